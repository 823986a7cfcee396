"""Who am I among the ranks, and where do we meet: the only reader of environment variables, one `WorkerEnv` for every launcher.

A launcher is one function in `LAUNCHERS`; each reads its own variables and returns the same frozen record. `open_store` then gives the
key-value store through which the process groups find one another.
"""

import contextlib
import datetime
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from crossdock.errors import CrossdockError, PeerLost, Unavailable, UsageError

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore

_LOCAL_PREFIX = "CROSSDOCK_"
_MEETING_KEY = "crossdock/meeting"
_RETRY_S = 0.2
_CONNECT_S = 5.0


@dataclass(frozen=True)
class Meeting:
    """Where the store of this run is.

    `file`: a `FileStore` at `path`, fresh for every start. `listen`: rank 0 listens on `host:port`, the others connect.
    `shared`: somebody else's store listens on `host:port` and outlives our restarts, so that its keys may be stale.
    """

    kind: Literal["file", "listen", "shared"]
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
    launcher: Literal["local", "torchrun", "single"]

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.world_size and 0 <= self.local_rank < self.local_world_size <= self.world_size and self.node >= 0):
            raise UsageError(
                f"rank {self.rank} of {self.world_size}, local rank {self.local_rank} of {self.local_world_size}, node {self.node}: "
                "these do not fit together; unset the variables of an earlier launcher, or start again through torchrun"
            )
        if self.world_size > 1 and self.meeting is None:
            raise UsageError(f"{self.world_size} ranks and no store to meet at; start through torchrun, or alone")

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
    """A rank that `crossdock.launch.local` started."""
    if _LOCAL_PREFIX + "RANK" not in environ:
        return None
    world_size = _integer(environ, _LOCAL_PREFIX + "WORLD_SIZE")
    rank = _integer(environ, _LOCAL_PREFIX + "RANK")
    meeting = Meeting("file", path=environ.get(_LOCAL_PREFIX + "STORE", ""))
    return WorkerEnv(rank, world_size, local_rank=rank, local_world_size=world_size, node=0, meeting=meeting, launcher="local")


def local_environment(rank: int, world_size: int, store_path: str, num_threads: int) -> dict[str, str]:
    """The environment in which `launch.local` starts a rank: ours, less any other launcher's variables, plus what `_from_local` reads."""
    foreign = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in foreign}
    environment.setdefault("OMP_NUM_THREADS", str(num_threads))
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    prefix = _LOCAL_PREFIX
    return environment | {f"{prefix}RANK": str(rank), f"{prefix}WORLD_SIZE": str(world_size), f"{prefix}STORE": store_path}


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


LAUNCHERS: dict[str, Callable[[Mapping[str, str]], WorkerEnv | None]] = {"local": _from_local, "torchrun": _from_torchrun}


def worker_env(environ: Mapping[str, str] | None = None) -> WorkerEnv | None:
    """This process's place, or None when no launcher started it: then `crossdock train` starts the ranks itself."""
    environ = os.environ if environ is None else environ
    found = (reader(environ) for reader in LAUNCHERS.values())
    return next((env for env in found if env is not None), None)


def open_store(env: WorkerEnv, timeout_s: float) -> "Store | None":
    """The store of this start alone: no key of an earlier incarnation can be read through it. None for a world of one.

    Raises `PeerLost` when the others do not come within `timeout_s`, `Unavailable` when the address cannot be used.
    """
    if env.meeting is None:
        return None
    if env.meeting.kind == "file":
        import torch.distributed as dist

        store = dist.FileStore(env.meeting.path, env.world_size)
        store.set_timeout(_timedelta(timeout_s))
        return store
    if env.meeting.kind == "listen":
        return _tcp_store(env.meeting.host, env.meeting.port, env, listening=env.rank == 0, timeout_s=timeout_s)
    return _meet_afresh(env, timeout_s)


def _meet_afresh(env: WorkerEnv, timeout_s: float) -> "Store":
    """Rank 0 opens a store of its own and announces it in the shared one; the others try what is announced until it is the live one.

    Restarted ranks that read their peers' addresses from the shared store find those of the dead (pytorch/pytorch#135712), and
    TORCHELASTIC_RESTART_COUNT differs between agents, so it cannot serve as a prefix. A store that dies with rank 0 cannot be stale: an
    old announcement leads to a refused connection, to another world size, or to a rank that has arrived before, and is tried again.
    """
    assert env.meeting is not None
    shared = _tcp_store(env.meeting.host, env.meeting.port, env, listening=False, timeout_s=timeout_s)
    if env.rank == 0:
        own = _tcp_store("0.0.0.0" if _spans_hosts(env) else "127.0.0.1", 0, env, listening=True, timeout_s=timeout_s)
        token = secrets.token_hex(16)
        own.set("token", token)
        own.set("world_size", str(env.world_size))
        own.add("arrived/0", 1)
        host = _reachable_host(env.meeting) if _spans_hosts(env) else "127.0.0.1"
        shared.set(_MEETING_KEY, f"{token} {host} {own.port}")
        return own
    deadline_s = time.monotonic() + timeout_s
    problem = "nothing was announced"
    while time.monotonic() < deadline_s:
        try:
            token, host, port = shared.get(_MEETING_KEY).decode().split()
            socket.create_connection(
                (host, int(port)), timeout=_CONNECT_S
            ).close()  # the store's client would not take a refusal for an answer
            own = _tcp_store(host, int(port), env, listening=False, timeout_s=min(_CONNECT_S, timeout_s))
            if (
                own.get("token").decode() == token
                and int(own.get("world_size")) == env.world_size
                and own.add(f"arrived/{env.rank}", 1) == 1
            ):
                own.set_timeout(_timedelta(timeout_s))
                return own
            problem = f"{host}:{port} belongs to an earlier start"
        except (RuntimeError, OSError, CrossdockError) as failure:
            problem = (str(failure).splitlines() or ["no reason given"])[0]
        time.sleep(_RETRY_S)
    raise PeerLost(f"rank {env.rank} did not find rank 0 within {timeout_s:g} s ({problem}); see why rank 0 did not start")


def _tcp_store(host: str, port: int, env: WorkerEnv, *, listening: bool, timeout_s: float) -> "TCPStore":
    import torch.distributed as dist

    try:
        return dist.TCPStore(host, port, is_master=listening, wait_for_workers=False, timeout=_timedelta(timeout_s))
    except (RuntimeError, ValueError) as failure:
        doing = "listen on" if listening else "reach"
        first_line = (str(failure).splitlines() or ["no reason given"])[0]
        raise Unavailable(f"rank {env.rank} cannot {doing} {host}:{port} ({first_line}); check the address and the firewall") from failure


def _spans_hosts(env: WorkerEnv) -> bool:
    return env.local_world_size < env.world_size


def _reachable_host(meeting: Meeting) -> str:
    """The address under which other hosts reach this one: that of the interface that leads to the shared store."""
    with socket.create_connection((meeting.host, meeting.port), timeout=_CONNECT_S) as connection:
        here, there = connection.getsockname()[0], connection.getpeername()[0]
    return meeting.host if here == there else here  # the store is on this host: the others came by its announced name


def _timedelta(seconds: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=seconds)


def exchange(store: "Store | None", env: WorkerEnv, key: str, value: str) -> tuple[str, ...]:
    """What every rank has to say under `key`, by rank; before there are process groups."""
    if store is None:
        return (value,)
    store.set(f"{key}/{env.rank}", value)
    return tuple(found.decode() for found in store.multi_get([f"{key}/{rank}" for rank in range(env.world_size)]))


@contextlib.contextmanager
def network_interface(env: WorkerEnv) -> Iterator[None]:
    """Within the block, gloo and NCCL use the interface that leads to the other ranks, unless the user has chosen one.

    Left alone they resolve the host's own name, which often leads to the wrong interface or to none.
    """
    name = _interface_towards(env)
    chosen = {} if name is None else {key: name for key in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if key not in os.environ}
    os.environ.update(chosen)
    try:
        yield
    finally:
        for key in chosen:
            os.environ.pop(key, None)


def _interface_towards(env: WorkerEnv) -> str | None:
    import psutil

    address = "127.0.0.1"
    if _spans_hosts(env):
        assert env.meeting is not None
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # nothing is sent: connecting a datagram socket only routes
                probe.connect((env.meeting.host, env.meeting.port))
                address = probe.getsockname()[0]
        except OSError:
            return None
    names = [name for name, entries in psutil.net_if_addrs().items() if any(entry.address == address for entry in entries)]
    if _spans_hosts(env) and address.startswith("127."):
        return None  # this host holds the store and only knows it by loopback: leave the choice to the backend
    return names[0] if names else None
