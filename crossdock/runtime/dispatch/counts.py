"""Counts: what the ranks of an expert group tell each other before rows travel; the only thing for which a dispatch blocks the host."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from crossdock.runtime.transport.all_to_all import Flying, Route
from crossdock.runtime.transport.mesh import Mesh


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
