"""Files and folders that are either whole or absent: written aside, fsynced, then renamed to where they belong."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crossdock.errors import IoFailure, UsageError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, fsync it and rename it over `path`.

    If the block raises, the temporary file is removed and whatever stood at `path` is untouched.
    Raises `IoFailure` where the operating system refuses (disk full, no permission).
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise IoFailure(f"cannot write {path}: {error.strerror}; choose a directory that exists and is writable") from error
    os.close(descriptor)
    aside = Path(name)
    try:
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.chmod(0o666 & ~_umask())
        aside.replace(path)
        _fsync_directory(path.parent)
    except OSError as error:
        raise IoFailure(f"cannot write {path}: {error.strerror or error}; free space or choose another directory") from error
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; when the block ends well, fsync its files and rename it to `path`, else remove it.

    Raises `UsageError` where something stands at `path`, but for an empty folder, and `IoFailure` where the operating system refuses.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UsageError(f"{path} exists already; name a folder that does not")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise IoFailure(f"cannot write {path}: {error.strerror}; choose a place that exists and is writable") from error
    try:
        yield aside
        for folder, _, files in os.walk(aside, topdown=False):
            for name in files:
                with (Path(folder) / name).open("rb") as file:
                    os.fsync(file.fileno())
            _fsync_directory(Path(folder))
        aside.chmod(0o777 & ~_umask())
        aside.replace(path)
        _fsync_directory(path.parent)
    except OSError as error:
        raise IoFailure(f"cannot write {path}: {error.strerror or error}; free space or choose another directory") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with replacing(path) as aside:
        aside.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` atomically as indented JSON; NaN and infinities are refused (`ValueError`)."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
