"""Chooses between torch and MPI for the all-to-alls of a run, by measuring both, on the mesh and at the size that the run will use."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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


@dataclass(frozen=True, eq=False)
class CarrierSamples:
    """Seconds of the slowest rank in every repeat, by carrier, with the kinds of exchange of `CarrierTimes`; equal on every rank.

    message_bytes: what each rank sent; compute_s: the matrix products that stood beside an exchange take about so long.
    """

    message_bytes: int
    compute_s: float
    alone_s: Mapping[CarrierName, Sequence[float]]
    beside_compute_s: Mapping[CarrierName, Sequence[float]]

    def choice(self) -> Carrier:
        """The carrier with the lower score, by medians."""
        median = statistics.median
        times = {name: CarrierTimes(median(self.alone_s[name]), median(self.beside_compute_s[name])) for name in self.alone_s}
        best = min(times, key=lambda name: times[name].score_s)
        return Carrier(best, "auto", message_bytes=self.message_bytes, times=times)


def choose_carrier(torch_mesh: Mesh, mpi_mesh: Mesh, message_bytes: int) -> Mesh:
    """The mesh of the faster carrier, the same on every rank, with what was measured in its `carrier`. message_bytes: see `sample`.

    The ranks may differ by a hair in what they make of the same numbers, so rank 0 decides for all.
    """
    carrier = broadcast_object(sample(torch_mesh, mpi_mesh, message_bytes).choice(), torch_mesh)
    return replace({"torch": torch_mesh, "mpi": mpi_mesh}[carrier.name], carrier=carrier)


def sample(torch_mesh: Mesh, mpi_mesh: Mesh, message_bytes: int, repeats: int = REPEATS) -> CarrierSamples:
    """Time both carriers in turns, so that what else runs on the machine disturbs them alike.

    message_bytes: what a rank sends in a dispatch, its own rows with it; rounded to whole rows for each rank.
    """
    meshes: dict[CarrierName, Mesh] = {"torch": torch_mesh, "mpi": mpi_mesh}
    num_rows = max(1, message_bytes // (_ROW_BYTES * torch_mesh.expert_parallel))
    factor = torch.ones((_FACTOR, _FACTOR))
    first = slowest_s(torch_mesh, {"dispatch": partial(_dispatch, torch_mesh, num_rows, 0), "product": lambda: factor @ factor}, repeats)
    dispatch_s, product_s = statistics.median(first["dispatch"]), statistics.median(first["product"])
    products = max(1, round(dispatch_s / product_s))
    calls: dict[str, Callable[[], object]] = {}
    for name, mesh in meshes.items():
        calls[f"{name} alone"] = partial(_dispatch, mesh, num_rows, 0)
        calls[f"{name} beside"] = partial(_dispatch, mesh, num_rows, products)
    seconds = slowest_s(torch_mesh, calls, repeats)
    return CarrierSamples(
        message_bytes=num_rows * _ROW_BYTES * torch_mesh.expert_parallel,
        compute_s=products * product_s,
        alone_s={name: seconds[f"{name} alone"] for name in meshes},
        beside_compute_s={name: seconds[f"{name} beside"] for name in meshes},
    )


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


def slowest_s(mesh: Mesh, calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """The slowest rank's seconds of each call in every repeat, the calls taken in turns; equal on every rank."""
    measured: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(-_WARMUP, repeats):
        for name, call in calls.items():
            barrier(mesh)
            begin_s = time.perf_counter()
            call()
            if repeat >= 0:
                measured[name].append(time.perf_counter() - begin_s)
    of_ranks = all_gather_objects(measured, mesh)
    return {name: list(map(max, zip(*(found[name] for found in of_ranks), strict=True))) for name in calls}
