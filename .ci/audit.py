"""Audit of what Crossdock depends on: `make audit`. Against known vulnerabilities where their database can be reached; offline in any case.

Offline: every pin of constraints.txt is what is installed, no version is older than the one that mended a vulnerability which matters to
us, every installed file has the checksum that its package lists, and every licence is one that permits use and distribution beside ours.
Ends with 1 for a finding; that the database cannot be reached is told, and is no finding.
"""

import base64
import csv
import hashlib
import importlib.util
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 180
PERMISSIVE = (
    "apache",
    "bsd",
    "mit",
    "mit-0",
    "isc",
    "psf",
    "python",
    "mpl",
    "mozilla",
    "unlicense",
    "zlib",
    "0bsd",
    "cc0",
    "hpnd",
    "boost",
    "bsl",
)
COPYLEFT = re.compile(r"\b(A?GPL|LGPL|SSPL|BUSL|EUPL|CC-BY-NC)", re.IGNORECASE)
LINKED_BY_EXCEPTION = ("gcc-exception", "linking-exception")
"""GPL with one of these may be linked with anything: the Fortran run-time library that numpy and scipy bring."""

MENDED_IN = {
    "aiohttp": ("3.13.3", "CVE-2025-69223"),
    "deepspeed": ("0.15.1", "CVE-2024-43497"),
    "jinja2": ("3.1.6", "CVE-2025-27516"),
    "pyyaml": ("5.4", "CVE-2020-14343"),
    "ray": ("2.52.0", "CVE-2025-62593"),
    "requests": ("2.32.4", "CVE-2024-47081"),
    "torch": ("2.6.0", "CVE-2025-32434"),
    "urllib3": ("2.6.3", "CVE-2026-21441"),
}
"""The version that mended the newest of these known to us, for when nobody can be asked: a floor, and no substitute for pip-audit."""


def main() -> int:
    """Print the findings; the exit code says whether there are any."""
    names = reachable("crossdock")
    findings = [*pins(ROOT / "constraints.txt"), *known_bad(names), *licences(names), *checksums(names)]
    vulnerable, told = vulnerabilities(ROOT / "constraints.txt")
    findings += vulnerable
    for finding in findings:
        print(f"FOUND: {finding}")
    print(f"offline: pins, licences and checksums of {len(names)} distributions that Crossdock may import, {len(findings)} findings")
    print(f"known vulnerabilities: {told}")
    return 1 if findings else 0


def reachable(name: str) -> list[str]:
    """Installed distributions that `name` needs, itself left out: with its extras but `dev`, and with those that it asks others for."""
    extras = tuple(extra for extra in metadata.metadata(name).get_all("Provides-Extra") or () if extra != "dev")
    waiting, seen = [(name, "", *extras)], set()
    done: set[tuple[str, str]] = set()
    while waiting:
        this, *chosen = waiting.pop()
        for extra in [extra for extra in chosen if (this, extra) not in done]:
            done.add((this, extra))
            for requirement in map(Requirement, metadata.requires(this) or []):
                needed = canonical(requirement.name)
                if needed == name or (requirement.marker is not None and not requirement.marker.evaluate({"extra": extra})):
                    continue
                try:
                    metadata.distribution(needed)
                except metadata.PackageNotFoundError:  # an extra that is not installed
                    continue
                seen.add(needed)
                waiting.append((needed, "", *requirement.extras))
    return sorted(seen)


def canonical(name: str) -> str:
    """A distribution's name as the indexes spell it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(constraints: Path) -> list[str]:
    """Pins that something else is installed for."""
    findings = []
    for line in constraints.read_text().split():
        name, _, version = line.partition("==")
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if installed.partition("+")[0] != version:
            findings.append(f"{name} {installed} is installed, and {constraints.name} pins {version}")
    return findings


def known_bad(names: list[str]) -> list[str]:
    """Distributions older than the version that mended a vulnerability."""
    old = {name: metadata.version(name) for name in names if name in MENDED_IN}
    old = {name: version for name, version in old.items() if Version(version) < Version(MENDED_IN[name][0])}
    return [f"{name} {version} has {MENDED_IN[name][1]}, mended in {MENDED_IN[name][0]}" for name, version in old.items()]


def licences(names: list[str]) -> list[str]:
    """Distributions whose stated licence is none of the permissive ones; one that states several may be had under any of them."""
    findings = []
    for name in names:
        fields = metadata.metadata(name)
        classifiers = [text.rpartition("::")[2].strip() for text in fields.get_all("Classifier") or [] if text.startswith("License ::")]
        stated = fields.get("License-Expression") or "; ".join(classifiers) or (fields.get("License") or "").split("\n")[0]
        words = {word.lower() for word in re.findall(r"[A-Za-z0-9-]+", stated)}
        is_permissive = any(word.startswith(PERMISSIVE) for word in words) or any(part in stated.lower() for part in LINKED_BY_EXCEPTION)
        if COPYLEFT.search(stated) and not is_permissive:
            findings.append(f"{name} is under {stated}, which asks for more than notice")
        elif not is_permissive and not _has_permissive_text(name):
            findings.append(f"{name} states the licence {stated[:60]!r}, which is not known to be permissive")
    return findings


def _has_permissive_text(name: str) -> bool:
    """Whether a licence file of the distribution begins like a permissive one."""
    for file in metadata.files(name) or []:
        if re.search(r"licen[cs]e|copying", file.name, re.IGNORECASE):
            head = Path(str(file.locate())).read_text(errors="replace")[:1500].lower()
            if any(sign in head for sign in ("permission is hereby granted", "redistribution and use", "apache license", "permissive")):
                return True
    return False


def checksums(names: list[str]) -> list[str]:
    """Installed files that are not what their package's RECORD says."""
    findings = []
    for name in names:
        record = metadata.distribution(name).read_text("RECORD")
        for path, digest, _ in csv.reader((record or "").splitlines()):
            kind, _, expected = digest.partition("=")
            file = Path(str(metadata.distribution(name).locate_file(path)))
            if kind != "sha256" or not file.is_file():
                continue
            with file.open("rb") as opened:
                found = base64.urlsafe_b64encode(hashlib.file_digest(opened, "sha256").digest()).rstrip(b"=").decode()
            if found != expected:
                findings.append(f"{path} of {name} was changed after it was installed")
    return findings


def vulnerabilities(constraints: Path) -> tuple[list[str], str]:
    """(findings of pip-audit, one line on how that went)."""
    if importlib.util.find_spec("pip_audit") is None:
        return [], "NOT CHECKED, because pip-audit is not installed here; run: pip install pip-audit"
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(constraints), "--no-deps", "--disable-pip", "--progress-spinner=off"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return [], f"NOT CHECKED, because their database did not answer within {TIMEOUT_S} s"
    rows = [line for line in ended.stdout.splitlines() if re.match(r"\S+\s+\d\S*\s+(PYSEC|GHSA|CVE|OSV)-", line)]
    if rows:
        return rows, f"{len(rows)} found by pip-audit"
    if ended.returncode == 0:
        return [], "none, says pip-audit"
    reason = (ended.stderr.strip().splitlines() or ["no reason given"])[-1]
    return [], f"NOT CHECKED, because their database could not be reached ({reason})"


if __name__ == "__main__":
    sys.exit(main())
