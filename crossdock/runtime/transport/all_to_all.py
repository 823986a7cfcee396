"""All-to-alls with explicit waits, differentiable and noted in the ledger.

An all-to-all is started and waited for by two calls, each an autograd Function of its own, so that other work can stand between them.
Autograd runs its nodes in reverse order of creation: the wait's backward launches the gradient's all-to-all, the start's backward joins it,
and the gradients of whatever stood between run in between. No hook, no extra schedule for the backward pass.

What is started and waited for is a `Path`: one hop between the ranks of a group (`Route`), or several (`relay.Relay`).

Every rank of a group must start the same all-to-alls in the same order, empty ones included.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge

from crossdock.runtime.phases import reached
from crossdock.runtime.transport.exchange import Exchange, Named, Pending, exchange_start, naming_lost_peers
from crossdock.runtime.transport.ledger import Bytes, Direction, Kind, Mark, Stage
from crossdock.runtime.transport.mesh import Group, Mesh
from crossdock.runtime.transport.wire import Wire


class Path(Named, Protocol):
    """A way that rows go and their gradients come back."""

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
        reached("backward" if direction == "backward" else path.stage)
        with naming_lost_peers(path):
            self.exchange = path.exchange_start(packed, direction)
        reached("in_flight")

    def join(self) -> Tensor:
        """The rows that came, once they are here."""
        path, ledger = self.path, self.path.mesh.ledger
        wait_begin = ledger.now()
        with naming_lost_peers(path):
            received = self.exchange.wait()
        ledger.record(path.layer, path.stage, self.direction, path.kind, self.bytes, self.launched, wait_begin, ledger.now(), path.movement)
        return received if path.wire is None else path.wire.decode(received, self.width)


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
