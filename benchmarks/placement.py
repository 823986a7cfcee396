"""What is each placement method worth, on real routing and on generated, how far from the best can it be, and does it hold on other text?

    CROSSDOCK_TRACES=FOLDER python -m benchmarks.placement [--seconds 5] [--bound-seconds 60] [--only WORD] [--out FILE] [--json] [--short]

Real: every .npz of the folder that has a partner of its shape (layers, experts); plans are solved on all of it and scored on the partners.
Joined: the same with every two layers taken for one of twice as many experts and choices, since no such trace of a larger model is public.
Generated (`placement_instances.py`): 8 experts on 4 devices, which is solved exactly; 64 on 8 devices; 256 on 8 nodes of 8, plain, and with
two-level costs under load cap 1.05. Without a folder only these. One row is one method on one problem:

    objective, held_out     distinct devices per token and layer, steps between devices (hops), or milliseconds of a step; on the routing
                            that was solved for, and on other text, the mean of the partners
    gap_cost, _moved, _kept   proven distance from the best plan in per cent of the objective, of what moves and of what could be kept
    load, load_held_out     busiest device over the mean, in the worst layer
    solve_s, bound_s        seconds of the search, and of the bound, which is computed once for a problem

`--only transfer` prints another table, of `placement_transfer.py`: what becomes of the load on other text, and what helps.
"""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import placement_transfer
from benchmarks.command_line import one_line_errors
from benchmarks.measure import publish
from benchmarks.placement_instances import drifting_trace, joined_pairs
from benchmarks.placement_transfer import transfer_rows
from crossdock.errors import InfeasiblePlan, UsageError
from crossdock.placement.analysis.compare import Candidate, row_of
from crossdock.placement.costs.cost import Workload
from crossdock.placement.records.affinity import Affinity
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import Trace, concatenate
from crossdock.placement.solvers import SOLVERS, auto, check_constraints, load_peaks
from crossdock.placement.solvers.certificates.certificate import certified
from crossdock.placement.solvers.problem import Constraints, Objective, Problem, Solution
from crossdock.placement.solvers.solution import cost_of_plan

PUBLISHED = ("contiguous", "random", "balance", "eplb", "exflow", "moetuner")
COLUMNS = (
    "instance", "problem", "method", "objective", "held_out", "gap_cost", "gap_moved", "gap_kept", "load", "load_held_out", "solve_s",
    "bound_s",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Case:
    """One problem, the methods that are compared on it, and the affinities of other text."""

    instance: str
    title: str
    problem: Problem
    trace: Trace
    methods: tuple[tuple[str, float], ...]  # name and seconds
    others: tuple[Affinity, ...] = ()
    bound_seconds: float = 60.0


def rows_of(case: Case) -> Iterator[dict[str, Any]]:
    """A row for every method that found a plan within the constraints."""
    began_s = time.perf_counter()
    bound = certified(case.problem, case.bound_seconds)
    bound_s = time.perf_counter() - began_s
    found: list[Solution] = []
    for method, seconds in case.methods:
        try:
            began_s = time.perf_counter()
            solution = auto.improved(case.problem, seconds, 0, ()) if method == "auto" else SOLVERS[method](case.problem, seconds, 0)
            solve_s = time.perf_counter() - began_s
            check_constraints(case.problem, solution)
        except (InfeasiblePlan, UsageError) as error:
            print(f"{case.instance}, {case.title}: {error}", flush=True)
            continue
        found.append(solution)
        yield _row(case, solution, f"{method}, {seconds:g} s" if _repeated(case, method) else method, bound) | {
            "solve_s": round(solve_s, 2),
            "bound_s": round(bound_s, 1),
        }


def _repeated(case: Case, method: str) -> bool:
    return sum(name == method for name, _ in case.methods) > 1


def _row(case: Case, solution: Solution, label: str, bound: float) -> dict[str, Any]:
    problem, plan = case.problem, solution.plan
    scored, _ = row_of(Candidate(label, plan, solution, solution.seconds), problem, case.trace, fitted=True, bound=bound)
    others = [
        Problem(other, problem.topology, problem.workload, objective=problem.objective, node_weight=problem.node_weight)
        for other in case.others
    ]
    held_out = [cost_of_plan(other, plan) for other in others]
    unit = 1e3 if problem.objective == "seconds" else 1.0
    gaps = {key: getattr(scored, key) for key in ("gap_cost", "gap_moved", "gap_kept")}
    percent = {key: None if gap is None else round(100 * gap, 2) for key, gap in gaps.items()}
    return {
        "instance": case.instance,
        "problem": case.title,
        "method": label,
        "objective": round(solution.cost * unit, 4),
        "held_out": round(float(np.mean(held_out)) * unit, 4) if held_out else None,
        **percent,
        "load": round(max(load_peaks(problem, solution)), 3),
        "load_held_out": round(max(max(load_peaks(other, solution)) for other in others), 3) if others else None,
        "stopped_by": solution.stopped_by,
        "bound": scored.bound,
    }


def real_cases(traces: dict[str, Trace], seconds: float, bound_seconds: float) -> Iterator[Case]:
    """Distinct devices, hops and seconds on 8 devices, free and with load cap 1.1."""
    affinities = {name: Affinity.from_trace(trace) for name, trace in traces.items()}
    methods = tuple((method, seconds) for method in (*PUBLISHED, "sweep", "anneal", "auto"))
    for name, trace in traces.items():
        shape = trace.num_layers, trace.num_experts
        same = [other for other in traces if other != name and (traces[other].num_layers, traces[other].num_experts) == shape]
        others = tuple(affinities[other] for other in same)
        problems: list[tuple[str, Topology, Objective, float | None]] = [
            ("devices, 1x8", Topology.uniform(1, 8), "devices", None),
            ("devices, 1x8, cap 1.1", Topology.uniform(1, 8), "devices", 1.1),
            ("hops, 1x8", Topology.uniform(1, 8), "hops", None),
            ("hops, 1x8, cap 1.1", Topology.uniform(1, 8), "hops", 1.1),
            ("ms, 2x4", Topology.uniform(2, 4), "seconds", None),
        ]
        for title, topology, objective, cap in problems:
            problem = Problem(affinities[name], topology, Workload(), objective=objective, constraints=Constraints(load_cap=cap))
            yield Case(name, title, problem, trace, methods, others, bound_seconds)
        replicas = Problem(affinities[name], Topology.uniform(2, 4), Workload(), constraints=Constraints(slots=-(-shape[1] // 8) + 2))
        copying = tuple((method, seconds) for method in ("balance", "eplb", "eplb_global", "auto"))
        yield Case(name, "ms, 2x4, 2 more slots", replicas, trace, copying, others, bound_seconds)
        if same:
            yield _robust(name, trace, traces[same[0]], seconds, bound_seconds)


def joined_cases(traces: dict[str, Trace], seconds: float, bound_seconds: float) -> Iterator[Case]:
    """Pairs of recorded layers as layers of twice as many experts, on 8 devices: distinct devices, free and with load cap 1.1."""
    joined = {name: joined_pairs(trace) for name, trace in traces.items()}
    affinities = {name: Affinity.from_trace(trace) for name, trace in joined.items()}
    methods = (*((method, seconds) for method in ("contiguous", "eplb", "sweep", "auto")), ("auto", 4 * seconds))
    for name, trace in joined.items():
        shape = trace.num_layers, trace.num_experts
        others = tuple(
            affinities[other] for other in joined if other != name and (joined[other].num_layers, joined[other].num_experts) == shape
        )
        for title, cap in (("devices, 1x8", None), ("devices, 1x8, cap 1.1", 1.1)):
            constraints = Constraints(load_cap=cap)
            problem = Problem(affinities[name], Topology.uniform(1, 8), Workload(), objective="devices", constraints=constraints)
            yield Case(f"{name}, {trace.num_experts} experts joined", title, problem, trace, methods, others, bound_seconds)


def _robust(name: str, trace: Trace, other: Trace, seconds: float, bound_seconds: float) -> Case:
    """Planned on the trace and on every second block of other text, the cap on both; scored on the blocks of that text that are left."""
    seen_T = np.arange(other.num_tokens) // 512 % 2 == 0
    apart = tuple(Affinity.from_trace(part) for part in (trace, other.select(seen_T)))
    constraints = Constraints(load_cap=1.3)
    affinity = apart[0] + apart[1]
    problem = Problem(affinity, Topology.uniform(1, 8), Workload(), objective="devices", constraints=constraints, also=apart)
    scored = (Affinity.from_trace(other.select(~seen_T)),)
    both = concatenate([trace, other.select(seen_T)])
    return Case(name, "devices, 1x8, cap 1.3, robust", problem, both, (("auto", 2 * seconds),), scored, bound_seconds)


def generated_cases(bound_seconds: float, short: bool) -> Iterator[Case]:
    """Sizes from Mixtral's to DeepSeek-V3's; with `short` a tenth of the tokens and a quarter of the layers."""
    tokens, part = (20_000, 4) if short else (200_000, 1)
    quick = tuple((method, 5.0) for method in ("contiguous", "moetuner", "dp", "auto"))
    small = drifting_trace(tokens // 4, 64 // part, 8, 2, width=8)
    for title, topology, weight in (("hops, 1x4", Topology.uniform(1, 4), 1.0), ("hops, 2x2, node 4", Topology.uniform(2, 2), 4.0)):
        yield _generated("8 experts", title, small, topology, quick, bound_seconds, weight)
    yield _generated("8 experts", "devices, 1x4", small, Topology.uniform(1, 4), quick, bound_seconds, objective="devices")
    middle = drifting_trace(tokens // 2, 32 // part, 64, 4, width=12)
    methods = (("contiguous", 1.0), ("eplb", 1.0), ("moetuner", 20.0), ("sweep", 2.0), ("auto", 2.0), ("auto", 30.0))
    yield _generated("64 experts", "hops, 1x8", middle, Topology.uniform(1, 8), methods, bound_seconds)
    yield _generated("64 experts", "hops, 1x8, cap 1.1", middle, Topology.uniform(1, 8), methods, bound_seconds, cap=1.1)
    yield _generated("64 experts", "devices, 1x8", middle, Topology.uniform(1, 8), methods, bound_seconds, objective="devices")
    yield _generated("64 experts", "devices, 1x16", middle, Topology.uniform(1, 16), methods, bound_seconds, objective="devices")
    large = drifting_trace(tokens, 58 // part, 256, 1, width=16, memory=0.95)
    methods = (("contiguous", 1.0), ("eplb", 1.0), ("sweep", 2.0), ("auto", 2.0), ("auto", 30.0), ("auto", 120.0))
    yield _generated("256 experts", "hops, 8x8", large, Topology.uniform(8, 8), methods, 2 * bound_seconds)
    yield _generated("256 experts", "hops, 8x8, node 4, cap 1.05", large, Topology.uniform(8, 8), methods, 2 * bound_seconds, 4.0, 1.05)


def _generated(
    instance: str,
    title: str,
    trace: Trace,
    topology: Topology,
    methods: tuple[tuple[str, float], ...],
    bound_seconds: float,
    node_weight: float = 1.0,
    cap: float | None = None,
    objective: Objective = "hops",
) -> Case:
    constraints = Constraints(load_cap=cap)
    problem = Problem(
        Affinity.from_trace(trace), topology, Workload(), objective=objective, constraints=constraints, node_weight=node_weight
    )
    return Case(f"{instance} x {trace.num_layers}", title, problem, trace, methods, (), bound_seconds)


def _publish_transfer(traces: dict[str, Trace], seconds: float, options: argparse.Namespace) -> None:
    """Every ordered pair of traces of one model."""
    pairs = [
        (one, other)
        for one, other in itertools.permutations(traces, 2)
        if (traces[one].num_layers, traces[one].num_experts) == (traces[other].num_layers, traces[other].num_experts)
    ]
    rows = [row for one, other in pairs for row in transfer_rows(f"{one} to {other}", traces[one], traces[other], seconds)]
    publish(rows, f"load on other text, {seconds:g} s a search", options.out, options.json, placement_transfer.COLUMNS)


def load_traces(short: bool) -> dict[str, Trace]:
    """The traces of the folder that CROSSDOCK_TRACES names, by file name; none where it names none."""
    folder = os.environ.get("CROSSDOCK_TRACES", "")
    traces = {path.stem: Trace.load(path) for path in sorted(Path(folder).glob("*.npz"))} if folder else {}
    return {name: Trace(trace.experts_TLK[:, ::4], trace.num_experts) for name, trace in traces.items()} if short else traces


@one_line_errors
def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="most seconds of one search on real routing")
    parser.add_argument("--bound-seconds", type=float, default=60.0, help="most seconds of one bound; twice as many for 256 experts")
    parser.add_argument("--only", default="", help="only instances and problems whose name holds this word")
    parser.add_argument("--out", type=Path, help="also write the JSON document here")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--short", action="store_true", help="every fourth layer, few tokens, 2 s for everything")
    options = parser.parse_args()
    seconds, bound_seconds = (2.0, 2.0) if options.short else (options.seconds, options.bound_seconds)
    if options.only == "transfer":
        _publish_transfer(load_traces(options.short), seconds, options)
        return 0
    rows = []
    traces = load_traces(options.short)
    for cases in (
        real_cases(traces, seconds, bound_seconds),
        joined_cases(traces, seconds, bound_seconds),
        generated_cases(bound_seconds, options.short),
    ):
        for case in cases:
            if options.only in f"{case.instance}, {case.title}":
                rows += list(rows_of(case))
    publish(
        rows, f"placement methods, {seconds:g} s a search on real routing, {bound_seconds:g} s a bound", options.out, options.json, COLUMNS
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
