"""How do time and quality of planning grow with the number of devices, from 8 to 2,048?

    python -m benchmarks.placement_curves [--devices 8,32,128,512,2048] [--seconds 2,10] [--bound-seconds 10] [--out FILE.json]
                                          [--page FILE.md] [--json] [--short]

Generated routing (`placement_instances.py`): 8 layers, 100,000 tokens; nodes of 8 devices; 256 experts, or one for each device where there
are more devices. Two problems for each size: `hops` (top 1, a hop between nodes counts 4) and `devices` (top 4). Method auto with each
budget; contiguous beside it. One row:

    objective, saved        distinct devices per token, or weighted hops per step; and what that is below contiguous, in per cent
    gap                     proven distance from the best plan in per cent, with one bound of --bound-seconds for the problem
    asked_s, solve_s        the budget, and what the search took: the quick starting plans must be made in any case
    bound_s, memory_mib     seconds of the bound, and the most memory that the process of this size and problem has held until then

Every size and problem runs in a process of its own, so that memory is its own. With one expert for each device all plans have the same
distinct devices, and only `hops` is planned. Beyond 1,024 experts a bound on hops counts the largest flows alone, and is far below what
plans can reach.
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.command_line import one_line_errors
from benchmarks.measure import markdown_table, publish
from benchmarks.placement_instances import drifting_trace
from crossdock.atomic import write_text
from crossdock.placement.costs.cost import Workload
from crossdock.placement.records.affinity import Affinity
from crossdock.placement.records.topology import Topology
from crossdock.placement.solvers import SOLVERS
from crossdock.placement.solvers.certificates.certificate import certified
from crossdock.placement.solvers.problem import Objective, Problem

PROBLEMS: tuple[Objective, ...] = ("hops", "devices")
NODE = 8  # devices of a node
FEWEST_EXPERTS = 256
COLUMNS = ("devices", "experts", "problem", "asked_s", "solve_s", "objective", "saved", "gap", "bound_s", "memory_mib")


def problem_of(num_devices: int, objective: Objective, num_layers: int, num_tokens: int) -> Problem:
    """The problem of one size."""
    top_k, weight = (1, 4.0) if objective == "hops" else (4, 1.0)
    trace = drifting_trace(num_tokens, num_layers, max(FEWEST_EXPERTS, num_devices), top_k, width=16, memory=0.95)
    topology = Topology.uniform(max(1, num_devices // NODE), min(NODE, num_devices))
    return Problem(Affinity.from_trace(trace), topology, Workload(), objective=objective, node_weight=weight)


def rows_of(
    num_devices: int, objective: Objective, budgets: Sequence[float], bound_seconds: float, num_layers: int, num_tokens: int
) -> Iterator[dict[str, Any]]:
    """A row for every budget."""
    problem = problem_of(num_devices, objective, num_layers, num_tokens)
    contiguous = SOLVERS["contiguous"](problem, 1.0, 0).cost
    began_s = time.perf_counter()
    bound = certified(problem, bound_seconds)
    bound_s = time.perf_counter() - began_s
    for budget in budgets:
        solution = SOLVERS["auto"](problem, budget, 0)
        proven = max(bound, solution.bound or 0.0)
        yield {
            "devices": num_devices,
            "experts": problem.num_experts,
            "problem": objective,
            "asked_s": budget,
            "solve_s": round(solution.seconds, 1),
            "objective": round(solution.cost, 4),
            "contiguous": round(contiguous, 4),
            "saved": round(100 * (1.0 - solution.cost / contiguous), 1),
            "gap": round(100 * (1.0 - proven / solution.cost), 1),
            "bound": proven,
            "bound_s": round(bound_s, 1),
            "memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }


def write_page(path: Path, document: Mapping[str, Any]) -> None:
    """Write the page of a document of `publish`, in Markdown."""
    host, rows = document["machine"], document["rows"]
    longest_s, most_mib = max(row["solve_s"] for row in rows), max(row["memory_mib"] for row in rows)
    parts = [f"## {name}\n\n{markdown_table([row for row in rows if row['problem'] == name], COLUMNS)}" for name in PROBLEMS]
    text = f"""# Planning for many devices: time, quality and memory

    {document["command"]} --out {path.stem}.json --page {path.name}

Commit {document["commit"]}. Machine: {host["processor"]}, {host["cores"]} cores, {host["system"]}, Python {host["python"]}, load average
{host["load_average_1min"]}. Raw numbers: [{path.stem}.json]({path.stem}.json). `benchmarks/placement_curves.py` explains the columns.
The longest search took {longest_s:.1f} s, and the largest process held {most_mib:,} MiB, some 270 of them before any problem.

{chr(10).join(parts)}"""
    write_text(path, text)


def _without_files(words: Sequence[str]) -> Iterator[str]:
    """The command's words but those that name where to write."""
    kept = iter(words)
    for word in kept:
        if word in ("--out", "--page"):
            next(kept, None)
        elif not word.startswith(("--out=", "--page=")):
            yield word


@one_line_errors
def main() -> int:
    """The command line; `--one` is what a size's own process is asked. A size that fails costs its own rows alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="8,32,128,512,2048", help="numbers of devices, multiples of 8")
    parser.add_argument("--seconds", default="2,10", help="budgets of a search, in seconds")
    parser.add_argument("--bound-seconds", type=float, default=10.0, help="most seconds of one bound")
    parser.add_argument("--short", action="store_true", help="2 layers, 5,000 tokens, 1 s for everything, up to 32 devices")
    parser.add_argument("--out", type=Path, help="also write the JSON document here")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--page", type=Path, help="a page in Markdown, beside the JSON of --out")
    parser.add_argument("--one", nargs=2, metavar=("SIZE", "PROBLEM"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes, budgets = ([int(word) for word in options.devices.split(",")], [float(word) for word in options.seconds.split(",")])
    layers, tokens, bound_seconds = 8, 100_000, options.bound_seconds
    if options.short:
        sizes, budgets, layers, tokens, bound_seconds = [8, 32], [1.0], 2, 5000, 1.0
    if options.one is not None:
        size, objective = int(options.one[0]), next(word for word in PROBLEMS if word == options.one[1])
        for row in rows_of(size, objective, budgets, bound_seconds, layers, tokens):
            print(json.dumps(row), flush=True)
        return 0
    rows: list[dict[str, Any]] = []
    failed = False
    for size, objective in itertools.product(sizes, PROBLEMS):
        if objective == "devices" and size >= FEWEST_EXPERTS:
            continue
        command = [sys.executable, "-m", "benchmarks.placement_curves", "--one", str(size), objective, *sys.argv[1:]]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        rows += [json.loads(line) for line in done.stdout.splitlines()]
        if done.returncode or not options.json:
            ended = f"ended with code {done.returncode}" if done.returncode else "done"
            print(f"{size} devices, {objective}: {ended}", file=sys.stderr, flush=True)
        failed = failed or done.returncode != 0
    what = f"planning for {sizes[0]} to {sizes[-1]} devices"
    asked = {"command": " ".join(["python -m benchmarks.placement_curves", *(word for word in _without_files(sys.argv[1:]))])}
    document = publish(rows, what, options.out, options.json, COLUMNS, asked)
    if options.page is not None:
        write_page(options.page, document)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
