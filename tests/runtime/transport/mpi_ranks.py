"""What every rank does for test_mpi_exchange.py: `mpirun -n R python -m tests.runtime.transport.mpi_ranks STORE OUT WHAT`."""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crossdock import atomic
from crossdock.errors import PeerLost
from crossdock.runtime.dispatch.dispatcher import DISPATCHERS
from crossdock.runtime.transport.all_to_all import Route, all_to_all_start
from crossdock.runtime.transport.carrier_choice import choose_carrier
from crossdock.runtime.transport.exchange import exchange_start
from crossdock.runtime.transport.ledger import Flight, bytes_by_class
from crossdock.runtime.transport.mesh import Mesh, initialise, shutdown
from crossdock.runtime.transport.mpi_exchange import Progress, over_mpi
from tests.runtime.movement_cases import Case, Outcome, as_slots, random_slots, run_layer_on

TIMEOUT_S = 60.0


def random_cases(world_size: int, nodes: tuple[int, ...]) -> list[Case]:
    """Uneven tokens, some without an expert, copies of experts, chunks in flight together, every wire; one rank without tokens."""
    cases = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        chosen = tuple(
            tuple(tuple(int(e) for e in rng.permutation(7)[: rng.integers(0, 4)]) for _ in range(rng.integers(0, 40) if rank else 5 * seed))
            for rank in range(world_size)
        )
        slots = as_slots(random_slots(rng, 7, world_size, -(-12 // world_size), 3))
        more: dict[str, Any] = [
            {"dtype": torch.float32},
            {"wire": "bf16", "chunks": 3, "dtype": torch.float32},
            {"wire": "int8", "chunks": 2, "prepared": True, "dtype": torch.float32},
            {"chunks": 4},
        ][seed]
        cases.append(Case(world_size, 7, slots, chosen, nodes, seed, **more))
    return cases


def same(ours: Outcome, theirs: Outcome) -> bool:
    """Bit for bit, and as much in every flight of the ledger."""
    names = ("y", "grad_x", "grad_weight", "grad_in_EDF", "grad_out_EFD")
    return all(torch.equal(getattr(ours, name), getattr(theirs, name)) for name in names) and flown(ours) == flown(theirs)


def flown(outcome: Outcome) -> list[tuple[Any, ...]]:
    def of(flight: Flight) -> tuple[Any, ...]:
        return flight.layer, flight.stage, flight.direction, flight.kind, flight.bytes_by_class

    return sorted(of(flight) for flight in outcome.flights)


def equality(torch_mesh: Mesh, mpi_mesh: Mesh) -> dict[str, Any]:
    """Every dispatcher on every case over both: which were equal, and the bytes that this rank moved."""
    found: dict[str, Any] = {}
    for name in sorted(DISPATCHERS):
        for case in random_cases(torch_mesh.world_size, torch_mesh.node_of_rank):
            by_torch, by_mpi = (run_layer_on(mesh, name, case) for mesh in (torch_mesh, mpi_mesh))
            found[f"{name} {case.seed}"] = {"same": same(by_mpi, by_torch), "bytes": sum(bytes_by_class(by_mpi.flights))}
    return found


def goes_on(torch_mesh: Mesh, mpi_mesh: Mesh) -> dict[str, Any]:
    """Whether an exchange whose sends cannot complete at once is over after a pause in which this rank was not inside MPI's calls."""
    rows = torch.full((1 << 20, 4), float(mpi_mesh.rank))
    even = [len(rows) // mpi_mesh.world_size] * mpi_mesh.world_size
    exchange: Any = exchange_start(rows, even, even, mpi_mesh.token_group)
    at_once = exchange.is_complete
    deadline_s = time.monotonic() + TIMEOUT_S
    while not exchange.is_complete and time.monotonic() < deadline_s:
        time.sleep(0.01)
    over = exchange.is_complete
    received = exchange.wait()
    right = torch.equal(received[:, 0], torch.arange(mpi_mesh.world_size).float().repeat_interleave(even[0]))
    return {"at_once": at_once, "over": over, "right": right}


def choice(torch_mesh: Mesh, mpi_mesh: Mesh) -> dict[str, Any]:
    chosen = choose_carrier(torch_mesh, mpi_mesh, 1 << 16)
    return {**chosen.carrier.as_event(), "is_mpi": chosen.token_group is mpi_mesh.token_group}


def farewell(torch_mesh: Mesh, mpi_mesh: Mesh) -> dict[str, Any]:
    """Rank 1 fails and leaves; the others wait for its rows and must hear of it, long before their time is over."""
    if mpi_mesh.rank == 1:
        return {"said": ""}
    even = (1,) * mpi_mesh.world_size
    begin_s = time.monotonic()
    try:
        all_to_all_start(
            torch.ones(mpi_mesh.world_size, 1), Route(mpi_mesh, mpi_mesh.token_group, even, even, 5, "combine", "tokens", 1)
        ).wait()
    except PeerLost as error:
        return {"said": str(error), "seconds": time.monotonic() - begin_s}
    return {"said": "nothing"}


WORK = {work.__name__: work for work in (equality, goes_on, choice, farewell)}


def main(store: str, out: str, what: str) -> int:
    from crossdock.launch.ranks import mpi

    torch.set_num_threads(1)
    place = mpi.world()
    initialise(place.rank, place.world_size, init_method=f"file://{store}", timeout_s=TIMEOUT_S)
    nodes = tuple(rank * 2 // place.world_size for rank in range(place.world_size))
    torch_mesh = Mesh.create(place.rank, place.world_size, place.world_size, nodes, timeout_s=TIMEOUT_S)
    communicator = mpi.communicator()
    progress = Progress(communicator, TIMEOUT_S)
    found = WORK[what](torch_mesh, over_mpi(torch_mesh, communicator, progress))
    atomic.write_json(Path(out) / f"{place.rank}.json", found)
    progress.close(failed=what == "farewell" and place.rank == 1)
    if what == "farewell":
        mpi.abandon()
        return 0
    shutdown()
    mpi.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
