"""What the overlap benchmarks share: calls timed on all ranks together, and the stages of a block taken apart."""

import functools
import gc
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks.block_pair import Halves, Pair, Shape
from benchmarks.measure import in_turns
from benchmarks.netlab import Lab
from benchmarks.on_ranks import set_rate
from crossdock.runtime.experts.overlap import Overlapped
from crossdock.runtime.transport import ledger
from crossdock.runtime.transport.all_to_all import Route, all_to_all_start
from crossdock.runtime.transport.collectives import all_gather_objects, barrier
from crossdock.runtime.transport.mesh import Mesh


@dataclass(frozen=True)
class Timing:
    """One repeat of one call on the slowest rank, and what the ledger says, mean over ranks.

    windows_s: compute beside dispatch and combine, forward, then backward; None where no tokens moved. forward_s, backward_s: of the rank
    that was slowest in it, where the call is a step.
    """

    step_s: float
    waits_s: Mapping[str, float]
    windows_s: tuple[float, ...] | None
    forward_s: float = 0.0
    backward_s: float = 0.0

    @property
    def exposed_s(self) -> float:
        return sum(self.waits_s.values())


def waits_s(flights: Iterable[ledger.Flight]) -> dict[str, float]:
    """Seconds waited, by what was waited for: `dispatch forward tokens` and so on."""
    waits: dict[str, float] = defaultdict(float)
    for flight in flights:
        waits[f"{flight.stage} {flight.direction} {flight.kind}"] += flight.wait_end_s - flight.wait_begin_s
    return dict(waits)


def windows_s(flights: Sequence[ledger.Flight]) -> tuple[float, float, float, float]:
    """Seconds between start and wait of the four token all-to-alls."""
    profile = ledger.profile(flights)[0]
    return profile.dispatch_forward_s, profile.combine_forward_s, profile.dispatch_backward_s, profile.combine_backward_s


def _slowest(of_ranks: Sequence[Timing]) -> Timing:
    first = of_ranks[0]
    waits = {name: statistics.mean(timing.waits_s.get(name, 0.0) for timing in of_ranks) for name in first.waits_s}
    windows = None
    if first.windows_s is not None:
        windows = tuple(statistics.mean(column) for column in zip(*(timing.windows_s or () for timing in of_ranks), strict=True))
    step_s, forward_s, backward_s = (max(getattr(timing, name) for timing in of_ranks) for name in ("step_s", "forward_s", "backward_s"))
    return Timing(step_s, waits, windows, forward_s, backward_s)


@dataclass(frozen=True)
class Stages:
    """Seconds forward of ScMoE's stages in the window and of its experts, and of the stages' backward over their forward."""

    stage_s: tuple[float, ...]
    expert_s: float
    backward_over_forward: float


# ---- on every rank


class Bench:
    """The measuring rank: builds pairs, times calls that all ranks begin together, agrees on numbers."""

    def __init__(self, mesh: Mesh, lab: Lab, repeats: int) -> None:
        self.mesh, self.lab, self.repeats = mesh, lab, repeats
        gc.freeze()  # what the imports made need not be looked through before every call

    def set_rate(self, rate_bit_per_s: float | None) -> None:
        set_rate(self.mesh, self.lab, rate_bit_per_s)

    def time(self, call: Callable[[], object]) -> Timing:
        """One call, begun by all ranks together; agreed later, so that nothing but the barrier stands between calls."""
        gc.collect()
        barrier(self.mesh)
        self.mesh.ledger.take()
        begin_s = time.perf_counter()
        halves = call()
        step_s = time.perf_counter() - begin_s
        flights = self.mesh.ledger.take()
        windows = windows_s(flights) if flights else None
        if isinstance(halves, Halves):
            return Timing(step_s, waits_s(flights), windows, halves.forward_s, halves.backward_s)
        return Timing(step_s, waits_s(flights), windows)

    def agreed(self, timings: Sequence[Timing]) -> list[Timing]:
        """For each repeat the slowest rank's seconds, and the means of the rest; equal on every rank."""
        return [_slowest(repeat) for repeat in zip(*all_gather_objects(list(timings), self.mesh), strict=True)]

    def interleaved(self, calls: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 2) -> dict[str, list[Timing]]:
        """Every call `repeats` times in turns; equal on every rank."""
        samples = in_turns({name: functools.partial(self.time, call) for name, call in calls.items()}, repeats, warmup)
        return {name: self.agreed(timings) for name, timings in samples.items()}

    def communicate(self, route: Route, shape: Shape) -> Callable[[], None]:
        """The step's token all-to-alls, one after the other, with nothing beside them."""
        dtype = getattr(torch, shape.dtype)
        out, back = route, route.back("combine")

        def all_four() -> None:
            for way in (out, back, out, back):
                all_to_all_start(torch.zeros(sum(way.send_R), shape.model_width, dtype=dtype), way).wait()

        return all_four

    def stages(self, shape: Shape) -> Stages:
        """ScMoE's stages, experts and backward, from replayed steps with the experts in every slot in turn."""
        pair = Pair(shape, "scmoe_overlapped", self.mesh)
        num_slots = len(pair.config.window) + 1
        pair.record()
        profiles: list[list[ledger.LayerProfile]] = [[] for _ in range(num_slots)]
        for round_number in range(-1, max(5, self.repeats // 2)):
            for slot in range(num_slots):
                pair.block.schedule = Overlapped(slot)
                barrier(self.mesh)
                self.mesh.ledger.take()
                pair.replay()
                if round_number >= 0:
                    profiles[slot].append(ledger.profile(self.mesh.ledger.take())[0])

        def medians(field: str) -> list[float]:
            here = [statistics.median(getattr(profile, field) for profile in of_slot) for of_slot in profiles]
            return [statistics.mean(of_ranks) for of_ranks in zip(*all_gather_objects(here, self.mesh), strict=True)]

        forward_s, backward_s = medians("dispatch_forward_s"), medians("dispatch_backward_s")
        stage_s = tuple(max(0.0, later - sooner) for sooner, later in itertools.pairwise(forward_s))
        return Stages(stage_s, statistics.median(medians("expert_forward_s")), (backward_s[-1] - backward_s[0]) / sum(stage_s))
