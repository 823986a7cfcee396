"""When does overlap lose on a CPU? Measures the two numbers of `strategies/overlap_rule.py`, and how often the rule is right elsewhere.

    python -m benchmarks.overlap_rule [--threads 1,2] [--repeats 15] [--out FILE] [--json] [--short]

2 ranks on one host over loopback, where a transfer is nothing but work for the processor: the worst case for overlap. Each rank computes
with so many threads; on 4 cores 1 leaves half of them to the transfer and 2 leave none. A point is an all-to-all of so many MiB a rank and
square matrix products that take about `ratio` times as long; its four variants run in turn, each from a barrier on:

    compute, transfer       alone
    sequential              start, wait, compute
    overlapped              start, compute, wait

For each number of threads, handle_s comes from the points without computing (the median of overlapped minus sequential, at least 0) and
slowdown from those of ratio 1 (the median). All other points are predicted from their compute and transfer alone: whether overlap pays,
and by how much. Where the quartiles of the paired ratios overlapped / sequential lie on both sides of 1, neither schedule is faster
(`even`) and no verdict is wrong. Seconds are those of the slower rank, medians over repeats.
"""

import math
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks import command_line
from benchmarks.measure import Sample, Spread, interleaved, paired_ratio, print_table, publish, timed
from crossdock.placement.strategies.overlap_rule import Interference, beside_s
from crossdock.runtime.transport.all_to_all import Route, all_to_all_start
from crossdock.runtime.transport.collectives import all_gather_objects, barrier
from crossdock.runtime.transport.mesh import Mesh, initialise, shutdown

RANKS, WIDTH = 2, 1024
MIB_PER_RANK = (0.25, 2.0, 8.0, 32.0)
RATIOS = (0.0, 0.5, 1.0, 3.0)
ROLES = {0.0: "handle", 1.0: "slowdown"}
"""What a ratio is measured for; the others are held out."""
COLUMNS = (
    "threads", "mib", "ratio", "role", "compute_s", "transfer_s", "sequential_s", "overlapped_s", "predicted_s", "over_sequential",
    "faster", "predicted",
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One size of message and amount of computing."""

    mib: float
    ratio: float


Measured = dict[tuple[int, Point], dict[str, list[float]]]


def matmuls(count: int, left: torch.Tensor, out: torch.Tensor) -> None:
    """`count` products of square matrices."""
    for _ in range(count):
        torch.mm(left, left, out=out)


def point_calls(mesh: Mesh, point: Point, transfer_alone_s: float) -> dict[str, Callable[[], None]]:
    """The four variants of a point; what is computed is made to take `ratio` times `transfer_alone_s`."""
    rows = int(point.mib * 2**20) // (4 * WIDTH) // 2 * 2
    x_TD = torch.randn(rows, WIDTH)
    half = (rows // 2,) * RANKS
    left, out = torch.randn(256, 256), torch.empty(256, 256)
    matmuls(20, left, out)
    single_s = Spread.of(sample.wall_s for sample in interleaved({"one": partial(matmuls, 10, left, out)}, 5)["one"]).median / 10
    count = max(all_gather_objects(math.ceil(point.ratio * transfer_alone_s / single_s), mesh))
    compute = partial(matmuls, count, left, out)

    def start() -> Any:
        return all_to_all_start(x_TD, Route(mesh, mesh.token_group, half, half, 0, "dispatch", "tokens", 0))

    def transfer() -> None:
        start().wait()

    def sequential() -> None:
        start().wait()
        compute()

    def overlapped() -> None:
        pending = start()
        compute()
        pending.wait()

    return {"compute": compute, "transfer": transfer, "sequential": sequential, "overlapped": overlapped}


def timed_rounds(mesh: Mesh, calls: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[Sample]]:
    """Every variant in turn, each from a barrier on that is not timed, after two rounds that are not either."""
    samples: dict[str, list[Sample]] = {name: [] for name in calls}
    for number in range(-2, repeats):
        for name, call in calls.items():
            barrier(mesh)
            sample = timed(call)
            mesh.ledger.take()
            if number >= 0:
                samples[name].append(sample)
    return samples


def run_rank(rank: int, threads: tuple[int, ...], points: list[Point], repeats: int, store: str, answer: Connection) -> None:
    """One rank's samples by (threads, point, variant)."""
    torch.manual_seed(rank)
    initialise(rank, RANKS, init_method=f"file://{store}")
    mesh = Mesh.create(rank, RANKS, RANKS, (0,) * RANKS)
    found: dict[tuple[int, Point], dict[str, list[float]]] = {}
    with torch.no_grad():
        for count in threads:
            torch.set_num_threads(count)
            for point in points:
                alone = timed_rounds(mesh, {"transfer": point_calls(mesh, Point(point.mib, 0.0), 0.0)["transfer"]}, repeats)["transfer"]
                alone_s = max(all_gather_objects(Spread.of(sample.wall_s for sample in alone).median, mesh))
                samples = timed_rounds(mesh, point_calls(mesh, point, alone_s), repeats)
                found[count, point] = {name: [sample.wall_s for sample in values] for name, values in samples.items()}
    answer.send(found)
    shutdown()


def measure(threads: tuple[int, ...], points: list[Point], repeats: int) -> Measured:
    """Seconds of the slower rank, a list over repeats, by (threads, point) and variant."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="crossdock-rule-") as folder:
        ends = [spawn.Pipe() for _ in range(RANKS)]
        ranks = [
            spawn.Process(target=run_rank, args=(rank, threads, points, repeats, str(Path(folder) / "store"), end[1]), daemon=True)
            for rank, end in enumerate(ends)
        ]
        for process, (_, theirs) in zip(ranks, ends, strict=True):
            process.start()
            theirs.close()
        try:
            answers = [ours.recv() for ours, _ in ends]
        finally:
            for process in ranks:
                process.join(timeout=20)
                process.kill()
    return {key: {name: list(map(max, *(answer[key][name] for answer in answers))) for name in answers[0][key]} for key in answers[0]}


def interference_of(points: dict[Point, dict[str, list[float]]]) -> Interference:
    """The two numbers, from the points that are there for them."""
    median = {point: {name: statistics.median(values) for name, values in variants.items()} for point, variants in points.items()}
    extra_s = [seconds["overlapped"] - seconds["sequential"] for point, seconds in median.items() if ROLES.get(point.ratio) == "handle"]
    handle_s = max(0.0, statistics.median(extra_s))
    slowdowns = [
        Interference.measured(seconds["compute"], seconds["transfer"], seconds["overlapped"], handle_s).slowdown
        for point, seconds in median.items()
        if ROLES.get(point.ratio) == "slowdown"
    ]
    return Interference(handle_s, statistics.median(slowdowns))


def row_of(threads: int, point: Point, samples: dict[str, list[float]], found: Interference) -> dict[str, Any]:
    """One point, measured and predicted."""
    seconds = {name: statistics.median(values) for name, values in samples.items()}
    ratio = paired_ratio(samples["overlapped"], samples["sequential"])
    predicted_s = beside_s(seconds["compute"], seconds["transfer"], found)
    return {
        "threads": threads,
        "mib": point.mib,
        "ratio": point.ratio,
        "role": ROLES.get(point.ratio, "held out"),
        **{f"{name}_s": value for name, value in seconds.items()},
        "predicted_s": predicted_s,
        **ratio.row("over_sequential"),
        "faster": "overlapped" if ratio.quartile_3 < 1 else "sequential" if ratio.quartile_1 > 1 else "even",
        "predicted": "overlapped" if predicted_s < seconds["compute"] + seconds["transfer"] else "sequential",
    }


def summary_of(threads: int, found: Interference, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How the rule does on what it has not seen."""
    held_out = [row for row in rows if row["role"] == "held out"]
    wrong = [row for row in held_out if row["faster"] not in ("even", row["predicted"])]
    lost = [row["over_sequential"] - 1 if row["predicted"] == "overlapped" else 1 / row["over_sequential"] - 1 for row in held_out]
    return {
        "threads": threads,
        "handle_s": found.handle_s,
        "slowdown": found.slowdown,
        "held_out": len(held_out),
        "even": sum(row["faster"] == "even" for row in held_out),
        "wrong": len(wrong),
        "worst_loss": max(0.0, *lost),
        "worst_loss_always_overlapped": max(0.0, *(row["over_sequential"] - 1 for row in held_out)),
        "worst_loss_never_overlapped": max(0.0, *(1 / row["over_sequential"] - 1 for row in held_out)),
    }


def main() -> None:
    """Measure and print."""
    parser = command_line.parser(__doc__, 15, "3 rounds with one thread")
    parser.add_argument("--threads", default="1,2", help="threads of each rank (default: %(default)s)")
    options = parser.parse_args()
    threads = (1,) if options.short else tuple(int(text) for text in options.threads.split(","))
    points = [Point(mib, ratio) for mib in MIB_PER_RANK for ratio in RATIOS]
    measured = measure(threads, points, 3 if options.short else options.repeats)
    rows, summaries = [], []
    for count in threads:
        of_count = {point: samples for (number, point), samples in measured.items() if number == count}
        found = interference_of(of_count)
        own = [row_of(count, point, samples, found) for point, samples in of_count.items()]
        summaries.append(summary_of(count, found, own))
        rows += own
    publish(rows, f"overlap beside matrix products, {RANKS} ranks, loopback", options.out, options.json, COLUMNS, {"summaries": summaries})
    if not options.json:
        print_table(summaries, "the rule on the points held out")


if __name__ == "__main__":
    main()
