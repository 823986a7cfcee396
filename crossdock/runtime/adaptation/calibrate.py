"""Calibration: a topology and a workload whose predicted step is the one that was just measured, so that other plans can be predicted."""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crossdock.placement.costs.cost import Window as Windows
from crossdock.placement.costs.cost import Workload, transfer_seconds
from crossdock.placement.costs.evaluate import Evaluation
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.topology import Topology
from crossdock.placement.strategies.strategy import Strategy
from crossdock.placement.strategies.traffic import evaluate_strategies
from crossdock.runtime.adaptation.windows import Measured, RankRecord, transfer_seconds_of

WILD = 4.0
"""A device whose speed seems this many times the mean, or the mean this many times its, was not measured but missed."""

MOST_SCALED = 1.5
"""Links that would have to be so many times as fast or slow for the step to come out are not what the step is off by."""


@dataclass(frozen=True, eq=False)
class Calibrated:
    """Topology and workload as measured, and what the cost model makes of the measured window itself."""

    topology: Topology
    workload: Workload
    evaluation: Evaluation


def calibrate(
    measured: Measured, plan: Plan, topology: Topology, workload: Workload, strategies: Sequence[Strategy], follow_links: bool = False
) -> Calibrated:
    """Fit the cost model to a window that ran under `plan`, each layer by its strategy.

    `workload` brings the sizes (tokens, widths, wire, dispatch, micro-batches), `topology` the devices and links. Windows are the ledger's
    means; experts get a fixed cost and a speed per device by least squares; links that nobody measured are scaled, all alike, to the
    median transfer, and with `follow_links` measured ones as well, where transfers were waited for.

    `other_s` is what is left of the median step. Where ranks know how long all their other work took, it should be that, and is nearly:
    without `follow_links`, links are scaled once more by what makes the step come out so. Ranks do not go in lockstep as the model has it:
    while tokens reach one rank late, another is already at work, and under uneven plans a part of the transfers is hidden by that. Booked
    as less other work, it would be missing under even plans, which hide less.
    """
    groups = [measured.ranks[first : first + topology.num_devices] for first in range(0, len(measured.ranks), topology.num_devices)]
    turns = tuple(_windows_of_turn(measured.ranks, strategies, turn, len(workload.windows)) for turn in range(len(workload.turn_windows)))
    workload = dataclasses.replace(workload, window=_mean_windows(measured.ranks), turn_windows=turns)
    evaluations = [evaluate_strategies(trace, plan, topology, workload, strategies) for trace in measured.traces]
    overhead_s, flop_per_s_R = _expert_speed(groups, evaluations, workload, strategies)
    workload = dataclasses.replace(workload, expert_overhead_s=overhead_s)
    topology = dataclasses.replace(topology, flop_per_s_R=flop_per_s_R)
    if topology.num_devices > 1 and (follow_links or not topology.measured):
        topology = _scaled_links(groups, evaluations, topology, workload, strategies)
    rests_s = [rank.rest_s for rank in measured.ranks]
    known_s = [rest_s for rest_s in rests_s if rest_s is not None]
    if topology.num_devices > 1 and len(known_s) == len(rests_s) and not follow_links:
        rest_s = max(0.0, statistics.fmean(known_s) - _windows_s(workload, plan.num_layers))
        topology = _links_of_step(measured, plan, topology, dataclasses.replace(workload, other_s=rest_s), strategies)
    blocks_s = evaluate_strategies(measured.trace, plan, topology, workload, strategies).step_s  # other_s is still 0
    workload = dataclasses.replace(workload, other_s=max(0.0, measured.step_s - blocks_s))
    return Calibrated(topology, workload, evaluate_strategies(measured.trace, plan, topology, workload, strategies))


def _mean_windows(ranks: Sequence[RankRecord]) -> Windows:
    profiles = [profile for rank in ranks for profile in rank.profile_of_layer.values()]
    return Windows(**{field.name: statistics.fmean(getattr(p, field.name) for p in profiles) for field in dataclasses.fields(Windows)})


def _windows_of_turn(ranks: Sequence[RankRecord], strategies: Sequence[Strategy], turn: int, num_turns: int) -> Windows:
    """Mean windows of one of the turns in which blocks route their tokens. In the lists of transfers turns follow one another, each with
    its chunks; which way back belongs to which way out is of no account, because the makespan adds them up."""
    found: dict[str, list[float]] = {field.name: [] for field in dataclasses.fields(Windows)}
    for rank in ranks:
        for (layer, stage, direction), transfers in rank.transfers.items():
            chunks = _chunks(strategies[layer], direction)
            of_turn = [transfer for number, transfer in enumerate(transfers) if number // chunks % num_turns == turn]
            found[f"{stage}_{direction}_s"] += [transfer.flight_s - transfer.wait_s for transfer in of_turn]
    return Windows(**{name: max(0.0, statistics.fmean(values or [0.0])) for name, values in found.items()})


def _expert_speed(
    groups: Sequence[Sequence[RankRecord]], evaluations: Sequence[Evaluation], workload: Workload, strategies: Sequence[Strategy]
) -> tuple[float, NDArray[np.float64]]:
    """(fixed seconds of a block's experts in one direction, flop/s [R]) from the expert seconds and rows of every rank and layer."""
    points = []  # (rank, flop, seconds)
    for ranks, evaluation in zip(groups, evaluations, strict=True):
        rows_LR = evaluation.rows_LR * _per_micro_batch(evaluation, len(ranks), workload)
        for rank, record in enumerate(ranks):
            for layer, profile in record.profile_of_layer.items():
                flop, strategy = rows_LR[layer, rank] * workload.row_flop, strategies[layer]  # of a chunk, as the profile's times are
                points.append((rank, flop / strategy.forward_chunks, profile.expert_forward_s))
                points.append((rank, 2.0 * flop / strategy.backward_chunks, profile.expert_backward_s))
    rank_P, flop_P, seconds_P = (np.array(column) for column in zip(*points, strict=True))
    return _fit(rank_P, flop_P, seconds_P, len(groups[0]))


def _fit(
    rank_P: NDArray[np.int64], flop_P: NDArray[np.float64], seconds_P: NDArray[np.float64], num_ranks: int
) -> tuple[float, NDArray[np.float64]]:
    """Least squares of seconds = overhead + flop / speed of the rank: (overhead, speed [R]).

    Where noise makes the overhead negative it is left out; where it makes a speed negative or wild, all ranks get the mean speed.
    """
    flop_PR = np.where(rank_P[:, None] == np.arange(num_ranks), flop_P[:, None], 0.0)
    scale = max(float(flop_P.max()), 1.0)  # so that both unknowns are seconds
    both = np.linalg.lstsq(np.column_stack([np.ones_like(seconds_P), flop_PR / scale]), seconds_P, rcond=None)[0]
    overhead_s, s_per_flop_R = float(both[0]), both[1:] / scale
    if overhead_s < 0:
        overhead_s, s_per_flop_R = 0.0, np.linalg.lstsq(flop_PR / scale, seconds_P, rcond=None)[0] / scale
    mean_s_per_flop = float(s_per_flop_R.mean())
    if mean_s_per_flop <= 0:
        overhead_s, mean_s_per_flop = 0.0, float(seconds_P.sum() / max(flop_P.sum(), 1.0))
    if not np.all((s_per_flop_R > mean_s_per_flop / WILD) & (s_per_flop_R < mean_s_per_flop * WILD)):
        s_per_flop_R = np.full(num_ranks, mean_s_per_flop)
    return overhead_s, 1.0 / np.maximum(s_per_flop_R, 1e-18)


def _scaled_links(
    groups: Sequence[Sequence[RankRecord]],
    evaluations: Sequence[Evaluation],
    topology: Topology,
    workload: Workload,
    strategies: Sequence[Strategy],
) -> Topology:
    """The latency of exchanged counts, and all links' bytes/s times the factor that makes the median transfer take what it took."""
    latency_s = statistics.median(
        min(flights) for ranks in groups for flights in zip(*(rank.count_flights_s for rank in ranks), strict=True)
    )
    apart_RR = ~np.eye(topology.num_devices, dtype=bool)
    ideal = dataclasses.replace(topology, latency_s_RR=np.zeros_like(topology.latency_s_RR))
    factors: dict[bool, list[float]] = {True: [], False: []}
    for ranks, evaluation in zip(groups, evaluations, strict=True):
        bytes_HLRR = evaluation.hops_HLRR * (_per_micro_batch(evaluation, len(ranks), workload) * workload.copy_bytes)
        for (layer, stage, direction), (seconds, is_known) in transfer_seconds_of(_unqueued(ranks, strategies)).items():
            goes_out = (stage == "dispatch") == (direction == "forward")
            chunks = _chunks(strategies[layer], direction)
            hops_HRR = bytes_HLRR[:, layer] / chunks
            port_s = sum(float(transfer_seconds(hop_RR if goes_out else hop_RR.T, ideal)) for hop_RR in hops_HRR)
            if port_s > 0:
                factors[is_known].append(port_s / max(seconds - latency_s, 0.1 * seconds))
    bounds = [] if topology.measured else factors[False]  # of a hidden transfer only a bound is known, and a measured link knows better
    factor = statistics.median(factors[True] or bounds or [1.0])
    latency_s_RR = topology.latency_s_RR if topology.measured else np.where(apart_RR, latency_s, 0.0)
    return dataclasses.replace(_times(topology, factor, "; links scaled to a live run's transfers"), latency_s_RR=latency_s_RR)


def _windows_s(workload: Workload, num_layers: int) -> float:
    """Seconds of a step that windows take."""
    return workload.micro_batches * num_layers * statistics.fmean(sum(dataclasses.asdict(window).values()) for window in workload.windows)


def _links_of_step(measured: Measured, plan: Plan, topology: Topology, workload: Workload, strategies: Sequence[Strategy]) -> Topology:
    """The topology with all links between devices times the one factor under which the predicted step is the measured one, by bisection;
    as it is where none between 1 / MOST_SCALED and MOST_SCALED does that, as where transfers are hidden."""

    def excess_s(factor: float) -> float:
        there = _times(topology, factor)
        return evaluate_strategies(measured.trace, plan, there, workload, strategies).step_s - measured.step_s

    low, high = 1.0 / MOST_SCALED, MOST_SCALED
    if not excess_s(low) > 0.0 > excess_s(high):
        return topology
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if excess_s(middle) > 0.0 else (low, middle)
    return _times(topology, (low * high) ** 0.5, "; links scaled to the steps of a live run")


def _times(topology: Topology, factor: float, source: str = "") -> Topology:
    """The topology with all links between devices `factor` times as fast."""
    apart_RR = ~np.eye(topology.num_devices, dtype=bool)
    return dataclasses.replace(
        topology,
        bytes_per_s_RR=np.where(apart_RR, topology.bytes_per_s_RR * factor, topology.bytes_per_s_RR),
        node_bytes_per_s=None if topology.node_bytes_per_s is None else topology.node_bytes_per_s * factor,
        source=f"{topology.source}{source}".lstrip("; "),
    )


def _unqueued(ranks: Sequence[RankRecord], strategies: Sequence[Strategy]) -> list[RankRecord]:
    """The records with those transfers alone that had the link for themselves: of chunks, which queue, the first one away from home."""
    records = []
    for rank in ranks:
        transfers = {}
        for (layer, stage, direction), found in rank.transfers.items():
            goes_out = (stage == "dispatch") == (direction == "forward")
            chunks = _chunks(strategies[layer], direction)
            if chunks == 1 or goes_out:
                transfers[layer, stage, direction] = found[::chunks]
        records.append(dataclasses.replace(rank, transfers=transfers))
    return records


def _chunks(strategy: Strategy, direction: str) -> int:
    return strategy.forward_chunks if direction == "forward" else strategy.backward_chunks


def _per_micro_batch(evaluation: Evaluation, num_devices: int, workload: Workload) -> float:
    """What turns an evaluation's counts into those of one micro-batch."""
    return workload.tokens_per_rank * num_devices / evaluation.num_tokens
