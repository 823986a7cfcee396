"""From rounds to rows: medians, ratios to Crossdock with intervals from resampled rounds, errors in words, and the bound beside them."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.measure import Spread
from benchmarks.peers.case import DTYPES, Case
from benchmarks.peers.rounds import TOLERANCE, Outcome

COLUMNS = ["row", "step_s", "step_s_low", "step_s_high", "over_crossdock", "ratio_low", "ratio_high", "link_mb", "cpu_s", "mathematics"]
RESAMPLES = 4000


@dataclass(frozen=True)
class Place:
    """Where and on what rows were measured. rate_bit_per_s: of each node's link, None on one host."""

    hosts: str
    rate_bit_per_s: float | None
    case: str


def rows_of(place: Place, outcomes: Sequence[Outcome], case: Case) -> list[dict[str, Any]]:
    """One row a variant, fastest first, those without a time last; a star where ours of equal mathematics is fastest.

    `over_crossdock` is the median over rounds of the paired ratio to our best way, with a 95 % interval; above 1 the row is slower.
    """
    tolerance = tolerance_of(case)
    ours = [o for o in outcomes if o.variant.ours and not o.reason and o.step_s and max(o.errors.values()) <= tolerance]
    best = min(ours, key=lambda outcome: statistics.median(outcome.step_s), default=None)
    best_s = best_of_others([outcome.step_s for outcome in ours])
    rows = [_row(place, outcome, outcome is best, best_s, tolerance) for outcome in outcomes]
    return sorted(rows, key=lambda row: row["step_s"] if row["step_s"] is not None else float("inf"))


def best_of_others(series: Sequence[Sequence[float]]) -> list[float]:
    """For each round the seconds of the series that is fastest by the median of the other rounds, so that choosing is fair."""
    if not series:
        return []

    def without(seconds: Sequence[float], number: int) -> float:
        return statistics.median([*seconds[:number], *seconds[number + 1 :]] or seconds)

    return [min(series, key=lambda seconds: without(seconds, number))[number] for number in range(len(series[0]))]


def tolerance_of(case: Case) -> float:
    """The relative error up to which a row has the same mathematics."""
    return TOLERANCE[f"{case.kind} {case.dtype}"]


def _row(place: Place, outcome: Outcome, best: bool, best_s: Sequence[float], tolerance: float) -> dict[str, Any]:
    row: dict[str, Any] = {
        "hosts": place.hosts,
        "link_bit_per_s": place.rate_bit_per_s,
        "case": place.case,
        "system": outcome.variant.system,
        "row": outcome.variant.name + (" *" if best else ""),
        "how": outcome.variant.how,
        "mathematics": mathematics(outcome, tolerance),
        "errors": dict(outcome.errors),
        "step_s": None,
        "rounds": len(outcome.step_s),
    }
    if outcome.reason or not outcome.step_s:
        return row
    row |= Spread.of(outcome.step_s).row("step_s")
    row["cpu_s"] = statistics.median(outcome.cpu_s)
    row["link_mb"] = statistics.median(outcome.link_bytes) / 1e6
    row["all_step_s"] = list(outcome.step_s)
    if len(best_s) == len(outcome.step_s):
        ratio, low, high = paired_interval(outcome.step_s, best_s)
        row |= {"over_crossdock": ratio, "ratio_low": low, "ratio_high": high}
    return row


def mathematics(outcome: Outcome, tolerance: float) -> str:
    """`equal` where outputs, input gradients and weight gradients are right, else what is not."""
    if outcome.reason:
        return f"none: {outcome.reason}"
    wrong = {name: error for name, error in outcome.errors.items() if not error <= tolerance}
    if not wrong:
        return "equal"
    return "differs: " + ", ".join(f"{name.replace('_', ' ')} by {error:.1e}" for name, error in wrong.items())


def paired_interval(above: Sequence[float], below: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Median of the rounds' ratios above/below and a 95 % interval of it, by resampling rounds."""
    ratios = np.asarray(above) / np.asarray(below)
    drawn = np.random.default_rng(seed).integers(len(ratios), size=(RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[drawn], axis=1), [0.025, 0.975])
    return float(np.median(ratios)), float(low), float(high)


def least_link_bytes(case: Case, num_nodes: int) -> int:
    """Bytes that the busier direction of a node's link must carry in a step: one row a token and other node, there and back, twice.

    Whatever the schedule and however copies are shared: the rows are of the case's dtype, and counts cost nothing.
    """
    ranks_per_node = case.sizes.ranks // num_nodes
    node_RTK = case.expert_RTK // case.sizes.num_slots // ranks_per_node
    home_R = torch.arange(case.sizes.ranks) // ranks_per_node
    rows_NN = [[int((node_RTK[home_R == home] == node).any(-1).sum()) for node in range(num_nodes)] for home in range(num_nodes)]
    sent = [sum(rows_NN[home][node] + rows_NN[node][home] for node in range(num_nodes) if node != home) for home in range(num_nodes)]
    return 2 * max(sent) * case.sizes.model_width * DTYPES[case.dtype].itemsize


def load_max_over_mean(case: Case) -> float:
    """Rows of the busiest rank over the mean, with experts in equal blocks."""
    rank_N = (case.expert_RTK // case.sizes.num_slots).flatten()
    rows_R = torch.bincount(rank_N, minlength=case.sizes.ranks).double()
    return float(rows_R.max() / rows_R.mean())


def bound_of(case: Case, num_nodes: int, rate_bit_per_s: float | None, experts_s: float | None) -> dict[str, float | None]:
    """Seconds that no layer can do without: its link's least bytes, or its experts' arithmetic, the longer of the two.

    experts_s: of the experts alone on the busiest rank. A planner may place them otherwise, so what counts is their even share.
    """
    link_s = least_link_bytes(case, num_nodes) * 8 / rate_bit_per_s if rate_bit_per_s else 0.0
    even_s = None if experts_s is None else experts_s / load_max_over_mean(case)
    return {"link_s": link_s, "experts_s": even_s, "bound_s": max(link_s, even_s or 0.0)}


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """Who was first among rows of equal mathematics, and by how much the best of the others is behind or ahead of us."""
    timed = [row for row in rows if row["step_s"] is not None and row["mathematics"] == "equal"]
    others = [row for row in timed if row["system"] != "crossdock" and "over_crossdock" in row]
    if not others:
        return "nobody to compare with"
    first = min(others, key=lambda row: row["over_crossdock"])
    where = f"{first['over_crossdock']:.2f} ({first['ratio_low']:.2f} to {first['ratio_high']:.2f})"
    if first["ratio_low"] > 1:
        return f"first; next is {first['row']}, {where} times our time"
    if first["ratio_high"] < 1:
        return f"NOT FIRST: {first['row']} takes {where} of our time"
    return f"level with {first['row']}: {where}"
