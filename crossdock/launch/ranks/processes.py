"""Processes of this host, as the system sees them: who they are, whether they live, where they stand."""

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from crossdock.errors import IoFailure

State = Literal["gone", "stopped", "alive"]
DUMP_S = 0.5
"""How long a process may take to write down its stacks."""
_POLL_S = 0.02
_FACTS = ("Name", "State", "Threads", "VmRSS", "SigPnd", "ShdPnd", "voluntary_ctxt_switches", "nonvoluntary_ctxt_switches")


@dataclass(frozen=True)
class Address:
    """A process and the host on which its number means something; `born` tells it from a later process of the same number."""

    host: str
    pid: int
    born: str

    @classmethod
    def here(cls) -> "Address":
        """This process."""
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int) -> "Address":
        """A process of this host."""
        return cls(_host(), pid, _born(pid))

    @classmethod
    def parse(cls, text: str) -> "Address":
        """What `str` wrote."""
        host, pid, born = text.rsplit(" ", 2)
        return cls(host, int(pid), born)

    def __str__(self) -> str:
        return f"{self.host} {self.pid} {self.born}"

    @property
    def name(self) -> str:
        """Of the host, for people."""
        return self.host.split(" ", 1)[0]

    @property
    def is_here(self) -> bool:
        """Whether this host and process can look at it."""
        return self.host == _host()

    def state(self) -> State:
        """Of a process on this host."""
        try:
            status = psutil.Process(self.pid).status()
            if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) or _born(self.pid) != self.born:
                return "gone"
        except psutil.NoSuchProcess:
            return "gone"
        return "stopped" if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP) else "alive"

    def signal(self, number: int) -> None:
        """Send it a signal, if it still is the same process."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.state() != "gone":
                os.kill(self.pid, number)

    def facts(self) -> str:
        """What the system says of it and of its threads, in lines: for processes that cannot speak for themselves."""
        root = Path("/proc") / str(self.pid)
        status = [line for line in _text(root / "status").splitlines() if line.split(":")[0] in _FACTS]
        threads = []
        for thread in sorted(root.glob("task/*")):
            state = _text(thread / "stat").rpartition(")")[2].split()[:1]
            waits = _text(thread / "wchan") or "?"
            threads.append(f"thread {thread.name} {_text(thread / 'comm').strip()}: {''.join(state)}, kernel at {waits}")
            threads += [f"    {line}" for line in _text(thread / "stack").splitlines()]
        return "\n".join([f"process {self.pid} on {self.name}", *status, *threads]) + "\n"


@contextlib.contextmanager
def stacks_kept(path: Path) -> Iterator[None]:
    """Within the block, SIGUSR1 makes this process append the stacks of all its threads to `path`, whatever it is doing.

    The file is made at once, since a signal cannot make it, and taken away again where nothing was written. Raises `IoFailure`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as failure:
        raise IoFailure(f"cannot write {path}: {failure.strerror}; free space or choose another run.dir") from failure
    with file:
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL:
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a question that comes after the block must not end the process
        faulthandler.register(signal.SIGUSR1, file, all_threads=True)
        try:
            yield
        finally:
            faulthandler.unregister(signal.SIGUSR1)
    if path.stat().st_size == 0:
        path.unlink()
        with contextlib.suppress(OSError):  # other ranks have something to say
            path.parent.rmdir()


def dumped(kept: Sequence[tuple[Address, Path]]) -> list[str]:
    """The stacks of other processes of this host, which each keeps at its path; empty for one that cannot write them.

    All are asked at once: together they take no longer than one.
    """
    before = [_size(path) for _, path in kept]
    for address, _ in kept:
        address.signal(signal.SIGUSR1)
    deadline_s, sizes = time.monotonic() + DUMP_S, before
    while time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
        now = [_size(path) for _, path in kept]
        if all(new > old and new == last for old, last, new in zip(before, sizes, now, strict=True)):  # begun, and no longer growing
            break
        sizes = now
    return [path.read_text(errors="replace")[old:] if new > old else "" for (_, path), old, new in zip(kept, before, sizes, strict=True)]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _host() -> str:
    """This host and, where numbers of processes have their own space, that space."""
    space = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {space.readlink()}" if space.exists() else socket.gethostname()


def _born(pid: int) -> str:
    if sys.platform == "linux":  # in ticks since the machine started, which no change of the clock moves
        fields = _text(Path("/proc") / str(pid) / "stat").rpartition(")")[2].split()
        return fields[19] if fields else ""
    return str(psutil.Process(pid).create_time())


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # the process has gone, or only root may look
        return ""
