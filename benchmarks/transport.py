"""torch and MPI as carriers of all-to-alls, by the measurement with which `parallel.transport: auto` chooses between them.

    mpirun -n 4 python -m benchmarks.transport [--out X.json] [--page X.md] [--repeats 9]

Rows: what a rank sends in a dispatch, and for both carriers the seconds of a dispatch alone and beside as much computing; medians of the
slowest rank, in turns.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import markdown_table, publish
from crossdock.atomic import write_text
from crossdock.errors import Unavailable
from crossdock.launch.ranks import mpi
from crossdock.runtime.transport.carrier_choice import REPEATS, choose_carrier
from crossdock.runtime.transport.mesh import Mesh, initialise, shutdown
from crossdock.runtime.transport.mpi_exchange import Progress, over_mpi

SIZES = (1 << 12, 1 << 16, 1 << 20, 1 << 22, 1 << 24)
TIMEOUT_S = 120.0
COLUMNS = (
    "message_bytes",
    "torch_alone_s",
    "mpi_alone_s",
    "alone_ratio",
    "torch_beside_compute_s",
    "mpi_beside_compute_s",
    "beside_compute_ratio",
    "chosen",
)


def mpi_library() -> str:
    """The package that brought MPI into this environment, with its version."""
    found = [one for one in metadata.distributions() if one.name in ("mpich", "openmpi", "impi-rt")]
    return f"{found[0].name} {found[0].version}" if found else "the system's MPI"


def page(document: Mapping[str, Any], name: str) -> str:
    """The results page."""
    host, ranks, repeats = document["machine"], document["rows"][0]["ranks"], document["repeats"]
    return f"""# Tokens over torch and over MPI

    mpirun -n {ranks} python -m benchmarks.transport --repeats {repeats} --out {name}.json --page {name}.md

Commit {document["commit"]}. Machine: {host["processor"]}, {host["cores"]} cores, {host["system"]}, Python {host["python"]},
torch {host["torch"]}, {document["mpi_library"]}. Load when it began: {document["load_at_start"]:g}, when it ended:
{host["load_average_1min"]:g}; above {host["cores"]} others computed beside it. Raw numbers: [{name}.json]({name}.json).

{ranks} ranks on one host, one thread each. Seconds of one all-to-all of {"`message_bytes`"} a rank, alone and beside as much computing: the
median of {repeats} repeats of the slowest rank, torch (gloo) and MPI in turns. Ratios are MPI over torch. `chosen` is what
`parallel.transport: auto` would take for messages of that size: a step has exchanges of both kinds, and the smaller sum wins.

{markdown_table(document["rows"], COLUMNS)}"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; every rank runs it."""
    parser = argparse.ArgumentParser(prog="mpirun -n R python -m benchmarks.transport", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    load_at_start = round(os.getloadavg()[0], 2)
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
            for kind in ("alone", "beside_compute"):
                row[f"{kind}_ratio"] = row[f"mpi_{kind}_s"] / row[f"torch_{kind}_s"]
            rows.append(row)
        progress.close(failed=False)
        shutdown()
        mpi.leave()
    if place.rank == 0:
        extra = {"load_at_start": load_at_start, "repeats": options.repeats, "mpi_library": mpi_library()}
        document = publish(rows, "all-to-alls over torch and over MPI", options.out, options.json, COLUMNS, extra)
        if options.page is not None:
            write_text(options.page, page(document, options.page.stem))
    return 0


if __name__ == "__main__":
    sys.exit(main())
