"""Ranks that start at once: a process that has imported everything waits, and every rank is a fork of it.

    python -m crossdock.launch.local.nursery

reads a JSON line a rank {arguments, environment}, answers {started: pid}, {ended: pid, code}

Importing torch takes a rank seconds, so that a restart would cost more than what it repeats; and a command that needs torch itself would
take them twice, one after the other, did this process not begin beside it (`ranks_ahead`). The waiting process has one thread, has computed
nothing and opened no device, so that its forks are as good as fresh processes. It dies with its parent, and its ranks with it.
"""

import contextlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

from crossdock.errors import Unavailable
from crossdock.launch.local.children import tie_to_parent
from crossdock.launch.ranks.worker_env import in_ray_job, worker_env

PRELOADED = "crossdock.launch.ranks.worker"
_POLL_S = 0.02
_READY_S = 120.0
_LOST = -int(signal.SIGKILL)


class Nursery:
    """The waiting process, seen from its parent; a context manager that ends it and its ranks."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""
        self._ended: dict[int, int] = {}
        self._running: set[int] = set()
        self._started: list[int] = []

    def __enter__(self) -> "Nursery":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._close(self._process)
            self._process = None

    def prepare(self) -> None:
        """Let the waiting process begin to import, before it is known which ranks there will be. Raises `Unavailable`."""
        self._living({"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **os.environ})

    def start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> "Forked":
        """A rank: `python ARGUMENTS...` (which begin with -m) in `environment`. Raises `Unavailable` where none can be started."""
        for _ in range(2):  # a second time where the waiting process was killed in the meantime, with all its ranks
            process = self._living(environment)
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps({"arguments": list(arguments), "environment": dict(environment)}).encode() + b"\n")
                process.stdin.flush()
            deadline_s = time.monotonic() + _READY_S
            while not self._started and self._is_there() and time.monotonic() < deadline_s:
                self._read(_POLL_S)
            if self._started:
                return Forked(self, self._started.pop())
        raise Unavailable("cannot start a rank: the process that ranks are forked from ends at once; free memory and processes")

    def code_of(self, pid: int) -> int | None:
        """The exit code of a rank (negative: the signal that killed it), None while it lives."""
        self._read(0.0)
        if pid not in self._ended and not self._is_there():
            return _LOST  # the ranks die with the process that they are forks of
        return self._ended.get(pid)

    def _living(self, environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
        """The waiting process, started in `environment` where there is none."""
        if self._process is None or self._process.poll() is not None:
            self._ended |= dict.fromkeys(self._running, _LOST)  # they were forks of the one that has gone
            self._running.clear()
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "crossdock.launch.local.nursery"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    # numpy's own threads would stand in the way of a fork, and ranks compute in torch
                    env={"OPENBLAS_NUM_THREADS": "1", **environment},
                    start_new_session=True,
                )
            except OSError as failure:
                raise Unavailable(f"cannot start a rank ({failure.strerror}); free memory and processes, or use fewer ranks") from failure
            self._unread = b""
        return self._process

    def _is_there(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _read(self, wait_s: float) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        while select.select([self._process.stdout], [], [], wait_s)[0]:
            data = os.read(self._process.stdout.fileno(), 1 << 16)
            if not data:
                if wait_s:
                    time.sleep(wait_s)
                return
            *lines, self._unread = (self._unread + data).split(b"\n")
            for line in lines:
                told = json.loads(line)
                if "started" in told:
                    self._started.append(told["started"])
                    self._running.add(told["started"])
                    self._ended.pop(told["started"], None)  # an earlier rank may have had the same number
                else:
                    self._running.discard(told["ended"])
                    self._ended[told["ended"]] = told["code"]
            wait_s = 0.0

    def _close(self, process: "subprocess.Popen[bytes]") -> None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


@contextlib.contextmanager
def ranks_ahead() -> Iterator[Nursery]:
    """A nursery that is already importing, where this command will start ranks itself: on Linux, under no launcher, in no Ray job."""
    with Nursery() as nursery:
        if sys.platform == "linux" and worker_env() is None and not in_ray_job():
            nursery.prepare()
        yield nursery


class Forked:
    """A rank that a nursery started; what `subprocess.Popen` offers of itself, as far as `launch.local` uses it."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self.nursery, self.pid = nursery, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, once there is one."""
        if self.returncode is None:
            self.returncode = self.nursery.code_of(self.pid)
        return self.returncode

    def wait(self) -> int:
        """The exit code, when the rank has ended."""
        while (code := self.poll()) is None:
            time.sleep(_POLL_S)
        return code

    def send_signal(self, number: int) -> None:
        """As `os.kill`, but to the living alone."""
        if self.poll() is None:
            os.kill(self.pid, number)


# ---- the waiting process -------------------------------------------------------------------------------------------


def _tell(output: int, **what: int) -> None:
    os.write(output, json.dumps(what).encode() + b"\n")  # one write, below the size that pipes keep whole


def _wait_for_orders() -> dict[str, Any]:
    """Serve the parent; returns, in every fork, what that rank shall do. The waiting process itself ends here."""
    orders, answers = os.dup(0), os.dup(1)
    os.dup2(2, 1)  # whatever prints must not reach the answers
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    previous = signal.signal(signal.SIGCHLD, _noted)
    unread = b""
    while True:
        ready, _, _ = select.select([orders, wake_read], [], [])
        if wake_read in ready:
            os.read(wake_read, 1 << 12)
            while (ended := _reaped()) is not None:
                _tell(answers, ended=ended[0], code=ended[1])
        if orders not in ready:
            continue
        data = os.read(orders, 1 << 20)
        if not data:
            sys.exit(0)
        *lines, unread = (unread + data).split(b"\n")
        for line in lines:
            if os.fork() == 0:
                os.setsid()
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, previous)
                _tell(answers, started=os.getpid())
                null = os.open(os.devnull, os.O_RDONLY)
                os.dup2(null, 0)
                for descriptor in (wake_read, wake_write, orders, answers, null):
                    os.close(descriptor)
                order: dict[str, Any] = json.loads(line)
                return order


def _noted(number: int, frame: FrameType | None) -> None:
    """The wakeup descriptor has it."""


def _reaped() -> tuple[int, int] | None:
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, os.waitstatus_to_exitcode(status)) if pid else None


def main() -> None:
    """Import what ranks need, then wait; in a rank, run what was ordered."""
    tie_to_parent()
    __import__(PRELOADED)
    order = _wait_for_orders()
    loaded_with = os.environ.get("OMP_NUM_THREADS")
    os.environ.clear()
    os.environ.update(order["environment"])
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads != loaded_with and threads.isdecimal():  # torch has read the variable when it was loaded
        import torch

        torch.set_num_threads(int(threads))
    option, module, *arguments = order["arguments"]
    assert option == "-m", order
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)  # it runs anew, under the name __main__
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
