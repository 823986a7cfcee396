"""Waits for the ranks of an incarnation to end, and finds out which of them was lost, and how.

A rank ends by its answer, by Ray's word that its process has gone, or by silence: its heartbeats reach the monitor, out of band.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from crossdock.errors import PeerLost
from crossdock.launch.ending import Result
from crossdock.launch.local.children import Outcome, root_cause
from crossdock.launch.ray.incarnation import POLL_S, Incarnation
from crossdock.launch.restarts import is_worth_another

_PEERS_S = 5.0  # what the other ranks get to report a death
_ANSWER_S = 2.0  # of the monitor: while Ray starts it again nobody is known to be silent


@dataclass(frozen=True)
class Loss:
    """Why an incarnation ended that another may follow. `started` says whether its ranks had begun to train.

    `suspects` are the nodes of ranks that Ray lost: it may be some health checks before it knows whether the node went with them.
    """

    outcome: Outcome
    started: bool
    suspects: frozenset[str] = frozenset()


Ending = Result | Outcome | Loss
"""Of an incarnation: a good result, a failure that another start would meet again, or a loss."""


class Watch:
    """The ranks of `incarnation`, of which none may be silent for longer than `silence_s`."""

    def __init__(self, ray: Any, monitor: Any, incarnation: Incarnation, silence_s: float) -> None:
        self.ray, self.monitor, self.incarnation, self.silence_s = ray, monitor, incarnation, silence_s
        self.outcomes: dict[int, Outcome] = {}
        self.fields: Mapping[str, Any] = {}
        self.begin_s = time.monotonic()

    def until_it_ends(self, is_stopping: Callable[[], bool]) -> Ending:
        """Wait. The first loss gives the others a few seconds to report; then the incarnation is over."""
        pending = {reference: rank for rank, reference in enumerate(self.incarnation.results)}
        first_dead: int | None = None
        deadline_s = float("inf")
        while pending and time.monotonic() < deadline_s:
            if is_stopping():
                self.monitor.stop.remote()  # again and again: one that Ray has started anew knows nothing of it
            done, _ = self.ray.wait(list(pending), num_returns=1, timeout=POLL_S)
            for reference in done:
                rank = pending.pop(reference)
                self.outcomes[rank] = self._outcome(reference, rank)
                if self.outcomes[rank].exit_code != 0 and first_dead is None:
                    first_dead, deadline_s = rank, time.monotonic() + _PEERS_S
            for rank in self._silent() & set(pending.values()) - self.outcomes.keys():
                where = self.incarnation.node_of(rank).address
                message = f"rank {rank} on {where} has not been heard of for {self.silence_s:g} s: it is stopped, or cut off"
                self.outcomes[rank] = Outcome(rank, PeerLost.exit_code, message, signalled=True)
                first_dead = rank if first_dead is None else first_dead
                deadline_s = min(deadline_s, time.monotonic())
        if all(outcome.exit_code == 0 for outcome in self.outcomes.values()):
            return Result(0, self.fields)
        cause = root_cause(list(self.outcomes.values()), first_dead)
        lost = [rank for rank, outcome in self.outcomes.items() if outcome.signalled]
        suspects = frozenset(self.incarnation.node_of(rank).node_id for rank in lost)
        return Loss(cause, started=True, suspects=suspects) if is_worth_another(cause) else cause

    def _outcome(self, reference: Any, rank: int) -> Outcome:
        try:
            answer = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError:
            raise  # a rank's own exceptions are in its answer; this one is a bug of ours
        except self.ray.exceptions.RayError:
            where = self.incarnation.node_of(rank).address
            message = f"rank {rank} on {where} was killed, or its node was lost"
            return Outcome(rank, PeerLost.exit_code, message, signalled=True)
        code = answer.pop("exit_code")
        if rank == 0:
            self.fields = answer
        return Outcome(rank, code, answer.get("message", ""), answer.get("traceback", ""))

    def _silent(self) -> set[int]:
        try:
            asked = self.monitor.silent_s.remote(self.incarnation.number, self.incarnation.shape.world_size)
            silent_s = self.ray.get(asked, timeout=min(self.silence_s, _ANSWER_S))
        except (self.ray.exceptions.GetTimeoutError, self.ray.exceptions.ActorUnavailableError):
            return set()
        longest_s = time.monotonic() - self.begin_s
        return {rank for rank, rank_s in enumerate(silent_s) if min(rank_s, longest_s) > self.silence_s}
