"""Who was lost: when a collective fails, the ranks that are left call one another through the store, and look at those that stay silent.

A failed collective names no culprit: a rank that dies breaks the connections of all, one that stops lets all others wait, and the first to
give up is rarely the one to blame. So every rank whose collective failed says so in the store, every other error leaves its reason there,
and whoever has done neither is looked at: gone, stopped, hung, or out of reach. All launchers share this; none of them knows as much.
"""

import contextlib
import json
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from crossdock import atomic
from crossdock.errors import CrossdockError, IoFailure, PeerLost
from crossdock.launch.ranks.processes import DUMP_S, Address, dumped, stacks_kept
from crossdock.launch.ranks.rendezvous import exchange
from crossdock.launch.ranks.worker_env import WorkerEnv

if TYPE_CHECKING:
    from torch.distributed import Store

Result = TypeVar("Result")
PATIENCE_S = 2.0
"""How long a silent rank of which nothing is known may take to answer."""
_STORE_S = 0.5
_QUESTIONS = 4  # silent ranks whose stacks are waited for before the store counts as gone
_POLL_S = 0.05
_WAITING = ("transport/exchange.py", "transport/mpi_exchange.py", "transport/collectives.py", "transport/all_to_all.py")
_WAITS = "waits for others"
_ENDED_BY_OTHERS = ("local", "ray")
"""Launchers that end what is left of a start themselves, and at once; others would wait for a rank that is stopped."""


@dataclass(frozen=True)
class Cause:
    """Why a start is over: the rank to blame, the exit code and the message of the run."""

    rank: int
    exit_code: int
    message: str
    is_mine_to_tell: bool
    """Whether this rank is the one to write down the result: rank 0, or the lowest that is left."""


class Lost(CrossdockError):
    """A lost peer, with the cause as the ranks that are left have found it; never seen by users."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(cause.message)
        self.cause = cause


@dataclass(frozen=True)
class Crew:
    """The ranks of one start, and where they leave their stacks (None: nowhere)."""

    store: "Store"
    env: WorkerEnv
    address_R: tuple[Address, ...]
    folder: Path | None

    @classmethod
    def gather(cls, store: "Store", env: WorkerEnv, folder: Path | None) -> "Crew":
        """Every rank calls this."""
        return cls(store, env, tuple(map(Address.parse, exchange(store, env, "process", str(Address.here())))), folder)

    @contextlib.contextmanager
    def watching(self, explain: Callable[[BaseException], tuple[int, str]]) -> Iterator[None]:
        """Within the block a lost peer becomes `Lost`, and any other error (as `explain` puts it) is left as word for the others."""
        with contextlib.nullcontext() if self.folder is None else stacks_kept(self._stacks(self.env.rank)):
            try:
                yield
            except PeerLost as failure:
                self._keep_own_stacks(failure)
                questions_s = DUMP_S * min(self.env.world_size - 1, _QUESTIONS)
                cause = _bounded(partial(self.cause_of, failure), PATIENCE_S + questions_s)
                raise Lost(cause or self._without_store(failure)) from failure
            except BaseException as failure:
                code, message = explain(failure)
                _bounded(partial(self.store.set, self._key(self.env.rank), json.dumps({"exit_code": code, "message": message})))
                raise

    def cause_of(self, failure: PeerLost) -> Cause:
        """Call the roll and look at who stays silent. Raises `RuntimeError` where the store has gone."""
        self.store.set(self._key(self.env.rank), json.dumps({"exit_code": failure.exit_code}))
        others = [rank for rank in range(self.env.world_size) if rank != self.env.rank]
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            silent = [rank for rank in others if not self.store.check([self._key(rank)])]
            for rank in others:
                if rank not in silent and (word := json.loads(self.store.get(self._key(rank))))["exit_code"] != failure.exit_code:
                    return self._cause([rank], f"rank {rank}: {word['message']}", silent, word["exit_code"])
            fates = {rank: self._told_fate(rank) or self._certain_fate(rank) for rank in silent}
            if any(fates.values()) or not silent or time.monotonic() > deadline_s:
                break
            time.sleep(_POLL_S)
        known = {rank: fate for rank, fate in fates.items() if fate} or {rank: self._examined(rank) for rank in silent}
        blamed = {rank: fate for rank, fate in known.items() if fate != _WAITS} or known
        if not blamed:
            return self._cause([self.env.rank], f"all ranks answer, and a collective failed: {failure}", silent)
        for rank, fate in blamed.items():
            self._end(rank, fate)
        by_fate = {fate: [rank for rank in blamed if blamed[rank] == fate] for fate in dict.fromkeys(blamed.values())}
        named = "; ".join(f"{self._named(ranks)} {fate}" for fate, ranks in by_fate.items())
        return self._cause(sorted(blamed), f"{named} (seen in: {failure})", silent)

    def _cause(self, blamed: list[int], message: str, silent: list[int], exit_code: int = PeerLost.exit_code) -> Cause:
        left = [rank for rank in range(self.env.world_size) if rank == self.env.rank or rank not in (*silent, *blamed)]
        return Cause(blamed[0], exit_code, message, left[0] == self.env.rank)

    def _told_fate(self, rank: int) -> str:
        """What a rank wrote of another before it ended that one."""
        return self.store.get(self._fate_key(rank)).decode() if self.store.check([self._fate_key(rank)]) else ""

    def _certain_fate(self, rank: int) -> str:
        """What is certain of a silent rank; empty where nothing is."""
        address = self.address_R[rank]
        if not address.is_here or (state := address.state()) == "alive":
            return ""
        return "is stopped, by SIGSTOP or a debugger" if state == "stopped" else "was killed, or crashed"

    def _examined(self, rank: int) -> str:
        """What can be found out of a silent rank that may be alive."""
        address = self.address_R[rank]
        if not address.is_here:
            return "did not answer: the host is lost or cut off"
        stacks = "" if self.folder is None else dumped(address, self._stacks(rank))
        if any(file in stacks for file in _WAITING):
            return _WAITS
        return "is alive and hangs"

    def _end(self, rank: int, fate: str) -> None:
        """Write down what the system says of a rank on this host that cannot go on, and end it where the launcher would wait for it."""
        address = self.address_R[rank]
        if not address.is_here or address.state() == "gone":
            return
        if self.folder is not None:
            self._write(self._stacks(rank).with_suffix(".system.txt"), address.facts())
        if self.env.launcher not in _ENDED_BY_OTHERS:
            _bounded(partial(self.store.set, self._fate_key(rank), fate))
            address.signal(signal.SIGKILL)

    def _without_store(self, failure: PeerLost) -> Cause:
        """Rank 0 holds the store of ranks that do not share a file system, and goes with it."""
        fate = self._certain_fate(0)
        self._end(0, fate)
        message = f"{self._named([0])} {fate or 'did not answer: the host is lost or cut off'} (seen in: {failure})"
        return Cause(0, PeerLost.exit_code, message, is_mine_to_tell=True)

    def _named(self, ranks: list[int]) -> str:
        places = ", ".join(dict.fromkeys(self.address_R[rank].name for rank in ranks))
        if len(ranks) == 1:
            return f"rank {ranks[0]} (process {self.address_R[ranks[0]].pid} on {places})"
        return f"ranks {', '.join(map(str, ranks))} (on {places})"

    def _keep_own_stacks(self, failure: PeerLost) -> None:
        if self.folder is None:
            return
        name_of = {thread.ident: thread.name for thread in threading.enumerate() if thread is not threading.current_thread()}
        frames = {name_of[ident]: frame for ident, frame in sys._current_frames().items() if ident in name_of}
        parts = [f"thread {name}:\n{''.join(traceback.format_stack(frame))}" for name, frame in frames.items()]
        parts.insert(0, "".join(traceback.format_exception(failure)))
        try:
            with self._stacks(self.env.rank).open("a") as file:
                file.write("\n".join(parts))
        except OSError as problem:
            print(f"crossdock: warning: no stacks were kept ({problem})", file=sys.stderr)

    def _write(self, path: Path, text: str) -> None:
        try:
            atomic.write_text(path, text)
        except IoFailure as problem:
            print(f"crossdock: warning: {problem}", file=sys.stderr)

    def _stacks(self, rank: int) -> Path:
        assert self.folder is not None
        return self.folder / f"rank-{rank:05d}.txt"

    def _key(self, rank: int) -> str:
        return f"roll/{rank}"

    def _fate_key(self, rank: int) -> str:
        return f"fate/{rank}"


def _bounded(work: Callable[[], Result], within_s: float = PATIENCE_S) -> Result | None:
    """`work`, or None where the store has gone: its server may be among the lost, and then a question may never be answered."""
    box: list[Result] = []

    def do() -> None:
        with contextlib.suppress(RuntimeError):  # what stores raise when their server has gone
            box.append(work())

    thread = threading.Thread(target=do, daemon=True, name="roll-call")
    try:
        thread.start()
    except RuntimeError:  # there is no memory for another thread's stack, which may be why the roll is called
        do()
    else:
        thread.join(within_s + _STORE_S)
    return box[0] if box else None
