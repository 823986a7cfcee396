"""What is each placement method worth on real routing, on the tokens it saw, on later tokens of the same text, and on other text?

    CROSSDOCK_TRACES=FOLDER python -m benchmarks.placement [--seconds 10] [--seeds 3] [--out FILE] [--json] [--short]

Every .npz of the folder is a trace; those of one shape (layers, experts) are scored on one another. Each trace is cut into blocks of 512
tokens: plans are solved on the even blocks (fit), scored there, on the odd ones (held_out), and on each other trace (its name). Values are
medians over seeds; low and high are the extremes. Three problems:

    devices           distinct devices per token on 1 x 8, nothing else counted
    devices, cap 1.1  the same with every layer's busiest device at most 1.1 times the mean
    seconds           predicted step on 2 x 4 (NVLink inside, one 400 Gbit/s card each outside), the default workload
"""

import argparse
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import publish
from crossdock.errors import InfeasiblePlan, MissingInput
from crossdock.placement.affinity import Affinity
from crossdock.placement.cost import Workload
from crossdock.placement.evaluate import Evaluation, evaluate
from crossdock.placement.problem import Constraints, Objective, Problem, Solution
from crossdock.placement.solvers import solve
from crossdock.placement.topology import Topology
from crossdock.placement.trace import Trace

BLOCK = 512
METHODS = ("contiguous", "random", "balance", "anneal")
PROBLEMS: dict[str, tuple[Topology, Objective, float | None]] = {
    "devices": (Topology.uniform(1, 8), "devices", None),
    "devices, cap 1.1": (Topology.uniform(1, 8), "devices", 1.1),
    "seconds": (Topology.uniform(2, 4), "seconds", None),
}
COLUMNS = ("trace", "problem", "method", "scored_on", "devices_per_token", "step_s", "load_max_over_mean", "moved", "gap", "solve_s")


def halves(trace: Trace) -> tuple[Trace, Trace]:
    """Even and odd blocks of BLOCK tokens."""
    even = np.arange(trace.num_tokens) // BLOCK % 2 == 0
    return trace.select(even), trace.select(~even)


def rows_of(name: str, traces: dict[str, Trace], seconds: float, seeds: int) -> Iterator[dict[str, Any]]:
    """All rows of plans that were solved on the trace `name`."""
    fit, held_out = halves(traces[name])
    shape = fit.num_layers, fit.num_experts
    others = {other: trace for other, trace in traces.items() if other != name and (trace.num_layers, trace.num_experts) == shape}
    affinity, workload = Affinity.from_trace(fit), Workload()
    for title, (topology, objective, load_cap) in PROBLEMS.items():
        problem = Problem(affinity, topology, workload, objective=objective, constraints=Constraints(load_cap=load_cap))
        for method in METHODS:
            repeats = seeds if method in ("random", "anneal") else 1
            try:
                solutions = [solve(problem, method, seconds, seed) for seed in range(repeats)]
            except InfeasiblePlan:  # a baseline above the cap: it has no row
                continue
            for scored_on, trace in {"fit": fit, "held_out": held_out, **others}.items():
                evaluations = [evaluate(trace, solution.plan, topology, workload) for solution in solutions]
                yield {"trace": name, "problem": title, "method": method, "scored_on": scored_on, "seeds": repeats} | _medians(
                    evaluations, solutions, fitted=scored_on == "fit"
                )


def _medians(evaluations: list[Evaluation], solutions: list[Solution], *, fitted: bool) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key in ("devices_per_token", "step_s", "load_max_over_mean", "moved"):
        values = [float(getattr(evaluation, key)) for evaluation in evaluations]
        row |= {key: statistics.median(values), f"{key}_low": min(values), f"{key}_high": max(values)}
    gaps = [1.0 - solution.bound / solution.cost for solution in solutions if solution.bound is not None]
    row["gap"] = statistics.median(gaps) if fitted and gaps else None
    row["solve_s"] = statistics.median(solution.seconds for solution in solutions) if fitted else None
    row["stopped_by"] = sorted({solution.stopped_by for solution in solutions}) if fitted else None
    return row


def load_traces() -> dict[str, Trace]:
    """The traces of the folder that CROSSDOCK_TRACES names, by file name."""
    folder = os.environ.get("CROSSDOCK_TRACES", "")
    files = sorted(Path(folder).glob("*.npz")) if folder else []
    if not files:
        raise MissingInput(f"CROSSDOCK_TRACES is {folder!r}, where no .npz lies; set it to a folder of routing traces")
    return {path.stem: Trace.load(path) for path in files}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="cap on one search")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--short", action="store_true", help="every fourth layer, one seed, 2 s")
    options = parser.parse_args()
    seconds, seeds = (2.0, 1) if options.short else (options.seconds, options.seeds)
    try:
        traces = load_traces()
    except MissingInput as error:
        parser.exit(error.exit_code, f"{parser.prog}: {error}\n")
    if options.short:
        traces = {name: Trace(trace.experts_TLK[:, ::4], trace.num_experts) for name, trace in traces.items()}
    rows = [row for name in traces for row in rows_of(name, traces, seconds, seeds)]
    publish(rows, f"placement methods, at most {seconds:g} s a search, {seeds} seeds", options.out, options.json, COLUMNS)


if __name__ == "__main__":
    main()
