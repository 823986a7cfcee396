"""What the programs share that measure on ranks of an emulated cluster: their options, the ranks, calls in turns, rows back to the command.

A program calls itself: the command builds a laboratory and starts `python -m PROGRAM --lab NAME ...` once on every rank (`started`); a rank
(`options.lab` is set) meets the others (`meeting`), measures, and rank 0 prints what the command reads.
"""

import argparse
import contextlib
import gc
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.netlab import Lab
from crossdock.runtime.transport.collectives import all_gather_objects, barrier
from crossdock.runtime.transport.mesh import Mesh, initialise, shutdown

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MEETING_S = 120.0
PROGRAM_S = 1800.0


def rates(text: str) -> list[float]:
    """Link rates in bit/s from `1e9,500e6`."""
    return [float(part) for part in text.split(",")]


def rates_or_none(text: str) -> list[float | None]:
    """The same; `none` is no link at all."""
    return [None if part == "none" else float(part) for part in text.split(",")]


def parser(
    program: str, description: str | None, repeats: int, read_rates: Callable[[str], Sequence[float | None]] = rates
) -> argparse.ArgumentParser:
    """The options that every such program has; `description` is its docstring, of which the first line is shown."""
    options = argparse.ArgumentParser(prog=f"python -m {program}", description=(description or "").partition("\n")[0])
    options.add_argument("--rates", type=read_rates, default=[1e9, 500e6, 250e6], help="bit/s of each node's link, each direction")
    options.add_argument("--repeats", type=int, default=repeats)
    options.add_argument("--short", action="store_true", help="one rate, few repeats, small shapes: shows that it runs")
    options.add_argument("--json", action="store_true")
    options.add_argument("--out", type=Path)
    options.add_argument("--lab", help=argparse.SUPPRESS)
    options.add_argument("--shape", help=argparse.SUPPRESS)
    return options


def started(program: str, lab: Lab, ranks_per_node: int, shape: "DataclassInstance", options: argparse.Namespace, *more: str) -> Any:
    """Run `program` on every rank of `lab` with these rates, repeats and shape, and the arguments `more`; what rank 0 told.

    Raises `PeerLost` with the last lines of the rank to blame.
    """
    passed = ["--rates", ",".join("none" if rate is None else str(rate) for rate in options.rates), "--repeats", str(options.repeats)]
    passed += ["--lab", lab.name, "--shape", json.dumps(asdict(shape))]
    return json.loads(lab.ranks(["-m", *program.split(), *passed, *more], ranks_per_node, timeout_s=PROGRAM_S)[0])


# ---- on every rank


@contextlib.contextmanager
def meeting(options: argparse.Namespace, patience_s: float = MEETING_S) -> Iterator[tuple[Mesh, Lab]]:
    """This rank among the others, one thread each: the mesh of all, and the laboratory that they stand in.

    patience_s: how long ranks wait for one another; more than `MEETING_S` where one of them computes meanwhile.
    """
    torch.set_num_threads(1)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    lab = Lab.attach(options.lab)
    initialise(rank, world_size, timeout_s=patience_s)
    nodes = tuple(other * lab.nodes // world_size for other in range(world_size))
    mesh = Mesh.create(rank, world_size, world_size, nodes, timeout_s=patience_s)
    yield mesh, lab
    barrier(mesh)
    shutdown()


def tell(mesh: Mesh, found: Any) -> None:
    """What the command reads: JSON, from rank 0."""
    if mesh.rank == 0:
        print(json.dumps(found))


def set_rate(mesh: Mesh, lab: Lab, rate_bit_per_s: float | None) -> None:
    """Shape every node's link while no rank sends; None leaves it open."""
    barrier(mesh)
    if mesh.rank == 0:
        lab.set_rate(rate_bit_per_s)
    barrier(mesh)


def timed(mesh: Mesh, call: Callable[[], object]) -> float:
    """Seconds of one call that all ranks begin together, on this rank."""
    gc.collect()
    barrier(mesh)
    begin_s = time.perf_counter()
    call()
    return time.perf_counter() - begin_s


def slowest(mesh: Mesh, seconds: Sequence[float]) -> list[float]:
    """For each repeat the slowest rank's seconds; equal on every rank."""
    return [max(repeat) for repeat in zip(*all_gather_objects(list(seconds), mesh), strict=True)]
