"""Who was lost: when a collective fails, the ranks that are left call one another through the store, and look at those that stay silent.

A failed collective names no culprit: a rank that dies breaks the connections of all, one that stops lets all others wait, and the first to
give up is rarely the one to blame. So every rank whose collective failed says so in the store, every other error leaves its reason there,
and whoever has done neither is looked at: gone, stopped, hung, or out of reach. Processes of this host are seen in its tables, those of
others by their `pulse`. All launchers share this; none of them knows as much.
"""

import contextlib
import json
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from crossdock import atomic
from crossdock.errors import CrossdockError, IoFailure, PeerLost
from crossdock.launch.ranks.processes import DUMP_S, Address, dumped, stacks_kept
from crossdock.launch.ranks.pulse import Pulse, Sign, felt
from crossdock.launch.ranks.rendezvous import exchange, own_address
from crossdock.launch.ranks.worker_env import WorkerEnv

if TYPE_CHECKING:
    from torch.distributed import Store

Result = TypeVar("Result")
PATIENCE_S = 2.0
"""How long a silent rank of which nothing is known may take to answer."""
_STORE_S = 0.5
_PULSE_S = 0.2
_SETTLE_S = 0.2  # the processes of a lost host do not go in the same moment
_POLL_S = 0.05
_WAITING = tuple(f"transport/{name}.py" for name in ("exchange", "mpi_exchange", "collectives", "all_to_all", "background"))
_WAITS = "waits for others"
_GONE = "was killed, or crashed"
_STOPPED = "is stopped, by SIGSTOP or a debugger"
_CUT_OFF = "did not answer: the host is lost or cut off"
_SILENT = "is there and does not answer: it is stopped, or hangs"
_PLURAL = {"was": "were", "is": "are", "waits": "wait"}
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
    pulse: Pulse | None = None
    """This rank's own, where ranks are on several hosts."""
    pulse_R: tuple[str, ...] = ()
    """Where those of all ranks can be felt; empty for one that cannot."""
    unanswered: list[threading.Thread] = field(default_factory=list)
    """Questions to a store that has not answered."""

    @classmethod
    def gather(cls, store: "Store", env: WorkerEnv, folder: Path | None) -> "Crew":
        """Every rank calls this."""
        addresses = tuple(map(Address.parse, exchange(store, env, "process", str(Address.here()))))
        if not env.spans_hosts:
            return cls(store, env, addresses, folder)
        host, pulse = own_address(env), None
        if host is not None:
            with contextlib.suppress(OSError):  # no port is free: a rank without a pulse is judged by its silence
                pulse = Pulse(host)
        return cls(store, env, addresses, folder, pulse, exchange(store, env, "pulse", "" if pulse is None else str(pulse)))

    @contextlib.contextmanager
    def watching(self, explain: Callable[[BaseException], tuple[int, str]]) -> Iterator[None]:
        """Within the block a lost peer becomes `Lost`, and any other error (as `explain` puts it) is left as word for the others."""
        with contextlib.nullcontext() if self.folder is None else stacks_kept(self._stacks(self.env.rank)):
            try:
                yield
            except PeerLost as failure:
                raise Lost(self._found(failure)) from failure
            except BaseException as failure:
                code, message = explain(failure)
                self._asked(partial(self._leave_word, json.dumps({"exit_code": code, "message": message})))
                raise

    def _found(self, failure: PeerLost) -> Cause:
        self._keep_own_stacks(failure)
        cause = self._asked(partial(self._heard_cause, failure), PATIENCE_S + DUMP_S, in_vain=self._is_store_stopped)
        cause = cause or self._without_store(failure)
        for thread in self.unanswered:  # one that came back while the interpreter ends would abort it
            thread.join(_STORE_S)
        return cause

    def stay_until_heard(self) -> None:
        """Called when the world is left over an error: rank 0 holds the store in which the others read why, and goes last.

        It stays until all ranks that can reach it have read what they need, or for `PATIENCE_S`. A store in a file needs nobody.
        """
        if self.env.rank != 0 or self._is_store_in_file():
            return
        others, deadline_s = range(1, self.env.world_size), time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline_s:
            waiting = [rank for rank in others if not self.store.check([self._heard_key(rank)])]
            signs = self._signs(waiting)
            if all(self._certain_fate(rank, signs) or signs.get(rank) == "unreachable" for rank in waiting):
                return
            time.sleep(_POLL_S)

    def _leave_word(self, word: str) -> None:
        self.store.set(self._key(self.env.rank), word)
        self.store.set(self._heard_key(self.env.rank), "")

    def _heard_cause(self, failure: PeerLost) -> Cause:
        cause = self.cause_of(failure)
        self.store.set(self._heard_key(self.env.rank), "")
        return cause

    def cause_of(self, failure: PeerLost) -> Cause:
        """Call the roll and look at who stays silent. Raises `RuntimeError` where the store has gone."""
        self.store.set(self._key(self.env.rank), json.dumps({"exit_code": failure.exit_code}))
        others = [rank for rank in range(self.env.world_size) if rank != self.env.rank]
        deadline_s, is_settled = time.monotonic() + PATIENCE_S, False
        while True:
            silent = [rank for rank in others if not self.store.check([self._key(rank)])]
            for rank in others:
                if rank not in silent and (word := json.loads(self.store.get(self._key(rank))))["exit_code"] != failure.exit_code:
                    return self._cause([rank], f"rank {rank}: {word['message']}", silent, word["exit_code"])
            signs = self._signs(silent)
            fates = {rank: self._told_fate(rank) or self._certain_fate(rank, signs) for rank in silent}
            if any(fates[rank] and self.store.check([self._key(rank)]) for rank in silent):
                continue  # it left its reason and went, between the two looks
            if any(fates.values()) and not all(fates.values()) and not is_settled:
                is_settled = True
                time.sleep(_SETTLE_S)
                continue
            if any(fates.values()) or not silent or time.monotonic() > deadline_s:
                break
            time.sleep(_POLL_S)
        known = {rank: fate for rank, fate in fates.items() if fate} or self._examined(silent, signs)
        blamed = {rank: fate for rank, fate in known.items() if fate != _WAITS} or known
        if not blamed:
            return self._cause([self.env.rank], f"all ranks answer, and a collective failed: {failure}", silent)
        for rank, fate in blamed.items():
            self._end(rank, fate)
        return self._cause(sorted(blamed), f"{self._told(blamed)} (seen in: {failure})", silent)

    def _cause(self, blamed: list[int], message: str, silent: list[int], exit_code: int = PeerLost.exit_code) -> Cause:
        left = [rank for rank in range(self.env.world_size) if rank == self.env.rank or rank not in (*silent, *blamed)]
        return Cause(blamed[0], exit_code, message, left[0] == self.env.rank)

    def _told_fate(self, rank: int) -> str:
        """What a rank wrote of another before it ended that one."""
        return self.store.get(self._fate_key(rank)).decode() if self.store.check([self._fate_key(rank)]) else ""

    def _signs(self, ranks: Sequence[int]) -> dict[int, Sign]:
        """Of those of the ranks that are on other hosts and have a pulse."""
        asked = [rank for rank in ranks if self.pulse_R and self.pulse_R[rank] and not self.address_R[rank].is_here]
        return felt({rank: self.pulse_R[rank] for rank in asked}, _PULSE_S)

    def _certain_fate(self, rank: int, signs: Mapping[int, Sign]) -> str:
        """What is certain of a silent rank; empty where nothing is."""
        address = self.address_R[rank]
        if not address.is_here:
            return _GONE if signs.get(rank) == "gone" else ""
        state = address.state()
        return "" if state == "alive" else _STOPPED if state == "stopped" else _GONE

    def _examined(self, ranks: Sequence[int], signs: Mapping[int, Sign]) -> dict[int, str]:
        """What can be found out of silent ranks that may be alive."""
        fates = {rank: _SILENT if signs.get(rank) == "there" else _CUT_OFF for rank in ranks}
        here = [rank for rank in ranks if self.address_R[rank].is_here]
        stacks = [""] * len(here)
        if self.folder is not None:
            stacks = dumped([(self.address_R[rank], self._stacks(rank)) for rank in here])
        return fates | {rank: _WAITS if waits(text) else "is alive and hangs" for rank, text in zip(here, stacks, strict=True)}

    def _end(self, rank: int, fate: str, *, is_told: bool = True) -> None:
        """Write down what the system says of a rank on this host that cannot go on, and end it where the launcher would wait for it.

        is_told: the other ranks can read why in the store.
        """
        address = self.address_R[rank]
        if not address.is_here or address.state() == "gone":
            return
        if self.folder is not None:
            self._write(self._stacks(rank).with_suffix(".system.txt"), address.facts())
        if self.env.launcher not in _ENDED_BY_OTHERS:
            if is_told:
                self._asked(partial(self.store.set, self._fate_key(rank), fate))
            address.signal(signal.SIGKILL)

    def _is_store_stopped(self) -> bool:
        """Whether no question to the store will be answered: rank 0 holds that of ranks that do not share a file."""
        return not self._is_store_in_file() and self.address_R[0].is_here and self.address_R[0].state() == "stopped"

    def _is_store_in_file(self) -> bool:
        assert self.env.meeting is not None
        return self.env.meeting.kind == "file"

    def _without_store(self, failure: PeerLost) -> Cause:
        """The store went with rank 0, who held it; and with its whole host, where nobody of that is left."""
        others = [rank for rank in range(1, self.env.world_size) if self.address_R[rank].host == self.address_R[0].host]
        if others and not self.address_R[0].is_here:
            time.sleep(_SETTLE_S)
        signs = self._signs([0, *others])
        is_there = signs.get(0) == "there" or self.address_R[0].is_here
        fate = self._certain_fate(0, signs) or (_SILENT if is_there else _CUT_OFF)
        self._end(0, fate, is_told=False)
        is_host_lost = signs.get(0) in ("gone", "unreachable") and all(signs.get(rank) == signs[0] for rank in others)
        lost = [0, *others] if is_host_lost else [0]
        return Cause(0, PeerLost.exit_code, f"{self._told(dict.fromkeys(lost, fate))} (seen in: {failure})", is_mine_to_tell=True)

    def _told(self, fates: Mapping[int, str]) -> str:
        """What became of which ranks, in words."""
        parts = []
        for fate in dict.fromkeys(fates.values()):
            ranks = [rank for rank in fates if fates[rank] == fate]
            hosts = dict.fromkeys(self.address_R[rank].host for rank in ranks)
            everybody = [rank for rank, address in enumerate(self.address_R) if address.host in hosts]
            places = ", ".join(dict.fromkeys(self.address_R[rank].name for rank in ranks))
            if len(ranks) == 1:
                parts.append(f"rank {ranks[0]} (process {self.address_R[ranks[0]].pid} on {places}) {fate}")
            else:
                verb, _, rest = fate.partition(" ")
                those = f"all of {places}" if self.env.spans_hosts and everybody == sorted(ranks) else f"on {places}"
                parts.append(f"ranks {', '.join(map(str, ranks))} ({those}) {_PLURAL.get(verb, verb)} {rest}")
        return "; ".join(parts)

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

    def _asked(
        self, work: Callable[[], Result], within_s: float = PATIENCE_S, in_vain: Callable[[], bool] = lambda: False
    ) -> Result | None:
        """`work`, or None where the store has gone: its server may be among the lost, and then a question may never be answered.

        in_vain: says that it will not be.
        """
        box: list[Result] = []

        def do() -> None:
            with contextlib.suppress(RuntimeError):  # what stores raise when their server has gone
                box.append(work())

        thread = threading.Thread(target=do, daemon=True, name="roll-call")
        try:
            thread.start()
        except RuntimeError:  # there is no memory for another thread's stack, which may be why the roll is called
            do()
            return box[0] if box else None
        deadline_s = time.monotonic() + within_s + _STORE_S
        while thread.is_alive() and time.monotonic() < deadline_s and not in_vain():
            thread.join(_POLL_S)
        if thread.is_alive():
            self.unanswered.append(thread)
        return box[0] if box else None

    def _key(self, rank: int) -> str:
        return f"roll/{rank}"

    def _heard_key(self, rank: int) -> str:
        return f"heard/{rank}"

    def _fate_key(self, rank: int) -> str:
        return f"fate/{rank}"


def waits(stacks: str) -> bool:
    """Whether a process with these stacks, as faulthandler writes them, waits in a collective.

    Threads that Python started are passed over: those of the transports wait there always, whatever the program does. So is a collective
    from which the program has gone on to other code of Crossdock, which hangs there.
    """
    threads = ("\n" + stacks).split("\nThread ")
    own = [text for part in threads for text in part.split("\nCurrent thread ") if "in _bootstrap\n" not in f"{text}\n"]
    return any(map(_is_in_a_collective, own))


def _is_in_a_collective(stack: str) -> bool:
    ours = [line for line in stack.splitlines() if "/crossdock/" in line or "/transport/" in line]  # the innermost first
    return bool(ours) and any(file in ours[0] for file in _WAITING)
