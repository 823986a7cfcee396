"""Adaptive choice: when to look again, what to measure for it, one decision on rank 0, the same strategies on every rank.

watch     every step's expert load, equal on every rank, says when a look is due: at the start, every so many steps, or when it moved
window    a few steps recorded on all ranks: routing, transfers, stage times
decide    rank 0 prices the candidates of every layer (`placement.strategies.choice`) and broadcasts one record; all ranks compare its hash
apply     each layer takes its strategy between two steps; no weight moves
"""

import dataclasses
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal, Protocol, cast

import numpy as np
import pydantic
from numpy.typing import NDArray
from torch import nn

from crossdock.errors import BadData, CrossdockError
from crossdock.placement.costs.cost import Dispatch, Workload
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.topology import Topology
from crossdock.placement.strategies.choice import LayerProblem, LayerTimes, choose
from crossdock.placement.strategies.gather import GatherCost, choose_gathered
from crossdock.placement.strategies.overlap_rule import Interference
from crossdock.placement.strategies.strategy import Choice, Choices, Priced, Strategy
from crossdock.placement.strategies.traffic import load_RE, traffic_of
from crossdock.runtime.adaptation.calibrate import calibrate
from crossdock.runtime.adaptation.migrate import RoutedLayer
from crossdock.runtime.adaptation.stage_times import StageTimes
from crossdock.runtime.adaptation.windows import Measured
from crossdock.runtime.dispatch.dispatcher import DISPATCHERS
from crossdock.runtime.experts.overlap import Chunked, Schedule
from crossdock.runtime.transport import collectives
from crossdock.runtime.transport.mesh import Mesh
from crossdock.strict_yaml import StrictModel

Load = NDArray[np.float64]

FIRST_STEPS = 2
"""Steps before the first look: caches, buffers and connections are made in them."""


class AdaptConfig(StrictModel):
    """Whether a run chooses how its tokens move, and when it looks again. The wire format is never chosen."""

    mode: Literal["off", "start", "continuous"] = "off"
    """off: as configured. start: chosen once, from the first steps. continuous: chosen again when the load has moved, and now and then."""
    window: int = pydantic.Field(default=4, ge=1)
    """Steps measured before every decision, and over which the load is summed."""
    every: int = pydantic.Field(default=200, ge=1)
    """Steps after which to look again although the load has not moved."""
    drift: float = pydantic.Field(default=0.1, gt=0.0, le=1.0)
    """Look again when this share of a layer's assignments goes to other experts than at the last look (total variation distance)."""
    min_saving: float = pydantic.Field(default=0.05, ge=0.0, lt=1.0)
    """Predicted share of a block's time that a change must save; below it the strategy stays. Predictions are no better than this."""
    max_chunks: int = pydantic.Field(default=8, ge=1, le=64)
    """Highest degree of chunking to consider; degrees are powers of two."""
    gather: bool = True
    """Consider moving the weights of hot experts instead of their tokens."""
    explain: bool = False
    """Print the table of candidates with every choice; with mode off, choose once as with start."""

    @property
    def mode_asked(self) -> str:
        """The mode, where `explain` alone asks for a choice at the start."""
        return "start" if self.mode == "off" and self.explain else self.mode

    @property
    def chunk_counts(self) -> tuple[int, ...]:
        """The degrees to consider: 1, 2, 4, ..."""
        return tuple(2**power for power in range(self.max_chunks.bit_length()))


class Adaptable(Protocol):
    """What a model needs so that its strategies can be chosen."""

    @property
    def moe_layers(self) -> Sequence[Any]:
        """The MoE layers in the order of a plan's layers."""
        ...

    @property
    def early_stages(self) -> Sequence[Sequence[nn.Module]]:
        """The stages of each MoE layer before its input is known."""
        ...

    @property
    def window_stages(self) -> Sequence[Sequence[nn.Module]]:
        """The stages of each MoE layer that may run while tokens travel."""
        ...

    def schedules(self, num_positions: int) -> Sequence[Schedule]:
        """What each MoE layer does for sequences of that length."""
        ...

    def set_schedules(self, schedules: Sequence[Schedule]) -> None:
        """Give each MoE layer its schedule."""
        ...


class Watch:
    """Says when to look; mutable, and the same on every rank, since all of them see the same steps and the same load."""

    def __init__(self, config: AdaptConfig) -> None:
        self.config = config
        self._recent: deque[Load] = deque(maxlen=config.window)
        self._looked_at: int | None = None
        self._seen_LE: Load | None = None

    def note(self, load_LE: Load) -> None:
        """A step's assignments by expert, of the whole world."""
        self._recent.append(np.asarray(load_LE, dtype=np.float64))

    def due(self, step: int) -> str | None:
        """Why to begin a look after `step` steps, or None."""
        config = self.config
        if config.mode_asked == "off" or step < FIRST_STEPS:
            return None
        if self._looked_at is None:
            return "start"
        if config.mode_asked == "start" or step < self._looked_at + config.window:
            return None
        if (moved := self.drift()) > config.drift:
            return f"load moved by {moved:.3f}"
        return f"every {config.every} steps" if step >= self._looked_at + config.every else None

    def drift(self) -> float:
        """The total variation distance between the load of the last look and the recent one, in the layer that moved most."""
        if self._seen_LE is None or not self._recent:
            return 0.0
        return float(np.abs(_shares(self.recent_LE()) - _shares(self._seen_LE)).sum(axis=1).max() / 2)

    def recent_LE(self) -> Load:
        """Assignments by expert over the last steps."""
        return np.sum(self._recent, axis=0)

    def looked(self, step: int, load_LE: Load) -> None:
        """A look ended after `step` steps with this load: what later ones are held against, so that one shift is one look."""
        self._looked_at, self._seen_LE = step, np.asarray(load_LE, dtype=np.float64)


def _shares(load_LE: Load) -> Load:
    return load_LE / np.maximum(load_LE.sum(axis=1, keepdims=True), 1.0)


# ---- strategies of a model


def strategies_of(model: Adaptable, num_positions: int) -> tuple[Strategy, ...]:
    """What the model does now, layer by layer."""
    schedules = model.schedules(num_positions)
    return tuple(
        Strategy(
            cast(Dispatch, layer.dispatcher.name),
            schedule.expert_slot,
            schedule.forward_chunks,
            schedule.backward_chunks,
            schedule.overlap,
            tuple(sorted(layer.gathered_experts)),
        )
        for layer, schedule in zip(model.moe_layers, schedules, strict=True)
    )


def apply(model: Adaptable, strategies: Sequence[Strategy]) -> None:
    """Every layer takes its strategy, between two steps; all ranks together, with the same ones."""
    for layer, strategy in zip(model.moe_layers, strategies, strict=True):
        layer.set_strategy(strategy)
    model.set_schedules([Chunked(s.expert_slot, s.forward_chunks, s.backward_chunks, s.overlap) for s in strategies])


# ---- deciding


def dispatches_for(mesh: Mesh) -> tuple[Dispatch, ...]:
    """The dispatchers that differ on this mesh: without two levels of links the hierarchical one is the de-duplicated one."""
    return tuple(cast(Dispatch, name) for name in DISPATCHERS if name != "hierarchical" or mesh.has_rails)


@dataclasses.dataclass(frozen=True)
class RankTimes:
    """What one rank measured beside its window: seconds of each layer's early stages and of those that may run while tokens travel,
    seconds per byte of packing rows, and interference."""

    early_s: list[list[float]]
    stage_s: list[list[float]]
    row_s_per_byte: float
    interference: Interference


def problems_of(
    config: AdaptConfig,
    measured: Measured,
    ranks: Sequence[RankTimes],
    plan: Plan,
    topology: Topology,
    workload: Workload,
    now: Sequence[Strategy],
    layers: Sequence[RoutedLayer],
) -> tuple[LayerProblem, ...]:
    """Rank 0: what each layer's choice depends on, from a window that ran under the strategies `now`."""
    calibrated = calibrate(measured, plan, topology, workload, now, follow_links=True)
    topology, workload = calibrated.topology, calibrated.workload
    element_bytes = layers[0].bank.inner.dtype.itemsize
    nothing: list[tuple[int, ...]] = [()] * len(now)
    variants = [nothing, [strategy.gathered for strategy in now]]
    if config.gather and topology.num_devices > 1:
        costs = (
            GatherCost(load_RE(measured.trace, layer, topology.num_devices, workload), plan, layer, topology, workload, element_bytes)
            for layer in range(len(now))
        )
        variants.append([choose_gathered(cost).experts for cost in costs])
    traffics = [
        traffic_of(measured.trace, plan, topology, workload, dispatch, variant, element_bytes)
        for dispatch in dispatches_for(layers[0].dispatcher.mesh)
        for variant in variants
    ]
    exchanges = zip(*(rank.count_flights_s for rank in measured.ranks), strict=False)
    exchange_s = statistics.median([min(flights) for flights in exchanges] or [0.0])
    row_s_per_byte = max(rank.row_s_per_byte for rank in ranks)
    problems = []
    for layer in range(len(now)):
        of_layer = {(found[layer].dispatch, found[layer].gathered): found[layer] for found in traffics}
        stage_s = tuple(max(seconds) for seconds in zip(*(rank.stage_s[layer] for rank in ranks), strict=True))
        early_s = min(sum(rank.early_s[layer]) for rank in ranks)
        times = LayerTimes(stage_s, 2.0, exchange_s, row_s_per_byte, ranks[0].interference, early_s)
        problems.append(LayerProblem(layer, tuple(of_layer.values()), times, topology, workload, config.chunk_counts, workload.wire))
    return tuple(problems)


def decide(config: AdaptConfig, step: int, problems: Sequence[LayerProblem], now: Sequence[Strategy]) -> Choices:
    """Rank 0: every layer's choice."""
    return Choices(step, tuple(choose(problem, old, config.min_saving) for problem, old in zip(problems, now, strict=True)))


def agreed(choices: Choices | CrossdockError | None, mesh: Mesh) -> Choices:
    """Rank 0's record on every rank. Raises on all of them what rank 0 met, and `BadData` where the ranks do not read the same."""
    sent = collectives.broadcast_object((choices.canonical, choices.digest) if isinstance(choices, Choices) else choices, mesh)
    if isinstance(sent, CrossdockError):
        raise sent
    assert sent is not None, "rank 0 decides"
    text, digest = sent
    return checked(Choices.from_canonical(text), digest, mesh)


def checked(choices: Choices, digest: str, mesh: Mesh) -> Choices:
    """`choices`, once all ranks have shown that theirs has the hash `digest`. Raises `BadData` on every rank otherwise."""
    found = collectives.all_gather_objects(choices.digest, mesh)
    wrong = [rank for rank, other in enumerate(found) if other != digest]
    if wrong:
        raise BadData(
            f"the choice of strategies after step {choices.step} has hash {digest[:12]} on rank 0 and {found[wrong[0]][:12]} on rank "
            f"{wrong[0]} ({len(wrong)} of {len(found)} ranks differ); start all ranks with the same version of Crossdock and of Python"
        )
    return choices


def as_event(choices: Choices, before: Sequence[Strategy], why: str) -> dict[str, Any]:
    """What `events.jsonl` holds of a decision: old and new strategy of each layer, predicted seconds of the alternatives, the reason."""
    return {
        "step": choices.step,
        "why": why,
        "digest": choices.digest,
        "layers": [_layer_event(choice, old) for choice, old in zip(choices.layers, before, strict=True)],
    }


def _layer_event(choice: Choice, old: Strategy) -> dict[str, Any]:
    return {
        "layer": choice.layer,
        "old": dataclasses.asdict(old),
        "new": dataclasses.asdict(choice.strategy),
        "changed": choice.strategy != old,
        "predicted_s": choice.predicted_s,
        "old_predicted_s": choice.current_s,
        "alternatives": [_priced_event(other) for other in choice.alternatives],
        "candidates": choice.num_candidates,
        "reason": choice.reason,
        "mismatch": None if choice.mismatch is None else _priced_event(choice.mismatch),
    }


def _priced_event(priced: Priced) -> dict[str, Any]:
    seconds = {"forward_s": priced.forward_s, "backward_s": priced.backward_s, "total_s": priced.total_s}
    return {**dataclasses.asdict(priced.strategy), **seconds}


__all__ = ["AdaptConfig", "StageTimes", "Watch", "agreed", "apply", "as_event", "decide", "strategies_of"]
