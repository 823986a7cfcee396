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
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Spread, publish
from benchmarks.netlab import Lab
from benchmarks.scaling_report import write_report
from benchmarks.simulate_layer import Layer
from crossdock.atomic import write_json
from crossdock.errors import CrossdockError, UsageError
from crossdock.models.moe import MoELayer
from crossdock.runtime.dispatch.assignment import Assignment
from crossdock.runtime.dispatch.dispatcher import DISPATCHERS
from crossdock.runtime.transport import ledger
from crossdock.runtime.transport.collectives import all_gather_objects, barrier
from crossdock.runtime.transport.mesh import Mesh, initialise, shutdown

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


def measured(lab: Lab, mesh: Mesh, shape: Layer, strategies: Sequence[str], rates: Sequence[float], repeats: int) -> list[dict[str, Any]]:
    """One row for each rate and strategy; equal on every rank."""
    steps: dict[str, Callable[[], None]] = {name: Step(shape, name, mesh) for name in strategies}
    rows = []
    for rate in rates:
        barrier(mesh)
        if mesh.rank == 0:
            lab.set_rate(rate)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        sent: dict[str, int] = {}
        for round_number in range(-1, repeats):
            turn = round_number % len(steps)
            for name in (*list(steps)[turn:], *list(steps)[:turn]):
                barrier(mesh)
                mesh.ledger.take()
                begin_s = time.perf_counter()
                steps[name]()
                step_s = time.perf_counter() - begin_s
                flights = mesh.ledger.take()
                sent[name] = sum(ledger.bytes_by_class(flights, kind)[2] for kind in MOVED)
                if round_number >= 0:
                    seconds[name].append(step_s)
        everybody = all_gather_objects((seconds, sent), mesh)
        rows += [
            {
                "nodes": lab.nodes,
                "ranks_per_node": mesh.world_size // lab.nodes,
                "link_bit_per_s": rate,
                "latency_s": lab.latencies_s[0],
                "strategy": name,
                **Spread.of(max(repeat) for repeat in zip(*(of_rank[name] for of_rank, _ in everybody), strict=True)).row("step_s"),
                "other_node_bytes": sum(of_rank[name] for _, of_rank in everybody),
                "repeats": repeats,
            }
            for name in steps
        ]
    return rows


def worker(options: argparse.Namespace) -> None:
    """One rank; rank 0 prints the rows."""
    torch.set_num_threads(1)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    lab = Lab.attach(options.lab)
    initialise(rank, world_size, timeout_s=120)
    mesh = Mesh.create(rank, world_size, world_size, tuple(other * lab.nodes // world_size for other in range(world_size)), timeout_s=120)
    rows = measured(lab, mesh, Layer(**json.loads(options.shape)), options.strategies, options.rates, options.repeats)
    if rank == 0:
        print(json.dumps(rows))
    barrier(mesh)
    shutdown()


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
            passed = ["--rates", ",".join(map(str, options.rates)), "--repeats", str(options.repeats)]
            passed += ["--strategies", ",".join(options.strategies)]
            passed += ["--lab", lab.name, "--shape", json.dumps(dataclasses.asdict(shape))]
            rows += json.loads(lab.ranks(["-m", "benchmarks.scaling", "measure", *passed], ranks_per_node, timeout_s=600)[0])
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


def _rates(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("measure", help="time the layer on emulated nodes (root)")
    command.add_argument("--topologies", type=_topologies, default=_topologies(TOPOLOGIES), help="nodes x ranks, separated by commas")
    command.add_argument("--rates", type=_rates, default=[1e8, 4e8], help="bit/s of each node's link, each direction")
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


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        if options.command == "report":
            write_report(options.measured, options.out, options.json)
        elif options.lab:
            worker(options)
        else:
            if options.repeats < 3:
                raise UsageError(f"{options.repeats} repeats; choose 3 or more")
            measure(options)
    except CrossdockError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
