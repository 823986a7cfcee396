"""Starts the ranks of one host as child processes, watches over them, and leaves nothing behind.

The children meet through a file in a private directory, so no port is chosen and none can collide. Each is in a session of its own: a
Ctrl-C reaches this process alone, which then ends them in order. A child dies with its parent (`tie_to_parent`).
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from crossdock import atomic
from crossdock.authentication import Secret
from crossdock.cores import available_cores
from crossdock.errors import PeerLost, Preempted, Unavailable
from crossdock.launch.ranks.worker_env import local_environment

INTERRUPTED = 130
_POLL_S = 0.05
_PEERS_S = 5.0  # what the other ranks get to notice that one has gone, and to report it
_LEAVE_S = 5.0  # for the end of a process that has reported
_KILLED_S = 1.0  # the same where it was killed: their reports would say no more than its exit code
_INTERRUPT_S = 3.0
_TERMINATE_S = 120.0  # to write a checkpoint after SIGTERM
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Outcome:
    """How a rank ended: its exit code (as `crossdock/errors.py` defines them), and what it had to say where that is not 0."""

    rank: int
    exit_code: int
    message: str = ""
    traceback: str = ""
    signalled: bool = False  # it was killed, by others than us


class Child(Protocol):
    """A rank's process, its return code that of `subprocess.Popen`."""

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | None: ...
    def poll(self) -> int | None: ...
    def wait(self) -> int: ...
    def send_signal(self, number: int, /) -> None: ...


Starter = Callable[[Sequence[str], Mapping[str, str]], Child]
"""Starts `python ARGUMENTS...` in an environment, as the leader of a session of its own; raises `Unavailable`."""


def run_ranks(arguments: Sequence[str], num_ranks: int, starter: Starter | None = None) -> Outcome:
    """Run `python ARGUMENTS... OUTCOME_FILE` once for every rank until all have ended; the outcome of the whole is its root cause.

    SIGINT ends the ranks and gives exit code 130; SIGTERM is passed on, so that they can save their state. When one rank dies the others
    are given a few seconds to report and are then ended.
    """
    threads_per_rank = max(1, available_cores() // num_ranks)
    with tempfile.TemporaryDirectory(prefix="crossdock-") as scratch:
        secret_path = Path(scratch) / "secret"
        Secret.fresh().write(secret_path)
        outcome_paths = [Path(scratch) / f"rank-{rank}.json" for rank in range(num_ranks)]
        children: list[Child] = []
        with _signals_caught() as caught:
            try:
                for rank, outcome_path in enumerate(outcome_paths):
                    environment = local_environment(rank, num_ranks, f"{scratch}/store", threads_per_rank, str(secret_path))
                    children.append((starter or _start)([*arguments, str(outcome_path)], environment))
                stopped_by, first_dead = _watch(children, caught, outcome_paths)
            finally:
                ended_by_us = _kill(children)
        ended_by_us -= _reported(outcome_paths)
        outcomes = [_read_outcome(rank, child, outcome_paths[rank]) for rank, child in enumerate(children)]
    if stopped_by == signal.SIGINT:
        return Outcome(rank=0, exit_code=INTERRUPTED, message="interrupted by Ctrl-C; the ranks have been ended")
    if stopped_by == signal.SIGTERM and all(outcome.signalled or outcome.exit_code == Preempted.exit_code for outcome in outcomes):
        in_order = [outcome for outcome in outcomes if not outcome.signalled]  # the others had not come so far
        if in_order:
            return in_order[0]
        return Outcome(rank=0, exit_code=Preempted.exit_code, message="asked to stop before there was anything to save; start it again")
    told = [outcome for rank, outcome in enumerate(outcomes) if rank not in ended_by_us]
    return root_cause(told or outcomes, first_dead)


def tie_to_parent() -> None:
    """Called by a child at once: it ends when its parent does, however that ends."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before the request
            os._exit(PeerLost.exit_code)
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(PeerLost.exit_code)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


def _start(arguments: Sequence[str], environment: Mapping[str, str]) -> Child:
    try:
        return subprocess.Popen([sys.executable, *arguments], env=dict(environment), stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as failure:
        raise Unavailable(f"cannot start a rank ({failure.strerror}); free memory and processes, or use fewer ranks") from failure


@contextlib.contextmanager
def _signals_caught() -> Iterator[list[int]]:
    """Within the block, SIGINT, SIGTERM and SIGHUP are appended to the list instead of ending this process."""
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(children: Sequence[Child], caught: list[int], outcome_paths: Sequence[Path]) -> tuple[int | None, int | None]:
    """Wait for the end of all children; returns the signal that stopped them, if one did, and the first rank that ended badly.

    Ranks that others have named as hung are not waited for, and those that have reported not for long: torch's file store reads for ever
    at the end of a process where another rank's disk was full.
    """
    deadline_s: float | None = None
    stopped_by: int | None = None
    first_dead: int | None = None
    leave_s = time.monotonic() + _LEAVE_S
    while any(child.poll() is None for child in children):
        if caught and stopped_by != signal.SIGINT:
            stopped_by = caught.pop()
            _signal(children, stopped_by)
            deadline_s = time.monotonic() + (_INTERRUPT_S if stopped_by == signal.SIGINT else _TERMINATE_S)
        elif caught:  # a second Ctrl-C: no more patience
            break
        if first_dead is None:
            first_dead = next((rank for rank, child in enumerate(children) if child.poll() not in (None, 0)), None)
            if first_dead is not None and stopped_by is None:
                was_killed = (children[first_dead].returncode or 0) < 0
                deadline_s = time.monotonic() + (_KILLED_S if was_killed else _PEERS_S)
        if deadline_s is not None and time.monotonic() > deadline_s:
            break
        if first_dead is not None and _living(children) <= _named(outcome_paths):
            break
        if not _living(children) <= _reported(outcome_paths):
            leave_s = time.monotonic() + _LEAVE_S
        elif time.monotonic() > leave_s:
            break
        time.sleep(_POLL_S)
    return stopped_by, first_dead


def _living(children: Sequence[Child]) -> set[int]:
    return {rank for rank, child in enumerate(children) if child.poll() is None}


def _reported(outcome_paths: Sequence[Path]) -> set[int]:
    """The ranks that have done their last act."""
    return {rank for rank, path in enumerate(outcome_paths) if path.exists()}


def _named(outcome_paths: Sequence[Path]) -> set[int]:
    """The ranks that other ranks have named as the cause of their end."""
    reports = [_report(path) for path in outcome_paths]
    return {report["rank"] for report in reports if report and report["exit_code"] == PeerLost.exit_code}


def _signal(children: Sequence[Child], number: int) -> None:
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(number)


def _kill(children: Sequence[Child]) -> frozenset[int]:
    """End whatever is left of the children and of what they started, and reap them; returns the ranks that were still alive."""
    alive = frozenset(rank for rank, child in enumerate(children) if child.poll() is None)
    for rank, child in enumerate(children):
        if rank in alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)  # start_new_session: the group is the child's own
        child.wait()
    return alive


def write_outcome(path: Path, rank: int, exit_code: int, message: str = "", traceback: str = "") -> None:
    """Called by a rank as its last act, for `run_ranks` to read; `rank` is the one to blame, as far as it knows."""
    atomic.write_json(path, {"rank": rank, "exit_code": exit_code, "message": message, "traceback": traceback})


def _report(path: Path) -> dict[str, Any] | None:
    """What a rank wrote as its last act; None where it could not: killed, or crashed in native code."""
    return json.loads(path.read_text()) if path.exists() else None


def _read_outcome(rank: int, child: Child, path: Path) -> Outcome:
    if (report := _report(path)) is not None:
        return Outcome(**report)
    assert child.returncode is not None
    if child.returncode == 0:
        return Outcome(rank, 0)
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        hint = "; the kernel kills so when memory runs out: see its log" if name == "SIGKILL" else ""
        return Outcome(rank, PeerLost.exit_code, f"rank {rank} was killed by {name}{hint}", signalled=True)
    return Outcome(rank, child.returncode, f"rank {rank} ended with exit code {child.returncode} before it could report; see above")


def root_cause(outcomes: Sequence[Outcome], first_dead: int | None) -> Outcome:
    """The outcome that explains the others: a killed rank, else one that did not merely lose its peer, else the first to end."""
    bad = [outcome for outcome in outcomes if outcome.exit_code != 0]
    if not bad:
        return outcomes[0]
    return min(
        bad, key=lambda outcome: (not outcome.signalled, outcome.exit_code == PeerLost.exit_code, outcome.rank != first_dead, outcome.rank)
    )
