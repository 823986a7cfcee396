"""Who am I among the ranks: the only reader of environment variables, one `WorkerEnv` for every launcher.

A launcher is one function in `LAUNCHERS`; each reads its own variables and returns the same frozen record. `rendezvous.open_store` then
gives the key-value store through which the process groups find one another.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from crossdock.authentication import Secret
from crossdock.errors import UsageError

_LOCAL_PREFIX = "CROSSDOCK_"
_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_SLURM_PORTS = range(20_000, 30_000)
_SECRET, _SECRET_FILE = "CROSSDOCK_SECRET", "CROSSDOCK_SECRET_FILE"


@dataclass(frozen=True)
class Meeting:
    """Where the store of this run is.

    `file`: a `FileStore` at `path`, fresh for every start. `listen`: rank 0 listens on `host:port`, the others connect.
    `shared`: somebody else's store listens on `host:port` and outlives our restarts, so that its keys may be stale.
    `mpi`: rank 0 listens on a free port of `host`, and MPI tells the others which.
    """

    kind: Literal["file", "listen", "shared", "mpi"]
    path: str = ""
    host: str = ""
    port: int = 0


@dataclass(frozen=True)
class WorkerEnv:
    """One rank's place in the world, as its launcher tells it. `node` numbers hosts from 0 and `local_rank` the ranks of one host."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: int
    meeting: Meeting | None  # None only for a world of one
    launcher: Literal["local", "deepspeed", "torchrun", "mpi", "slurm", "ray", "single"]
    secret: Secret | None = field(default=None, compare=False)
    """What the ranks of this job sign their messages with; None where nothing has handed one down."""

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.world_size and 0 <= self.local_rank < self.local_world_size <= self.world_size and self.node >= 0):
            raise UsageError(
                f"rank {self.rank} of {self.world_size}, local rank {self.local_rank} of {self.local_world_size}, node {self.node}: "
                "these do not fit together; unset the variables of an earlier launcher, or start again through torchrun"
            )
        if self.world_size > 1 and self.meeting is None:
            raise UsageError(f"{self.world_size} ranks and no store to meet at; start through torchrun, or alone")

    @property
    def spans_hosts(self) -> bool:
        """Whether some ranks are on other hosts."""
        return self.local_world_size < self.world_size

    @classmethod
    def single(cls) -> "WorkerEnv":
        """A world of one rank, which needs no store."""
        return cls(rank=0, world_size=1, local_rank=0, local_world_size=1, node=0, meeting=None, launcher="single")


def _integer(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name)
    if text is None:
        raise UsageError(f"{name} is not set, though other variables of its launcher are; unset them to start alone, or use torchrun")
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"environment variable {name} is {text!r}, not an integer; unset it to start alone, or use torchrun") from None


def _from_local(environ: Mapping[str, str]) -> WorkerEnv | None:
    """A rank that `crossdock.launch.local.children` started."""
    if _LOCAL_PREFIX + "RANK" not in environ:
        return None
    world_size = _integer(environ, _LOCAL_PREFIX + "WORLD_SIZE")
    rank = _integer(environ, _LOCAL_PREFIX + "RANK")
    meeting = Meeting("file", path=environ.get(_LOCAL_PREFIX + "STORE", ""))
    return WorkerEnv(rank, world_size, local_rank=rank, local_world_size=world_size, node=0, meeting=meeting, launcher="local")


def local_environment(rank: int, world_size: int, store_path: str, num_threads: int, secret_path: str = "") -> dict[str, str]:
    """The environment in which `launch.local` starts a rank: ours, less any other launcher's variables, plus what `_from_local` reads."""
    foreign = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "CROSS_RANK",
        "LOCAL_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    )
    families = ("OMPI_", "PMI_", "PMIX_", "SLURM_STEP_")
    environment = {name: value for name, value in os.environ.items() if name not in foreign and not name.startswith(families)}
    environment.setdefault("OMP_NUM_THREADS", str(num_threads))
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment.pop(_SECRET, None)
    prefix = _LOCAL_PREFIX
    ours = {f"{prefix}RANK": str(rank), f"{prefix}WORLD_SIZE": str(world_size), f"{prefix}STORE": store_path}
    return environment | ours | ({_SECRET_FILE: secret_path} if secret_path else {})


def _from_torchrun(environ: Mapping[str, str]) -> WorkerEnv | None:
    """torchrun on one or several nodes, or anything that sets the same variables."""
    if "RANK" not in environ or "WORLD_SIZE" not in environ:
        return None
    rank, world_size = _integer(environ, "RANK"), _integer(environ, "WORLD_SIZE")
    host = environ.get("MASTER_ADDR", "")
    if not host:
        raise UsageError("RANK and WORLD_SIZE are set and MASTER_ADDR is not; start through torchrun, or unset them to start alone")
    # The agent of torchrun lends its own store, the same one for every restart; without that, rank 0 listens on a port chosen per start.
    shared = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    local_world_size = _integer(environ, "LOCAL_WORLD_SIZE")
    return WorkerEnv(
        rank,
        world_size,
        local_rank=_integer(environ, "LOCAL_RANK"),
        local_world_size=local_world_size,
        node=_integer(environ, "GROUP_RANK") if "GROUP_RANK" in environ else rank // local_world_size,
        meeting=Meeting("shared" if shared else "listen", host=host, port=_integer(environ, "MASTER_PORT")),
        launcher="torchrun",
    )


def _from_deepspeed(environ: Mapping[str, str]) -> WorkerEnv | None:
    """DeepSpeed's launcher on every host, as `deepspeed --hostfile ...` starts it. Its other backends are MPI's and Slurm's own."""
    if not {"RANK", "CROSS_RANK", "LOCAL_SIZE"} <= environ.keys() or "LOCAL_WORLD_SIZE" in environ:  # torchrun sets the last
        return None
    return WorkerEnv(
        _integer(environ, "RANK"),
        _integer(environ, "WORLD_SIZE"),
        local_rank=_integer(environ, "LOCAL_RANK"),
        local_world_size=_integer(environ, "LOCAL_SIZE"),
        node=_integer(environ, "CROSS_RANK"),
        meeting=Meeting("listen", host=environ.get("MASTER_ADDR", "127.0.0.1"), port=_integer(environ, "MASTER_PORT")),
        launcher="deepspeed",
    )


def _from_mpi(environ: Mapping[str, str]) -> WorkerEnv | None:
    """mpirun or mpiexec. Their variables differ and none numbers the hosts, so they only say that MPI is there to be asked."""
    in_slurm_step = "SLURM_STEP_ID" in environ  # srun speaks PMI as well
    if "OMPI_COMM_WORLD_RANK" not in environ and ("PMI_RANK" not in environ or in_slurm_step):
        return None
    from crossdock.launch.ranks.mpi import world

    place = world()
    return WorkerEnv(
        place.rank,
        place.world_size,
        place.local_rank,
        place.local_world_size,
        place.node,
        meeting=Meeting("mpi", host=environ.get("MASTER_ADDR", place.host)),
        launcher="mpi",
    )


def _from_slurm(environ: Mapping[str, str]) -> WorkerEnv | None:
    """A task of an srun step. In a batch script without srun there is no step, and `crossdock train` starts local ranks."""
    if "SLURM_STEP_ID" not in environ or "SLURM_STEP_NUM_TASKS" not in environ:
        return None
    node, tasks_N = _integer(environ, "SLURM_NODEID"), tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if node >= len(tasks_N):
        raise UsageError(f"SLURM_NODEID is {node} and SLURM_STEP_TASKS_PER_NODE names {len(tasks_N)} nodes; start the ranks by srun")
    job, step = _integer(environ, "SLURM_JOB_ID"), _integer(environ, "SLURM_STEP_ID")
    port = _integer(environ, "MASTER_PORT") if "MASTER_PORT" in environ else _SLURM_PORTS[(job * 31 + step) % len(_SLURM_PORTS)]
    return WorkerEnv(
        _integer(environ, "SLURM_PROCID"),
        _integer(environ, "SLURM_STEP_NUM_TASKS"),
        local_rank=_integer(environ, "SLURM_LOCALID"),
        local_world_size=tasks_N[node],
        node=node,
        meeting=Meeting("listen", host=environ.get("MASTER_ADDR") or first_host(environ.get("SLURM_STEP_NODELIST", "")), port=port),
        launcher="slurm",
    )


def tasks_per_node(text: str) -> tuple[int, ...]:
    """Slurm's `4(x2),1` as (4, 4, 1). Raises `UsageError`."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise UsageError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}, not a list such as 4(x2),1; start the ranks by srun")
        counts += [int(found[1])] * int(found[2] or 1)
    return tuple(counts)


def first_host(nodelist: str) -> str:
    """The first host of Slurm's `gpu[03-05,9],login1`: gpu03, with its leading zeros. Raises `UsageError`."""
    found = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\])?([^,\[]*)", nodelist)
    if found is None:
        raise UsageError(f"SLURM_STEP_NODELIST is {nodelist!r}; start the ranks by srun, or set MASTER_ADDR to rank 0's host")
    return found[1] + (found[2] or "") + found[3]


LAUNCHERS: dict[str, Callable[[Mapping[str, str]], WorkerEnv | None]] = {
    "local": _from_local,
    "deepspeed": _from_deepspeed,
    "torchrun": _from_torchrun,
    "mpi": _from_mpi,
    "slurm": _from_slurm,
}
"""Readers in the order in which they are asked: a launcher that was started by another one stands before it."""


def worker_env(environ: Mapping[str, str] | None = None) -> WorkerEnv | None:
    """This process's place, or None when no launcher started it: then `crossdock train` starts the ranks itself."""
    environ = os.environ if environ is None else environ
    found = (reader(environ) for reader in LAUNCHERS.values())
    env = next((env for env in found if env is not None), None)
    return None if env is None else replace(env, secret=job_secret(environ))


def signs_nothing(environ: Mapping[str, str]) -> bool:
    """Whether torchrun, or anything that sets its variables, starts ranks on several hosts that have no secret to sign with."""
    env = _from_torchrun(environ)
    return env is not None and env.spans_hosts and job_secret(environ) is None


def job_secret(environ: Mapping[str, str]) -> Secret | None:
    """The secret that was handed down, in a file or in the environment; None where there is none. Raises what `Secret.read` raises."""
    if environ.get(_SECRET_FILE):
        return Secret.read(Path(environ[_SECRET_FILE]))
    return Secret.of(environ[_SECRET], _SECRET) if environ.get(_SECRET) else None


def meeting_name(environ: Mapping[str, str] | None = None) -> str:
    """What torchrun's agent of this host calls the meeting: equal for its ranks, and for no other job at the same time."""
    environ = os.environ if environ is None else environ
    return "-".join(environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"))


def in_ray_job(environ: Mapping[str, str] | None = None) -> bool:
    """Whether `ray job submit` started this process, which then drives the cluster: Ray sets this variable, so named, in its driver."""
    return _RAY_JOB in (os.environ if environ is None else environ)


def ray_submission_id(environ: Mapping[str, str] | None = None) -> str | None:
    """What `ray job submit` calls the job that this process drives; None where it drives none."""
    text = (os.environ if environ is None else environ).get(_RAY_JOB)
    found = None if text is None else json.loads(text).get("metadata", {}).get("job_submission_id")
    return None if found is None else str(found)
