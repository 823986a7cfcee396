"""Relay: two hops as one movement, over the rail to the node and then inside it; the sums on the way back take the same hops backwards.

    outward     home --- rail: one row per (token, node) ---> rank on that node --- one row per (token, device) ---> device
    homeward    home <-- rail: one partial sum per (token, node) --- sums <--- one partial sum per (token, device) --- device

A dispatch and the gradient of a combine go outward; a combine and the gradient of a dispatch go homeward. The first hop starts at once. The
second is started by the mesh's background as soon as the first is complete, so that neither stands still while the program computes.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from crossdock.runtime.dispatch.rows import RowMap, gather, sum_rows
from crossdock.runtime.transport.all_to_all import Flying
from crossdock.runtime.transport.background import Started, Task
from crossdock.runtime.transport.exchange import Exchange, exchange_start
from crossdock.runtime.transport.ledger import Bytes, Direction, Kind, Stage
from crossdock.runtime.transport.mesh import Group, Mesh
from crossdock.runtime.transport.wire import Wire


@dataclass(frozen=True, eq=False)
class Hop:
    """Rows that go to and come from each rank of a group, outward."""

    group: Group
    send_R: tuple[int, ...]
    receive_R: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class FanOut:
    """Which of the rows that come over the rail go to which devices of this node; known when its codes have arrived.

    `codes` brings, for each source node in turn, (row within the source's block) * G + local device, sorted by device and row.
    """

    codes: Flying
    rows_N: Tensor
    """int64 [N]: rows that come from each source node."""
    codes_N: Tensor
    """int64 [N]: codes that come from each source node."""
    num_rows: int
    ranks_per_node: int

    @cached_property
    def row_map(self) -> RowMap:
        """Narrow: rows from the rail; wide: rows for the devices of this node, sorted by device, source node and row.

        First asked for on the background that goes outward, which waits for the codes.
        """
        code_C = self.codes.exchange.wait().long()
        first_N = self.rows_N.cumsum(0) - self.rows_N
        row_C = code_C.div(self.ranks_per_node, rounding_mode="floor")
        row_C += first_N.repeat_interleave(self.codes_N, output_size=code_C.numel())
        order_C = torch.argsort(code_C % self.ranks_per_node, stable=True)
        return RowMap.from_source(row_C[order_C], self.num_rows)


@dataclass(frozen=True, eq=False)
class Relay:
    """Path of two hops; see `all_to_all.Path`.

    Bytes are counted where rows change ranks: what stays on its rank in a hop is free, and only copies for experts at home count as
    same-device bytes, as in the other dispatchers.
    """

    mesh: Mesh
    rail: Hop
    node: Hop
    fan_out: FanOut
    num_staying: int
    """Copies for experts on the token's own rank."""
    layer: int
    stage: Stage
    movement: int
    wire: Wire
    width: int
    """D, elements of a row."""
    outward: bool = True
    """Whether forward is outward."""
    kind: Kind = "tokens"

    def num_rows(self, direction: Direction) -> int:
        """See `all_to_all.Path`."""
        return sum(self.rail.send_R if self._is_outward(direction) else self.node.receive_R)

    def bytes_sent(self, packed: Tensor, direction: Direction) -> Bytes:
        """See `all_to_all.Path`; what this rank relays for others is counted here as well."""
        node, local = divmod(self.mesh.expert_rank, self.fan_out.ranks_per_node)
        if self._is_outward(direction):
            in_node, over_rail = self.node.send_R, self.rail.send_R
        else:
            in_node, over_rail = self.node.receive_R, self.rail.receive_R
        row_bytes = packed.element_size() * packed.shape[1:].numel()
        moved_in_node, moved_over_rail = sum(in_node) - in_node[local], sum(over_rail) - over_rail[node]
        return self.num_staying * row_bytes, moved_in_node * row_bytes, moved_over_rail * row_bytes

    def exchange_start(self, packed: Tensor, direction: Direction) -> Exchange:
        """See `all_to_all.Path`."""
        return self._outward_start(packed) if self._is_outward(direction) else self._homeward_start(packed)

    def back(self, stage: Stage) -> "Relay":
        """See `all_to_all.Path`."""
        return replace(self, stage=stage, outward=not self.outward)

    def _is_outward(self, direction: Direction) -> bool:
        return self.outward == (direction == "forward")

    def _outward_start(self, packed: Tensor) -> Exchange:
        rail, node = self.rail, self.node
        first = exchange_start(packed, rail.send_R, rail.receive_R, rail.group)
        received = packed.new_empty((sum(node.receive_R), *packed.shape[1:]))

        def fan_out() -> Started:
            row_map = self.fan_out.row_map
            return exchange_start(gather(first.wait(), row_map), node.send_R, node.receive_R, node.group, into=received, tag=_SECOND_HOP)

        return _Relayed(self.mesh.outward.submit(fan_out))

    def _homeward_start(self, packed: Tensor) -> Exchange:
        rail, node = self.rail, self.node
        first = exchange_start(packed, node.receive_R, node.send_R, node.group)
        received = packed.new_empty((sum(rail.send_R), *packed.shape[1:]))

        def sum_up() -> Started:
            row_map = self.fan_out.row_map
            _keep_for_this_stream(row_map)
            partial = sum_rows(self.wire.decode(first.wait(), self.width), row_map, None)
            return exchange_start(self.wire.encode(partial), rail.receive_R, rail.send_R, rail.group, into=received, tag=_SECOND_HOP)

        return _Relayed(self.mesh.homeward.submit(sum_up))


_SECOND_HOP = 1  # The tag: first hops are started by the program, second ones by a background, and neither waits for the other's turn.


@dataclass(frozen=True, eq=False)
class _Relayed:
    second: Task

    def wait(self) -> Tensor:
        received: Tensor = self.second.started().wait()
        return received


def _keep_for_this_stream(row_map: RowMap) -> None:
    """The map was made on the stream that goes outward; its memory must not be reused there while this stream reads it."""
    for tensor in (row_map.source_M, row_map.position_M, row_map.offset_C):
        if tensor is not None and tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream())
