"""De-duplicated dispatch: one copy per (token, device); the device weights and sums its experts' outputs and returns one row per copy.

Beside the tokens travel, on a group of their own, which copy goes to which slot (int32) and with which weight (the gate's dtype; its
gradient comes back the same way). They are counted as metadata.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crossdock.runtime.dispatch.assignment import Assignment
from crossdock.runtime.dispatch.copies import Arrivals, Copies
from crossdock.runtime.dispatch.counts import Counts, PendingCounts, counts_start
from crossdock.runtime.dispatch.layout import ExpertLayout
from crossdock.runtime.dispatch.movement import Dispatched, Dispatcher, Handle
from crossdock.runtime.dispatch.rows import RowMap, spread
from crossdock.runtime.transport.all_to_all import Route, all_to_all_start
from crossdock.runtime.transport.exchange import Pending
from crossdock.runtime.transport.mesh import Mesh
from crossdock.runtime.transport.wire import wire_of


class Deduplicated(Dispatcher):
    """Sends a token once to each device that holds at least one of its experts.

    Outputs are summed on each device in the gate's order, then at home in the order of the devices.
    """

    name = "deduplicated"

    def prepare(self, pieces: Sequence[Assignment]) -> list["_Prepared"]:
        """Sort the entries by (device, token) and tell every device how many copies come, and how many entries for each of its slots."""
        mesh, layout = self.mesh, self.layout
        movements = [mesh.ledger.next_movement() for _ in pieces]
        sorted_ = [Copies.of(assignment, layout) for assignment in pieces]
        told = [torch.cat((copies.copies_R.unsqueeze(1), copies.entries_RS), 1) for copies in sorted_]
        each = zip(pieces, sorted_, counts_start(told, mesh, layout.layer, movements[0]), movements, strict=True)
        return [
            _Prepared(self, assignment, copies, counts, copies.codes(), assignment.weight_A[copies.order_A], movement)
            for assignment, copies, counts, movement in each
        ]


@dataclass(frozen=True, eq=False)
class _Prepared:
    dispatcher: Deduplicated
    assignment: Assignment
    copies: Copies
    counts: PendingCounts
    code_A: Tensor
    weight_A: Tensor
    movement: int

    def start(self, x_TD: Tensor) -> Pending[Dispatched]:
        """Send one row for each copy, and the entries beside them."""
        mesh, layout = self.dispatcher.mesh, self.dispatcher.layout
        wire = wire_of(self.dispatcher.wire, x_TD.dtype)
        home = _home_map(self.copies, self.assignment, int(self.counts.sent_cpu()[:, 0].sum()), layout.num_ranks)
        copied = spread(x_TD, home, wire.row_dtype)
        counted = self.counts.wait()
        tokens = replace(_route(mesh, layout, counted, "tokens", self.movement), wire=wire)
        metadata = _route(mesh, layout, counted, "metadata", self.movement)
        rows = all_to_all_start(copied, tokens)
        codes = all_to_all_start(self.code_A, metadata)
        weights = all_to_all_start(self.weight_A, metadata)
        return _PendingRows(rows, codes, weights, tokens, home, counted, layout, x_TD.dtype)


@dataclass(frozen=True, eq=False)
class _PendingRows:
    rows: Pending[Tensor]
    codes: Pending[Tensor]
    weights: Pending[Tensor]
    route: Route
    home: RowMap
    counted: Counts
    layout: ExpertLayout
    dtype: torch.dtype

    def wait(self) -> Dispatched:
        count_RX = self.counted.received
        first_R = count_RX[:, 0].cumsum(0) - count_RX[:, 0]
        entries_R = count_RX[:, 1:].sum(1)
        arrivals = Arrivals(self.codes.wait().long(), first_R, entries_R, self.layout.num_slots, sum(self.route.receive_R))
        rows_MD = spread(self.rows.wait(), arrival := arrivals.row_map(), self.dtype)
        handle = Handle(self.route, self.home, arrival, None, self.weights.wait(), self.dtype)
        return Dispatched(rows_MD, self.layout.own_counts(self.counted.received_cpu[:, 1:].sum(0)), handle)


def _route(mesh: Mesh, layout: ExpertLayout, counted: Counts, kind: str, movement: int) -> Route:
    """Copies (column 0 of the counts) for tokens, entries (the other columns) for metadata."""
    sent, received = counted.sent_cpu, counted.received_cpu
    if kind == "tokens":
        send_R, receive_R = sent[:, 0].tolist(), received[:, 0].tolist()
        return Route(mesh, mesh.token_group, tuple(send_R), tuple(receive_R), layout.layer, "dispatch", "tokens", movement)
    send_R, receive_R = sent[:, 1:].sum(1).tolist(), received[:, 1:].sum(1).tolist()
    return Route(mesh, mesh.metadata_group, tuple(send_R), tuple(receive_R), layout.layer, "dispatch", "metadata", movement)


def _home_map(copies: Copies, assignment: Assignment, num_copies: int, num_ranks: int) -> RowMap:
    """From tokens to the copies that are sent. On one device, where no token is without experts, they are the tokens themselves."""
    if num_ranks == 1 and assignment.uniform_k:
        return RowMap.identity()
    # Entries of one copy all write the same token, so their order is of no account.
    source_C = torch.empty(num_copies, dtype=torch.int64, device=copies.token_A.device).scatter_(0, copies.copy_A, copies.token_A)
    return RowMap.from_source(source_C, assignment.num_tokens)
