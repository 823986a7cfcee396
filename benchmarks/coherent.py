"""Does it pay in training to let tokens stay with their experts? Context-coherent traffic beside tokens that go home, top-1.

    python -m benchmarks.coherent [--rates 1e9,500e6,250e6] [--repeats 9] [--out FILE] [--json] [--short]      (root: it makes namespaces)

A model of a few layers, each attention and one routed expert a token, forward and backward on two emulated nodes with two ranks each; no
gradient reduction, no optimizer. Rows:

    home              de-duplicated dispatch: to the expert and back, four movements a layer
    coherent          to the next expert only, two movements a layer; keys and values to every rank, and their gradients back
    coherent_planned  the same under a plan that keeps consecutive experts of a token together (solver `anneal`, objective hops), solved
                      on this very routing: more than a forecast could give

Cases (`--cases`): tokens drawn uniformly, with one head of keys and values for 8 query heads (`one_of_8`), for 32 (`one_of_32`), or one for
each of 8 (`all_of_8`); and one for 8 on bytes of real text, which the fresh gates spread less evenly (`text`).

Columns, medians over paired repeats (a repeat's time is that of its slowest rank): step_s; over_home, the median of the repeats' ratios to
the home row; bytes between nodes and between ranks of a node, of rows and of keys and values, counted (coherent rows fail unless they are
those predicted); dense_load, residents of the busiest rank over the mean; expert_load, the same of routed rows.
"""

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import on_ranks
from benchmarks.command_line import one_line_errors
from benchmarks.measure import Spread, in_turns, paired_ratio, publish
from benchmarks.netlab import Lab
from benchmarks.on_ranks import meeting, set_rate, slowest, started, tell, timed
from crossdock.models.config import ModelConfig
from crossdock.models.transformer import Transformer
from crossdock.placement.costs.coherent import CoherentEvaluation, Context, evaluate_coherent
from crossdock.placement.costs.cost import Workload
from crossdock.placement.records.affinity import Affinity
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import Trace
from crossdock.placement.solvers import solve
from crossdock.placement.solvers.problem import Problem
from crossdock.runtime.training.context import StepContext
from crossdock.runtime.transport.collectives import all_gather_objects, broadcast_object
from crossdock.runtime.transport.ledger import bytes_by_class
from crossdock.runtime.transport.mesh import Mesh

RANKS, NODES = 4, 2
CASES = {"one_of_8": ("uniform", 8, 1), "one_of_32": ("uniform", 32, 1), "all_of_8": ("uniform", 8, 8), "text": ("text", 8, 1)}
"""Tokens, query heads, heads of keys and values."""
COLUMNS = ["variant", "case", "link_bit_per_s", "step_s", "step_s_low", "step_s_high", "over_home", "other_node_bytes"]
COLUMNS += ["same_node_bytes", "dense_load", "expert_load"]


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; SwiGLU experts in fp32."""

    num_layers: int = 3
    model_width: int = 512
    expert_width: int = 512
    num_experts: int = 8
    sequences: int = 8  # of one rank
    positions: int = 128
    vocab_size: int = 512

    def config(self, traffic: str, heads: int, kv_heads: int) -> ModelConfig:
        """The model; both ways of traffic have the same parameters."""
        return ModelConfig(
            vocab_size=self.vocab_size,
            num_layers=self.num_layers,
            model_width=self.model_width,
            num_heads=heads,
            num_kv_heads=kv_heads,
            block="top_k",
            top_k=1,
            moe_every=1,
            num_experts=self.num_experts,
            expert_width=self.expert_width,
            traffic=traffic,  # type: ignore[arg-type]
        )

    def batch(self, tokens: str, rank: int) -> torch.Tensor:
        """Token ids of `rank` with one more position for the targets, int64 [Q, P + 1]."""
        size = (self.sequences, self.positions + 1)
        if tokens == "uniform":
            return torch.randint(0, self.vocab_size, size, generator=torch.Generator().manual_seed(rank))
        source = np.frombuffer(Path(argparse.__file__).read_bytes(), dtype=np.uint8)
        begin = rank * size[0] * size[1]
        return torch.from_numpy(source[begin : begin + size[0] * size[1]].astype(np.int64)).view(size)


class Step:
    """One variant's model on this rank, with its batch; a call is forward and backward."""

    def __init__(self, shape: Shape, mesh: Mesh, case: str, traffic: str, plan: Plan) -> None:
        self.shape, self.mesh, self.plan = shape, mesh, plan
        tokens, heads, kv_heads = CASES[case]
        self.model = Transformer(shape.config(traffic, heads, kv_heads), mesh, plan, dispatch="deduplicated")
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)  # accumulated into, as in every micro-batch but the first
        batch_QP = shape.batch(tokens, mesh.rank)
        self.token_QP, self.target_QP = batch_QP[:, :-1].contiguous(), batch_QP[:, 1:].flatten()
        self.experts: dict[int, list[int]] = {}

    def __call__(self) -> None:
        context = StepContext(0, 0, True, self.token_QP.flatten(), self.mesh.rank * self.token_QP.numel())
        self._forward(context).backward()

    def trace(self) -> Trace:
        """What the batch of all ranks chose, on every rank."""
        experts: dict[int, list[int]] = {}
        listener = (lambda layer, assignment: experts.update({layer: assignment.expert_A.tolist()}),)
        with torch.no_grad():
            self._forward(StepContext(0, 0, True, self.token_QP.flatten(), self.mesh.rank * self.token_QP.numel(), listener))
        of_ranks = all_gather_objects([experts[layer] for layer in sorted(experts)], self.mesh)
        experts_TL = np.concatenate([np.array(layers).T for layers in of_ranks])
        home_T = np.repeat(np.arange(RANKS, dtype=np.int32), len(experts_TL) // RANKS)
        return Trace(experts_TL[:, :, None].astype(np.uint16), self.shape.num_experts, home_T=home_T)

    def counted(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Bytes of one step of all ranks by link class: rows, and keys and values."""
        self.mesh.ledger.take()
        self()
        flights = self.mesh.ledger.take()
        of_ranks = all_gather_objects((bytes_by_class(flights), bytes_by_class(flights, "keys_values")), self.mesh)
        rows, keys_values = (np.sum([pair[kind] for pair in of_ranks], axis=0) for kind in (0, 1))
        return tuple(rows.tolist()), tuple(keys_values.tolist())

    def _forward(self, context: StepContext) -> torch.Tensor:
        output = self.model(self.token_QP, context)
        return F.cross_entropy(output.logits_QPV.flatten(0, 1), self.target_QP) + torch.stack(list(output.losses.values())).sum()


def measure(mesh: Mesh, shape: Shape, case: str, rate_bit_per_s: float, repeats: int) -> list[dict[str, Any]]:
    """The rows of one case at one link rate."""
    topology = Topology.uniform(NODES, RANKS // NODES, other_node_bytes_per_s=rate_bit_per_s / 8, shared_by_node=True)
    workload = Workload(shape.sequences * shape.positions, shape.model_width, shape.expert_width, wire="fp32", dispatch="deduplicated")
    blocks = Plan.contiguous(shape.num_layers, shape.num_experts, RANKS)
    home = Step(shape, mesh, case, "home", blocks)
    trace = home.trace()
    problem = Problem(Affinity.from_trace(trace), topology, workload, objective="hops")
    planned = broadcast_object(solve(problem, "anneal", seconds=2.0, seed=0).plan if mesh.rank == 0 else None, mesh)
    steps = {
        "home": home,
        "coherent": Step(shape, mesh, case, "coherent", blocks),
        "coherent_planned": Step(shape, mesh, case, "coherent", planned),
    }
    samples = in_turns({name: functools.partial(timed, mesh, step) for name, step in steps.items()}, repeats, warmup=2)
    step_s = {name: slowest(mesh, seconds) for name, seconds in samples.items()}
    context = Context(2 * home.model.config.kv_heads * home.model.config.head_width * 4)
    rows = []
    for name, step in steps.items():
        found = evaluate_coherent(trace, step.plan, topology, workload, context)
        row_bytes, key_value_bytes = step.counted()
        if name != "home":
            assert (row_bytes, key_value_bytes) == (found.token_bytes, found.key_value_bytes), "counted bytes are not those predicted"
        sent = [row + kv for row, kv in zip(row_bytes, key_value_bytes, strict=True)]
        spread, ratio = Spread.of(step_s[name]), paired_ratio(step_s[name], step_s["home"])
        rows.append(
            {
                "variant": name,
                "case": case,
                "link_bit_per_s": rate_bit_per_s,
                **spread.row("step_s"),
                "over_home": ratio.median,
                "over_home_quartile_1": ratio.quartile_1,
                "over_home_quartile_3": ratio.quartile_3,
                "other_node_bytes": sent[2],
                "same_node_bytes": sent[1],
                "key_value_share": sum(key_value_bytes[1:]) / max(1, sum(sent[1:])),
                "dense_load": found.dense_max_over_mean if name != "home" else 1.0,
                "expert_load": _expert_load(found),
                "repeats": spread.count,
            }
        )
    return rows


def _expert_load(found: CoherentEvaluation) -> float:
    return float((found.rows_LR.max(axis=1) / found.rows_LR.mean(axis=1)).mean())


def worker(options: argparse.Namespace) -> None:
    """One rank: measure, and tell the rows."""
    with meeting(options) as (mesh, lab):
        rows = []
        for rate in options.rates:
            set_rate(mesh, lab, rate)
            for case in options.cases:
                rows += measure(mesh, Shape(**json.loads(options.shape)), case, rate, options.repeats)
        tell(mesh, rows)


# ---- the command


def _parser() -> argparse.ArgumentParser:
    parser = on_ranks.parser("benchmarks.coherent", __doc__, repeats=9)
    parser.add_argument("--cases", type=lambda text: text.split(","), default=list(CASES), help="of " + ", ".join(CASES))
    parser.add_argument("--layers", type=int, default=Shape.num_layers)
    parser.add_argument("--model-width", type=int, default=Shape.model_width)
    parser.add_argument("--expert-width", type=int, default=Shape.expert_width)
    return parser


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.lab:
        worker(options)
        return 0
    if unknown := set(options.cases) - set(CASES):
        print(f"unknown cases {', '.join(sorted(unknown))}; choose from {', '.join(CASES)}", file=sys.stderr)
        return 2
    shape = Shape(options.layers, options.model_width, options.expert_width)
    if options.short:
        options.rates, options.repeats = [500e6], 3
        shape = Shape(num_layers=2, model_width=64, expert_width=64, sequences=4, positions=32)
    with Lab(NODES, options.rates[0]) as lab:
        rows = started("benchmarks.coherent", lab, RANKS // NODES, shape, options, "--cases", ",".join(options.cases))
    publish(rows, f"{NODES} nodes x {RANKS // NODES} ranks, {shape}", options.out, options.json, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
