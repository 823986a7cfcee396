"""What becomes of a plan's load on other text, and what helps: the table of `benchmarks.placement --only transfer`.

All plans are made for the text that is known, on 8 devices, but for two kinds of rows: `both texts` knows every second block of the other
text and is scored on the blocks between, and `re-planned` makes a plan from each quarter of the other text and is scored on the next one.

    cap, pieces             load cap in the search, and on how many consecutive pieces of the known text it holds, each by itself
    load, load_held_out     busiest device over the mean in the worst layer, on the known text and on the other
    load_mean               the latter's mean over layers
    devices                 distinct devices per token and layer on the other text: what the plan sends
    memory                  slots of each device over what one copy of each expert needs: memory of experts with their optimizer state
    moves                   experts that change their device at each re-planning, of all, after devices were renamed so that fewest do
"""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from crossdock.errors import InfeasiblePlan
from crossdock.placement.analysis.relabel import relabelled
from crossdock.placement.costs.cost import Workload
from crossdock.placement.records.affinity import Affinity
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import Trace, concatenate, in_pieces
from crossdock.placement.solvers import load_peaks, solve
from crossdock.placement.solvers.problem import Constraints, Problem, Solution
from crossdock.placement.solvers.solution import cost_of_plan

DEVICES = 8
BLOCK_TOKENS = 512  # of the other text, known and scored on by turns
WINDOWS = 4
COLUMNS = ("instance", "plan", "cap", "pieces", "load", "load_held_out", "load_mean", "devices", "memory", "moves", "solve_s")


@dataclass(frozen=True)
class Way:
    """How a plan is made: by which method, with how many more slots, under which load cap, and on how many pieces that holds."""

    method: str
    cap: float | None = None
    pieces: int = 1
    spare_slots: int = 0

    @property
    def label(self) -> str:
        return self.method + (f", {self.spare_slots} spare slots" if self.spare_slots else "")

    def problem(self, *texts: Trace) -> Problem:
        """The problem for all `texts` together, with the cap on each of them, or on each of their pieces."""
        constraints = Constraints(load_cap=self.cap, spare_slots=self.spare_slots or None)
        pieces = [piece for text in texts for piece in in_pieces(text, self.pieces)]
        also = tuple(Affinity.from_trace(piece) for piece in pieces) if len(pieces) > 1 else ()
        affinity = Affinity.from_trace(concatenate(texts))
        return Problem(affinity, Topology.uniform(1, DEVICES), Workload(), "home", "devices", constraints, also=also)


WAYS = (
    Way("contiguous"),
    Way("balance"),
    Way("auto"),
    Way("auto", 1.1),
    Way("auto", 1.3),
    Way("auto", 1.6),
    Way("auto", 1.6, 2),
    Way("auto", 1.6, 4),
    Way("auto", 1.6, 8),
    Way("auto", 1.75, 16),
    Way("auto", 1.1, spare_slots=2),
    Way("auto", 1.6, 8, spare_slots=2),
    Way("eplb", spare_slots=1),
    Way("eplb", spare_slots=2),
)
BOTH = (Way("auto", 1.3), Way("auto", 1.6, 4))
RE_PLANNED = (Way("balance"), Way("auto", 1.4), Way("eplb", spare_slots=2))


def transfer_rows(name: str, known: Trace, other: Trace, seconds: float) -> Iterator[dict[str, Any]]:
    """A row for every way that finds a plan; of others the reason is printed."""
    for way in WAYS:
        yield from _row(name, way, way.label, way.problem(known), other, seconds)
    seen_T = np.arange(other.num_tokens) // BLOCK_TOKENS % 2 == 0
    for way in BOTH:
        yield from _row(name, way, f"{way.label}, both texts", way.problem(known, other.select(seen_T)), other.select(~seen_T), seconds)
    for way in RE_PLANNED:
        yield from _re_planned(name, way, other, seconds)


def _row(name: str, way: Way, label: str, problem: Problem, other: Trace, seconds: float) -> Iterator[dict[str, Any]]:
    solution, solve_s = _solved(f"{name}, {label}", problem, way.method, seconds)
    if solution is not None:
        yield _head(name, label, way) | _scores(solution, problem, other) | {"solve_s": round(solve_s, 2)}


def _re_planned(name: str, way: Way, other: Trace, seconds: float) -> Iterator[dict[str, Any]]:
    """The mean over windows of the other text; the plan of each is made from the one before, and its devices are named to move least."""
    windows, rows, moved, took_s = in_pieces(other, WINDOWS), [], [], []
    before: Plan | None = None
    for window, after in itertools.pairwise(windows):
        problem = way.problem(window)
        solution, solve_s = _solved(f"{name}, {way.label}, re-planned", problem, way.method, seconds)
        if solution is None:
            return
        if before is not None:
            solution = replace(solution, plan=relabelled(solution.plan, before, problem.topology))
            moved.append(len(before.moves_to(solution.plan)) / (other.num_layers * other.num_experts))
        before = solution.plan
        rows.append(_scores(solution, problem, after))
        took_s.append(solve_s)
    means = {key: round(float(np.mean([row[key] for row in rows])), 3) for key in rows[0]}
    yield (
        _head(name, f"{way.label}, re-planned", way) | means | {"moves": round(float(np.mean(moved)), 3), "solve_s": round(max(took_s), 2)}
    )


def _solved(what: str, problem: Problem, method: str, seconds: float) -> tuple[Solution | None, float]:
    began_s = time.perf_counter()
    try:
        solution = solve(problem, method, seconds, seed=0)
    except InfeasiblePlan as error:
        print(f"{what}: {error}", flush=True)
        return None, 0.0
    return solution, time.perf_counter() - began_s


def _head(name: str, label: str, way: Way) -> dict[str, Any]:
    return {"instance": name, "plan": label, "cap": way.cap, "pieces": way.pieces if way.cap is not None else None}


def _scores(solution: Solution, problem: Problem, other: Trace) -> dict[str, Any]:
    """Load and traffic on other text, and load on the text that was planned for."""
    held_out = replace(problem, affinity=Affinity.from_trace(other), also=())
    peaks = load_peaks(held_out, solution)
    return {
        "load": round(max(load_peaks(replace(problem, also=()), solution)), 3),
        "load_held_out": round(max(peaks), 3),
        "load_mean": round(float(np.mean(peaks)), 3),
        "devices": round(cost_of_plan(held_out, solution.plan), 3),
        "memory": round(solution.plan.slots_per_device * DEVICES / problem.num_experts, 3),
    }
