"""torch and MPI as carriers of all-to-alls, by the measurement with which `parallel.transport: auto` chooses between them.

    mpirun -n 4 python -m benchmarks.transport [--out X.json] [--repeats 9]

Rows: what a rank sends in a dispatch, and for both carriers the seconds of a dispatch alone and beside as much computing; medians of the
slowest rank, in turns.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import publish
from crossdock.errors import Unavailable
from crossdock.launch.ranks import mpi
from crossdock.runtime.transport.carrier_choice import REPEATS, choose_carrier
from crossdock.runtime.transport.mesh import Mesh, initialise, shutdown
from crossdock.runtime.transport.mpi_exchange import Progress, over_mpi

SIZES = (1 << 12, 1 << 16, 1 << 20, 1 << 22, 1 << 24)
TIMEOUT_S = 120.0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; every rank runs it."""
    parser = argparse.ArgumentParser(prog="mpirun -n R python -m benchmarks.transport", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        place = mpi.world()
    except Unavailable as error:
        print(error, file=sys.stderr)
        return error.exit_code
    with tempfile.TemporaryDirectory(prefix="crossdock-transport-") as folder:
        store = mpi.broadcast(f"file://{folder}/store")  # rank 0's, which outlives the others' use of it
        initialise(place.rank, place.world_size, init_method=store, timeout_s=TIMEOUT_S)
        torch_mesh = Mesh.create(place.rank, place.world_size, place.world_size, timeout_s=TIMEOUT_S)
        communicator = mpi.communicator()
        progress = Progress(communicator, TIMEOUT_S)
        mpi_mesh = over_mpi(torch_mesh, communicator, progress)
        rows = []
        for size in SIZES:
            carrier = choose_carrier(torch_mesh, mpi_mesh, size, options.repeats).carrier
            row: dict[str, Any] = {"ranks": place.world_size, "message_bytes": carrier.message_bytes, "chosen": carrier.name}
            for name, times in carrier.times.items():
                row |= {f"{name}_alone_s": times.alone_s, f"{name}_beside_compute_s": times.beside_compute_s}
            rows.append(row)
        progress.close(failed=False)
        shutdown()
        mpi.leave()
    if place.rank == 0:
        publish(rows, "all-to-alls over torch and over MPI", options.out, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
