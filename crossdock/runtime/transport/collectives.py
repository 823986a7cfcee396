"""Reductions, broadcasts and control records between ranks. Beside `exchange` the only module that moves data through `torch.distributed`.

Every rank of a group must make the same calls in the same order. Control records are signed with the secret of the job; see `control`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from crossdock.errors import BadConfig
from crossdock.runtime.transport.control import FIRST_BYTES
from crossdock.runtime.transport.exchange import Pending, naming_lost_peers
from crossdock.runtime.transport.mesh import Group, Mesh
from crossdock.runtime.transport.records import decoded, encoded


class _SumOverWorld(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, mesh: Mesh) -> Tensor:
        ctx.world_size = mesh.world_size
        return all_reduce(value.detach().clone(), mesh.dense_group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.world_size, None


def sum_over_world(value: Tensor, mesh: Mesh) -> Tensor:
    """The sum of `value` over all ranks, for losses of the global batch (balance, z-loss).

    Every rank computes the same loss from the sum, and gradients are averaged over the ranks: the gradient of a rank's own `value` is
    therefore the sum's gradient times the world size, without communication.
    """
    if mesh.dense_group is None:
        return value
    return _SumOverWorld.apply(value, mesh)


def all_reduce(value: Tensor, group: Group) -> Tensor:
    """Sum `value` over the group, in place, and return it; in a group of one it is left as it is."""
    if group is not None:
        with naming_lost_peers():
            dist.all_reduce(value, group=group)
    return value


def all_reduce_start(value: Tensor, group: Group) -> Pending[Tensor]:
    """Start summing `value` over the group, in place; `wait()` gives it back."""
    with naming_lost_peers():
        return _PendingReduction(value, None if group is None else dist.all_reduce(value, group=group, async_op=True))


class _PendingReduction:
    def __init__(self, value: Tensor, work: Any) -> None:
        self.value, self.work = value, work

    def wait(self) -> Tensor:
        if self.work is not None:
            with naming_lost_peers():
                self.work.wait()
        return self.value


def broadcast(value: Tensor, source_rank: int, group: Group) -> Tensor:
    """Overwrite `value` with that of world rank `source_rank`, in place, and return it."""
    if group is not None:
        with naming_lost_peers():
            dist.broadcast(value, src=source_rank, group=group)
    return value


def all_gather_rows(rows: Tensor, group: Group) -> list[Tensor]:
    """`rows` of every rank of the group, in rank order; only the first dimension may differ between ranks. Not differentiable."""
    if group is None:
        return [rows]
    with naming_lost_peers():
        count = torch.tensor([rows.shape[0]], dtype=torch.int64, device=rows.device)
        counts = [torch.empty_like(count) for _ in range(dist.get_world_size(group))]
        dist.all_gather(counts, count, group=group)
        sizes = [int(n) for n in torch.cat(counts).tolist()]
        padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
        padded[: rows.shape[0]] = rows.detach()
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded, group=group)
    return [part[:size] for part, size in zip(gathered, sizes, strict=True)]


def gather_objects(value: Any, mesh: Mesh) -> list[Any] | None:
    """Every rank's `value`, in rank order, on rank 0; None elsewhere. For control records (`records` says of what they may be made)."""
    if mesh.control_group is None:
        return [value]
    gathered = _gather(encoded(value), mesh, everywhere=False)
    return None if gathered is None else [decoded(record) for record in gathered]


def all_gather_objects(value: Any, mesh: Mesh) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank."""
    if mesh.control_group is None:
        return [value]
    gathered = _gather(encoded(value), mesh, everywhere=True)
    assert gathered is not None
    return [decoded(record) for record in gathered]


def all_gather_numbers(values: Sequence[float], mesh: Mesh) -> NDArray[np.float64]:
    """Every rank's `values`, [ranks, numbers], on every rank; all have as many."""
    mine = np.asarray(values, dtype="<f8")
    if mesh.control_group is None:
        return mine[None]
    gathered = _gather(mine.tobytes(), mesh, everywhere=True)
    assert gathered is not None
    return np.stack([np.frombuffer(record, dtype="<f8") for record in gathered])


def broadcast_object(value: Any, mesh: Mesh, source_rank: int = 0) -> Any:
    """World rank `source_rank`'s `value`, on every rank: how a decision taken on one rank becomes everybody's.

    Raises `BadConfig` where it is not signed with the secret of the job.
    """
    if mesh.control_group is None:
        return value
    call, is_source = mesh.control.next_call(), mesh.rank == source_rank
    record = encoded(value) if is_source else b""
    first = _message(call.first(source_rank, record)) if is_source else torch.empty(FIRST_BYTES, dtype=torch.uint8)
    second_bytes, found = call.read_first(source_rank, _bytes(broadcast(first, source_rank, mesh.control_group)))
    if second_bytes:
        second = _message(call.second(source_rank, record)) if is_source else torch.empty(second_bytes, dtype=torch.uint8)
        broadcast(second, source_rank, mesh.control_group)
        found = record if is_source else call.read_second(source_rank, _bytes(second))
    assert found is not None
    return value if is_source else decoded(found)


def _gather(record: bytes, mesh: Mesh, everywhere: bool) -> list[bytes] | None:
    """Every rank's record, in rank order, each shown to be that rank's own; None on other ranks than 0 unless `everywhere`."""
    call, ranks = mesh.control.next_call(), range(mesh.world_size)
    firsts = _all_gather_bytes(call.first(mesh.rank, record), mesh)
    read = [call.read_first(rank, firsts[rank]) for rank in ranks]
    longest = max(size for size, _ in read)
    if longest == 0:
        return [found or b"" for _, found in read] if everywhere or mesh.rank == 0 else None
    second = call.second(mesh.rank, record).ljust(longest, b"\0") if read[mesh.rank][0] else bytes(longest)
    seconds = _all_gather_bytes(second, mesh) if everywhere else _gather_bytes(second, mesh)
    if seconds is None:
        return None
    return [call.read_second(rank, seconds[rank][:size]) if size else found or b"" for rank, (size, found) in enumerate(read)]


def _all_gather_bytes(message: bytes, mesh: Mesh) -> list[bytes]:
    gathered = torch.empty((mesh.world_size, len(message)), dtype=torch.uint8)
    with naming_lost_peers():
        dist.all_gather(list(gathered.unbind()), _message(message), group=mesh.control_group)
    return [_bytes(row) for row in gathered]


def _gather_bytes(message: bytes, mesh: Mesh) -> list[bytes] | None:
    gathered = [torch.empty(len(message), dtype=torch.uint8) for _ in range(mesh.world_size)] if mesh.rank == 0 else None
    with naming_lost_peers():
        dist.gather(_message(message), gathered, dst=0, group=mesh.control_group)
    return None if gathered is None else [_bytes(row) for row in gathered]


def _message(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _bytes(message: Tensor) -> bytes:
    return message.numpy().tobytes()


def check_same(facts: Mapping[str, str], mesh: Mesh) -> None:
    """Raise `BadConfig` on every rank, naming the fact and the ranks, unless all ranks hold the same `facts` (by name)."""
    facts_R = all_gather_objects(dict(facts), mesh)
    for name, value in facts_R[0].items():
        others = [rank for rank, facts_of_rank in enumerate(facts_R) if facts_of_rank.get(name) != value]
        if others:
            which = f"rank {others[0]}" if len(others) == 1 else f"ranks {', '.join(map(str, others[:8]))}"
            raise BadConfig(f"{which} of {mesh.world_size} and rank 0 were given different {name}; start all ranks with the same files")


def barrier(mesh: Mesh) -> None:
    """Return when every rank of the world has come here."""
    if mesh.control_group is not None:
        with naming_lost_peers():
            dist.barrier(group=mesh.control_group)
