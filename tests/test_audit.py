"""The audit of dependencies finds what it looks for, and says what it could not look at."""

import importlib.util
import subprocess
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

PATH = Path(__file__).resolve().parents[1] / ".ci" / "audit.py"


@pytest.fixture
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pins(audit: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "constraints.txt"
    path.write_text(f"numpy==0.0.1\nabsent-package==1\npyyaml=={metadata.version('pyyaml')}\n")
    assert audit.pins(path) == [f"numpy {metadata.version('numpy')} is installed, and constraints.txt pins 0.0.1"]


def test_a_version_that_is_known_to_be_bad_fails_the_audit(
    audit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed = metadata.version
    monkeypatch.setattr(audit, "vulnerabilities", lambda constraints: ([], "NOT CHECKED"))
    monkeypatch.setattr(audit, "checksums", lambda names: [])
    assert audit.main() == 0
    monkeypatch.setattr(metadata, "version", lambda name: "3.1.5" if name == "jinja2" else installed(name))
    assert audit.known_bad(["jinja2", "numpy"]) == ["jinja2 3.1.5 has CVE-2025-27516, mended in 3.1.6"]
    assert audit.main() == 1
    assert "FOUND: jinja2 3.1.5 has CVE-2025-27516" in capsys.readouterr().out
    monkeypatch.setattr(metadata, "version", lambda name: "3.1.10" if name == "jinja2" else installed(name))
    assert audit.known_bad(["jinja2"]) == []


def test_what_is_reachable(audit: ModuleType) -> None:
    names = audit.reachable("crossdock")
    assert {"torch", "numpy", "pydantic", "pydantic-core"} <= set(names)
    assert "ruff" not in names  # of the extra `dev`
    assert {"aiohttp", "grpcio"} <= set(names)  # of ray[default], which the extra `ray` asks for
    assert "crossdock" not in names


@pytest.mark.parametrize(
    ("stated", "is_found"),
    [
        ("MIT", False),
        ("Apache-2.0 OR GPL-2.0", False),
        ("GPL-3.0-with-GCC-exception", False),
        ("GPL-3.0-only", True),
        ("Proprietary", True),
        ("BSD-3-Clause AND GPL-3.0-with-GCC-exception", False),
    ],
)
def test_licences(audit: ModuleType, stated: str, is_found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fields(dict[str, str]):
        def get_all(self, name: str) -> None:
            return None

    monkeypatch.setattr(metadata, "metadata", lambda name: Fields({"License-Expression": stated}))
    monkeypatch.setattr(metadata, "files", lambda name: [])
    assert bool(audit.licences(["package"])) == is_found


def test_a_changed_file_is_found(audit: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert audit.checksums(["pyyaml"]) == []
    (tmp_path / "module.py").write_text("changed")

    class Distribution:
        def read_text(self, name: str) -> str:
            return "module.py,sha256=AAAA,7\nRECORD,,\n"

        def locate_file(self, path: str) -> Path:
            return tmp_path / path

    monkeypatch.setattr(metadata, "distribution", lambda name: Distribution())
    assert audit.checksums(["package"]) == ["module.py of package was changed after it was installed"]


@pytest.mark.parametrize(
    ("code", "out", "err", "findings", "told"),
    [
        (0, "", "No known vulnerabilities found", 0, "none"),
        (1, "Name Version ID Fix\njinja2 3.1.0 GHSA-h5c8-rqwp-cp95 3.1.3\n", "Found 1", 1, "1 found"),
        (1, "", "requests.exceptions.ConnectionError: no route", 0, "NOT CHECKED, because their database could not be reached"),
    ],
)
def test_the_database(audit: ModuleType, monkeypatch: pytest.MonkeyPatch, code: int, out: str, err: str, findings: int, told: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: subprocess.CompletedProcess(args, code, out, err))
    found, line = audit.vulnerabilities(Path("constraints.txt"))
    assert len(found) == findings
    assert line.startswith(told)
