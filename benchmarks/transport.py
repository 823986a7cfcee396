"""torch and MPI as carriers of all-to-alls, by the measurement with which `parallel.transport: auto` chooses between them.

    mpirun -n 4 python -m benchmarks.transport [--out X.json] [--page X.md] [--repeats 31]

Rows: what a rank sends in a dispatch, and for both carriers the seconds of a dispatch alone and beside as much computing, of the slowest
rank, in turns; beside them a bound: what comes from other ranks, copied once.
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

from benchmarks.command_line import one_line_errors
from benchmarks.measure import Spread, markdown_table, paired_ratio, publish
from crossdock.atomic import write_text
from crossdock.launch.ranks import mpi
from crossdock.runtime.transport.carrier import CarrierName
from crossdock.runtime.transport.carrier_choice import CarrierSamples, sample, slowest_s
from crossdock.runtime.transport.mesh import Mesh, initialise, shutdown
from crossdock.runtime.transport.mpi_exchange import Progress, over_mpi

SIZES = (1 << 12, 1 << 16, 1 << 20, 1 << 22, 1 << 24)
TIMEOUT_S = 120.0
REPEATS = 31
CARRIERS: tuple[CarrierName, ...] = ("torch", "mpi")
KINDS = ("alone", "beside_compute")
COLUMNS = (
    "message_bytes",
    *(f"{kind}_{what}" for kind in KINDS for what in ("torch_s", "mpi_s", "ratio")),
    "compute_s",
    "copy_bound_s",
    "chosen",
)


def mpi_library() -> str:
    """The package that brought MPI into this environment, with its version."""
    found = [one for one in metadata.distributions() if one.name in ("mpich", "openmpi", "impi-rt")]
    return f"{found[0].name} {found[0].version}" if found else "the system's MPI"


def row_of(samples: CarrierSamples, copy_s: Sequence[float], ranks: int) -> dict[str, Any]:
    """Medians with the lowest and the highest of the repeats; ratios are medians of MPI over torch in the same repeat."""
    choice = samples.choice()
    row: dict[str, Any] = {"ranks": ranks, "message_bytes": samples.message_bytes, "chosen": choice.name, "compute_s": samples.compute_s}
    for kind, times in (("alone", samples.alone_s), ("beside_compute", samples.beside_compute_s)):
        for name in CARRIERS:
            row |= Spread.of(times[name]).row(f"{kind}_{name}_s")
        row |= paired_ratio(times["mpi"], times["torch"]).row(f"{kind}_ratio")
    return row | Spread.of(copy_s).row("copy_bound_s")


def copied_once(samples: CarrierSamples, mesh: Mesh, repeats: int) -> list[float]:
    """Seconds of the slowest rank to copy what a dispatch brings it from the others, all ranks at the same time: no carrier is faster that
    copies each row at least once."""
    rows = torch.zeros(samples.message_bytes - samples.message_bytes // mesh.expert_parallel, dtype=torch.uint8)
    there = torch.ones_like(rows)
    return slowest_s(mesh, {"copy": lambda: there.copy_(rows)}, repeats)["copy"]


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the page: medians, lowest to highest in brackets."""
    cells = {name: f"{row[name]:.3g} ({row[f'{name}_low']:.3g}-{row[f'{name}_high']:.3g})" for name in COLUMNS if f"{name}_low" in row}
    return {name: cells.get(name, row[name]) for name in COLUMNS}


def page(document: Mapping[str, Any], name: str) -> str:
    """The results page."""
    host, ranks, repeats, rows = document["machine"], document["rows"][0]["ranks"], document["repeats"], document["rows"]
    times_bound = {carrier: rows[-1][f"alone_{carrier}_s"] / rows[-1]["copy_bound_s"] for carrier in CARRIERS}
    wins = sum(row["chosen"] == "mpi" for row in rows)
    return f"""# Tokens over torch and over MPI

    mpirun -n {ranks} python -m benchmarks.transport --repeats {repeats} --out {name}.json --page {name}.md

Commit {document["commit"]}. Machine: {host["processor"]}, {host["cores"]} cores, {host["system"]}, Python {host["python"]},
torch {host["torch"]}, {document["mpi_library"]}. Load when it began: {document["load_at_start"]:g}; the {ranks} ranks are a load of
{ranks} themselves. Raw numbers: [{name}.json]({name}.json).

{ranks} ranks on one host, one thread each. Seconds of one layer's dispatch (its counts, then its rows), `message_bytes` sent by each rank,
alone and beside as much computing: median of {repeats} repeats of the slowest rank, lowest and highest in brackets, torch (gloo) and MPI in
turns. Ratios are MPI over torch in the same repeat. `compute_s` is what the computing beside it takes by itself. `copy_bound_s` is one copy
of what comes from other ranks, all ranks copying at once: it knows no latency, so it says something of large messages alone. Of
{rows[-1]["message_bytes"]:,} bytes torch takes {times_bound["torch"]:.1f} times as long, and MPI {times_bound["mpi"]:.1f} times.

`chosen` is what `parallel.transport: auto` takes for messages of that size, by the same code: a step has exchanges of both kinds, and the
smaller sum of the two medians wins. Here MPI wins {wins} of {len(rows)} sizes. A run measures at its own message size, on its own hosts.

{markdown_table([shown(row) for row in rows], COLUMNS)}"""


@one_line_errors
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
    place = mpi.world()
    with tempfile.TemporaryDirectory(prefix="crossdock-transport-") as folder:
        store = mpi.broadcast(f"file://{folder}/store")  # rank 0's, which outlives the others' use of it
        initialise(place.rank, place.world_size, init_method=store, timeout_s=TIMEOUT_S)
        torch_mesh = Mesh.create(place.rank, place.world_size, place.world_size, timeout_s=TIMEOUT_S)
        communicator = mpi.communicator()
        progress = Progress(communicator, TIMEOUT_S)
        mpi_mesh = over_mpi(torch_mesh, communicator, progress)
        rows = []
        for size in SIZES:
            samples = sample(torch_mesh, mpi_mesh, size, options.repeats)
            rows.append(row_of(samples, copied_once(samples, torch_mesh, options.repeats), place.world_size))
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
