"""Is the adaptive choice as fast as the best fixed strategy, on links and loads that nobody tuned it for?

    python -m benchmarks.adapt [--rates 1e9,500e6,250e6] [--repeats 7] [--out FILE] [--json] [--short]      (root: it makes namespaces)

A ScMoE block pair (top-2 of 16 experts, Pos-2), forward and backward, on 2 emulated nodes with 2 ranks each. At each rate the run begins
with equally popular experts; in the middle Zipf's law with exponent 1.2 is switched on and stays. The adaptive run begins as configured
(de-duplicated), looks when it starts and when its load has moved, and nobody tells it anything. When it has chosen, its strategy and every
fixed one are timed in turns in the same processes. Rows:

    step_s           forward and backward of the slowest rank; median with lowest and highest
    over_best        median of the paired ratios to the fastest fixed strategy here, with quartiles; the adaptive row is the answer
    predicted_s      the choice's own model: the measured step of the fixed de-duplicated strategy, plus what the model says is between them
    steps_to_choice  steps from the beginning of the phase until the new choice was in force (of them `window` were measured)
    look_s           what the decision itself cost: all ranks stand still for it

`gathered` is the fixed strategy that knows the skew beforehand: de-duplicated with those hot experts gathered that the choice's model
names. Dense gradient reduction and the optimizer are no part of the step.
"""

import argparse
import functools
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import on_ranks
from benchmarks.command_line import one_line_errors
from benchmarks.measure import Spread, in_turns, paired_ratio, publish
from benchmarks.netlab import Lab
from benchmarks.on_ranks import meeting, set_rate, slowest, started, tell
from crossdock.models.config import ModelConfig
from crossdock.models.transformer import Transformer
from crossdock.placement.records.plan import Plan
from crossdock.placement.strategies.choice import price
from crossdock.placement.strategies.strategy import Strategy, describe
from crossdock.runtime.adaptation import choice
from crossdock.runtime.adaptation.adaptation import Adaptation, StepNumbers
from crossdock.runtime.adaptation.choice import AdaptConfig
from crossdock.runtime.adaptation.replan import topology_of
from crossdock.runtime.training.context import StepContext
from crossdock.runtime.transport.collectives import all_gather_objects, barrier, broadcast_object
from crossdock.runtime.transport.ledger import bytes_by_class, exposed_s
from crossdock.runtime.transport.mesh import Mesh

NODES, RANKS_PER_NODE = 2, 2
EXPONENT = 1.2
ADAPT = AdaptConfig(mode="continuous", window=3, every=1000)
MOST_STEPS = 12  # of a phase, for the adaptive run to look and choose
COLUMNS = ["routing", "link_bit_per_s", "strategy", "step_s", "step_s_low", "step_s_high", "over_best", "over_best_quartile_1"]
COLUMNS += ["over_best_quartile_3", "predicted_s", "what"]


@dataclass(frozen=True)
class Shape:
    """Sizes of the block pair, fp32."""

    tokens: int = 2048  # of one rank
    sequence: int = 128
    model_width: int = 256
    mlp_width: int = 512
    expert_width: int = 256
    num_experts: int = 16

    def config(self) -> ModelConfig:
        return ModelConfig(
            num_layers=2,
            vocab_size=256,
            model_width=self.model_width,
            num_heads=4,
            num_kv_heads=1,
            mlp_width=self.mlp_width,
            expert_width=self.expert_width,
            shared_expert_width=self.mlp_width,
            num_experts=self.num_experts,
            top_k=2,
        )


class Run:
    """The model on this rank, its steps, and the popularity of its experts."""

    def __init__(self, shape: Shape, mesh: Mesh) -> None:
        self.shape, self.mesh = shape, mesh
        self.plan = Plan.contiguous(1, shape.num_experts, mesh.expert_parallel)
        self.model = Transformer(shape.config(), mesh, self.plan, seed=0)
        generator = torch.Generator().manual_seed(mesh.rank)
        self.token_QP = torch.randint(0, 256, (shape.tokens // shape.sequence, shape.sequence), generator=generator)
        self.expert_TK = torch.zeros((shape.tokens, 2), dtype=torch.int64)
        self.skewed = False
        self.num_steps = 0
        (layer,) = self.model.moe_layers
        route = layer.gate._route

        def drawn(*arguments: Any) -> tuple[Tensor, Tensor, Tensor | None, Any]:
            _, weight_TK, wanted_TK, sums = route(*arguments)
            return self.expert_TK, weight_TK, wanted_TK, sums

        layer.gate._route = drawn  # type: ignore[method-assign, assignment]

    def popularity(self, skewed: bool) -> None:
        """Draw two different experts for each token: all alike, or by Zipf's law in an order that is drawn once."""
        self.skewed = skewed
        share_E = np.arange(1, self.shape.num_experts + 1) ** -(EXPONENT if skewed else 0.0)
        share_E = np.random.default_rng(0).permutation(share_E / share_E.sum())
        noise_TE = np.random.default_rng((1, self.mesh.rank)).gumbel(size=(self.shape.tokens, self.shape.num_experts))
        self.expert_TK = torch.from_numpy(np.argsort(-(noise_TE + np.log(share_E)), axis=1)[:, :2].copy())

    def step(self, adaptation: Adaptation | None = None) -> float:
        """Forward and backward, begun by all ranks together; this rank's seconds."""
        token_T, captures = self.token_QP.reshape(-1), []
        if adaptation is not None and adaptation.window is not None:
            captures = [adaptation.window.capture]
            captures[0].begin(token_T, torch.arange(len(token_T)) // self.shape.sequence)
        context = StepContext(0, self.num_steps, True, token_T, self.mesh.rank * len(token_T), tuple(c.listener for c in captures))
        self.num_steps += 1
        gc.collect()
        barrier(self.mesh)
        begin_s = time.perf_counter()
        output = self.model(self.token_QP, context)
        output.logits_QPV.square().mean().backward()
        seconds = time.perf_counter() - begin_s
        self.model.zero_grad(set_to_none=False)
        flights = self.mesh.ledger.take()
        if adaptation is not None:
            counted = np.sum(all_gather_objects(bytes_by_class(flights), self.mesh), axis=0)
            sent = tuple(int(size) for size in counted)
            adaptation.after(StepNumbers(flights, sent, seconds, exposed_s(flights), output.load_LE.numpy()))
        return seconds


@dataclass(frozen=True)
class Chosen:
    """How the adaptive run came to its strategy in one phase."""

    strategy: Strategy
    steps: int
    look_s: float


def adapt(run: Run, adaptation: Adaptation) -> Chosen:
    """Steps of the adaptive run until its choice for this phase is in force."""
    choices_before = adaptation.num_choices
    for number in range(MOST_STEPS):
        begin_s = time.perf_counter()
        adaptation.before(run.num_steps, run.plan, is_busy=False)
        look_s = time.perf_counter() - begin_s
        if adaptation.num_choices > choices_before:
            (strategy,) = adaptation.strategies
            return Chosen(strategy, number, look_s)
        run.step(adaptation)
    raise AssertionError(f"no choice within {MOST_STEPS} steps")


def fixed_strategies(hot: tuple[int, ...]) -> dict[str, Strategy]:
    """What a user might configure; slot 1 is the middle of the three stages by FLOP here."""
    plain = {dispatch: Strategy(dispatch, 1) for dispatch in ("flat", "deduplicated", "hierarchical")}
    named: dict[str, Strategy] = {**plain, "sequential": Strategy("deduplicated", 1, overlap=False)}
    named |= {f"{name}_chunked": replace(plain[name], forward_chunks=4, backward_chunks=4) for name in ("deduplicated", "hierarchical")}
    if hot:
        named["gathered"] = replace(plain["deduplicated"], gathered=hot)
    return named


def phase(run: Run, adaptation: Adaptation, skewed: bool, rate: float, repeats: int) -> list[dict[str, Any]]:
    """The rows of one rate and one popularity: choose, then time every strategy in turns."""
    run.popularity(skewed)
    found = adapt(run, adaptation)
    problems = broadcast_object(adaptation.problems, run.mesh)
    hot = max((traffic.gathered for traffic in problems[0].traffics), key=len)
    strategies = {**fixed_strategies(hot), "adaptive": found.strategy}

    def timed_under(strategy: Strategy) -> float:
        choice.apply(run.model, [strategy])
        return run.step()

    names = list(strategies)
    samples = in_turns({name: functools.partial(timed_under, strategy) for name, strategy in strategies.items()}, repeats, warmup=1)
    choice.apply(run.model, [found.strategy])
    steps = {name: slowest(run.mesh, seconds) for name, seconds in samples.items()}
    medians = {name: statistics.median(seconds) for name, seconds in steps.items()}
    best = min((name for name in names if name != "adaptive"), key=lambda name: medians[name])
    block_s = {name: price(problems[0], strategy).total_s for name, strategy in strategies.items()}
    rows = []
    for name in names:
        ratio = paired_ratio(steps[name], steps[best])
        row: dict[str, Any] = {
            "routing": "zipf" if skewed else "balanced",
            "link_bit_per_s": rate,
            "strategy": name,
            **Spread.of(steps[name]).row("step_s"),
            "over_best": ratio.median,
            "over_best_quartile_1": ratio.quartile_1,
            "over_best_quartile_3": ratio.quartile_3,
            "predicted_s": medians["deduplicated"] + block_s[name] - block_s["deduplicated"],
            "what": describe(strategies[name]),
            "repeats": repeats,
        }
        if name == "adaptive":
            row |= {"steps_to_choice": found.steps, "look_s": found.look_s, "best_fixed": best}
        rows.append(row)
    return rows


def worker(options: argparse.Namespace) -> None:
    """One rank: measure, and tell the rows."""
    with meeting(options) as (mesh, lab):
        shape, rows = Shape(**json.loads(options.shape)), []
        for rate in options.rates:
            set_rate(mesh, lab, rate)
            run = Run(shape, mesh)
            with tempfile.TemporaryDirectory() as folder:
                adaptation = Adaptation(
                    ADAPT,
                    run.model,
                    mesh,
                    topology_of(mesh, None),
                    shape.tokens,
                    shape.sequence,
                    1,
                    Path(folder) / "choices.jsonl",
                    event=lambda *_, **__: None,
                    table=lambda _: None,
                )
                for skewed in (False, True):
                    rows += phase(run, adaptation, skewed, rate, options.repeats)
        tell(mesh, rows)


# ---- the command


def _parser() -> argparse.ArgumentParser:
    parser = on_ranks.parser("benchmarks.adapt", __doc__, repeats=7)
    parser.add_argument("--tokens", type=int, default=Shape.tokens, help="of one rank")
    parser.add_argument("--model-width", type=int, default=Shape.model_width)
    parser.add_argument("--mlp-width", type=int, default=Shape.mlp_width, help="of MLP and shared expert")
    parser.add_argument("--expert-width", type=int, default=Shape.expert_width)
    return parser


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.lab:
        worker(options)
        return 0
    if options.short:
        options.rates, options.repeats = [500e6], 3
        options.tokens, options.model_width, options.mlp_width, options.expert_width = 256, 64, 128, 64
    shape = Shape(options.tokens, Shape.sequence, options.model_width, options.mlp_width, options.expert_width)
    with Lab(NODES, options.rates[0]) as lab:
        rows = started("benchmarks.adapt", lab, RANKS_PER_NODE, shape, options)
    publish(rows, f"adaptive choice on {NODES} nodes x {RANKS_PER_NODE} ranks, {shape}", options.out, options.json, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
