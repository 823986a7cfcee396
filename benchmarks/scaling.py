"""How one MoE layer scales: measured up to 16 ranks on emulated nodes, simulated from 8 to 2,048 devices with what was measured.

    sudo python -m benchmarks.scaling measure [--topologies 2x2,4x4] [--rates 1e8,4e8] [--repeats 7] [--short] --out RAW.json
    python -m benchmarks.scaling report RAW.json [RAW.json ...] [--out docs/benchmarks/DATE-scaling.md] [--json]

`measure` times one layer, forward and backward, under every dispatcher and with all weights gathered: routing is drawn evenly, rows are
wide and experts are tiny, so that the links dominate and four cores can stand for sixteen ranks. `report` fits the few costs of
`simulate_layer.Cluster` that are not known beforehand (what a link gives of its rate, and the processor's time for each phase, message and
byte, which all ranks take from the machine's cores) to the measured points, states the model's error on each point when fitted without it,
and then runs the same model with the figures of a GPU cluster.

A step is the slowest rank's; medians over repeats in which the strategies take turns.
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import on_ranks
from benchmarks.command_line import one_line_errors
from benchmarks.measure import Spread, in_turns, publish
from benchmarks.netlab import Lab
from benchmarks.on_ranks import meeting, set_rate, slowest, started, tell, timed
from benchmarks.scaling_report import write_report
from benchmarks.simulate_layer import Layer
from crossdock.atomic import write_json
from crossdock.errors import UsageError
from crossdock.models.moe import MoELayer
from crossdock.runtime.dispatch.assignment import Assignment
from crossdock.runtime.dispatch.dispatcher import DISPATCHERS
from crossdock.runtime.transport import ledger
from crossdock.runtime.transport.collectives import all_gather_objects
from crossdock.runtime.transport.mesh import Mesh

TOPOLOGIES = "2x1,2x2,4x1,2x4,4x2,2x8,4x4,8x2"
SHAPE = Layer(tokens=256, model_width=512, expert_width=8, num_experts=32, top_k=4, element_bytes=4)
STRATEGIES = (*DISPATCHERS, "gather")
MOVED: tuple[ledger.Kind, ...] = ("tokens", "weights")
COLUMNS = ["nodes", "ranks_per_node", "link_bit_per_s", "latency_s", "strategy", "step_s", "step_s_low", "step_s_high", "other_node_bytes"]


# ---- on every rank


class Step:
    """Forward and backward of one layer under one strategy, with routing drawn evenly; the same for every strategy."""

    def __init__(self, shape: Layer, strategy: str, mesh: Mesh) -> None:
        dispatch, gathered = ("flat", range(shape.num_experts)) if strategy == "gather" else (strategy, ())
        sizes = (shape.model_width, shape.expert_width, shape.num_experts, shape.top_k)
        self.moe = MoELayer(*sizes, mesh=mesh, dispatch=dispatch, gathered_experts=gathered)
        generator = torch.Generator().manual_seed(1 + mesh.rank)
        self.x_TD = torch.randn(shape.tokens, shape.model_width, generator=generator).requires_grad_()
        expert_TK = torch.rand(shape.tokens, shape.num_experts, generator=generator).topk(shape.top_k).indices
        weight_TK = torch.rand(shape.tokens, shape.top_k, generator=generator).requires_grad_()
        self.assignment = Assignment.from_topk(expert_TK, weight_TK)
        self.gradient_TD = torch.randn(shape.tokens, shape.model_width, generator=generator)

    def __call__(self) -> None:
        if self.moe.gathering is not None:
            self.moe.gathering.enter()
        received = self.moe.dispatch_start(self.x_TD, self.assignment).wait()
        y_TD = self.moe.combine_start(self.moe.compute(received)).wait()
        y_TD.backward(self.gradient_TD, retain_graph=False, inputs=[self.x_TD, *self.moe.bank.parameters()])


def timed_and_sent(mesh: Mesh, step: Step) -> tuple[float, int]:
    """Seconds of one step on this rank, and the bytes that it sent to other nodes."""
    mesh.ledger.take()
    step_s = timed(mesh, step)
    flights = mesh.ledger.take()
    return step_s, sum(ledger.bytes_by_class(flights, kind)[2] for kind in MOVED)


def measured(lab: Lab, mesh: Mesh, shape: Layer, strategies: Sequence[str], rates: Sequence[float], repeats: int) -> list[dict[str, Any]]:
    """One row for each rate and strategy; equal on every rank."""
    steps = {name: Step(shape, name, mesh) for name in strategies}
    rows = []
    for rate in rates:
        set_rate(mesh, lab, rate)
        found = in_turns({name: functools.partial(timed_and_sent, mesh, step) for name, step in steps.items()}, repeats, warmup=1)
        rows += [
            {
                "nodes": lab.nodes,
                "ranks_per_node": mesh.world_size // lab.nodes,
                "link_bit_per_s": rate,
                "latency_s": lab.latencies_s[0],
                "strategy": name,
                **Spread.of(slowest(mesh, [step_s for step_s, _ in samples])).row("step_s"),
                "other_node_bytes": sum(all_gather_objects(samples[-1][1], mesh)),
                "repeats": repeats,
            }
            for name, samples in found.items()
        ]
    return rows


def worker(options: argparse.Namespace) -> None:
    """One rank: measure, and tell the rows."""
    with meeting(options) as (mesh, lab):
        tell(mesh, measured(lab, mesh, Layer(**json.loads(options.shape)), options.strategies, options.rates, options.repeats))


# ---- the commands


def measure(options: argparse.Namespace) -> None:
    shape = SHAPE
    if options.short:
        options.topologies, options.rates, options.repeats = [(2, 2)], [4e8], 3
        shape = dataclasses.replace(SHAPE, tokens=64, model_width=128)
    rows: list[dict[str, Any]] = []
    extra = {"shape": dataclasses.asdict(shape), "cores": os.cpu_count()}
    for nodes, ranks_per_node in options.topologies:
        with Lab(nodes, options.rates[0], latency_s=options.latency) as lab:
            strategies = ["--strategies", ",".join(options.strategies)]
            rows += started("benchmarks.scaling measure", lab, ranks_per_node, shape, options, *strategies)
        if options.out is not None:  # a long run that is cut short keeps what it has
            write_json(options.out, {"rows": rows, **extra})
        if not options.json:
            print(f"{nodes}x{ranks_per_node}: {len(rows)} points", file=sys.stderr)
    publish(rows, f"one layer on emulated nodes, {dataclasses.asdict(shape)}", options.out, options.json, COLUMNS, extra=extra)


def _topologies(text: str) -> list[tuple[int, int]]:
    found = []
    for word in text.split(","):
        nodes, _, ranks = word.partition("x")
        if not (nodes.isdigit() and ranks.isdigit() and int(nodes) * int(ranks) > 1):
            raise argparse.ArgumentTypeError(f"topology {word!r}; write nodes x ranks per node, such as 4x2")
        found.append((int(nodes), int(ranks)))
    return found


def _strategies(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in STRATEGIES]
    if unknown:
        raise argparse.ArgumentTypeError(f"strategy {unknown[0]!r}; choose from {', '.join(STRATEGIES)}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("measure", help="time the layer on emulated nodes (root)")
    command.add_argument("--topologies", type=_topologies, default=_topologies(TOPOLOGIES), help="nodes x ranks, separated by commas")
    command.add_argument("--rates", type=on_ranks.rates, default=[1e8, 4e8], help="bit/s of each node's link, each direction")
    command.add_argument("--strategies", type=_strategies, default=list(STRATEGIES), help=f"of {', '.join(STRATEGIES)}")
    command.add_argument("--latency", type=float, default=0.0, help="s of each link, one way")
    command.add_argument("--repeats", type=int, default=7)
    command.add_argument("--short", action="store_true", help="one topology, small rows: for CI")
    command.add_argument("--lab", help=argparse.SUPPRESS)
    command.add_argument("--shape", help=argparse.SUPPRESS)
    report = commands.add_parser("report", help="fit the simulator to measured points and predict 8 to 2,048 devices")
    report.add_argument("measured", type=Path, nargs="+", help="what `measure --out` wrote")
    for each in (command, report):
        each.add_argument("--out", type=Path)
        each.add_argument("--json", action="store_true")
    return parser


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.command == "report":
        write_report(options.measured, options.out, options.json)
    elif options.lab:
        worker(options)
    else:
        if options.repeats < 3:
            raise UsageError(f"{options.repeats} repeats; choose 3 or more")
        measure(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
