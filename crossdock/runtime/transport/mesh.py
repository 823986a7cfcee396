"""Mesh: which rank this is, on which node, and the process groups it talks through; built once and passed down.

Expert parallelism lies inside data parallelism. With 4 ranks and expert_parallel 2:

    rank           0  1  2  3      every rank has its own micro-batch and a copy of the dense parameters
    expert group   0  0  1  1      = replica: contiguous ranks; one group together holds every expert
    expert rank    0  1  0  1      ranks with the same expert rank hold the same experts

Tokens travel inside an expert group. Expert gradients are summed over the ranks with the same expert rank, dense gradients over the
world, and both are divided by the world size. Kinds of traffic that may be in flight together have groups of their own, so that none can
overtake another.
"""

import contextlib
import threading
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from crossdock.errors import BadConfig, PeerLost, Unavailable
from crossdock.placement.costs.hops import devices_per_node
from crossdock.runtime.transport.background import Background
from crossdock.runtime.transport.carrier import Carrier
from crossdock.runtime.transport.control import Control
from crossdock.runtime.transport.host_memory import keep_freed_memory
from crossdock.runtime.transport.ledger import Ledger

Group = Any
"""`torch.distributed.ProcessGroup`, or for all-to-alls an `MpiGroup`; None stands for a group of this rank alone."""

SHUTDOWN_S = 10.0


@dataclass(frozen=True, eq=False)
class Mesh:
    """One rank's place in the world. Groups are None where this rank would be alone in them."""

    rank: int
    world_size: int
    expert_parallel: int
    """R, ranks of one expert group."""
    node_of_rank: tuple[int, ...]
    """Node of every rank of the world."""
    device: torch.device
    expert_group: Group = None
    """The ranks of this expert group, for sums; the next six may be carried by another library."""
    token_group: Group = None
    """Token rows of this expert group."""
    metadata_group: Group = None
    """What describes the rows: slots and combine weights."""
    count_group: Group = None
    """How many rows will come."""
    weight_group: Group = None
    """Weights of gathered experts and gradients of copied ones, which travel beside all of these."""
    node_group: Group = None
    """The ranks of this expert group on this node; like the next one only where `has_rails`."""
    rail_group: Group = None
    """This rank's rail: the ranks of this expert group with the same number on their node, one on every node."""
    outward: Background = field(default_factory=Background)
    """Starts the second hops of movements away from home."""
    homeward: Background = field(default_factory=Background)
    """Starts the second hops of movements towards home."""
    expert_replica_group: Group = None
    """The ranks that hold the same experts: reduction of expert gradients."""
    dense_group: Group = None
    """The world: reduction of dense gradients and of balance statistics."""
    control_group: Group = None
    """The world, on the CPU: decisions, records, checkpoints."""
    control: Control = field(default_factory=Control)
    """What the records in it are signed with."""
    ledger: Ledger = field(default_factory=Ledger)
    timeout_s: float = 600.0
    carrier: Carrier = field(default_factory=Carrier)
    """Which library the all-to-alls go through."""

    def __post_init__(self) -> None:
        check_expert_parallel(self.expert_parallel, self.world_size)
        if len(self.node_of_rank) != self.world_size:
            raise BadConfig(f"{len(self.node_of_rank)} nodes are named for {self.world_size} ranks; give one node number for each rank")
        assert 0 <= self.rank < self.world_size

    @property
    def expert_rank(self) -> int:
        """Rank inside the expert group; the device number of plans and traces."""
        return self.rank % self.expert_parallel

    @property
    def replica(self) -> int:
        """Which data-parallel copy of the expert group this rank belongs to."""
        return self.rank // self.expert_parallel

    @property
    def num_replicas(self) -> int:
        """How many copies of the expert group there are."""
        return self.world_size // self.expert_parallel

    @property
    def node_of_expert_rank(self) -> tuple[int, ...]:
        """Node of every rank of this expert group, [R]."""
        first = self.replica * self.expert_parallel
        return self.node_of_rank[first : first + self.expert_parallel]

    @cached_property
    def count_stream(self) -> Any:
        """The CUDA stream on which counts come to the host, so that the host waits for them and not for what computes."""
        return torch.cuda.Stream(self.device)

    @property
    def ranks_per_node(self) -> int | None:
        """G, ranks of this expert group on each of its nodes; None where nodes hold unequal numbers of them, or not in one block each."""
        return devices_per_node(self.node_of_expert_rank)

    @property
    def has_rails(self) -> bool:
        """Whether the expert group spans several nodes with several ranks on each, so that a movement can take two hops."""
        return (size := self.ranks_per_node) is not None and 1 < size < self.expert_parallel

    @property
    def link_class_of_peer(self) -> tuple[int, ...]:
        """Class of the link to every rank of this expert group, [R]: 0 same device, 1 same node, 2 other node."""
        nodes = self.node_of_expert_rank
        here = self.expert_rank
        return tuple(0 if peer == here else 1 if nodes[peer] == nodes[here] else 2 for peer in range(self.expert_parallel))

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> "Mesh":
        """A world of one rank; needs no process group."""
        device = torch.device(device)
        return cls(0, 1, 1, (0,), device, ledger=Ledger(device))

    @classmethod
    def create(
        cls,
        rank: int,
        world_size: int,
        expert_parallel: int,
        node_of_rank: tuple[int, ...] | None = None,
        device: torch.device | str = "cpu",
        timeout_s: float = 600.0,
        control: Control | None = None,
    ) -> "Mesh":
        """The mesh of an initialised world: every rank calls this at the same time, after `initialise`.

        Args:
            expert_parallel: R; must divide `world_size`, else `BadConfig`.
            node_of_rank: node number of each rank; None puts all of them on one node.
            timeout_s: how long a collective may take before its ranks give up.
            control: what signs the ranks' records; without it they are not signed.
        """
        check_expert_parallel(expert_parallel, world_size)
        nodes = (0,) * world_size if node_of_rank is None else tuple(node_of_rank)
        device = torch.device(device)
        expert_groups = [list(range(first, first + expert_parallel)) for first in range(0, world_size, expert_parallel)]
        replica_groups = [list(range(first, world_size, expert_parallel)) for first in range(expert_parallel)]
        world = [list(range(world_size))]
        sizes = [devices_per_node(tuple(nodes[rank] for rank in ranks)) for ranks in expert_groups]
        node_groups, rail_groups = [], []
        for ranks, size in zip(expert_groups, sizes, strict=True):
            if size is None or size in (1, expert_parallel):  # no second hop to make
                node_groups += [[rank] for rank in ranks]
                rail_groups += [[rank] for rank in ranks]
            else:
                node_groups += [ranks[first : first + size] for first in range(0, expert_parallel, size)]
                rail_groups += [ranks[local::size] for local in range(size)]

        def mine(partition: list[list[int]], backend: str | None = None) -> Group:
            """Create all groups of a partition, as every rank must, and keep the one that this rank is in."""
            if all(len(ranks) == 1 for ranks in partition):
                return None
            groups = [dist.new_group(ranks, timeout=timedelta(seconds=timeout_s), backend=backend) for ranks in partition]
            return next(group for ranks, group in zip(partition, groups, strict=True) if rank in ranks)

        tokens = mine(expert_groups)
        return cls(
            rank=rank,
            world_size=world_size,
            expert_parallel=expert_parallel,
            node_of_rank=nodes,
            device=device,
            expert_group=tokens,
            token_group=tokens,
            metadata_group=mine(expert_groups),
            count_group=mine(expert_groups),
            weight_group=mine(expert_groups),
            node_group=mine(node_groups),
            rail_group=mine(rail_groups),
            outward=Background(device),
            homeward=Background(device),
            expert_replica_group=mine(replica_groups),
            dense_group=mine(world),
            control_group=mine(world, backend="gloo"),
            control=Control() if control is None else control,
            ledger=Ledger(device),
            timeout_s=timeout_s,
        )


def check_expert_parallel(expert_parallel: int, world_size: int) -> None:
    """Raise `BadConfig` unless `expert_parallel` ranks per expert group divide `world_size` ranks."""
    if world_size < 1 or expert_parallel < 1 or world_size % expert_parallel:
        divisors = ", ".join(str(n) for n in range(1, max(world_size, 1) + 1) if max(world_size, 1) % n == 0)
        raise BadConfig(
            f"parallel.expert {expert_parallel} (ranks of a group) does not divide {world_size} ranks; choose it from {divisors}, or "
            f"start a multiple of {max(expert_parallel, 1)} ranks"
        )


def ranks_of(group: Group, rank: int) -> list[int]:
    """World ranks of a group of the mesh, in their order in it; `rank` alone where the group is None."""
    return [rank] if group is None else dist.get_process_group_ranks(group)


def backend_for(device: torch.device | str) -> str:
    """The torch.distributed backend for tensors of `device`: NCCL for CUDA (gloo beside it for the CPU), gloo otherwise."""
    return "cpu:gloo,cuda:nccl" if torch.device(device).type == "cuda" else "gloo"


def initialise(
    rank: int,
    world_size: int,
    *,
    device: torch.device | str = "cpu",
    init_method: str | None = None,
    store: dist.Store | None = None,
    backend: str | None = None,
    timeout_s: float = 600.0,
) -> None:
    """Join the world: `torch.distributed.init_process_group`, met through `init_method` (`file://`, `tcp://`, `env://`) or a ready `store`.

    Ranks on the CPU keep the memory of freed tensors (`host_memory`).
    Which network interface gloo and NCCL use follows `GLOO_SOCKET_IFNAME` and `NCCL_SOCKET_IFNAME`, set by the launcher before this call.
    Raises `PeerLost` where the other ranks do not come in time, `Unavailable` where the backend is not built into this torch.
    """
    device = torch.device(device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise Unavailable("device cuda was asked for, and torch sees no CUDA device; choose device cpu or auto")
        torch.cuda.set_device(torch.cuda.current_device() if device.index is None else device)  # it takes no "cuda" alone
    else:
        keep_freed_memory()
    try:
        dist.init_process_group(
            backend or backend_for(device),
            rank=rank,
            world_size=world_size,
            init_method=None if store is not None else (init_method or "env://"),
            store=store,
            timeout=timedelta(seconds=timeout_s),
        )
    except (RuntimeError, TimeoutError) as error:  # gloo reports a timeout as a bare RuntimeError
        raise PeerLost(f"rank {rank} of {world_size} could not join the others within {timeout_s:g} s: {_first_line(error)}") from error


def group_of_one(mesh: Mesh) -> Group:
    """A process group of this rank alone, for a library that takes no None for it; a world of one is made real for that."""
    if not dist.is_initialized():
        initialise(0, 1, device=mesh.device, store=dist.HashStore(), timeout_s=mesh.timeout_s)
    return dist.new_group([mesh.rank], timeout=timedelta(seconds=mesh.timeout_s), use_local_synchronization=True)


def shutdown(timeout_s: float = SHUTDOWN_S) -> None:
    """Leave the world, if joined; gives up after `timeout_s`, because a lost peer can block the regular way for ever."""
    if not dist.is_initialized():
        return

    def leave() -> None:
        with contextlib.suppress(Exception):  # a broken connection is what is being left
            dist.destroy_process_group()

    leaver = threading.Thread(target=leave, daemon=True, name="crossdock-shutdown")
    try:
        leaver.start()
    except RuntimeError:  # no memory for another thread's stack, which is why the world is left; the process ends without it
        return
    leaver.join(timeout_s)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
