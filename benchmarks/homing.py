"""What does sequence homing save, on routing it was planned on and on other text? Pure replay of traces, no network.

    CROSSDOCK_TRACES=FOLDER python -m benchmarks.homing [--seconds 10] [--seeds 5] [--trace FIT --eval-trace HELD] [--train-steps 600]
                                                        [--only WORD] [--out FILE.json] [--page FILE.md] [--json] [--short]

Three kinds of routing: the gpt-oss traces of the folder (pieces of 128 tokens as sequences; they name no tokens, so homes are those by
known routing, the limit of any forecast); `--trace` and `--eval-trace`, where given; and a small model that is trained here on the default
text, its routing captured on held-out text, one half of the sequences to fit and the other to score. Sequences are drawn into global
batches, and each batch is given homes on its own. One row is one plan on one set of devices; numbers are medians over seeds (of search and
of draws).

    copies_read, copies, copies_known    copies that leave their device per token and layer: homes as read, by the forecast (where the trace
                                         names tokens), by known routing; held_ the same on the routing that was not planned on
    saved, held_saved                    part of copies_read of plan `auto` that this row's best usable homes save, in per cent
    held_of_known                        part of what homes by known routing save that homes by the forecast save, in per cent, held out
    spread                               largest less smallest held_copies over the seeds
    recall                               of the forecast on held-out routing: choices among the likeliest for their token

Beside the rows, in CPU seconds, medians of 15: homes_s, the exact homes of 512 sequences on 8 ranks; lookup_s, the costs of a million
tokens of 100,000 identities at 8 homes.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.command_line import one_line_errors
from benchmarks.measure import markdown_table, publish, timed
from crossdock.atomic import write_text
from crossdock.errors import PeerLost
from crossdock.placement.analysis.homing_score import HomingRow, Setting, solve_with_homes
from crossdock.placement.costs.cost import Workload
from crossdock.placement.homing.forecast import COST_STEPS, Forecast, TokenCosts
from crossdock.placement.homing.homes import MAX_PART, assign_homes, sequences_of
from crossdock.placement.records.affinity import Affinity
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import Trace
from crossdock.placement.solvers import solve
from crossdock.placement.solvers.problem import Problem

COLUMNS = (
    "instance", "devices", "plan", "copies_read", "copies", "copies_known", "saved", "held_copies_read", "held_copies", "held_copies_known",
    "held_saved", "held_of_known", "spread", "recall",
)  # fmt: skip
PIECE_TOKENS = 128
PLANS = ("contiguous", "auto", "auto+homing")


@dataclass(frozen=True, eq=False)
class Instance:
    """Routing to plan on, and other routing of the same model; sequences of `sequence_tokens`, or the traces' own."""

    name: str
    fit: Trace
    held_out: Trace
    sequence_tokens: int | None
    batch_sequences: int


def rows_of(instance: Instance, num_devices: int, seconds: float, seeds: int) -> Iterator[dict[str, Any]]:
    """A row for each plan: medians over the seeds."""
    found: dict[str, list[tuple[HomingRow, HomingRow]]] = {plan: [] for plan in PLANS}
    topology = Topology.uniform(1, num_devices)
    problem = Problem(Affinity.from_trace(instance.fit), topology, Workload(), objective="devices")
    forecast = None if instance.fit.token_T is None else Forecast.fit(instance.fit)
    recall = None if forecast is None else forecast.accuracy(instance.held_out)["recall"]
    for seed in range(seeds):
        fit, held_out = (
            Setting.of(problem, trace, instance.sequence_tokens, instance.batch_sequences, seed)
            for trace in (instance.fit, instance.held_out)
        )
        solutions = [solve(problem, method, seconds, seed) for method in PLANS[:2]]
        solutions.append(solve_with_homes(fit, solutions, forecast, seconds, seed))
        for plan, solution in zip(PLANS, solutions, strict=True):
            found[plan].append((fit.row(plan, solution.plan, forecast), held_out.row(plan, solution.plan, forecast)))
    of_auto = [_median([rows[side].read.remote_copies for rows in found["auto"]]) for side in (0, 1)]
    for plan in PLANS:
        row: dict[str, Any] = {"instance": instance.name, "devices": num_devices, "plan": plan, "recall": recall}
        for side, prefix in ((0, ""), (1, "held_")):
            scores = [rows[side] for rows in found[plan]]
            usable = [(score.forecast or score.known).remote_copies for score in scores]
            row[f"{prefix}copies_read"] = _median([score.read.remote_copies for score in scores])
            row[f"{prefix}copies"] = None if scores[0].forecast is None else _median(usable)
            row[f"{prefix}copies_known"] = _median([score.known.remote_copies for score in scores])
            row[f"{prefix}saved"] = round(100 * (1 - _median(usable) / of_auto[side]), 1)
            row["spread"] = round(max(usable) - min(usable), 4)
        row["held_of_known"] = None if row["held_copies"] is None else _share_of_known(row)
        yield row


def _share_of_known(row: Mapping[str, Any]) -> float | None:
    read, mine, known = (row[f"held_{name}"] for name in ("copies_read", "copies", "copies_known"))
    return None if read == known else round(100 * (read - mine) / (read - known), 1)


def _median(values: list[float]) -> float:
    return round(statistics.median(values), 4)


def times(repeats: int = 15, num_homes: int = 8) -> dict[str, float]:
    """What finding homes takes, medians of CPU seconds: the assignment itself (`homes_s`), looking up costs by token (`lookup_s`)."""
    generator = np.random.default_rng(0)
    cost_VH = generator.integers(0, COST_STEPS, (100_001, num_homes))
    costs = TokenCosts(np.arange(100_000, dtype=np.int32), cost_VH, unit=1.0)
    token_BQ = generator.integers(0, 100_000, (2_000, 500))
    cost_QH = costs.of(token_BQ[:MAX_PART])
    found = {"homes_s": lambda: assign_homes(cost_QH), "lookup_s": lambda: costs.of(token_BQ)}
    return {name: statistics.median(timed(work).cpu_s for _ in range(repeats)) for name, work in found.items()}


def published_traces(short: bool) -> Iterator[Instance]:
    """The traces of the folder that CROSSDOCK_TRACES names: the larger of two neighbours in size is planned on, the other held out."""
    folder = os.environ.get("CROSSDOCK_TRACES", "")
    files = sorted(Path(folder).glob("*.npz"), key=lambda path: -path.stat().st_size) if folder else []
    for paths in itertools.pairwise(files):
        fit, held_out = (Trace.load(path) for path in paths)
        if short:
            fit, held_out = (Trace(trace.experts_TLK[:, ::6], trace.num_experts) for trace in (fit, held_out))
        if (fit.num_layers, fit.num_experts) == (held_out.num_layers, held_out.num_experts):
            yield Instance(", ".join(path.stem for path in paths), fit, held_out, PIECE_TOKENS, 48)


def trained_model(steps: int, batches: int) -> Instance:
    """Train the model of `configs/tiny.yaml`, larger, on the default text, and capture its routing on held-out text.

    Raises `PeerLost` where either fails.
    """
    with tempfile.TemporaryDirectory(prefix="crossdock-homing-") as folder:
        sizes = ["model.num_layers=4", "model.num_experts=16", "data.seq_len=128", "train.batch_sequences=32", "train.eval_batches=0"]
        run = ["train", "tiny", *sizes, f"train.steps={steps}", "capture.steps=0", "checkpoint.at_end=true", f"run.dir={folder}/run"]
        capture = ["trace", "capture", f"{folder}/run", "--steps", str(batches), "--out", f"{folder}/trace.npz"]
        for command in (run, capture):
            done = subprocess.run([sys.executable, "-m", "crossdock", *command, "--json"], stdout=subprocess.DEVNULL)
            if done.returncode:
                raise PeerLost(f"crossdock {' '.join(command)} ended with code {done.returncode}; its lines above say why")
        trace = Trace.load(Path(folder) / "trace.npz")
    is_fit_Q = np.random.default_rng(0).permutation(int(sequences_of(trace).max()) + 1) % 2 == 0
    is_fit_T = is_fit_Q[sequences_of(trace)]
    return Instance(f"tiny model, {steps} steps", trace.select(is_fit_T), trace.select(~is_fit_T), None, 32)


def write_page(path: Path, document: Mapping[str, Any]) -> None:
    """Write the page of a document of `publish`, in Markdown; the raw numbers stand in the JSON of the same name."""
    host, rows = document["machine"], document["rows"]
    parts = []
    for instance in dict.fromkeys(row["instance"] for row in rows):
        of_instance = [row for row in rows if row["instance"] == instance]
        parts.append(f"## {instance}\n\n{_sentence(of_instance)}\n\n{markdown_table(of_instance, COLUMNS[1:])}")
    text = f"""# Sequence homing: what it saves

    {document["command"]} --out {path.stem}.json --page {path.name}

Commit {document["commit"]}. Machine: {host["processor"]}, {host["cores"]} cores, {host["system"]}, Python {host["python"]}, load average
{host["load_average_1min"]}. {document["what"][0].upper()}{document["what"][1:]}. Raw numbers: [{path.stem}.json]({path.stem}.json); the
columns are explained in `benchmarks/homing.py`. Copies are counted by replay, so that the machine's load changes how far searches come in
their time, and nothing else. The exact homes of {MAX_PART} sequences on 8 ranks took {document["homes_s"] * 1e3:.2g} ms, and looking up the
costs of a million tokens at 8 homes {document["lookup_s"]:.2g} s, of one core's time (medians of 15).

{chr(10).join(parts)}"""
    write_text(path, text)


def _sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """What planning with homes saves on routing that was not planned on, for each number of devices."""
    saved = {row["devices"]: row["held_saved"] for row in rows if row["plan"] == PLANS[-1]}
    listed = ", ".join(f"{percent:g} % at {devices}" for devices, percent in saved.items())
    return f"Planned with homes, copies that leave their device fall on held-out routing by (devices): {listed}."


def command(options: argparse.Namespace) -> str:
    """The command that measures the same, but for where it puts things."""
    words = ["CROSSDOCK_TRACES=FOLDER python -m benchmarks.homing", f"--seconds {options.seconds:g} --seeds {options.seeds}"]
    words += [f"--trace {options.trace} --eval-trace {options.eval_trace}"] if options.trace else []
    words += [f"--train-steps {options.train_steps}", *([f"--only {options.only}"] if options.only else [])]
    return " ".join([*words, *(["--short"] if options.short else [])])


@one_line_errors
def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="cap on one search")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trace", type=Path, help="routing to plan on, with sequences")
    parser.add_argument("--eval-trace", type=Path, help="other routing of the same model, to score on")
    parser.add_argument("--train-steps", type=int, default=600)
    parser.add_argument("--only", default="", help="only instances whose name holds this word; the trained one is called tiny")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", type=Path, help="a page in Markdown, beside the JSON of --out")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--short", action="store_true", help="every sixth layer, 40 steps of training, 2 seeds, 2 s a search")
    options = parser.parse_args()
    if (options.trace is None) != (options.eval_trace is None):
        parser.error("--trace and --eval-trace are given together: one to plan on, the other to score on")
    seconds, seeds, steps = (2.0, 2, 40) if options.short else (options.seconds, options.seeds, options.train_steps)
    instances = [instance for instance in published_traces(options.short) if options.only in instance.name]
    if options.trace and options.eval_trace:
        instances.append(Instance(options.trace.stem, Trace.load(options.trace), Trace.load(options.eval_trace), None, 32))
    if options.only in "tiny model":
        instances.append(trained_model(steps, 4 if options.short else 32))
    rows = [row for instance in instances for devices in (2, 4, 8) for row in rows_of(instance, devices, seconds, seeds)]
    if not rows:
        parser.error(
            f"no instance's name holds {options.only!r}; traces are looked for in CROSSDOCK_TRACES, and the trained model is called tiny"
        )
    what = f"sequence homing: copies that leave their device, medians of {seeds} seeds"
    document = publish(rows, what, options.out, options.json, COLUMNS, {"command": command(options), **times()})
    if options.page is not None:
        write_page(options.page, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
