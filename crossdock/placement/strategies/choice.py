"""Choosing a strategy: which dispatch, expert slot, chunks and gathered experts each MoE layer should use, from what was measured.

Pure functions over numbers; the runtime measures, rank 0 asks `choose`, and every rank applies the one record that comes out
(`strategy.py`).

    traffic       what the tokens of one micro-batch send under one dispatch and one set of gathered experts
    problem       all that the choice for one layer depends on: traffics, measured times, links

A strategy is priced as the makespan of its block, forward plus backward: the stages of the shared stream, the experts of the slowest device
and what of the transfers stands out of the stages that run beside them. Computing that no strategy saves (packing rows, the exchange of
counts) is added to every candidate alike, by how much of it the candidate asks for.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from crossdock.errors import BadData
from crossdock.placement.costs.cost import BACKWARD_FLOP_RATIO, Dispatch, Workload, transfer_seconds
from crossdock.placement.records.topology import Topology
from crossdock.placement.strategies.overlap_rule import Interference
from crossdock.placement.strategies.pipeline import BlockTimes, chunked_makespan, mismatch_slot
from crossdock.placement.strategies.strategy import Choice, Priced, Strategy, describe, in_ms

Float = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Traffic:
    """What the tokens of one micro-batch send from their homes to their experts; the way back is the same turned round.

    hops_HRR         [H, R, R] rows from device to device in each hop, one hop after the other: one for flat and de-duplicated dispatch
    rows_R           [R] rows that each device's experts compute
    weight_hops_HRR  [G, R, R] bytes of gathered experts' weights, hop after hop; G is 0 where nothing is gathered
    """

    dispatch: Dispatch
    gathered: tuple[int, ...]
    hops_HRR: Float
    rows_R: Float
    weight_hops_HRR: Float = field(default_factory=lambda: np.zeros((0, 1, 1)))


@dataclass(frozen=True)
class LayerTimes:
    """Measured seconds of one layer, on its slowest rank.

    stage_s                forward seconds of the stages that may run while tokens travel, in order
    backward_over_forward  how much longer a stage takes backward
    exchange_s             host seconds of one exchange of counts, which nothing hides; all chunks share it
    row_s_per_byte         host seconds per byte that is packed for, or unpacked from, one hop
    interference           what computing and travelling cost one another while both are under way
    early_s                forward seconds of computing before the dispatch, under which weights of gathered experts travel
    """

    stage_s: tuple[float, ...]
    backward_over_forward: float = 2.0
    exchange_s: float = 0.0
    row_s_per_byte: float = 0.0
    interference: Interference = field(default_factory=Interference)
    early_s: float = 0.0


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """All that the choice for one layer depends on."""

    layer: int
    traffics: tuple[Traffic, ...]
    """One for each dispatch and each set of gathered experts that may be chosen."""
    times: LayerTimes
    topology: Topology
    workload: Workload
    """Row bytes, flop of a row, fixed cost of the experts; its window and dispatch are not read."""
    chunk_counts: tuple[int, ...] = (1,)
    """Degrees to try, forward and backward each on their own."""
    wire: str = "fp32"


def choose(problem: LayerProblem, current: Strategy, min_saving: float = 0.0) -> Choice:
    """The strategy with the shortest predicted block, or `current` where that saves less than `min_saving` of it.

    `current` must be a strategy of one of the problem's traffics. Equal times go to the simpler strategy: fewer gathered experts, fewer
    chunks, then the order of `traffics`. Raises `BadData` where the problem has no traffic.
    """
    if not problem.traffics:
        raise BadData(f"layer {problem.layer} has no strategy to choose from; name at least one dispatch")
    candidates = list(price_all(problem))
    best = min(candidates, key=_rank)
    now = price(problem, current)
    keeps = now.total_s - best.total_s <= min_saving * now.total_s and now.total_s > 0
    taken = now if keeps else best
    families: dict[tuple[str, bool, bool, bool], Priced] = {}
    for candidate in (*candidates, now):
        known = families.get(candidate.strategy.family)
        if known is None or _rank(candidate) < _rank(known):
            families[candidate.strategy.family] = candidate
    alternatives = tuple(sorted(families.values(), key=_rank))
    reason = _reason(now, best, keeps, min_saving, alternatives)
    ruled = by_mismatch(problem, taken.strategy)
    return Choice(problem.layer, taken.strategy, problem.wire, taken.total_s, now.total_s, alternatives, len(candidates), reason, ruled)


def by_mismatch(problem: LayerProblem, strategy: Strategy) -> Priced | None:
    """`strategy` with the expert slot of ScMoE's rule (arXiv 2404.05019, section 3.3), priced by the makespan like every candidate.

    None where no stage can run while tokens travel. Raises `BadData` where the problem does not know the strategy's traffic.
    """
    if not problem.times.stage_s:
        return None
    block = _Block(problem, traffic_under(problem, strategy))
    times = BlockTimes(problem.times.stage_s, block.whole_out_s, block.rows_s, block.whole_back_s)
    return block.of(replace(strategy, expert_slot=mismatch_slot(times), overlap=True))


def price_all(problem: LayerProblem) -> Iterable[Priced]:
    """Every candidate with its predicted seconds.

    Tokens travel in as many pieces as the least common multiple of both degrees, in either direction. Where nothing overlaps, neither slot
    nor chunks matter.
    """
    num_slots = len(problem.times.stage_s) + 1
    for traffic in problem.traffics:
        priced = _Block(problem, traffic)
        for overlap, slot in [(False, 0), *((True, slot) for slot in range(num_slots if num_slots > 1 else 0))]:
            chunk_counts = problem.chunk_counts if overlap else (1,)
            for forward_chunks, backward_chunks in itertools.product(chunk_counts, repeat=2):
                yield priced.of(Strategy(traffic.dispatch, slot, forward_chunks, backward_chunks, overlap, traffic.gathered))


def price(problem: LayerProblem, strategy: Strategy) -> Priced:
    """Predicted seconds of one strategy. Raises `BadData` where the problem does not know its traffic."""
    return _Block(problem, traffic_under(problem, strategy)).of(strategy)


def traffic_under(problem: LayerProblem, strategy: Strategy) -> Traffic:
    """What was counted for the strategy's dispatch and gathered experts. Raises `BadData` where nothing was."""
    for traffic in problem.traffics:
        if (traffic.dispatch, traffic.gathered) == (strategy.dispatch, strategy.gathered):
            return traffic
    known = ", ".join(f"{traffic.dispatch} with {len(traffic.gathered)} gathered" for traffic in problem.traffics)
    raise BadData(f"layer {problem.layer}: no traffic was counted for {strategy.dispatch} gathering {strategy.gathered}; counted: {known}")


class _Block:
    """Seconds of one block under one traffic."""

    def __init__(self, problem: LayerProblem, traffic: Traffic) -> None:
        self.times, self.workload, self.topology = problem.times, problem.workload, problem.topology
        self.bytes_HRR = np.asarray(traffic.hops_HRR, dtype=np.float64) * problem.workload.copy_bytes
        self.weights_out_s = sum(float(transfer_seconds(hop_RR, problem.topology)) for hop_RR in traffic.weight_hops_HRR)
        self.weights_back_s = sum(float(transfer_seconds(hop_RR.T, problem.topology)) for hop_RR in traffic.weight_hops_HRR)
        seconds_R = np.asarray(traffic.rows_R, dtype=np.float64) * problem.workload.row_flop / problem.topology.flop_per_s_R
        self.rows_s = float(seconds_R.max())
        # Rows are packed where they leave and unpacked where they come; the busiest device is the one that the step waits for.
        handled_HR = self.bytes_HRR.sum(axis=2) + self.bytes_HRR.sum(axis=1)
        self.packing_s = problem.times.row_s_per_byte * float(handled_HR.max(axis=1).sum())
        self._out: dict[int, float] = {}
        self._back: dict[int, float] = {}

    @property
    def whole_out_s(self) -> float:
        """Seconds of all tokens on their way to the experts, in one piece."""
        return self._out_s(1, 1)

    @property
    def whole_back_s(self) -> float:
        """The same on their way home."""
        return self._back_s(1, 1)

    def of(self, strategy: Strategy) -> Priced:
        """Both directions, in the pieces that the strategy cuts the tokens into."""
        pieces = math.lcm(strategy.forward_chunks, strategy.backward_chunks)
        return Priced(
            strategy,
            self.forward_s(strategy.expert_slot, strategy.forward_chunks, pieces, strategy.overlap),
            self.backward_s(strategy.expert_slot, strategy.backward_chunks, pieces, strategy.overlap),
        )

    def forward_s(self, slot: int, chunks: int, pieces: int, overlap: bool) -> float:
        """Dispatch beside the stages before the slot, combine beside those from it on; weights come first."""
        before_s, after_s = self._sides(slot, 1.0)
        extra_s = 2 * self.packing_s + self.times.exchange_s
        dispatch_s, combine_s = self._out_s(chunks, pieces), self._back_s(chunks, pieces)
        return extra_s + self._seconds(
            before_s, dispatch_s, self.rows_s, after_s, combine_s, chunks, pieces, overlap, self._late_s(self.weights_out_s, 1.0), 0.0
        )

    def backward_s(self, slot: int, chunks: int, pieces: int, overlap: bool) -> float:
        """The combine's gradient travels out beside the later stages, the dispatch's back beside the earlier ones; weights' come last."""
        factor = self.times.backward_over_forward
        before_s, after_s = self._sides(slot, factor)
        expert_s = BACKWARD_FLOP_RATIO * self.rows_s
        out_s, back_s = self._out_s(chunks, pieces), self._back_s(chunks, pieces)
        return 2 * self.packing_s + self._seconds(
            after_s, out_s, expert_s, before_s, back_s, chunks, pieces, overlap, 0.0, self._late_s(self.weights_back_s, factor)
        )

    def _seconds(
        self,
        before_s: float,
        out_s: float,
        expert_s: float,
        after_s: float,
        back_s: float,
        chunks: int,
        pieces: int,
        overlap: bool,
        weights_before_s: float,
        weights_after_s: float,
    ) -> float:
        """One direction: `out_s` and `back_s` are the transfers of one of `chunks` equal chunks."""
        overhead_s = self.workload.expert_overhead_s
        if not overlap:
            whole_s = chunks * (out_s + back_s + overhead_s) + expert_s
            return before_s + after_s + whole_s + weights_before_s + weights_after_s
        one_s, back_s = expert_s / chunks + overhead_s, back_s + weights_after_s / chunks
        # Chunks overlap with the experts as well; what overlaps at all is slowed down once, whatever the pieces.
        if chunks == 1:
            beside_s = min(before_s, out_s) + min(after_s, back_s)
        else:
            beside_s = min(before_s + expert_s + after_s, chunks * (out_s + back_s))
        mutual_s = 2 * pieces * self.times.interference.handle_s + (self.times.interference.slowdown - 1.0) * beside_s
        return mutual_s + chunked_makespan(before_s, out_s, one_s, after_s, back_s, chunks, weights_before_s)

    def _late_s(self, weights_s: float, factor: float) -> float:
        """What of the weights' way no early stage hides."""
        return max(0.0, weights_s - factor * self.times.early_s)

    def _sides(self, slot: int, factor: float) -> tuple[float, float]:
        return factor * sum(self.times.stage_s[:slot]), factor * sum(self.times.stage_s[slot:])

    def _out_s(self, chunks: int, pieces: int) -> float:
        if pieces not in self._out:
            self._out[pieces] = sum(float(transfer_seconds(hop_RR / pieces, self.topology)) for hop_RR in self.bytes_HRR)
        return self._out[pieces] * pieces / chunks

    def _back_s(self, chunks: int, pieces: int) -> float:
        if pieces not in self._back:
            self._back[pieces] = sum(float(transfer_seconds(hop_RR.T / pieces, self.topology)) for hop_RR in self.bytes_HRR)
        return self._back[pieces] * pieces / chunks


def _rank(priced: Priced) -> tuple[float, int, int, bool, int]:
    """Order of candidates: time to twelve digits, so that rounding decides nothing, then simplicity."""
    strategy = priced.strategy
    time_s = float(f"{priced.total_s:.12g}")
    return time_s, len(strategy.gathered), strategy.forward_chunks + strategy.backward_chunks, not strategy.overlap, strategy.expert_slot


def _reason(now: Priced, best: Priced, keeps: bool, min_saving: float, alternatives: Sequence[Priced]) -> str:
    if best.strategy == now.strategy:
        others = [other for other in alternatives if other.strategy.family != now.strategy.family]
        lead = f"; next is {describe(others[0].strategy)} at {in_ms(others[0].total_s)}" if others else ""
        return f"what runs is the fastest: {in_ms(now.total_s)}{lead}"
    saving = 1.0 - best.total_s / now.total_s if now.total_s > 0 else 0.0
    found = f"{describe(best.strategy)} is predicted at {in_ms(best.total_s)}, {describe(now.strategy)} at {in_ms(now.total_s)}"
    less = f"{found}: {saving:.1%} less"
    return f"{less}, below the {min_saving:.1%} that a change must save" if keeps else less
