"""Which library carries the all-to-alls of a run: torch, or MPI where mpirun started the ranks and `parallel.transport` asks for it."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from crossdock.errors import BadConfig
from crossdock.launch.config import RunConfig
from crossdock.launch.ranks.worker_env import WorkerEnv
from crossdock.launch.transport import MPI_REMEDY, why_not_mpi
from crossdock.placement.costs.cost import WireName, row_bytes
from crossdock.runtime.data import sequences_per_rank
from crossdock.runtime.transport.carrier import Carrier
from crossdock.runtime.transport.mesh import Mesh


@contextlib.contextmanager
def carried(mesh: Mesh, config: RunConfig, env: WorkerEnv) -> Iterator[Mesh]:
    """The mesh with its all-to-alls over the library that `parallel.transport` says; every rank of the world enters at the same time.

    MPI is left as soon as it is no longer needed. Raises `BadConfig` where MPI was asked for and cannot carry this run.
    """
    asked, why = config.parallel.transport, why_not_mpi(config, env.launcher) or _why_not_here(config, mesh)
    if asked == "mpi" and why:
        raise BadConfig(f"parallel.transport mpi: {why}; {MPI_REMEDY}")
    if asked == "torch" or why:
        _leave_mpi(env)
        yield replace(mesh, carrier=Carrier(asked=asked, why=why))
        return

    from crossdock.launch.ranks import mpi
    from crossdock.runtime.transport.carrier_choice import choose_carrier
    from crossdock.runtime.transport.mpi_exchange import Progress, over_mpi

    communicator = mpi.communicator()
    progress = Progress(communicator, mesh.timeout_s)
    try:
        mpi_mesh = over_mpi(mesh, communicator, progress)
        if asked == "mpi":
            chosen = replace(mpi_mesh, carrier=Carrier("mpi", asked))
        else:
            chosen = choose_carrier(mesh, mpi_mesh, dispatch_bytes(config, env.world_size))
        if chosen.carrier.name == "mpi":
            yield chosen
    except BaseException:
        mpi.abandon()  # leaving in order would wait for ranks that do not come
        progress.close(failed=True)
        raise
    progress.close(failed=False)
    mpi.leave()
    if chosen.carrier.name == "torch":
        yield chosen


def _leave_mpi(env: WorkerEnv) -> None:
    if env.launcher == "mpi":
        from crossdock.launch.ranks import mpi

        mpi.leave()


def _why_not_here(config: RunConfig, mesh: Mesh) -> str:
    """Why MPI cannot carry the all-to-alls of ranks that mpirun has started; empty where it can."""
    if mesh.device.type != "cpu":
        return f"tokens are on {mesh.device}, and this transport carries rows of the host's memory"
    if config.parallel.transport != "torch" and not mpi_is_threaded():
        return "this MPI library does not let several threads use it (MPI_THREAD_MULTIPLE)"
    return ""


def mpi_is_threaded() -> bool:
    """Whether several threads may use the MPI that these ranks were started by."""
    from crossdock.launch.ranks import mpi

    return mpi.is_threaded()


def dispatch_bytes(config: RunConfig, world_size: int) -> int:
    """What a rank sends in a dispatch, at most: a row for every token and expert."""
    tokens = sequences_per_rank(config.train.batch_sequences, world_size, config.train.accumulate) * config.data.seq_len
    wire: WireName = config.precision.wire or config.precision.compute
    return tokens * config.model.top_k * row_bytes(wire, config.model.model_width)
