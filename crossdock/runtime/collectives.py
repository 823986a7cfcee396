"""The only module that moves data through `torch.distributed`: all-to-alls with explicit waits, reductions, and control records.

An all-to-all is started and waited for by two calls, each an autograd Function of its own, so that other work can stand between them.
Autograd runs its nodes in reverse order of creation: the wait's backward launches the gradient's all-to-all, the start's backward joins it,
and the gradients of whatever stood between run in between. No hook, no extra schedule for the backward pass.

What is started and waited for is a `Path`: one hop between the ranks of a group (`Route`), or several (`relay.Relay`).

On CUDA the collectives run on the process group's own stream: a start makes that stream wait for the rows, a wait makes the compute stream
wait for the collective, and neither blocks the host. Buffers are held here until they are joined, so that the allocator cannot hand them
out earlier.

Every rank of a group must start the same all-to-alls in the same order, empty ones included.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge

from crossdock.errors import PeerLost
from crossdock.runtime.ledger import Bytes, Direction, Kind, Mark, Stage
from crossdock.runtime.mesh import Group, Mesh
from crossdock.runtime.wire import Wire

T_co = TypeVar("T_co", covariant=True)


class Pending(Protocol[T_co]):
    """Something under way; `wait` may be called once, and gives the result."""

    def wait(self) -> T_co:
        """Block (on CUDA: make the compute stream wait) until the result is there."""
        ...


class Exchange(Protocol):
    """An all-to-all under way, in whatever hops."""

    def wait(self) -> Tensor:
        """Block (on CUDA: make the current stream wait) until the rows are here. May be called again, after the first call returned."""
        ...


class Path(Protocol):
    """A way that rows go and their gradients come back."""

    @property
    def mesh(self) -> Mesh: ...
    @property
    def layer(self) -> int: ...
    @property
    def stage(self) -> Stage: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def movement(self) -> int: ...
    @property
    def wire(self) -> Wire | None:
        """The format in which rows travel; None where they travel as they are."""
        ...

    def num_rows(self, direction: Direction) -> int:
        """How many rows this rank sends."""
        ...

    def bytes_sent(self, packed: Tensor, direction: Direction) -> Bytes:
        """Bytes that this rank sends over each class of link."""
        ...

    def exchange_start(self, packed: Tensor, direction: Direction) -> Exchange:
        """Let contiguous rows leave, in the format of the wire."""
        ...

    def back(self, stage: Stage) -> "Path":
        """The way back: what came from a rank goes to it again."""
        ...


@dataclass(frozen=True, eq=False)
class Route:
    """One hop: how many rows go to and come from each rank of a group, and under which name the ledger knows them."""

    mesh: Mesh
    group: Group
    send_R: tuple[int, ...]
    receive_R: tuple[int, ...]
    layer: int
    stage: Stage
    kind: Kind
    movement: int
    wire: Wire | None = None

    def num_rows(self, direction: Direction) -> int:
        """See `Path`."""
        return sum(self._sizes(direction)[0])

    def bytes_sent(self, packed: Tensor, direction: Direction) -> Bytes:
        """See `Path`."""
        return bytes_sent(self.mesh, self._sizes(direction)[0], packed)

    def exchange_start(self, packed: Tensor, direction: Direction) -> Exchange:
        """See `Path`."""
        send, receive = self._sizes(direction)
        return exchange_start(packed, send, receive, self.group)

    def back(self, stage: Stage) -> "Route":
        """See `Path`."""
        return replace(self, send_R=self.receive_R, receive_R=self.send_R, stage=stage)

    def _sizes(self, direction: Direction) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (self.send_R, self.receive_R) if direction == "forward" else (self.receive_R, self.send_R)


def all_to_all_start(rows: Tensor, path: Path) -> Pending[Tensor]:
    """Send `rows` [C, ...], grouped by destination; `wait()` gives those that come here, grouped by source, in the same dtype.

    Differentiable where the dtype is; the gradients go the same way back in the same dtype. `rows` must not be changed before the wait.
    Where the path has a wire, rows are of its `row_dtype` and are rounded to what it can say, gradients as well. In a group of one nothing
    is copied unless it must be rounded: the result shares its memory with `rows`.
    """
    assert rows.shape[0] == path.num_rows("forward"), f"{rows.shape[0]} rows for {path.num_rows('forward')} announced"
    assert path.wire is None or path.wire.row_dtype == rows.dtype, f"{rows.dtype} rows for wire {path.wire}"
    if isinstance(path, Route) and path.group is None and not (path.wire and path.wire.is_scaled):
        return _LocalCrossing(rows, path)
    return _Crossing(rows, path)


class Flying:
    """One movement under way, in one direction, without autograd: what is exchanged, and its entry in the ledger."""

    def __init__(self, rows: Tensor, path: Path, direction: Direction) -> None:
        ledger = path.mesh.ledger
        self.path, self.direction, self.width = path, direction, rows.shape[-1]
        packed = rows.contiguous() if path.wire is None else path.wire.encode(rows.contiguous())
        self.bytes = path.bytes_sent(packed, direction) if ledger.enabled else (0, 0, 0)
        self.launched = ledger.now()
        with _naming_lost_peers(path):
            self.exchange = path.exchange_start(packed, direction)

    def join(self) -> Tensor:
        """The rows that came, once they are here."""
        path, ledger = self.path, self.path.mesh.ledger
        wait_begin = ledger.now()
        with _naming_lost_peers(path):
            received = self.exchange.wait()
        ledger.record(path.layer, path.stage, self.direction, path.kind, self.bytes, self.launched, wait_begin, ledger.now(), path.movement)
        return received if path.wire is None else path.wire.decode(received, self.width)


def exchange_start(
    rows: Tensor, send: Sequence[int], receive: Sequence[int], group: Group, *, into: Tensor | None = None, tag: int = 0
) -> Exchange:
    """Start one bare all-to-all: `send[p]` of `rows` to the group's rank p. No autograd, no ledger.

    into: where received rows are put; allocated where it is None. tag: on the CPU, exchanges of one group with different tags may be
    started in different orders on different ranks; others not.
    """
    if group is None:
        return _NoExchange(rows)
    received = rows.new_empty((sum(receive), *rows.shape[1:])) if into is None else into
    if rows.device.type == "cpu":
        return _GlooExchange(received, rows, list(receive), list(send), group, tag)
    work = dist.all_to_all_single(received, rows, list(receive), list(send), group=group, async_op=True)
    return _NcclExchange(received, rows, work)


@dataclass(frozen=True, eq=False)
class _NoExchange:
    received: Tensor

    def wait(self) -> Tensor:
        return self.received


@dataclass(frozen=True, eq=False)
class _NcclExchange:
    received: Tensor
    sent: Tensor
    work: Any

    def wait(self) -> Tensor:
        self.work.wait()
        return self.received


class _GlooExchange:
    """An all-to-all over gloo that posts every receive before any send.

    gloo announces a posted receive through the same queue that carries data to that peer. Its own all-to-all posts each send before the
    receive, so where the peer was quicker, the announcement stands behind our data and the two directions of a link take turns instead of
    sharing it: 4 MiB a rank over a 500 Mbit/s link took 70 to 118 ms (median 92), and this way takes 69 to 71.
    """

    def __init__(self, received: Tensor, sent: Tensor, receive_R: list[int], send_R: list[int], group: Group, tag: int) -> None:
        here, num_ranks = group.rank(), group.size()
        self.received, self.sent = received, sent
        into_R, from_R = received.split(receive_R), sent.split(send_R)
        peers = [(here + distance) % num_ranks for distance in range(1, num_ranks)]
        self.works = [group.recv([into_R[peer]], peer, tag) for peer in reversed(peers) if into_R[peer].numel()]
        self.works += [group.send([from_R[peer]], peer, tag) for peer in peers if from_R[peer].numel()]
        into_R[here].copy_(from_R[here])

    def wait(self) -> Tensor:
        while self.works:
            self.works[-1].wait()
            self.works.pop()
        return self.received


class _Crossing:
    """A differentiable all-to-all: the flight forward, and later the flight of its gradient."""

    def __init__(self, rows: Tensor, path: Path) -> None:
        self.path = path
        self.forward: Flying | None = None
        self.backward: Flying | None = None
        self.in_flight: Tensor | None = _Start.apply(rows, self)

    def wait(self) -> Tensor:
        assert self.in_flight is not None, "waited for twice"
        in_flight, self.in_flight = self.in_flight, None
        return _Wait.apply(in_flight, self)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, crossing: _Crossing) -> Tensor:
        ctx.crossing = crossing
        crossing.forward = Flying(rows.detach(), crossing.path, "forward")
        # What comes is not here yet: an empty tensor holds its place in autograd's graph.
        placeholder = rows.new_empty(0)
        if not rows.is_floating_point():
            ctx.mark_non_differentiable(placeholder)
        return placeholder

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _placeholder: Tensor) -> tuple[Tensor, None]:
        flying, ctx.crossing.backward = ctx.crossing.backward, None
        return flying.join(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, in_flight: Tensor, crossing: _Crossing) -> Tensor:
        assert crossing.forward is not None
        ctx.crossing = crossing
        flying, crossing.forward = crossing.forward, None
        received = flying.join()
        if not received.is_floating_point():
            ctx.mark_non_differentiable(received)
        return received

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.crossing.backward = Flying(grad, ctx.crossing.path, "backward")
        # The gradient is still on its way, and _Start picks it up there.
        return grad.new_empty(0), None


def frontier(edges: Sequence[GradientEdge]) -> list[GradientEdge]:
    """Where a backward pass from `edges` stops on this rank: at leaves, and at all-to-alls, whose gradients have left by then.

    For schedules that run a graph backwards in steps. Going on from an all-to-all's edge waits for its gradient first.
    """
    ends: list[GradientEdge] = []
    seen: set[Any] = set()
    waiting = [edge.node for edge in edges]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if not node.next_functions:
            ends.append(GradientEdge(node, 0))
        for before, number in node.next_functions:
            if before is not None and isinstance(node, _Wait._backward_cls):
                ends.append(GradientEdge(before, number))
            elif before is not None:
                waiting.append(before)
    return ends


class _LocalCrossing:
    """The same in a group of one: nothing moves, and the ledger still sees when it would have and how much stayed on the device."""

    def __init__(self, rows: Tensor, route: Route) -> None:
        self.route, self.ledger = route, route.mesh.ledger
        self.bytes = bytes_sent(route.mesh, route.send_R, rows)
        self.in_flight: Tensor | None = rows.view_as(rows)
        self.launched = self.ledger.now()
        self.launched_backward: Mark = 0.0
        if rows.requires_grad and self.ledger.enabled:
            self.in_flight.register_hook(self._joined_backward)

    def wait(self) -> Tensor:
        assert self.in_flight is not None, "waited for twice"
        arrived, self.in_flight = self.in_flight.view_as(self.in_flight), None
        self._record("forward", self.launched)
        if arrived.requires_grad and self.ledger.enabled:
            arrived.register_hook(self._launched_backward)
        return arrived

    def _launched_backward(self, _grad: Tensor) -> None:
        self.launched_backward = self.ledger.now()

    def _joined_backward(self, _grad: Tensor) -> None:
        self._record("backward", self.launched_backward)

    def _record(self, direction: Direction, launched: Mark) -> None:
        now = self.ledger.now()
        self.ledger.record(
            self.route.layer, self.route.stage, direction, self.route.kind, self.bytes, launched, now, now, self.route.movement
        )


def bytes_sent(mesh: Mesh, send_R: Sequence[int], rows: Tensor) -> Bytes:
    """Bytes of `rows` that go to each class of link when `send_R` of them go to each rank of the expert group."""
    row_bytes = rows.element_size() * rows[0:1].numel() if rows.shape[0] else 0
    totals = [0, 0, 0]
    for link_class, num_rows in zip(mesh.link_class_of_peer, send_R, strict=True):
        totals[link_class] += num_rows * row_bytes
    return totals[0], totals[1], totals[2]


@dataclass(frozen=True)
class Counts:
    """What the ranks of an expert group told each other, once on the device and once on the CPU; rows are ranks, [R, X]."""

    sent: Tensor
    received: Tensor
    sent_cpu: Tensor
    received_cpu: Tensor


def counts_start(sent: Sequence[Tensor], mesh: Mesh, layer: int, movement: int) -> list["PendingCounts"]:
    """Tell every rank of the expert group one row of each `sent`, int64 [R, X] of one shape, all in one exchange; one answer for each."""
    exchange = _CountsExchange(sent[0].unsqueeze(1) if len(sent) == 1 else torch.stack(list(sent), 1), mesh, layer, movement)
    return [PendingCounts(exchange, place) for place in range(len(sent))]


@dataclass(frozen=True, eq=False)
class PendingCounts:
    """Counts under way."""

    exchange: "_CountsExchange"
    place: int

    def sent_cpu(self) -> Tensor:
        """int64 [R, X] on the CPU: what this rank tells. On the CPU at once; on CUDA it waits for what made them, not for the exchange."""
        return self.exchange.sent_cpu()[:, self.place]

    def wait(self) -> Counts:
        """Block the host, the only time in a dispatch, until the others have told."""
        sent, received, sent_cpu, received_cpu = (counts_RPX[:, self.place] for counts_RPX in self.exchange.joined)
        return Counts(sent, received, sent_cpu, received_cpu)


class _CountsExchange:
    """On CUDA the way to the host is prepared on a side stream, so that the wait is for the counts alone and not for what computes."""

    def __init__(self, sent_RPX: Tensor, mesh: Mesh, layer: int, movement: int) -> None:
        self.sent_RPX = sent_RPX
        even = (1,) * len(sent_RPX)
        self.flying = None
        if mesh.count_group is not None:
            self.flying = Flying(sent_RPX, Route(mesh, mesh.count_group, even, even, layer, "dispatch", "counts", movement), "forward")
        self.on_host = _ToHost(sent_RPX, self.flying, mesh) if sent_RPX.is_cuda else None

    def sent_cpu(self) -> Tensor:
        return self.sent_RPX if self.on_host is None else self.on_host.sent()

    @cached_property
    def joined(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What was sent and what came, on the device and on the CPU; the first to ask waits."""
        sent = self.sent_RPX
        received = sent if self.flying is None else self.flying.join()
        return (sent, received, sent, received) if self.on_host is None else (sent, received, *self.on_host.wait())


class _ToHost:
    """Both counts on their way to the host, behind their exchange and beside everything else on the device."""

    def __init__(self, sent: Tensor, flying: Flying | None, mesh: Mesh) -> None:
        self.pinned = torch.empty((2, *sent.shape), dtype=sent.dtype, pin_memory=True)
        self.copied = torch.cuda.Event(), torch.cuda.Event()
        stream = mesh.count_stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.pinned[0].copy_(sent, non_blocking=True)
            self.copied[0].record()
            self.pinned[1].copy_(sent if flying is None else flying.exchange.wait(), non_blocking=True)
            self.copied[1].record()

    def sent(self) -> Tensor:
        self.copied[0].synchronize()
        return self.pinned[0]

    def wait(self) -> tuple[Tensor, Tensor]:
        self.copied[1].synchronize()
        return self.pinned[0], self.pinned[1]


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
        with _naming_lost_peers():
            dist.all_reduce(value, group=group)
    return value


def all_reduce_start(value: Tensor, group: Group) -> Pending[Tensor]:
    """Start summing `value` over the group, in place; `wait()` gives it back."""
    return _PendingReduction(value, None if group is None else dist.all_reduce(value, group=group, async_op=True))


class _PendingReduction:
    def __init__(self, value: Tensor, work: Any) -> None:
        self.value, self.work = value, work

    def wait(self) -> Tensor:
        if self.work is not None:
            with _naming_lost_peers():
                self.work.wait()
        return self.value


def broadcast(value: Tensor, source_rank: int, group: Group) -> Tensor:
    """Overwrite `value` with that of world rank `source_rank`, in place, and return it."""
    if group is not None:
        with _naming_lost_peers():
            dist.broadcast(value, src=source_rank, group=group)
    return value


def all_gather_rows(rows: Tensor, group: Group) -> list[Tensor]:
    """`rows` of every rank of the group, in rank order; only the first dimension may differ between ranks. Not differentiable."""
    if group is None:
        return [rows]
    with _naming_lost_peers():
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
    """Every rank's picklable `value`, in rank order, on rank 0; None elsewhere. For control records, between ranks of one run."""
    if mesh.control_group is None:
        return [value]
    gathered = [None] * mesh.world_size if mesh.rank == 0 else None
    with _naming_lost_peers():
        dist.gather_object(value, gathered, dst=0, group=mesh.control_group)
    return gathered


def all_gather_objects(value: Any, mesh: Mesh) -> list[Any]:
    """Every rank's picklable `value`, in rank order, on every rank."""
    if mesh.control_group is None:
        return [value]
    gathered: list[Any] = [None] * mesh.world_size
    with _naming_lost_peers():
        dist.all_gather_object(gathered, value, group=mesh.control_group)
    return gathered


def broadcast_object(value: Any, mesh: Mesh, source_rank: int = 0) -> Any:
    """World rank `source_rank`'s picklable `value`, on every rank: how a decision taken on one rank becomes everybody's."""
    if mesh.control_group is None:
        return value
    box = [value]
    with _naming_lost_peers():
        dist.broadcast_object_list(box, src=source_rank, group=mesh.control_group)
    return box[0]


def barrier(mesh: Mesh) -> None:
    """Return when every rank of the world has come here."""
    if mesh.control_group is not None:
        with _naming_lost_peers():
            dist.barrier(group=mesh.control_group)


_LOST = re.compile(r"gloo|nccl|connection|timed? ?out|socket|reset by peer|broken pipe", re.IGNORECASE)


class _naming_lost_peers:
    """Turn what a backend says when a peer is gone into `PeerLost`; leave every other error as it is."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: Any, error: BaseException | None, _traceback: Any) -> None:
        if isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or _LOST.search(str(error))):
            what = "a collective"
            if (path := self.path) is not None:
                what = f"{path.stage} of layer {path.layer} ({path.kind}) on rank {path.mesh.rank} of {path.mesh.world_size}"
            detail = (str(error).strip().splitlines() or ["no detail"])[0]
            raise PeerLost(f"{what} failed: another rank is gone or stopped answering ({detail})") from error
