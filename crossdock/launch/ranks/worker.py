"""What every launcher runs on every rank: join the others, do the job, leave; and an exit code with `result.json` for every ending.

Ranks that `local/children.py` starts run `python -m crossdock.launch.ranks.worker REQUEST OUTCOME`; torchrun runs `crossdock train` itself.
"""

import contextlib
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from crossdock import atomic
from crossdock.errors import BadConfig, CrossdockError, Occupied, OutOfMemory, PeerLost, Unavailable
from crossdock.launch.config import RunConfig
from crossdock.launch.doctor.ranks import doctor
from crossdock.launch.ending import Result
from crossdock.launch.local.children import tie_to_parent, write_outcome
from crossdock.launch.ranks.carried import carried
from crossdock.launch.ranks.jobs import JOBS
from crossdock.launch.ranks.rendezvous import control_of, exchange, network_interface, open_store, stay_away
from crossdock.launch.ranks.roll_call import Cause, Crew, Lost
from crossdock.launch.ranks.termination import be_deaf, sigterm_restored, stopping_in_order
from crossdock.launch.ranks.worker_env import WorkerEnv, worker_env
from crossdock.launch.request import (
    Request,
    check_reachable,
    check_replan,
    check_world,
    is_finished,
    prepare_directory,
    read_inputs,
    record_failure,
    run_directory,
)
from crossdock.occupancy import occupied
from crossdock.runtime.training.metrics import RunDirectory
from crossdock.runtime.transport.mesh import SHUTDOWN_S, Mesh, initialise, shutdown

if TYPE_CHECKING:
    from torch.distributed import Store

    from crossdock.placement.records.topology import Topology

_NO_MEMORY = ("can't allocate memory", "can't start new thread")
_LOST_S = 0.5  # to leave a world that has lost a rank: nothing is waited for there

MEETING_JOBS = {"doctor": doctor}
"""Jobs that need the others' word alone, and must do where no process group can be formed: `(request, env, store) -> fields`."""


def main(config: RunConfig, env: WorkerEnv) -> Result:
    """Train as `config` says, as the rank that `env` says; every launcher ends here. Never raises for what has an exit code."""
    return run_job(Request("train", config), env)


def run_job(request: Request, env: WorkerEnv, store: "Store | None" = None) -> Result:
    """Run the job to its end or to its error. `store` is the one in which the ranks meet, where rank 0 has opened it before.

    Of a training run rank 0 makes the directory ready, unless the launcher has, and leaves `result.json` in it however it ends.
    """
    with sigterm_restored(), contextlib.ExitStack() as held:
        return _done(request, env, store, held)


def _done(request: Request, env: WorkerEnv, store: "Store | None", held: contextlib.ExitStack) -> Result:
    trains = request.job == "train"
    is_ours = "resume" in request.arguments
    """Whether the run directory is this run's: until it is ready it may be that of an earlier one."""
    try:
        if trains and env.rank == 0:
            try:
                if not is_ours:
                    check_replan(request.config)
                    resume = prepare_directory(request.config)
                    request, is_ours = Request(request.job, request.config, {**request.arguments, "resume": resume}), True
                held.enter_context(occupied(run_directory(request.config)))
            except BaseException:  # the others have no part in this, and would wait
                stay_away(env)
                raise
        if request.job in MEETING_JOBS:
            return Result(0, MEETING_JOBS[request.job](request, env, store))
        with joined(request.config, env, held, trains=trains, store=store) as mesh:
            result = Result(0, JOBS[request.job](request, env, mesh))
            be_deaf()
        if trains and env.rank == 0:
            write_report(RunDirectory(run_directory(request.config)))
        return result
    except BaseException as failure:
        code, message = explain(failure)
        lost = failure.cause if isinstance(failure, Lost) else None
        rank = env.rank if lost is None else lost.rank
        details = {"message": message, "rank": rank}
        if code == 1:
            details["traceback"] = "".join(traceback.format_exception(failure))
        if isinstance(failure, Occupied):
            return Result(code, details)  # nothing there is ours
        if trains and (env.rank == 0 if lost is None else lost.is_mine_to_tell):
            if lost is not None:
                _record_loss(request.config, env, lost)
            elif not is_ours and is_finished(request.config):
                return Result(code, details)  # what an earlier run has left stands
            return Result(code, {**record_failure(request.config, code, message, rank, env.world_size).fields, **details})
        return Result(code, details)


def _record_loss(config: RunConfig, env: WorkerEnv, lost: Cause) -> None:
    """Note in the run's events who was lost: others' launchers start the ranks again and leave nothing of `result.json`; ours note it."""
    if env.launcher not in ("local", "ray"):
        with contextlib.suppress(CrossdockError):  # the disk may be what failed; the exit code still tells
            RunDirectory(run_directory(config)).write_event("rank_lost", rank=lost.rank, exit_code=lost.exit_code, message=lost.message)


def write_report(directory: RunDirectory) -> None:
    """Write `report.html` from the files of a finished run. A run that reached its target has succeeded, whatever becomes of the page."""
    try:
        from crossdock.placement.reports.report import render_run_report

        atomic.write_text(directory.report, render_run_report(directory.path))
    except Exception as failure:
        print(f"crossdock: warning: {directory.report} was not written: {explain(failure)[1]}", file=sys.stderr, flush=True)


def explain(failure: BaseException) -> tuple[int, str]:
    """Exit code and one line for whatever ended a job."""
    first_line = (str(failure).splitlines() or [""])[0]
    if isinstance(failure, Lost):
        return failure.cause.exit_code, failure.cause.message
    if isinstance(failure, CrossdockError):
        return failure.exit_code, str(failure)
    if isinstance(failure, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(failure, MemoryError | torch.OutOfMemoryError) or any(text in str(failure) for text in _NO_MEMORY):
        remedy = "lower train.batch_sequences, raise train.accumulate, or use more ranks"
        return OutOfMemory.exit_code, f"out of memory ({first_line or 'no more on the host'}); {remedy}"
    return 1, f"{type(failure).__name__}: {first_line}"


@contextlib.contextmanager
def ending_recorded(config: RunConfig, num_ranks: int) -> Iterator[None]:
    """Whatever ends a training run before its ranks do, or between two starts of them, leaves `result.json` as well.

    One that says that a run is done stands: it is an earlier run's, which could not be moved aside, or the ranks have done their work.
    """
    try:
        yield
    except BaseException as failure:
        if not isinstance(failure, Occupied) and not is_finished(config):
            record_failure(config, *explain(failure), 0, num_ranks)
        raise


@contextlib.contextmanager
def joined(config: RunConfig, env: WorkerEnv, held: contextlib.ExitStack, *, trains: bool, store: "Store | None" = None) -> Iterator[Mesh]:
    """The mesh of this world, left again when the block ends.

    After an error rank 0 goes last, for the others' sake: it stays when `held` is closed, once it has written down what there is to tell.
    """
    if trains:
        check_world(config, env.world_size, env.launcher)
        if env.spans_hosts:
            check_reachable(config, env.world_size)
    declared = read_inputs(config).topology
    store = open_store(env, config.parallel.timeout_s) if store is None else store
    device = choose_device(config, env, store)
    started = tuple(int(node) for node in exchange(store, env, "node", str(env.node)))
    if env.world_size == 1:
        try:
            with stopping_in_order():
                yield Mesh.single(device)
        finally:
            shutdown()  # an engine may have made a world of this one rank
        return
    timeout_s = config.parallel.timeout_s
    with network_interface(env):
        try:
            initialise(env.rank, env.world_size, device=device, store=store, timeout_s=timeout_s)
            nodes = nodes_of_ranks(started, declared, config.parallel.expert)
            mesh = Mesh.create(env.rank, env.world_size, config.parallel.expert, nodes, device, timeout_s, control_of(store, env))
        except RuntimeError as failure:
            first_line = (str(failure).splitlines() or ["no reason given"])[0]
            raise PeerLost(
                f"rank {env.rank} of {env.world_size} could not connect to the others ({first_line}); see which rank did not start, and "
                "set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME where hosts have several networks"
            ) from failure
    assert store is not None, "a world of several ranks has met somewhere"
    crew = Crew.gather(store, env, RunDirectory(run_directory(config)).stacks if trains else None)
    try:
        with crew.watching(explain), stopping_in_order(), carried(mesh, config, env) as mesh_of_run:
            yield mesh_of_run
    except BaseException as failure:
        shutdown(_LOST_S if isinstance(failure, Lost) else SHUTDOWN_S)
        held.callback(crew.stay_until_heard)
        raise
    shutdown(SHUTDOWN_S)


def nodes_of_ranks(started: tuple[int, ...], declared: "Topology | None", expert_parallel: int) -> tuple[int, ...]:
    """The node of every world rank: as `declared` by a topology for each expert group, else as the launcher `started` them.

    A topology may declare nodes on one host (as the demo does); where there really are several, the two must agree.
    """
    if declared is None:
        return started
    world_size = len(started)
    nodes = tuple(declared.node_of_R[rank % expert_parallel] + declared.num_nodes * (rank // expert_parallel) for rank in range(world_size))
    for rank in range(world_size):
        for peer in range(rank - rank % expert_parallel, rank):
            if len(set(started)) > 1 and (started[rank] == started[peer]) != (nodes[rank] == nodes[peer]):
                really, said = ("one host", "different nodes") if started[rank] == started[peer] else ("different hosts", "one node")
                raise BadConfig(
                    f"ranks {peer} and {rank} run on {really}, and topology {declared.name} puts them on {said}; "
                    "start as many ranks on each host as its nodes have devices, or choose another topology"
                )
    return nodes


def usable_gpus(config: RunConfig) -> int:
    """GPUs of this host that the run may use."""
    return torch.cuda.device_count() if config.device != "cpu" and torch.cuda.is_available() else 0


def check_gpus(num_gpus: int, num_ranks: int) -> None:
    """Raise `Unavailable` where `num_ranks` ranks of this host have no GPU each."""
    if num_gpus < num_ranks:
        raise Unavailable(
            f"device cuda: {num_ranks} ranks on this host, {num_gpus} usable GPUs; start one rank a GPU, or choose device: cpu"
        )


def choose_device(config: RunConfig, env: WorkerEnv, store: Any) -> torch.device:
    """The device of this rank: `auto` is CUDA where every rank has a GPU of its own, the CPU otherwise."""
    num_gpus = usable_gpus(config)
    everywhere = min(int(found) for found in exchange(store, env, "gpus_to_spare", str(num_gpus - env.local_world_size)))
    if config.device == "cuda":
        check_gpus(num_gpus, env.local_world_size)
    if config.device == "cpu" or (config.device == "auto" and everywhere < 0):
        return torch.device("cpu")
    return torch.device("cuda", env.local_rank)


def run_local_rank(request_path: Path, outcome_path: Path) -> int:
    """One of the ranks that `launch/start.py` asked `local/children.py` for: rank 0 leaves its result in `arguments.answer`."""
    tie_to_parent()
    env, request = worker_env(), Request.load(request_path)
    assert env is not None
    result = run_job(request, env)
    if env.rank == 0:
        atomic.write_json(Path(request.arguments["answer"]), result.as_json())
    fields = result.fields if result.exit_code else {}
    write_outcome(outcome_path, fields.get("rank", env.rank), result.exit_code, fields.get("message", ""), fields.get("traceback", ""))
    return result.exit_code


if __name__ == "__main__":
    sys.exit(run_local_rank(Path(sys.argv[1]), Path(sys.argv[2])))
