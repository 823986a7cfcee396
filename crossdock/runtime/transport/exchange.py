"""Bare exchanges: one all-to-all of a group started and waited for, without autograd or ledger; and the error for a lost peer.

Beside `collectives` the only module that moves data through `torch.distributed`; `mpi_exchange` moves it through MPI, where a run asks so.

On CUDA they run on the process group's own stream: a start makes that stream wait for the rows, a wait makes the current stream wait for
the collective, and neither blocks the host. Buffers are held here until they are joined, and their memory is not handed out again before
the stream that joined them is done with it, which need not be the one that made them.

Every rank of a group must start the same exchanges in the same order, empty ones included.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from crossdock.errors import PeerLost
from crossdock.runtime.transport.ledger import Kind, Stage
from crossdock.runtime.transport.mesh import Group, Mesh
from crossdock.runtime.transport.mpi_exchange import MpiGroup

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
    if isinstance(group, MpiGroup):
        return group.exchange_start(received, rows, receive, send, tag)
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
        stream = torch.cuda.current_stream(self.received.device)
        for buffer in (self.received, self.sent):  # free of cost on the stream that made them
            buffer.record_stream(stream)
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


class Named(Protocol):
    """A movement of a layer, by the names it has in the ledger."""

    @property
    def mesh(self) -> Mesh: ...
    @property
    def layer(self) -> int: ...
    @property
    def stage(self) -> Stage: ...
    @property
    def kind(self) -> Kind: ...


_LOST = re.compile(r"gloo|nccl|\bmpi\b|mpi_err|connection|timed? ?out|socket|reset by peer|broken pipe", re.IGNORECASE)


class naming_lost_peers:
    """Turn what a backend says when a peer is gone into `PeerLost`; leave every other error as it is."""

    def __init__(self, movement: Named | None = None) -> None:
        self.movement = movement

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: Any, error: BaseException | None, _traceback: Any) -> None:
        if isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or _LOST.search(str(error))):
            what = "a collective"
            if (moved := self.movement) is not None:
                what = f"{moved.stage} of layer {moved.layer} ({moved.kind}) on rank {moved.mesh.rank} of {moved.mesh.world_size}"
            detail = (str(error).strip().splitlines() or ["no detail"])[0]
            raise PeerLost(f"{what} failed: another rank is gone or stopped answering ({detail})") from error
