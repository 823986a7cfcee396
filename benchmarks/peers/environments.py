"""The systems that are compared, and a virtual environment for each, filled from package registries by uv (or pip where there is no uv).

An environment is made once and kept; its marker file says what was asked for, so that a change of versions makes it anew. Torch is the
version that `constraints.txt` pins, the one that this process runs; uv links its files into every environment, so they cost no space.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.peers.crew import ROOT
from crossdock.atomic import write_json

DEFAULT_FOLDER = Path("~/.cache/crossdock/peers").expanduser()


@dataclass(frozen=True)
class System:
    """One system: its adapter, the environment it needs and what is installed there. No packages: it runs in this environment."""

    adapter: str
    environment: str = ""
    packages: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    versions: tuple[str, ...] = ()
    """Distributions whose versions are named in the results."""


_DEEPSPEED = ("deepspeed==0.19.8", "transformers==5.23.0", "ninja", "numpy", "setuptools")
_CPU = {"DS_ACCELERATOR": "cpu"}
SYSTEMS = {
    "crossdock": System("crossdock"),
    "naive": System("naive"),
    "deepspeed_autoep": System("deepspeed_autoep", "deepspeed", _DEEPSPEED, _CPU, ("deepspeed", "transformers")),
    "deepspeed_moe": System("deepspeed_moe", "deepspeed", _DEEPSPEED, _CPU, ("deepspeed",)),
    "megatron": System("megatron", "megatron", ("megatron-core==0.16.1", "numpy"), {}, ("megatron-core",)),
    "torchtitan": System("torchtitan", "torchtitan", ("torchtitan==0.3.0", "spmd-types", "numpy"), {}, ("torchtitan", "spmd-types")),
    "transformers": System("hugging_face", "transformers", ("transformers==5.23.0", "numpy"), {}, ("transformers",)),
}


class NotInstalled(Exception):
    """An environment could not be made; the message is the installer's last line."""


def torch_requirement() -> str:
    """The pinned torch, as a requirement."""
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith("torch=="):
            return line.strip()
    raise NotInstalled("constraints.txt pins no torch")


def python_of(system: System, folder: Path) -> str:
    """The interpreter that runs `system`, after `install`."""
    return str(folder / system.environment / "bin" / "python") if system.packages else sys.executable


def install(system: System, folder: Path) -> bool:
    """Make the system's environment unless it stands already; True where something was installed. Raises `NotInstalled`."""
    if not system.packages:
        return False
    place, wanted = folder / system.environment, [torch_requirement(), *system.packages]
    marker = place / "installed.json"
    if marker.exists() and json.loads(marker.read_text()) == wanted:
        return False
    if place.exists():
        shutil.rmtree(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", *(["--without-pip"] if _uv() else []), str(place)])
    constraints = place / "constraints.txt"
    constraints.write_text(torch_requirement() + "\n")
    python = str(place / "bin" / "python")
    installer = [uv, "pip", "install", "--quiet", "--python", python] if (uv := _uv()) else [python, "-m", "pip", "install", "--quiet"]
    _run([*installer, "--constraint", str(constraints), *wanted])
    write_json(marker, wanted)
    return True


def variables_of(system: System, folder: Path) -> dict[str, str]:
    """Environment variables of the system's ranks: its tools are found (ninja), what it compiles stays in its environment."""
    if not system.packages:
        return {}
    place = folder / system.environment
    path = os.pathsep.join([str(place / "bin"), os.environ.get("PATH", os.defpath)])
    return {**system.variables, "PATH": path, "TORCH_EXTENSIONS_DIR": str(place / "torch_extensions")}


def versions_of(system: System, folder: Path) -> str:
    """`name version, ...` of what is installed, for the results."""
    if not system.versions:
        return ""
    code = "import importlib.metadata as m, sys; print(', '.join(f'{n} {m.version(n)}' for n in sys.argv[1:]))"
    return _run([python_of(system, folder), "-c", code, *system.versions]).strip()


def _uv() -> str | None:
    beside = Path(sys.executable).parent / "uv"
    return str(beside) if beside.exists() else shutil.which("uv")


def _run(command: list[str]) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **_find_links()})
    if ended.returncode:
        lines = [line for line in (ended.stderr + ended.stdout).splitlines() if line.strip()]
        raise NotInstalled(lines[-1].strip() if lines else f"{command[0]} ended with code {ended.returncode}")
    return ended.stdout


def _find_links() -> dict[str, str]:
    """uv does not read pip's settings: it is told where else pip would look for wheels."""
    if "UV_FIND_LINKS" in os.environ:
        return {}
    found = os.environ.get("PIP_FIND_LINKS")
    if found is None:
        asked = subprocess.run([sys.executable, "-m", "pip", "config", "get", "global.find-links"], capture_output=True, text=True)
        found = " ".join(asked.stdout.split()) if asked.returncode == 0 else ""
    return {"UV_FIND_LINKS": found} if found else {}
