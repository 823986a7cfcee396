"""Where ranks meet: the key-value store of one start, through which the process groups find one another."""

import contextlib
import datetime
import hashlib
import ipaddress
import os
import secrets
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from crossdock.authentication import Secret
from crossdock.errors import BadConfig, CrossdockError, PeerLost, Unavailable
from crossdock.launch.ranks.worker_env import Meeting, WorkerEnv, meeting_name
from crossdock.runtime.transport.control import Control

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore

_MEETING_KEY = "crossdock/meeting"
LOOPBACK = "127.0.0.1"
_ELSEWHERE = ("192.0.2.1", 9)  # an address that no host has (RFC 5737)
_RETRY_S = 0.2
_CONNECT_S = 5.0
_STALE_S = 10.0
_KEPT_S = 7 * 86_400.0  # how long the secret of a job on one host is kept at least
_kept_to_the_end: list[object] = []
"""Stores in files: one that goes writes to its file, and where it cannot, on a full disk, aborts the process before that could report."""


def open_store(env: WorkerEnv, timeout_s: float) -> "Store | None":
    """The store of this start alone: no key of an earlier incarnation can be read through it. None for a world of one.

    Raises `PeerLost` when the others do not come within `timeout_s`, `Unavailable` when the address cannot be used.
    """
    if env.meeting is None:
        return None
    if env.meeting.kind == "file":
        import torch.distributed as dist

        file_store = dist.FileStore(env.meeting.path, env.world_size)
        _kept_to_the_end.append(file_store)
        file_store.set_timeout(_timedelta(timeout_s))
        return signed(file_store, env.secret)
    if env.meeting.kind == "listen":
        host, port = env.meeting.host, env.meeting.port
        if env.rank == 0:
            store = listen(env.rank, host, timeout_s, port, spans_hosts=env.spans_hosts)
        else:
            store = _tcp_store(host, port, env.rank, timeout_s=timeout_s)
        return signed(store, env.secret)
    if env.meeting.kind == "mpi":
        return _meet_by_mpi(env, timeout_s)
    return _meet_afresh(env, timeout_s)


def signed(store: "Store", secret: Secret | None, start: str = "") -> "Store":
    """The store as ranks of one job use it; see `SignedStore`."""
    from crossdock.launch.ranks.signed_store import SignedStore

    return SignedStore(store, secret, start)


def _meet_by_mpi(env: WorkerEnv, timeout_s: float) -> "Store":
    """Rank 0 listens on a port that the system chooses, and MPI carries its number and a secret: no port is guessed, none can be taken."""
    from crossdock.launch.ranks import mpi

    assert env.meeting is not None
    own, fresh = None, Secret.fresh()
    try:
        if env.rank == 0:
            own = listen(env.rank, env.meeting.host, timeout_s, spans_hosts=env.spans_hosts)
    finally:
        port, secret = mpi.broadcast((0 if own is None else own.port, fresh))
    if port == 0:
        raise PeerLost(f"rank {env.rank}: rank 0 could not open a store on {env.meeting.host}, or failed before it; see its message")
    return signed(own or _tcp_store(env.meeting.host, port, env.rank, timeout_s=timeout_s), env.secret or secret)


def stay_away(env: WorkerEnv) -> None:
    """Rank 0 does not come: ranks that would wait for its word without end are told. Elsewhere a time limit or the launcher ends them."""
    if env.meeting is not None and env.meeting.kind == "mpi":
        from crossdock.launch.ranks import mpi

        mpi.broadcast((0, None))


def _meet_afresh(env: WorkerEnv, timeout_s: float) -> "Store":
    """Rank 0 opens a store of its own and announces it in the shared one; the others try what is announced until it is the live one.

    Restarted ranks that read their peers' addresses from the shared store find those of the dead (pytorch/pytorch#135712), and
    TORCHELASTIC_RESTART_COUNT differs between agents, so it cannot serve as a prefix. A store that dies with rank 0 cannot be stale: an
    old announcement leads to a refused connection, to another world size, or to a rank that has arrived before, and is tried again.
    """
    assert env.meeting is not None
    secret = env.secret if env.secret is not None or env.spans_hosts else host_secret(meeting_name())
    shared = signed(_tcp_store(env.meeting.host, env.meeting.port, env.rank, timeout_s=timeout_s), secret)
    if env.rank == 0:
        host = _reachable_host(env.meeting) if env.spans_hosts else LOOPBACK
        listening = listen(env.rank, host, timeout_s)
        token = secrets.token_hex(16)
        own = signed(listening, secret, token)
        own.set("token", token)
        own.set("world_size", str(env.world_size))
        own.add("arrived/0", 1)
        shared.set(_MEETING_KEY, f"{token} {host} {listening.port}")
        return own
    deadline_s = time.monotonic() + timeout_s
    problem = "nothing was announced"
    while time.monotonic() < deadline_s:
        try:
            token, host, port = shared.get(_MEETING_KEY).decode().split()
            socket.create_connection(
                (host, int(port)), timeout=_CONNECT_S
            ).close()  # the store's client would not take a refusal for an answer
            own = signed(_tcp_store(host, int(port), env.rank, timeout_s=min(_CONNECT_S, timeout_s)), secret, token)
            if (
                own.get("token").decode() == token
                and int(own.get("world_size")) == env.world_size
                and own.add(f"arrived/{env.rank}", 1) == 1
            ):
                own.set_timeout(_timedelta(timeout_s))
                return own
            problem = f"{host}:{port} belongs to an earlier start"
        except BadConfig:  # an earlier start may have had another secret; rank 0 soon announces what this one may believe
            if time.monotonic() > deadline_s - timeout_s + min(_STALE_S, timeout_s):
                raise
        except (RuntimeError, OSError, CrossdockError) as failure:
            problem = (str(failure).splitlines() or ["no reason given"])[0]
        time.sleep(_RETRY_S)
    raise PeerLost(f"rank {env.rank} did not find rank 0 within {timeout_s:g} s ({problem}); see why rank 0 did not start")


def listen(rank: int, host: str, timeout_s: float, port: int = 0, *, spans_hosts: bool = False) -> "TCPStore":
    """A store of our own on `host`, an address or a name of this host, and on none of its other addresses; port 0: on a free one.

    A host may know its own name as loopback, as Debian's /etc/hosts has it. Where ranks of other hosts shall come (`spans_hosts`), which
    know the name better, it is then the address from which this host reaches others.
    torch's store would listen on all addresses, whatever it is told, so the socket is ours. Raises `Unavailable`.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if spans_hosts and ipaddress.ip_address(address[0]).is_loopback and host not in ("localhost", address[0]):
            family, address = socket.AF_INET, (outward_address(host), port)
        with socket.socket(family, socket.SOCK_STREAM) as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(1024)
            bound_host, bound_port = listening.getsockname()[:2]
            return _tcp_store(bound_host, bound_port, rank, timeout_s=timeout_s, descriptor=listening.detach())
    except OSError as failure:
        raise Unavailable(f"rank {rank} cannot listen on {host}:{port} ({failure}); check the address, and what else is there") from failure


def outward_address(name: str) -> str:
    """The IPv4 address from which this host, called `name`, reaches others; raises `Unavailable` where it has none."""
    import psutil

    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(_ELSEWHERE)  # nothing is sent: connecting a datagram socket only routes
        return str(probe.getsockname()[0])
    entries = [entry for entries in psutil.net_if_addrs().values() for entry in entries if entry.family == socket.AF_INET]
    found = [entry.address for entry in entries if not entry.address.startswith("127.")]
    if len(found) != 1:
        raise Unavailable(
            f"this host knows its name {name} as loopback alone, and has {len(found)} other addresses without a route to tell which one "
            "others reach; name rank 0 by its address"
        )
    return found[0]


def _tcp_store(host: str, port: int, rank: int, *, timeout_s: float, descriptor: int | None = None) -> "TCPStore":
    """The store at `host:port`, which is ours where we hold the `descriptor` of its listening socket."""
    import torch.distributed as dist

    is_ours = descriptor is not None
    try:
        return dist.TCPStore(
            host, port, is_master=is_ours, wait_for_workers=False, timeout=_timedelta(timeout_s), master_listen_fd=descriptor
        )
    except (RuntimeError, ValueError) as failure:
        doing = "listen on" if is_ours else "reach"
        first_line = (str(failure).splitlines() or ["no reason given"])[0]
        raise Unavailable(f"rank {rank} cannot {doing} {host}:{port} ({first_line}); check the address and the firewall") from failure


def host_secret(name: str) -> Secret:
    """One secret for all processes of this user on this host that ask by the same name: whoever comes first makes it.

    It stands in a folder that only the user can enter. Raises `Unavailable` where somebody else has taken the folder's name.
    """
    folder = Path(tempfile.gettempdir()) / f"crossdock-{os.getuid()}"
    with contextlib.suppress(FileExistsError):  # what stands there is looked at
        folder.mkdir(mode=0o700)
    state = folder.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid() or stat.S_IMODE(state.st_mode) & 0o077:
        raise Unavailable(f"{folder} is not a folder of this user alone; remove it, or set CROSSDOCK_SECRET_FILE")
    for old in folder.iterdir():
        with contextlib.suppress(OSError):  # another rank may have been faster
            if old.is_file() and time.time() - old.stat().st_mtime > _KEPT_S:
                old.unlink()
    path = folder / hashlib.sha256(name.encode()).hexdigest()[:32]
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        Secret.fresh().write(Path(aside) / "secret")
        with contextlib.suppress(FileExistsError):
            os.link(Path(aside) / "secret", path)  # all at once: nobody can read half of it
    return Secret.read(path)


def _reachable_host(meeting: Meeting) -> str:
    """The address under which other hosts reach this one: that of the interface that leads to the shared store."""
    with socket.create_connection((meeting.host, meeting.port), timeout=_CONNECT_S) as connection:
        here, there = connection.getsockname()[0], connection.getpeername()[0]
    return meeting.host if here == there else here  # the store is on this host: the others came by its announced name


def _timedelta(seconds: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=seconds)


def exchange(store: "Store | None", env: WorkerEnv, key: str, value: str) -> tuple[str, ...]:
    """What every rank has to say under `key`, by rank; before there are process groups.

    Raises `PeerLost` where a rank says nothing, and `BadConfig` where what it says is not signed with this job's secret.
    """
    if store is None:
        return (value,)
    store.set(f"{key}/{env.rank}", value)
    try:
        return tuple(found.decode() for found in store.multi_get([f"{key}/{rank}" for rank in range(env.world_size)]))
    except RuntimeError as failure:
        first_line = (str(failure).splitlines() or ["no reason given"])[0]
        raise PeerLost(
            f"rank {env.rank} did not hear the {key} of all {env.world_size} ranks ({first_line}); see which one did not start"
        ) from failure


def control_of(store: "Store | None", env: WorkerEnv) -> Control:
    """What signs the control records of this start: the job's secret, and a name to which every rank has added something new.

    A record of an earlier start is therefore worth nothing, though the secret may be the same. Every rank calls this.
    """
    from crossdock.launch.ranks.signed_store import SignedStore

    said = exchange(store, env, "start", secrets.token_hex(16))
    return Control(store.secret if isinstance(store, SignedStore) else env.secret, hashlib.sha256(" ".join(said).encode()).hexdigest()[:32])


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

    address = own_address(env) if env.spans_hosts else LOOPBACK
    names = [name for name, entries in psutil.net_if_addrs().items() if any(entry.address == address for entry in entries)]
    return names[0] if names else None


def own_address(env: WorkerEnv) -> str | None:
    """This host's address towards the store, under which ranks of other hosts reach it.

    None where there is none, or where this host holds the store and only knows it by loopback.
    """
    assert env.meeting is not None
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # nothing is sent: connecting a datagram socket only routes
            probe.connect((env.meeting.host, env.meeting.port or 1))
            address = str(probe.getsockname()[0])
    except OSError:
        return None
    return None if address.startswith("127.") else address
