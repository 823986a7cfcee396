"""Flat dispatch: one row per (token, expert); combine weights are applied at home."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crossdock.runtime.dispatch.assignment import Assignment
from crossdock.runtime.dispatch.counts import Counts, PendingCounts, counts_start
from crossdock.runtime.dispatch.layout import ExpertLayout
from crossdock.runtime.dispatch.movement import Dispatched, Dispatcher, Handle
from crossdock.runtime.dispatch.rows import RowMap, count_of, inverse, spread
from crossdock.runtime.transport.all_to_all import Route, all_to_all_start
from crossdock.runtime.transport.exchange import Pending
from crossdock.runtime.transport.wire import wire_of


class Flat(Dispatcher):
    """Sends a token once for each of its experts. The result does not depend on where the experts live."""

    name = "flat"

    def prepare(self, pieces: Sequence[Assignment]) -> list["_Prepared"]:
        """Sort the entries by global slot and tell how many there are; see `movement.Dispatcher`."""
        mesh, layout = self.mesh, self.layout
        movements = [mesh.ledger.next_movement() for _ in pieces]
        slots = [layout.slot_of_expert_E[assignment.expert_A] for assignment in pieces]
        told = [count_of(slot_A, layout.num_ranks * layout.num_slots).view(layout.num_ranks, -1) for slot_A in slots]
        each = zip(pieces, slots, counts_start(told, mesh, layout.layer, movements[0]), movements, strict=True)
        return [
            _Prepared(self, counts, _home_map(assignment, slot_A), assignment.weight_A, move) for assignment, slot_A, counts, move in each
        ]


@dataclass(frozen=True, eq=False)
class _Prepared:
    dispatcher: Flat
    counts: PendingCounts
    home: RowMap
    weight_A: Tensor
    movement: int

    def start(self, x_TD: Tensor) -> Pending[Dispatched]:
        """Send one row for each entry."""
        mesh = self.dispatcher.mesh
        wire = wire_of(self.dispatcher.wire, x_TD.dtype)
        rows = spread(x_TD, self.home, wire.row_dtype)
        counted = self.counts.wait()
        route = Route(
            mesh,
            mesh.token_group,
            send_R=tuple(counted.sent_cpu.sum(1).tolist()),
            receive_R=tuple(counted.received_cpu.sum(1).tolist()),
            layer=self.dispatcher.layout.layer,
            stage="dispatch",
            kind="tokens",
            movement=self.movement,
            wire=wire,
        )
        return _PendingRows(all_to_all_start(rows, route), route, self.home, counted, self.dispatcher.layout, self.weight_A, x_TD.dtype)


@dataclass(frozen=True, eq=False)
class _PendingRows:
    pending: Pending[Tensor]
    route: Route
    home: RowMap
    counted: Counts
    layout: ExpertLayout
    weight_A: Tensor
    dtype: torch.dtype

    def wait(self) -> Dispatched:
        arrival = _by_slot(self.counted.received, sum(self.route.receive_R))
        rows_MD = spread(self.pending.wait(), arrival, self.dtype)
        handle = Handle(self.route, self.home, arrival, self.weight_A, None, self.dtype)
        return Dispatched(rows_MD, self.layout.own_counts(self.counted.received_cpu.sum(0)), handle)


def _home_map(assignment: Assignment, slot_A: Tensor) -> RowMap:
    """From tokens to their entries, sorted by global slot."""
    order_A = torch.argsort(slot_A, stable=True)
    return RowMap(assignment.token_A[order_A], inverse(order_A), assignment.offset_T)


def _by_slot(count_RS: Tensor, num_rows: int) -> RowMap:
    """From rows in blocks by (source, slot), as they arrive, to blocks by (slot, source), as the experts want them."""
    num_ranks, num_slots = count_RS.shape
    if num_ranks == 1 or num_slots == 1:
        return RowMap.identity()
    count_SR = count_RS.t().reshape(-1)
    begin_RS = (count_RS.reshape(-1).cumsum(0) - count_RS.reshape(-1)).view(num_ranks, num_slots)
    shift_SR = begin_RS.t().reshape(-1) - (count_SR.cumsum(0) - count_SR)
    source_M = torch.arange(num_rows, device=count_RS.device) + shift_SR.repeat_interleave(count_SR, output_size=num_rows)
    return RowMap.permutation(source_M)
