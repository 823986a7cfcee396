"""The examination of one host: versions, cores and memory here, the rest in the modules beside."""

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path

from crossdock.cores import available_cores
from crossdock.launch.doctor.access import access
from crossdock.launch.doctor.clock import clock
from crossdock.launch.doctor.devices import devices
from crossdock.launch.doctor.disk import disk
from crossdock.launch.doctor.network import network
from crossdock.launch.doctor.report import Check

PACKAGES = ("torch", "numpy", "scipy", "pyyaml", "pydantic", "typer", "rich", "jinja2", "safetensors", "psutil")
OPTIONAL_PACKAGES = ("ray", "mpi4py", "deepspeed", "transformers", "tokenizers", "datasets", "tensorboard", "matplotlib")
_SHARED_MEMORY = Path("/dev/shm")
_LITTLE_BYTES = 2**30


def examine(run_dir: Path = Path("runs")) -> tuple[Check, ...]:
    """Look at everything; never raises for what it finds."""
    return (*_versions(), _cores(), _memory(), _shared_memory(), *disk(run_dir), *devices(), *network(), *access(), *clock())


def installed() -> dict[str, str]:
    """Versions of ours and of all packages that we may use and are there."""
    from crossdock import __version__

    versions = {name: version for name in (*PACKAGES, *OPTIONAL_PACKAGES) if (version := _version(name))}
    return {"crossdock": __version__, **versions}


def _versions() -> list[Check]:
    from crossdock import __version__

    checks = [Check("crossdock", "ok", f"{__version__}, Python {platform.python_version()} on {platform.platform()}")]
    for name in PACKAGES:
        version = _version(name)
        checks.append(Check(name, "ok", version) if version else Check(name, "bad", "not installed", f"pip install {name}"))
    present = [f"{name} {version}" for name in OPTIONAL_PACKAGES if (version := _version(name))]
    checks.append(Check("optional packages", "ok", ", ".join(present) or "none; pip install 'crossdock[all]' adds them"))
    return checks


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cores() -> Check:
    available, total = available_cores(), os.cpu_count() or 1
    load = os.getloadavg()[0]
    finding = f"{available} of {total} usable, load {load:.1f}"
    if load > available:
        return Check("cores", "note", finding, "the machine is busy: measured times will be longer than those of a quiet one")
    return Check("cores", "ok", finding)


def _memory() -> Check:
    import psutil

    memory = psutil.virtual_memory()
    finding = f"{_bytes(memory.available)} free of {_bytes(memory.total)}"
    if memory.available < _LITTLE_BYTES:
        return Check("memory", "bad", finding, "a rank needs about 1 GiB: end other programs, or use a larger machine")
    return Check("memory", "ok", finding)


def _shared_memory() -> Check:
    if not _SHARED_MEMORY.is_dir():
        return Check("shared memory", "note", f"no {_SHARED_MEMORY}", "ranks of one host then talk over loopback alone")
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if free < _LITTLE_BYTES // 4:
        remedy = "NCCL needs more for ranks of one host: start the container with a larger --shm-size"
        return Check("shared memory", "note", f"{_bytes(free)} free", remedy)
    return Check("shared memory", "ok", f"{_bytes(free)} free")


def _bytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
