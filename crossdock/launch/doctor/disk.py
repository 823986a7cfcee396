"""The disk under a run directory: room, speed of a write that is on the disk for good, and whether a rename replaces a file."""

import os
import shutil
import tempfile
import time
from pathlib import Path

from crossdock.launch.doctor.report import Check

PROBE_BYTES = 32 * 2**20
SLOW_BYTES_PER_S = 50e6
_LITTLE_BYTES = 2**30
_VOLATILE = {"tmpfs", "ramfs"}


def disk(run_dir: Path) -> list[Check]:
    """Writes 32 MiB into the folder, or the nearest one above it that exists, and removes them again."""
    existing = next(parent for parent in (run_dir.absolute(), *run_dir.absolute().parents) if parent.is_dir())
    choose = "choose another place with run.dir=PATH"
    blocked = next((path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists() and not path.is_dir()), None)
    if blocked is not None:
        return [Check("disk", "bad", f"{blocked} is a file, and no run can write into it", choose)]
    try:
        free = shutil.disk_usage(existing).free
        if free < 4 * PROBE_BYTES:
            return [Check("disk", "bad", f"{free / 2**20:.0f} MiB free under {existing}", f"free space, or {choose}")]
        with tempfile.TemporaryDirectory(prefix=".crossdock-doctor-", dir=existing) as folder:
            speed = _write_bytes_per_s(Path(folder))
            problem = _rename_problem(Path(folder), existing)
    except OSError as failure:
        return [Check("disk", "bad", f"cannot write under {existing}: {failure.strerror}", choose)]
    kind = _file_system(existing)
    room = f"{free / 2**30:.1f} GiB free under {existing} ({kind})"
    if kind in _VOLATILE:
        checks = [Check("disk", "note", f"{room}: it lies in memory", f"checkpoints do not survive a restart of the machine; {choose}")]
    elif free < _LITTLE_BYTES:
        checks = [Check("disk", "note", room, f"checkpoints may not fit: free space, or {choose}")]
    else:
        checks = [Check("disk", "ok", room)]
    finding = f"{speed / 1e6:.0f} MB/s to write and fsync {PROBE_BYTES >> 20} MiB"
    if speed < SLOW_BYTES_PER_S:
        checks.append(Check("disk speed", "note", finding, "checkpoints hold up training: set checkpoint.asynchronous=true"))
    else:
        checks.append(Check("disk speed", "ok", finding))
    if problem:
        checks.append(Check("rename", "bad", problem, f"checkpoints rely on it: {choose}"))
    else:
        checks.append(Check("rename", "ok", "replaces files and folders in one step, on one file system"))
    return checks


def _write_bytes_per_s(folder: Path) -> float:
    data = os.urandom(2**20)
    begin_s = time.perf_counter()
    with (folder / "speed").open("wb") as file:
        for _ in range(PROBE_BYTES // len(data)):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return PROBE_BYTES / (time.perf_counter() - begin_s)


def _rename_problem(folder: Path, existing: Path) -> str:
    """What prevents a file that was written aside from taking another one's place; empty where nothing does."""
    if folder.stat().st_dev != existing.stat().st_dev:
        return f"new folders under {existing} are on another file system"
    (folder / "old").write_text("old")
    (folder / "new").write_text("new")
    (folder / "aside").mkdir()
    try:
        (folder / "new").replace(folder / "old")
        (folder / "aside").replace(folder / "folder")
    except OSError as failure:
        return f"a file cannot replace another under {existing}: {failure.strerror}"
    return "" if (folder / "old").read_text() == "new" else f"a rename under {existing} left the old file"


def _file_system(path: Path) -> str:
    """The kind of file system that holds `path`, as the system calls it."""
    import psutil

    mounts = [mount for mount in psutil.disk_partitions(all=True) if path.resolve().is_relative_to(mount.mountpoint)]
    return max(mounts, key=lambda mount: len(mount.mountpoint)).fstype if mounts else "unknown"
