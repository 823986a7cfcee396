"""Hierarchical dispatch: one copy per (token, node) over the slow link, fan-out inside the node, one partial sum per (token, node) back.

Rank n * G + g is device g of node n. A token of home n * G + g travels to node m over the *rail* g, to rank m * G + g, and from there to
the devices of that node that hold its experts: the idea of HetuMoE (arXiv 2203.14685) and of Tutel's 2DH (arXiv 2206.03382), with copies
shared as well. On the way back each device weights and sums its experts' outputs, the rail's rank sums over the devices of its node, and
the home over the nodes.

Counts, slots and weights travel directly from home to device, as in the de-duplicated dispatch; which copies a rail's rank passes on to
which device travels to it beside them (int32).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crossdock.placement.costs.hops import check_nodes
from crossdock.runtime.dispatch.assignment import Assignment
from crossdock.runtime.dispatch.copies import Arrivals, Copies, begins
from crossdock.runtime.dispatch.counts import Counts, PendingCounts, counts_start
from crossdock.runtime.dispatch.deduplicated import Deduplicated
from crossdock.runtime.dispatch.layout import ExpertLayout
from crossdock.runtime.dispatch.movement import Dispatched, Dispatcher, Handle
from crossdock.runtime.dispatch.relay import FanOut, Hop, Relay
from crossdock.runtime.dispatch.rows import RowMap, spread
from crossdock.runtime.transport.all_to_all import Flying, Route, all_to_all_start
from crossdock.runtime.transport.exchange import Pending
from crossdock.runtime.transport.mesh import Mesh
from crossdock.runtime.transport.wire import Wire, wire_of


def hierarchical(mesh: Mesh, layout: ExpertLayout, wire: Wire | None = None) -> "Hierarchical | Deduplicated":
    """The dispatcher in two hops; on one node, or with one rank on each, there is one hop, and it is the de-duplicated dispatcher.

    Raises `BadConfig` where the nodes do not hold equal numbers of consecutive ranks of the expert group.
    """
    check_nodes(mesh.node_of_expert_rank)
    return Hierarchical(mesh, layout, wire) if mesh.has_rails else Deduplicated(mesh, layout, wire)


class Hierarchical(Dispatcher):
    """Sends a token once to each other node that holds at least one of its experts."""

    name = "hierarchical"

    def prepare(self, pieces: Sequence[Assignment]) -> list["_Prepared"]:
        """Number the copies for devices and for nodes, and tell how many there are; see `movement.Dispatcher`."""
        mesh, layout = self.mesh, self.layout
        assert mesh.ranks_per_node is not None
        movements = [mesh.ledger.next_movement() for _ in pieces]
        numbered = [_Numbered.of(assignment, layout, mesh.ranks_per_node) for assignment in pieces]
        told = [copies.told(mesh.expert_rank % mesh.ranks_per_node) for copies in numbered]
        each = zip(pieces, numbered, counts_start(told, mesh, layout.layer, movements[0]), movements, strict=True)
        return [
            _Prepared(
                self,
                assignment,
                copies,
                counts,
                fan_code_A=copies.fan_codes(),
                code_A=copies.by_device.codes(),
                weight_A=assignment.weight_A[copies.by_device.order_A],
                movement=movement,
            )
            for assignment, copies, counts, movement in each
        ]


@dataclass(frozen=True, eq=False)
class _Numbered:
    """The copies for devices, and beside them those for nodes, sorted by (node, token)."""

    by_device: Copies
    node_A: Tensor
    """int64 [A]: the node that each entry, in the order of `by_device`, goes to."""
    node_copy_A: Tensor
    """int64 [A]: number of the copy for a node that each entry belongs to."""
    copies_N: Tensor
    """int64 [N]: copies for each node."""
    per_node: int

    @classmethod
    def of(cls, assignment: Assignment, layout: ExpertLayout, per_node: int) -> "_Numbered":
        copies = Copies.of(assignment, layout)
        node_A = copies.device_A.div(per_node, rounding_mode="floor")
        pair_A = node_A * assignment.num_tokens + copies.token_A
        by_pair_A = torch.argsort(pair_A, stable=True)
        begins_A = begins(pair_A[by_pair_A])
        node_copy_A = torch.empty_like(pair_A).scatter_(0, by_pair_A, begins_A.cumsum(0) - 1)
        copies_N = torch.zeros(layout.num_ranks // per_node, dtype=torch.int64, device=pair_A.device)
        return cls(copies, node_A, node_copy_A, copies_N.scatter_add_(0, node_A[by_pair_A], begins_A), per_node)

    def told(self, local: int) -> Tensor:
        """What every device is told of its slots, and my rail (number `local`) of its rows and for which device they are; see `_Told`."""
        copies_R, entries_RS = self.by_device.copies_R, self.by_device.entries_RS
        for_rail_NX = torch.cat((self.copies_N.unsqueeze(1), copies_R.view(-1, self.per_node)), 1)
        for_rails_NGX = for_rail_NX.new_zeros(len(for_rail_NX), self.per_node, 1 + self.per_node)
        for_rails_NGX[:, local] = for_rail_NX
        return torch.cat((copies_R.unsqueeze(1), entries_RS, for_rails_NGX.flatten(0, 1)), 1)

    def fan_codes(self) -> Tensor:
        """int64 [A]: what the rail's rank is told of the copy for a device that each entry belongs to; see `relay.FanOut`."""
        first_N = self.copies_N.cumsum(0) - self.copies_N
        return (self.node_copy_A - first_N[self.node_A]) * self.per_node + self.by_device.device_A % self.per_node


@dataclass(frozen=True, eq=False)
class _Prepared:
    dispatcher: Hierarchical
    assignment: Assignment
    copies: _Numbered
    counts: PendingCounts
    fan_code_A: Tensor
    code_A: Tensor
    weight_A: Tensor
    movement: int

    def start(self, x_TD: Tensor) -> Pending[Dispatched]:
        """Send what each rail's rank passes on, one row for each (node, token), and the entries."""
        mesh, layout, movement = self.dispatcher.mesh, self.dispatcher.layout, self.movement
        assert mesh.ranks_per_node is not None
        per_node = mesh.ranks_per_node
        num_nodes, local = layout.num_ranks // per_node, mesh.expert_rank % per_node
        wire = wire_of(self.dispatcher.wire, x_TD.dtype)

        # 1. Gather the rows while the counts travel.
        num_rows = int(self.counts.sent_cpu()[local::per_node, 1 + layout.num_slots].sum())
        source_C = _one_of_each(self.copies.by_device.token_A, self.copies.node_copy_A, num_rows)
        home = RowMap.from_source(source_C, self.assignment.num_tokens)
        copied = spread(x_TD, home, wire.row_dtype)

        # 2. Send them, and beside them what the rails and the devices need to know.
        told = _Told(self.counts.wait(), num_nodes, per_node, layout, local)
        fan_code_C = _one_of_each(self.fan_code_A, self.copies.by_device.copy_A, sum(told.codes_sent)).int()
        to_rail = _metadata(mesh, layout.layer, movement, told.on_rail(told.codes_sent), told.on_rail(told.codes_received))
        fan_out = FanOut(
            Flying(fan_code_C, to_rail, "forward"), told.rail_NX[:, 0], told.rail_NX[:, 1:].sum(1), sum(told.rows_received), per_node
        )
        relay = Relay(
            mesh,
            rail=Hop(mesh.rail_group, told.rows_sent, told.rows_received),
            node=Hop(mesh.node_group, told.fanned_out, told.fanned_in),
            fan_out=fan_out,
            num_staying=told.staying(mesh.expert_rank),
            layer=layout.layer,
            stage="dispatch",
            movement=movement,
            wire=wire,
            width=x_TD.shape[1],
        )
        metadata = _metadata(mesh, layout.layer, movement, told.entries_sent, told.entries_received)
        rows = all_to_all_start(copied, relay)
        codes = all_to_all_start(self.code_A, metadata)
        weights = all_to_all_start(self.weight_A, metadata)
        return _PendingRows(rows, codes, weights, relay, home, told, x_TD.dtype)


class _Told:
    """What the exchanged counts say, [R, X]: copies, entries of each slot, and on the rail rows and how many of them go to each device."""

    def __init__(self, counts: Counts, num_nodes: int, per_node: int, layout: ExpertLayout, local: int) -> None:
        self.counts, self.num_nodes, self.per_node, self.layout, self.local = counts, num_nodes, per_node, layout, local
        sent, received = counts.sent_cpu, counts.received_cpu
        self.entries_sent = tuple(self._entries(sent).sum(1).tolist())
        self.entries_received = tuple(self._entries(received).sum(1).tolist())
        rail_sent, rail_received = self._rail(sent), self._rail(received)
        self.rows_sent, self.rows_received = tuple(rail_sent[:, 0].tolist()), tuple(rail_received[:, 0].tolist())
        self.codes_sent, self.codes_received = tuple(rail_sent[:, 1:].sum(1).tolist()), tuple(rail_received[:, 1:].sum(1).tolist())
        self.fanned_out = tuple(rail_received[:, 1:].sum(0).tolist())
        self.fanned_in = tuple(received[:, 0].view(num_nodes, per_node).sum(0).tolist())

    @property
    def count_S(self) -> Tensor:
        """int64 on the CPU: rows for each of this rank's slots."""
        return self.layout.own_counts(self._entries(self.counts.received_cpu).sum(0))

    @property
    def rail_NX(self) -> Tensor:
        """int64 [N, 1 + G]: from each node over my rail, rows and how many of them go to each device."""
        return self._rail(self.counts.received)

    def staying(self, rank: int) -> int:
        """Copies from this rank to itself."""
        return int(self.counts.sent_cpu[rank, 0])

    def on_rail(self, value_N: tuple[int, ...]) -> tuple[int, ...]:
        """One value for each rank of the group: the rail's, and 0 for all others."""
        return tuple(value if local == self.local else 0 for value in value_N for local in range(self.per_node))

    def arrivals(self, code_A: Tensor) -> Arrivals:
        """Copies come from the ranks of this node in turn, and from each sorted by home node."""
        received = self.counts.received
        copies_GN = received[:, 0].view(self.num_nodes, self.per_node).t().reshape(-1)
        first_R = (copies_GN.cumsum(0) - copies_GN).view(self.per_node, self.num_nodes).t().reshape(-1)
        return Arrivals(code_A, first_R, self._entries(received).sum(1), self.layout.num_slots, sum(self.fanned_in))

    def _entries(self, counts_RX: Tensor) -> Tensor:
        return counts_RX[:, 1 : 1 + self.layout.num_slots]

    def _rail(self, counts_RX: Tensor) -> Tensor:
        return counts_RX.view(self.num_nodes, self.per_node, -1)[:, self.local, 1 + self.layout.num_slots :]


@dataclass(frozen=True, eq=False)
class _PendingRows:
    rows: Pending[Tensor]
    codes: Pending[Tensor]
    weights: Pending[Tensor]
    relay: Relay
    home: RowMap
    told: _Told
    dtype: torch.dtype

    def wait(self) -> Dispatched:
        arrivals = self.told.arrivals(self.codes.wait().long())
        by_copy_A = arrivals.by_copy()
        arrival = arrivals.row_map(by_copy_A)
        rows_MD = spread(self.rows.wait(), arrival, self.dtype)
        self.relay.fan_out.codes.join()  # they came before the rows; this is their entry in the ledger
        weight_A = self.weights.wait().index_select(0, by_copy_A)
        handle = Handle(self.relay, self.home, arrival, None, weight_A, self.dtype)
        return Dispatched(rows_MD, self.told.count_S, handle)


def _metadata(mesh: Mesh, layer: int, movement: int, send_R: tuple[int, ...], receive_R: tuple[int, ...]) -> Route:
    return Route(mesh, mesh.metadata_group, send_R, receive_R, layer, "dispatch", "metadata", movement)


def _one_of_each(value_A: Tensor, number_A: Tensor, num_values: int) -> Tensor:
    """[num_values]: the value of each number, where entries of one number all have the same."""
    return torch.empty(num_values, dtype=value_A.dtype, device=value_A.device).scatter_(0, number_A, value_A)
