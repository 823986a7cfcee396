"""What this machine offers a run: versions, cores, memory, devices, network interfaces and disk, and what is wrong with them."""

import os
import platform
import shutil
import socket
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from crossdock.launch.local import available_cores

PACKAGES = ("torch", "numpy", "scipy", "pyyaml", "pydantic", "typer", "rich", "jinja2", "safetensors", "psutil")
OPTIONAL_PACKAGES = ("ray", "mpi4py", "deepspeed", "transformers", "tokenizers", "datasets", "tensorboard", "matplotlib")
_SHARED_MEMORY = Path("/dev/shm")
_LITTLE_BYTES = 2**30


@dataclass(frozen=True)
class Check:
    """One line of the report; `level` is `ok`, `note` (works, with a remark) or `bad` (a run will fail), and `remedy` says what to do."""

    topic: str
    level: str
    finding: str
    remedy: str = ""


def examine(run_dir: Path = Path("runs")) -> tuple[Check, ...]:
    """Look at everything; never raises for what it finds."""
    return (*_versions(), _cores(), _memory(), _shared_memory(), _disk(run_dir), *_devices(), *_network())


def as_json(checks: tuple[Check, ...]) -> dict[str, Any]:
    """The object that `crossdock doctor --json` prints."""
    return {"ok": all(check.level != "bad" for check in checks), "checks": [asdict(check) for check in checks]}


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


def _disk(run_dir: Path) -> Check:
    existing = next(parent for parent in (run_dir.absolute(), *run_dir.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free
    finding = f"{_bytes(free)} free under {existing}"
    if not os.access(existing, os.W_OK):
        return Check("disk", "bad", f"{existing} is not writable", "choose another place with run.dir=PATH")
    if free < _LITTLE_BYTES:
        return Check("disk", "note", finding, "checkpoints may not fit: free space, or choose another place with run.dir=PATH")
    return Check("disk", "ok", finding)


def _devices() -> list[Check]:
    try:
        import torch
        import torch.distributed as dist
    except (ImportError, OSError) as failure:
        return [Check("devices", "bad", f"torch does not load: {failure}", "install torch anew: pip install --force-reinstall torch")]
    checks: list[Check] = []
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(number)
            finding = f"{properties.name}, {_bytes(properties.total_memory)}, compute capability {properties.major}.{properties.minor}"
            checks.append(Check(f"cuda:{number}", "ok", finding))
    else:
        built = (
            f"torch is built for CUDA {torch.version.cuda}, and no device is usable" if torch.version.cuda else "torch is built for the CPU"
        )
        checks.append(Check("devices", "ok", f"CPU alone ({built}); {torch.backends.cpu.get_cpu_capability()}"))
    available = [name for name, there in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available())) if there]
    level, remedy = ("ok", "") if "gloo" in available else ("bad", "install a torch that has gloo")
    checks.append(Check("process groups", level, ", ".join(available) or "none", remedy))
    return checks


def _network() -> list[Check]:
    import psutil

    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    addresses = {
        name: [entry.address for entry in entries if entry.family in (socket.AF_INET, socket.AF_INET6)]
        for name, entries in psutil.net_if_addrs().items()
        if name in up
    }
    finding = "; ".join(f"{name} {', '.join(found)}" for name, found in sorted(addresses.items()) if found)
    checks = [Check("interfaces", "ok", finding or "none that is up and has an address")]
    name = socket.gethostname()
    try:
        checks.append(Check("host name", "ok", f"{name} is {socket.gethostbyname(name)}"))
    except OSError:
        remedy = "runs on several hosts need it in DNS or /etc/hosts, or pass torchrun --local-addr"
        checks.append(Check("host name", "note", f"{name} does not resolve", remedy))
    if not any(address == "127.0.0.1" for found in addresses.values() for address in found):
        checks.append(Check("loopback", "bad", "127.0.0.1 is not up", "ip link set lo up"))
    return checks


def _bytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def show(checks: tuple[Check, ...]) -> None:
    """Print the checks as a table."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for check in checks:
        colour = {"ok": "green", "note": "yellow", "bad": "red"}[check.level]
        table.add_row(f"[{colour}]{check.level}[/]", check.topic, escape(check.finding + (f"\n-> {check.remedy}" if check.remedy else "")))
    Console(file=sys.stdout, soft_wrap=True).print(table)
