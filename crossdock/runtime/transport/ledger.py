"""Ledger: what travelled between ranks, over which links, and how long it was waited for.

One `Flight` is one all-to-all of one rank. Bytes are those that this rank sent; summed over the ranks they are all bytes of the group.

    launched ........ wait_begin ---- wait_end        dots: the window (other work ran); dashes: exposed (the rank stood still)

A rank may stand still for other flights inside a window; no work runs then either.
"""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

Stage = Literal["dispatch", "combine"]
Direction = Literal["forward", "backward"]
Kind = Literal["tokens", "metadata", "counts", "weights", "keys_values", "gradients"]
Bytes = tuple[int, int, int]
"""Bytes by link class, in the order of `placement.records.topology.LINK_CLASSES`: same device, same node, other node."""

CAPACITY = 1 << 17
"""Flights held when nobody takes them; the oldest give way, so that a loop that never looks at its ledger does not grow."""

Mark = Any
"""A moment: seconds of `time.perf_counter` on the CPU, a recorded `torch.cuda.Event` on CUDA."""


@dataclass(frozen=True, slots=True)
class Flight:
    """One all-to-all: what it carried and when. Times are seconds on one clock (the compute stream's on CUDA)."""

    layer: int
    stage: Stage
    direction: Direction
    kind: Kind
    bytes_by_class: Bytes
    launched_s: float
    wait_begin_s: float
    wait_end_s: float
    movement: int = 0
    """Shared by the flights of one dispatch and its combine, forward and backward; tells apart chunks that are in flight together."""


@dataclass(frozen=True)
class LayerProfile:
    """Mean times of one MoE layer, in seconds: what `placement.costs.cost` is calibrated with."""

    dispatch_forward_s: float
    combine_forward_s: float
    dispatch_backward_s: float
    combine_backward_s: float
    """The four windows: launched until wait_begin, less what the rank stood still for others meanwhile (metadata, or another chunk)."""
    expert_forward_s: float
    expert_backward_s: float
    exposed_s: float
    """Time blocked in waits, all kinds but gradients of copies, per movement."""


class Ledger:
    """Records flights while `enabled`; a mesh owns one. Not thread-safe: autograd runs a device's backward on one thread at a time."""

    def __init__(self, device: torch.device | str = "cpu", enabled: bool = True) -> None:
        self.enabled = enabled
        self._on_cuda = torch.device(device).type == "cuda"
        self._flights: deque[tuple[Any, ...]] = deque(maxlen=CAPACITY)
        self._origin: Mark = None
        self._movements = 0

    def next_movement(self) -> int:
        """A number for a dispatch that starts now and everything that belongs to it."""
        self._movements += 1
        return self._movements

    def now(self) -> Mark:
        """This moment, on the stream that computes."""
        if not self.enabled:
            return 0.0
        if not self._on_cuda:
            return time.perf_counter()
        if self._origin is None:
            self._origin = self._event()
        return self._event()

    def record(
        self,
        layer: int,
        stage: Stage,
        direction: Direction,
        kind: Kind,
        bytes_by_class: Bytes,
        launched: Mark,
        wait_begin: Mark,
        wait_end: Mark,
        movement: int = 0,
    ) -> None:
        """Note one all-to-all; the marks come from `now`."""
        if self.enabled:
            self._flights.append((layer, stage, direction, kind, bytes_by_class, launched, wait_begin, wait_end, movement))

    def take(self) -> tuple[Flight, ...]:
        """Everything recorded since the last call, in order of completion, and forget it. On CUDA this waits for the device."""
        taken, self._flights = self._flights, deque(maxlen=CAPACITY)
        if self._on_cuda and taken:
            torch.cuda.synchronize()
        at = self.seconds
        return tuple(
            Flight(layer, stage, direction, kind, amounts, at(launched), at(wait_begin), at(wait_end), movement)
            for layer, stage, direction, kind, amounts, launched, wait_begin, wait_end, movement in taken
        )

    def _event(self) -> Mark:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, mark: Mark) -> float:
        """A mark on the clock of flights, s; on CUDA once the device has come to it."""
        # A flight launched while the ledger was off carries 0.0 in place of an event.
        return float(mark) if isinstance(mark, float) else self._origin.elapsed_time(mark) / 1e3


def bytes_by_class(flights: Iterable[Flight], kind: Kind = "tokens") -> Bytes:
    """Bytes of one kind by link class, over all flights (both stages, both directions)."""
    totals = [0, 0, 0]
    for flight in flights:
        if flight.kind == kind:
            for link_class, amount in enumerate(flight.bytes_by_class):
                totals[link_class] += amount
    return totals[0], totals[1], totals[2]


def bytes_by_way(flights: Iterable[Flight], kind: Kind = "tokens") -> dict[tuple[Stage, Direction], Bytes]:
    """Bytes of one kind by link class for each of the four ways: dispatch and combine, forward and backward."""
    flights = tuple(flights)
    ways: tuple[tuple[Stage, Direction], ...] = (
        ("dispatch", "forward"),
        ("combine", "forward"),
        ("combine", "backward"),
        ("dispatch", "backward"),
    )
    return {way: bytes_by_class([f for f in flights if (f.stage, f.direction) == way], kind) for way in ways}


def exposed_s(flights: Iterable[Flight]) -> float:
    """Seconds that this rank stood still for communication: the sum of all waits."""
    return sum(flight.wait_end_s - flight.wait_begin_s for flight in flights)


def standstill(flights: Iterable[Flight]) -> Callable[[float], float]:
    """How many seconds the rank had stood still for any of `flights` until a moment; differences count what lies between two moments."""
    edges, stood_s = [0.0], [0.0]
    for begin_s, end_s in sorted((flight.wait_begin_s, flight.wait_end_s) for flight in flights):
        begin_s = max(begin_s, edges[-1])
        if end_s > begin_s:
            edges += [begin_s, end_s]
            stood_s += [stood_s[-1], stood_s[-1] + end_s - begin_s]
    return lambda moment: float(np.interp(moment, edges, stood_s))


def window_s(flight: Flight, stood_s: Callable[[float], float]) -> float:
    """Seconds of work that ran while `flight` was under way; `stood_s` is `standstill` of all flights of the rank."""
    return flight.wait_begin_s - flight.launched_s - (stood_s(flight.wait_begin_s) - stood_s(flight.launched_s))


def profile(flights: Iterable[Flight]) -> dict[int, LayerProfile]:
    """Windows, expert seconds and exposed seconds of each layer, as means over its movements (micro-batches or chunks).

    Forward, the experts run between the end of the dispatch's wait and the launch of the combine; backward, between the end of the
    combine's wait and the launch of the dispatch. A direction that did not happen (evaluation has no backward) counts as 0.
    """
    flights = tuple(flights)
    stood_s = standstill(flights)
    tokens = {(f.layer, f.movement, f.stage, f.direction): f for f in flights if f.kind == "tokens"}
    movements: dict[int, set[int]] = defaultdict(set)
    for flight in flights:
        if flight.kind not in ("weights", "keys_values", "gradients"):  # they belong to no movement of tokens
            movements[flight.layer].add(flight.movement)
    return {layer: _profile_layer(layer, movements[layer], tokens, flights, stood_s) for layer in sorted(movements)}


def _profile_layer(
    layer: int,
    movements: set[int],
    tokens: dict[tuple[int, int, Stage, Direction], Flight],
    flights: tuple[Flight, ...],
    stood_s: Callable[[float], float],
) -> LayerProfile:
    def mean_window_s(stage: Stage, direction: Direction) -> float:
        return _mean([window_s(f, stood_s) for m in movements if (f := tokens.get((layer, m, stage, direction)))])

    def expert_s(first: Stage, second: Stage, direction: Direction) -> float:
        pairs = [(tokens.get((layer, m, first, direction)), tokens.get((layer, m, second, direction))) for m in movements]
        return _mean([after.launched_s - before.wait_end_s for before, after in pairs if before and after])

    return LayerProfile(
        dispatch_forward_s=mean_window_s("dispatch", "forward"),
        combine_forward_s=mean_window_s("combine", "forward"),
        dispatch_backward_s=mean_window_s("dispatch", "backward"),
        combine_backward_s=mean_window_s("combine", "backward"),
        expert_forward_s=expert_s("dispatch", "combine", "forward"),
        expert_backward_s=expert_s("combine", "dispatch", "backward"),
        exposed_s=exposed_s(f for f in flights if f.layer == layer and f.kind != "gradients") / len(movements),
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
