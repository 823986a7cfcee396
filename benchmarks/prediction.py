"""Do the planner's predictions come true, and what is each method's plan worth, on 2 emulated nodes with 2 ranks each?

    python -m benchmarks.prediction --work DIR [--rates 1e9,700e6] [--repeats 15] [--cases text,hot] [--methods contiguous,auto]
                                    [--out FILE.json] [--page FILE.md] [--json] [--short]              (root: it makes namespaces)

A model (top-2 of 16 experts in each of 4 layers, de-duplicated dispatch, nothing overlapped) is trained once on the default corpus until
its routing is far from uniform, and kept in DIR with the routing of its last steps, the fit half. Plans are solved on that half alone.
Then the model goes on training, once for each plan, from the same checkpoint and over the same batches, in turns: whole optimizer steps
with gradient reduction. The cost model is calibrated on steps under a plan drawn at random, which is no row's: before all others, to solve
with, and on its steps that take turns with the others', so that what else the machine does meanwhile troubles all alike. Cases: `text` is
the routing as the corpus has it; in `hot` biases added to the gates' logits make Zipf's law with exponent 1.2 of the experts'
popularity. Columns, bytes in one step over all ranks:

    counted_*, predicted_*, forecast_*   by link class: the runtime's ledger; the evaluator's replay of those very steps (equal, or the
                       program fails); what the plan promised from the fit half
    interface_bytes    what the nodes' interfaces sent; interface_over_expected: that over the ledger's bytes between nodes (tokens,
                       metadata, counts, gradients of copies) and one reduction of the dense gradients as measured; the rest is headers
    predicted_s, step_s, error_percent   the step as predicted from the fit half by the calibration in the same rounds, and as measured:
                       median of the slowest rank's seconds
    promised_s         what the calibration before all rounds predicted
    replayed_s         what the calibration in the same rounds predicts, were the very tokens known
    tokens_s, experts_s, copies_s, rest_s   where the measured step went (prediction_parts.py), and *_predicted_s the same of predicted_s
    speedup            median of the paired ratios contiguous / method with the bootstrap's 95 % interval
    communication_share   of the step: what the rank that waits longest waits for tokens, metadata and counts
    load_max_over_mean    rows of the busiest rank over the mean, mean over layers
    homing_saved       part of what copies cost the links, had every sequence been processed where it was read, that homes saved
    loss               mean over the measured steps; methods differ in the order of sums alone

Wants a machine to itself. Where other programs take its cores, ranks that all compute at once are slowed more than one that computes while
others wait, which no calibration under an uneven plan can know: steps of evenly loaded plans then take longer than predicted.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import on_ranks
from benchmarks.command_line import one_line_errors
from benchmarks.measure import publish
from benchmarks.netlab import Lab
from benchmarks.on_ranks import started
from benchmarks.prediction_model import Shape, add_options, shape_of, trained
from benchmarks.prediction_page import write_page
from benchmarks.prediction_ranks import METHODS, told, worker
from crossdock.errors import UsageError

NODES, RANKS_PER_NODE = 2, 2
COLUMNS = ["case", "link_bit_per_s", "method", "step_s", "predicted_s", "error_percent", "speedup", "speedup_low", "speedup_high"]
COLUMNS += ["communication_share", "load_max_over_mean", "devices_per_token", "counted_other_node", "interface_over_expected"]
SHORT = {"num_layers": 2, "model_width": 32, "expert_width": 32, "num_experts": 8, "sequences": 2, "sequence": 64, "train_steps": 12}


def _list(text: str) -> list[str]:
    return text.split(",")


def _parser() -> argparse.ArgumentParser:
    parser = on_ranks.parser("benchmarks.prediction", __doc__, repeats=15)
    parser.set_defaults(rates=[1e9, 700e6])
    parser.add_argument("--work", type=Path, default=Path("runs/prediction"), help="where the trained model is kept")
    parser.add_argument("--cases", type=_list, default=list(METHODS))
    parser.add_argument("--methods", type=_list, help="rows to measure; contiguous is always one")
    parser.add_argument("--window", type=int, default=8, help="steps that calibrate the cost model")
    parser.add_argument("--seconds", type=float, default=5.0, help="cap on each solver")
    parser.add_argument("--page", type=Path, help="a page in Markdown, beside the JSON of --out")
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    add_options(parser)
    return parser


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.lab:
        worker(options)
        return 0
    if options.short:
        options.rates, options.repeats, options.window, options.seconds = [500e6], 3, 2, 1.0
        vars(options).update(SHORT)
    if refusal := _refusal(options):
        print(refusal, file=sys.stderr)
        return UsageError.exit_code
    shape = shape_of(options)
    document: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    directory = trained(options.work, shape)
    for case in options.cases:
        for rate in options.rates:
            with Lab(NODES, rate) as lab:
                asked = argparse.Namespace(rates=[rate], repeats=options.repeats)
                rows += started("benchmarks.prediction", lab, RANKS_PER_NODE, shape, asked, *told(options, directory.path, case))
            last = case == options.cases[-1] and rate == options.rates[-1]
            if last or not options.json:
                document = publish(rows, title(shape), options.out, options.json, COLUMNS, {"command": command(options)})
    if options.page is not None:
        write_page(options.page, document)
    return 0


def _refusal(options: argparse.Namespace) -> str | None:
    """What is wrong with the options, if anything."""
    methods = list(dict.fromkeys(name for case in METHODS.values() for name in case))
    for kind, asked, known in (("case", options.cases, list(METHODS)), ("method", options.methods or [], methods)):
        if unknown := [name for name in asked if name not in known]:
            return f"no {kind} {', '.join(unknown)}; choose from {', '.join(known)}"
    return None


def command(options: argparse.Namespace) -> str:
    """The command that measures the same, but for where it puts things."""
    rates = ",".join("none" if rate is None else f"{rate:g}" for rate in options.rates)
    words = ["sudo python -m benchmarks.prediction", f"--rates {rates} --repeats {options.repeats} --cases {','.join(options.cases)}"]
    words += [f"--methods {','.join(options.methods)}"] if options.methods else []
    sizes = {} if options.short else asdict(shape_of(options))
    words += [f"--{name.replace('_', '-')} {size}" for name, size in sizes.items() if size != getattr(Shape, name)]
    words += ["--short"] if options.short else []
    return " ".join([*words, f"--window {options.window} --seconds {options.seconds:g}"])


def title(shape: Shape) -> str:
    return f"predictions held against steps on {NODES} nodes x {RANKS_PER_NODE} ranks, {shape}"


if __name__ == "__main__":
    sys.exit(main())
