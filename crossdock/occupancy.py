"""One run at a time in a run directory: a lock that the system takes back however its holder ends."""

import contextlib
import errno
import fcntl
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from crossdock.errors import IoFailure, Occupied

LOCK = ".lock"
PATIENCE_S = 20.0
"""How long a start waits for the end of the one before: the memory of a killed rank 0 may take so long to go, then goes its lock."""
ELSEWHERE_S = 5.0
"""The same for a holder on another host."""
_TELL_S = 1.0
_POLL_S = 0.05
_NO_LOCKS = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)


@contextlib.contextmanager
def occupied(directory: Path) -> Iterator[None]:
    """Within the block no other process of this host can occupy `directory`. On a file system without locks it is not held.

    The lock of another host does not hold for long: that host may have died, and a network's file system gives its locks back much later
    than the run goes on elsewhere. Raises `Occupied` where another one works there, and `IoFailure` where the folder cannot be written.
    """
    path, begin_s, is_told = directory / LOCK, time.monotonic(), False
    descriptor = _opened(path)
    try:
        while not (_is_taken(descriptor) and _is_at(path, descriptor)):
            waited_s, holder = time.monotonic() - begin_s, os.pread(descriptor, 200, 0).decode(errors="replace")
            is_here = holder.endswith(f" on {platform.node()}")
            if waited_s > (PATIENCE_S if is_here else ELSEWHERE_S):
                if is_here:
                    raise Occupied(f"{directory} is in use by {holder}; wait for its end, or choose another run.dir")
                print(f"crossdock: warning: {directory} is locked by {holder or 'another run'}, which is taken for lost", file=sys.stderr)
                break
            if is_here and waited_s > _TELL_S and not is_told:
                is_told = True
                print(
                    f"crossdock: {directory} is in use by {holder}; waiting for its end for {PATIENCE_S:g} s", file=sys.stderr, flush=True
                )
            time.sleep(_POLL_S)
            earlier, descriptor = descriptor, _opened(path)
            os.close(earlier)
        with contextlib.suppress(OSError):  # the disk is full: then the holder has no name
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _opened(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as failure:
        raise IoFailure(f"cannot write {path}: {failure.strerror}; set run.dir to a place that is writable") from failure


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the file is there still: who held the lock before may have moved an earlier run aside, and the lock in it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _is_taken(descriptor: int) -> bool:
    """Whether the lock is ours now, or cannot be had on this file system at all."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as failure:
        if failure.errno not in _NO_LOCKS:
            raise IoFailure(f"cannot lock the run directory: {failure.strerror}; choose another run.dir") from failure
    return True
