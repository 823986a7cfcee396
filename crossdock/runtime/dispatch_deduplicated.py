"""De-duplicated dispatch: one copy per (token, device); the device weights and sums its experts' outputs and returns one row per copy.

Beside the tokens travel, on a group of their own, which copy goes to which slot (int32) and with which weight (the gate's dtype; its
gradient comes back the same way). They are counted as metadata.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from crossdock.runtime.assignment import Assignment
from crossdock.runtime.collectives import Counts, Pending, Route, all_to_all_start, counts_start
from crossdock.runtime.layout import ExpertLayout
from crossdock.runtime.mesh import Mesh
from crossdock.runtime.movement import Dispatched, Handle, PendingTokens, combine_start
from crossdock.runtime.rows import RowMap, count_of, inverse, spread


@dataclass(frozen=True, eq=False)
class Deduplicated:
    """Dispatcher that sends a token once to each device that holds at least one of its experts.

    Outputs are summed on each device in the gate's order, then at home in the order of the devices. `wire_dtype` is that of rows between
    ranks, gradients included; None: that of the tokens.
    """

    mesh: Mesh
    layout: ExpertLayout
    wire_dtype: torch.dtype | None = None

    def dispatch_start(self, x_TD: Tensor, assignment: Assignment) -> Pending[Dispatched]:
        """Sort the entries by (device, token), send one row for each pair and the entries beside them; see `dispatch.Dispatcher`."""
        mesh, layout = self.mesh, self.layout
        num_ranks, num_slots, num_tokens = layout.num_ranks, layout.num_slots, assignment.num_tokens
        wire_dtype = self.wire_dtype or x_TD.dtype
        slot_A = layout.slot_of_expert_E[assignment.expert_A]

        # 1. Entries of one copy side by side; a copy begins where (device, token) changes.
        pair_A = slot_A.div(num_slots, rounding_mode="floor") * num_tokens + assignment.token_A
        order_A = torch.argsort(pair_A, stable=True)
        pair_A, token_A, slot_A = pair_A[order_A], assignment.token_A[order_A], slot_A[order_A]
        begins_A = torch.ones_like(pair_A)
        begins_A[1:] = pair_A[1:] != pair_A[:-1]
        copy_A = begins_A.cumsum(0) - 1
        device_A = slot_A.div(num_slots, rounding_mode="floor")
        copies_R = torch.zeros(num_ranks, dtype=torch.int64, device=slot_A.device).scatter_add_(0, device_A, begins_A)

        # 2. Tell every device how many copies come, and how many entries for each of its slots.
        entries_RS = count_of(slot_A, num_ranks * num_slots).view(num_ranks, num_slots)
        movement = mesh.ledger.next_movement()
        counts = counts_start(torch.cat((copies_R.unsqueeze(1), entries_RS), 1), mesh, layout.layer, movement)
        first_R = copies_R.cumsum(0) - copies_R
        code_A = ((copy_A - first_R[device_A]) * num_slots + slot_A % num_slots).int()
        weight_A = assignment.weight_A[order_A]
        counted = counts.wait()

        # 3. Send the copies, and the entries beside them.
        home = _home_map(copy_A, token_A, num_tokens, int(counted.sent_cpu[:, 0].sum()), assignment.uniform_k, num_ranks)
        tokens = _route(mesh, layout, counted, "tokens", movement)
        metadata = _route(mesh, layout, counted, "metadata", movement)
        rows = all_to_all_start(spread(x_TD, home, wire_dtype), tokens)
        codes = all_to_all_start(code_A, metadata)
        weights = all_to_all_start(weight_A, metadata)
        return _PendingRows(rows, codes, weights, tokens, home, counted, num_slots, x_TD.dtype, wire_dtype)

    def combine_start(self, rows_MD: Tensor, handle: Handle) -> PendingTokens:
        """Weight, sum and send expert outputs home; see `dispatch.Dispatcher`."""
        return combine_start(rows_MD, handle)


@dataclass(frozen=True, eq=False)
class _PendingRows:
    rows: Pending[Tensor]
    codes: Pending[Tensor]
    weights: Pending[Tensor]
    route: Route
    home: RowMap
    counted: Counts
    num_slots: int
    dtype: torch.dtype
    wire_dtype: torch.dtype

    def wait(self) -> Dispatched:
        code_A = self.codes.wait().long()
        arrival = _arrival_map(code_A, self.counted.received, self.num_slots, sum(self.route.receive_R))
        rows_MD = spread(self.rows.wait(), arrival, self.dtype)
        handle = Handle(self.route, self.home, arrival, None, self.weights.wait(), self.dtype, self.wire_dtype)
        return Dispatched(rows_MD, self.counted.received_cpu[:, 1:].sum(0), handle)


def _route(mesh: Mesh, layout: ExpertLayout, counted: Counts, kind: str, movement: int) -> Route:
    """Copies (column 0 of the counts) for tokens, entries (the other columns) for metadata."""
    sent, received = counted.sent_cpu, counted.received_cpu
    if kind == "tokens":
        send_R, receive_R = sent[:, 0].tolist(), received[:, 0].tolist()
        return Route(mesh, mesh.token_group, tuple(send_R), tuple(receive_R), layout.layer, "dispatch", "tokens", movement)
    send_R, receive_R = sent[:, 1:].sum(1).tolist(), received[:, 1:].sum(1).tolist()
    return Route(mesh, mesh.metadata_group, tuple(send_R), tuple(receive_R), layout.layer, "dispatch", "metadata", movement)


def _home_map(copy_A: Tensor, token_A: Tensor, num_tokens: int, num_copies: int, uniform_k: int | None, num_ranks: int) -> RowMap:
    """From tokens to the copies that are sent. On one device, where no token is without experts, they are the tokens themselves."""
    if num_ranks == 1 and uniform_k:
        return RowMap.identity()
    # Entries of one copy all write the same token, so their order is of no account.
    source_C = torch.empty(num_copies, dtype=torch.int64, device=token_A.device).scatter_(0, copy_A, token_A)
    position_C = torch.argsort(source_C, stable=True)
    offset_T = torch.searchsorted(source_C[position_C], torch.arange(num_tokens, device=token_A.device))
    return RowMap(source_C, position_C, offset_T)


def _arrival_map(code_A: Tensor, count_RX: Tensor, num_slots: int, num_copies: int) -> RowMap:
    """From the copies that arrived to rows sorted by slot. `code_A` is (copy within its source's block) * S + slot, grouped by source."""
    copies_R, entries_R = count_RX[:, 0], count_RX[:, 1:].sum(1)
    first_R = copies_R.cumsum(0) - copies_R
    copy_A = code_A.div(num_slots, rounding_mode="floor") + first_R.repeat_interleave(entries_R, output_size=code_A.numel())
    order_M = torch.argsort(code_A % num_slots, stable=True)
    offset_C = torch.searchsorted(copy_A, torch.arange(num_copies, device=code_A.device))
    return RowMap(copy_A[order_M], inverse(order_M), offset_C)
