"""Where ranks meet: the key-value store of one start, through which the process groups find one another."""

import contextlib
import datetime
import os
import secrets
import socket
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from crossdock.errors import CrossdockError, PeerLost, Unavailable
from crossdock.launch.worker_env import Meeting, WorkerEnv

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore

_MEETING_KEY = "crossdock/meeting"
_RETRY_S = 0.2
_CONNECT_S = 5.0


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
        return _tcp_store(env.meeting.host, env.meeting.port, env.rank, listening=env.rank == 0, timeout_s=timeout_s)
    if env.meeting.kind == "mpi":
        return _meet_by_mpi(env, timeout_s)
    return _meet_afresh(env, timeout_s)


def _meet_by_mpi(env: WorkerEnv, timeout_s: float) -> "Store":
    """Rank 0 listens on a port that the system chooses, and MPI carries its number: no port is guessed, none can be taken."""
    from crossdock.launch import mpi

    assert env.meeting is not None
    own = None
    try:
        if env.rank == 0:
            own = listen(env.rank, _spans_hosts(env), timeout_s)
    finally:
        port = mpi.broadcast_port_and_leave(0 if own is None else own.port)
    if port == 0:
        raise PeerLost(f"rank {env.rank}: rank 0 could not open a store on {env.meeting.host}; see its message")
    return own or _tcp_store(env.meeting.host, port, env.rank, listening=False, timeout_s=timeout_s)


def _meet_afresh(env: WorkerEnv, timeout_s: float) -> "Store":
    """Rank 0 opens a store of its own and announces it in the shared one; the others try what is announced until it is the live one.

    Restarted ranks that read their peers' addresses from the shared store find those of the dead (pytorch/pytorch#135712), and
    TORCHELASTIC_RESTART_COUNT differs between agents, so it cannot serve as a prefix. A store that dies with rank 0 cannot be stale: an
    old announcement leads to a refused connection, to another world size, or to a rank that has arrived before, and is tried again.
    """
    assert env.meeting is not None
    shared = _tcp_store(env.meeting.host, env.meeting.port, env.rank, listening=False, timeout_s=timeout_s)
    if env.rank == 0:
        own = listen(env.rank, _spans_hosts(env), timeout_s)
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
            own = _tcp_store(host, int(port), env.rank, listening=False, timeout_s=min(_CONNECT_S, timeout_s))
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


def listen(rank: int, several_hosts: bool, timeout_s: float) -> "TCPStore":
    """A store of our own, on a port that the system chooses; only this host can reach it unless there are several. Raises `Unavailable`."""
    return _tcp_store("0.0.0.0" if several_hosts else "127.0.0.1", 0, rank, listening=True, timeout_s=timeout_s)


def _tcp_store(host: str, port: int, rank: int, *, listening: bool, timeout_s: float) -> "TCPStore":
    import torch.distributed as dist

    try:
        return dist.TCPStore(host, port, is_master=listening, wait_for_workers=False, timeout=_timedelta(timeout_s))
    except (RuntimeError, ValueError) as failure:
        doing = "listen on" if listening else "reach"
        first_line = (str(failure).splitlines() or ["no reason given"])[0]
        raise Unavailable(f"rank {rank} cannot {doing} {host}:{port} ({first_line}); check the address and the firewall") from failure


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
