"""MPI as a launcher: a rank's place in the world, and where rank 0 can be reached. The only module that imports mpi4py.

MPI is asked twice, for the place and for a port number, and then left, unless it shall carry the all-to-alls of the run as well
(`parallel.transport`): everything else travels through torch, whose threads a busily polling MPI would only disturb.
"""

import atexit
import functools
import ipaddress
import time
from dataclasses import dataclass
from typing import Any, TypeVar

from crossdock.errors import Unavailable

Told = TypeVar("Told")
_PEERS_S = 2.0  # what the others get to report


@dataclass(frozen=True)
class Place:
    """One rank's place. `node` numbers hosts by their lowest rank; `host` is an address under which the others reach rank 0."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: int
    host: str


@functools.cache
def world() -> Place:
    """This process's place in MPI's world; every rank calls it. Hosts are told apart by shared memory, not by their names.

    Raises `Unavailable` without mpi4py, or where MPI cannot start.
    """
    comm = _world()
    shared = comm.Split_type(_mpi().COMM_TYPE_SHARED)
    first_of_my_host = comm.Get_rank() if shared.Get_rank() == 0 else -1
    first_of_my_host = shared.bcast(first_of_my_host, root=0)
    hosts = sorted(set(comm.allgather(first_of_my_host)))
    host = "127.0.0.1" if len(hosts) == 1 else reachable_address(comm.allgather(_addresses()))
    place = Place(comm.Get_rank(), comm.Get_size(), shared.Get_rank(), shared.Get_size(), hosts.index(first_of_my_host), host)
    shared.Free()
    return place


def broadcast(value: Told) -> Told:
    """Rank 0's `value` on every rank."""
    told: Told = _world().bcast(value, root=0)
    return told


def communicator() -> Any:
    """mpi4py's communicator of all ranks."""
    return _mpi().COMM_WORLD


def is_threaded() -> bool:
    """Whether this MPI lets several threads use it at once, as the transport does."""
    mpi = _mpi()
    return bool(mpi.Query_thread() >= mpi.THREAD_MULTIPLE)


def leave() -> None:
    """Leave MPI, which can be entered only once; every rank does."""
    if not _mpi().Is_finalized():
        _mpi().Finalize()


def abandon() -> None:
    """End without the others: this rank has failed, or another one has, and leaving in order would wait for it for ever.

    mpirun ends them as soon as this process has ended, so it ends a little later: one of them has a result to write.
    """
    atexit.unregister(leave)
    atexit.register(time.sleep, _PEERS_S)


def reachable_address(addresses_R: list[list[str]]) -> str:
    """Of rank 0's interfaces, `10.1.0.2/24` each, the address on the network that most ranks share; the first of equal ones.

    Raises `Unavailable` where rank 0 has no address beyond the loopback one.
    """
    candidates = [ipaddress.ip_interface(text) for text in addresses_R[0]]
    if not candidates:
        raise Unavailable("rank 0's host has no network address for the other hosts; set MASTER_ADDR to one")
    networks_R = [{ipaddress.ip_interface(text).network for text in addresses} for addresses in addresses_R]
    return str(max(candidates, key=lambda candidate: sum(candidate.network in networks for networks in networks_R)).ip)


def _addresses() -> list[str]:
    """This host's IPv4 interfaces but for loopback, as `address/prefix`."""
    import socket

    import psutil

    entries = [entry for entries in psutil.net_if_addrs().values() for entry in entries if entry.family == socket.AF_INET and entry.netmask]
    interfaces = [ipaddress.ip_interface(f"{entry.address}/{entry.netmask}") for entry in entries]
    return [str(interface) for interface in interfaces if not interface.is_loopback]


@functools.cache
def _mpi() -> Any:
    try:
        import mpi4py

        mpi4py.rc.finalize = False  # by `leave`, so that `abandon` can prevent it
        from mpi4py import MPI
    except (ImportError, RuntimeError) as failure:  # RuntimeError: mpi4py found no MPI library
        detail = (str(failure).splitlines() or ["no reason given"])[0]
        raise Unavailable(f"mpirun started this rank, and mpi4py cannot be used ({detail}); run: pip install 'crossdock[mpi]'") from failure
    atexit.register(leave)
    return MPI


def _world() -> Any:
    return _mpi().COMM_WORLD
