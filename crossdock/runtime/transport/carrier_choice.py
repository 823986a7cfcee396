"""Chooses between torch and MPI for the all-to-alls of a run, by measuring both, on the mesh and at the size that the run will use."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch

from crossdock.runtime.transport.carrier import Carrier, CarrierName, CarrierTimes
from crossdock.runtime.transport.collectives import all_gather_objects, barrier, broadcast_object
from crossdock.runtime.transport.exchange import exchange_start
from crossdock.runtime.transport.mesh import Mesh

REPEATS = 9
_WARMUP = 2
_COUNT_BYTES = 64  # what one rank tells another before rows leave
_ROW_BYTES = 256
_FACTOR = 128  # side of the matrices: one product takes a fraction of a millisecond


def choose_carrier(torch_mesh: Mesh, mpi_mesh: Mesh, message_bytes: int, repeats: int = REPEATS) -> Mesh:
    """The mesh of the faster carrier, the same on every rank, with what was measured in its `carrier`.

    Both are timed in turns, so that what else runs on the machine disturbs them alike. message_bytes: what a rank sends in a dispatch.
    The ranks may differ by a hair in what they see, so rank 0 decides for all.
    """
    meshes: dict[CarrierName, Mesh] = {"torch": torch_mesh, "mpi": mpi_mesh}
    num_rows = max(1, message_bytes // (_ROW_BYTES * torch_mesh.expert_parallel))
    factor = torch.ones((_FACTOR, _FACTOR))
    once = _seconds(torch_mesh, {"dispatch": partial(_dispatch, torch_mesh, num_rows, 0), "product": lambda: factor @ factor}, repeats)
    products = max(1, round(once["dispatch"] / once["product"]))
    calls: dict[str, Callable[[], object]] = {}
    for name, mesh in meshes.items():
        calls[f"{name} alone"] = partial(_dispatch, mesh, num_rows, 0)
        calls[f"{name} beside"] = partial(_dispatch, mesh, num_rows, products)
    seconds = _seconds(torch_mesh, calls, repeats)
    times = {name: CarrierTimes(seconds[f"{name} alone"], seconds[f"{name} beside"]) for name in meshes}
    best = min(times, key=lambda name: times[name].score_s)
    carrier = Carrier(best, "auto", message_bytes=num_rows * _ROW_BYTES * torch_mesh.expert_parallel, times=times)
    carrier = broadcast_object(carrier, torch_mesh)
    return replace(meshes[carrier.name], carrier=carrier)


def _dispatch(mesh: Mesh, num_rows: int, products: int) -> None:
    """The counts, then `num_rows` to each rank, with matrix products between start and wait."""
    counts = torch.zeros((mesh.expert_parallel, _COUNT_BYTES), dtype=torch.uint8)
    exchange_start(counts, [1] * mesh.expert_parallel, [1] * mesh.expert_parallel, mesh.count_group).wait()
    rows = torch.zeros((mesh.expert_parallel * num_rows, _ROW_BYTES), dtype=torch.uint8)
    even = [num_rows] * mesh.expert_parallel
    exchange = exchange_start(rows, even, even, mesh.token_group)
    factor = torch.ones((_FACTOR, _FACTOR))
    for _ in range(products):
        factor @ factor
    exchange.wait()


def _seconds(mesh: Mesh, calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median over the repeats of the slowest rank's seconds of each call, taken in turns; equal on every rank."""
    measured: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(-_WARMUP, repeats):
        for name, call in calls.items():
            barrier(mesh)
            begin_s = time.perf_counter()
            call()
            if repeat >= 0:
                measured[name].append(time.perf_counter() - begin_s)
    of_ranks = all_gather_objects(measured, mesh)
    return {name: statistics.median(map(max, zip(*(found[name] for found in of_ranks), strict=True))) for name in calls}
