"""Does the shortcut cost quality? Loss of top-2, shared expert and ScMoE (Pos-2, CG-1) at equal tokens, and at equal time on a slow link.

    python -m benchmarks.losses [--steps 300] [--seeds 0,1,2] [--rate 500e6] [--svg FILE] [--out FILE] [--json] [--short]        (as root)
    python -m benchmarks.losses --local                                                    (no root: local ranks, equal tokens alone)

Every run is `crossdock train` on the default corpus, two ranks on each of two emulated nodes whose link carries `--rate` bit/s; ScMoE runs
overlapped. One run serves both comparisons, because the learning rate is constant after warm-up: the held-out loss is read off after all
tokens, and once more after the seconds of training that the fastest variant needed for all of them (steps alone, no evaluation). Variants
take turns within a seed. All variants spend the same FLOP on a token: two routed experts, or one routed and one shared of the same width.
"""

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import yaml

from benchmarks.command_line import one_line_errors
from benchmarks.curves import Curve, figure
from benchmarks.measure import publish
from benchmarks.netlab import Lab
from crossdock import atomic
from crossdock.errors import PeerLost

NODES, RANKS_PER_NODE = 2, 2
WORLD_SIZE = NODES * RANKS_PER_NODE
VARIANTS: dict[str, dict[str, Any]] = {
    "top2": {"block": "top_k", "top_k": 2},
    "shared_expert": {"block": "shared_expert", "top_k": 1},
    "scmoe": {"block": "scmoe", "top_k": 1, "shortcut": {"position": 2, "coefficient": "cg1"}},
}
COLUMNS = ["variant", "eval_loss", "eval_loss_low", "eval_loss_high", "tokens", "step_s", "exposed_s", "wall_s"]
COLUMNS += ["eval_loss_equal_wall", "tokens_equal_wall"]


@dataclass(frozen=True)
class Run:
    """One training run: training loss and seconds of every step, and (step, held-out loss) of every evaluation."""

    loss: tuple[float, ...]
    step_s: tuple[float, ...]
    exposed_s: tuple[float, ...]
    evaluations: tuple[tuple[int, float], ...]
    tokens_per_step: int

    def wall_s(self, step: int) -> float:
        """Seconds of the first `step` steps."""
        return sum(self.step_s[:step])

    def eval_loss_at(self, wall_s: float) -> float:
        """The held-out loss after `wall_s` seconds of training, between evaluations on a straight line."""
        steps, losses = zip(*self.evaluations, strict=True)
        return float(np.interp(wall_s, [self.wall_s(step) for step in steps], losses))

    def tokens_at(self, wall_s: float) -> float:
        """Tokens trained on within `wall_s` seconds."""
        seconds = [0.0, *itertools.accumulate(self.step_s)]
        return float(np.interp(wall_s, seconds, range(len(seconds)))) * self.tokens_per_step


def configuration(options: argparse.Namespace, variant: str, seed: int, directory: Path) -> dict[str, Any]:
    """What `crossdock train` reads."""
    width = options.model_width
    return {
        "run": {"dir": str(directory), "resume": "never"},
        "train": {
            "steps": options.steps,
            "seed": seed,
            "batch_sequences": options.tokens * WORLD_SIZE // options.sequence,
            "eval_every": options.eval_every,
            "eval_batches": options.eval_batches,
            "optimizer": {"lr": options.lr, "final_lr_share": 1.0, "warmup_steps": min(20, options.steps)},
        },
        "parallel": {"expert": WORLD_SIZE},
        "model": {"num_layers": 4, "model_width": width, "num_heads": 4, "num_experts": 8, "expert_width": 2 * width, **VARIANTS[variant]},
        "data": {"seq_len": options.sequence},
        "capture": {"steps": 0},
        "checkpoint": {"at_end": False},
        "device": "cpu",
    }


def read_run(directory: Path) -> Run:
    """The run that lies in `directory`. Raises `PeerLost` where it did not reach its target."""
    result = json.loads((directory / "result.json").read_text())
    if result["status"] != "done":
        raise PeerLost(f"a training run ended with {result['status']} at step {result['reached_step']}: {result.get('message', '')}")
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return Run(
        loss=tuple(row["loss"] for row in rows),
        step_s=tuple(row["step_s"] for row in rows),
        exposed_s=tuple(row["exposed_s"] for row in rows),
        evaluations=tuple((row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row),
        tokens_per_step=rows[0]["tokens"],
    )


def train_all(options: argparse.Namespace, lab: Lab | None) -> dict[str, list[Run]]:
    """Every variant with every seed, variants taking turns: on the laboratory, or in local ranks where there is none."""
    runs: dict[str, list[Run]] = {variant: [] for variant in VARIANTS}
    for seed, variant in itertools.product(options.seeds, VARIANTS):
        with tempfile.TemporaryDirectory(prefix="crossdock-losses-") as folder:
            directory, config = Path(folder) / "run", Path(folder) / "config.yaml"
            config.write_text(yaml.safe_dump(configuration(options, variant, seed, directory)))
            command = ["-m", "crossdock", "train", str(config)]
            if lab is not None:
                lab.ranks(command, RANKS_PER_NODE, timeout_s=3600)
            else:
                subprocess.run(
                    [sys.executable, *command], check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
                )
            run = read_run(directory)
        runs[variant].append(run)
        done = f"{variant}, seed {seed}: held-out loss {run.evaluations[-1][1]:.4f}, {median(run.step_s):.3f} s a step"
        print(done, file=sys.stderr, flush=True)
    return runs


def rows_of(runs: Mapping[str, Sequence[Run]], timed: bool) -> list[dict[str, Any]]:
    """One row a variant; what rests on the slow link's seconds is left out where there was none."""
    wall_s = min(mean(run.wall_s(len(run.loss)) for run in of_variant) for of_variant in runs.values())
    rows = []
    for variant, of_variant in runs.items():
        final = [run.evaluations[-1][1] for run in of_variant]
        row: dict[str, Any] = {
            "variant": variant,
            "eval_loss": mean(final),
            "eval_loss_low": min(final),
            "eval_loss_high": max(final),
            "seeds": len(of_variant),
            "tokens": len(of_variant[0].loss) * of_variant[0].tokens_per_step,
        }
        if timed:
            then = [run.eval_loss_at(wall_s) for run in of_variant]
            row |= {
                "step_s": median(second for run in of_variant for second in run.step_s),
                "exposed_s": median(second for run in of_variant for second in run.exposed_s),
                "wall_s": wall_s,
                "eval_loss_equal_wall": mean(then),
                "eval_loss_equal_wall_low": min(then),
                "eval_loss_equal_wall_high": max(then),
                "tokens_equal_wall": mean(run.tokens_at(wall_s) for run in of_variant),
            }
        rows.append(row)
    return rows


def picture(runs: Mapping[str, Sequence[Run]], timed: bool, rate_bit_per_s: float) -> str:
    """SVG: held-out loss over tokens, and over seconds of training where they were measured; line: mean of the seeds, band: all of them."""
    steps = [step for step, _ in next(iter(runs.values()))[0].evaluations]
    losses = {variant: [[loss for _, loss in run.evaluations] for run in of_variant] for variant, of_variant in runs.items()}
    tokens = {
        variant: Curve.of([step * of_variant[0].tokens_per_step / 1e6 for step in steps], losses[variant])
        for variant, of_variant in runs.items()
    }
    panels = {"million tokens": tokens}
    if timed:
        seconds = {
            variant: Curve.of([mean(run.wall_s(step) for run in of_variant) for step in steps], losses[variant])
            for variant, of_variant in runs.items()
        }
        panels[f"s of training, {rate_bit_per_s / 1e6:.0f} Mbit/s between the nodes"] = seconds
    return figure(panels, "held-out loss (nat per byte)")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.losses", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=_numbers, default=[0, 1, 2])
    parser.add_argument("--rate", type=float, default=500e6, help="bit/s of each node's link, each direction")
    parser.add_argument("--tokens", type=int, default=2048, help="of one rank and step")
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--model-width", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--eval-every", type=int, default=25, help="steps")
    parser.add_argument("--eval-batches", type=int, default=8)
    parser.add_argument("--local", action="store_true", help="local ranks instead of emulated nodes: equal tokens alone")
    parser.add_argument("--short", action="store_true", help="12 steps of a tiny model, one seed: for CI")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--svg", type=Path)
    return parser


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.short:
        options.steps, options.seeds, options.eval_every, options.eval_batches = 12, [0], 4, 1
        options.tokens, options.sequence, options.model_width = 256, 64, 32
    try:
        with _laboratory(options) as lab:
            runs = train_all(options, lab)
    except subprocess.CalledProcessError as error:
        print(f"a training run ended with code {error.returncode}", file=sys.stderr)
        return error.returncode
    timed = not options.local
    if options.svg is not None:
        atomic.write_text(options.svg, picture(runs, timed, options.rate))
    curves = {
        variant: [{"loss": run.loss, "step_s": run.step_s, "evaluations": run.evaluations} for run in of_variant]
        for variant, of_variant in runs.items()
    }
    rows = rows_of(runs, timed)
    columns = [column for column in COLUMNS if column in rows[0]]
    settings = configuration(options, "scmoe", options.seeds[0], Path("run"))
    publish(
        rows, f"loss after {rows[0]['tokens']} tokens", options.out, options.json, columns, extra={"config": settings, "curves": curves}
    )
    return 0


@contextlib.contextmanager
def _laboratory(options: argparse.Namespace) -> Iterator[Lab | None]:
    if options.local:
        yield None
    else:
        with Lab(NODES, options.rate) as lab:
            yield lab


if __name__ == "__main__":
    sys.exit(main())
