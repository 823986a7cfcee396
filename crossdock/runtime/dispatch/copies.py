"""Copies: one token for one device, and the entries (slot, weight) that share it; how both ends number them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from crossdock.runtime.dispatch.assignment import Assignment
from crossdock.runtime.dispatch.layout import ExpertLayout
from crossdock.runtime.dispatch.rows import RowMap, count_of, inverse


@dataclass(frozen=True, eq=False)
class Copies:
    """The entries of an assignment sorted by (device, token), so that those of one copy stand side by side in the gate's order.

    Copies are numbered in that order. An example, two slots a device, tokens 0 and 1, both with slots 0 and 1 (device 0), token 1 with
    slot 3 (device 1) as well:

        device_A [0, 0, 0, 0, 1]    token_A [0, 0, 1, 1, 1]    copy_A [0, 0, 1, 1, 2]    copies_R [2, 1]    entries_RS [[2, 2], [0, 1]]
    """

    order_A: Tensor
    """int64 [A]: the entry of the assignment that stands here."""
    device_A: Tensor
    token_A: Tensor
    slot_A: Tensor
    """int64 [A]: local slot on the device."""
    copy_A: Tensor
    copies_R: Tensor
    """int64 [R]: copies for each device."""
    entries_RS: Tensor
    """int64 [R, S]: entries for each slot of each device."""

    @classmethod
    def of(cls, assignment: Assignment, layout: ExpertLayout) -> "Copies":
        """Sort the entries; nothing here waits for a CUDA device."""
        num_ranks, num_slots = layout.num_ranks, layout.num_slots
        slot_A = layout.slot_of_expert_E[assignment.expert_A]
        pair_A = slot_A.div(num_slots, rounding_mode="floor") * assignment.num_tokens + assignment.token_A
        order_A = torch.argsort(pair_A, stable=True)
        pair_A, slot_A = pair_A[order_A], slot_A[order_A]
        device_A = slot_A.div(num_slots, rounding_mode="floor")
        begins_A = begins(pair_A)
        return cls(
            order_A=order_A,
            device_A=device_A,
            token_A=assignment.token_A[order_A],
            slot_A=slot_A % num_slots,
            copy_A=begins_A.cumsum(0) - 1,
            copies_R=torch.zeros(num_ranks, dtype=torch.int64, device=slot_A.device).scatter_add_(0, device_A, begins_A),
            entries_RS=count_of(slot_A, num_ranks * num_slots).view(num_ranks, num_slots),
        )

    def codes(self) -> Tensor:
        """int32 [A], what an entry's device is told: (copy within the block that this rank sends there) * S + slot."""
        first_R = self.copies_R.cumsum(0) - self.copies_R
        return ((self.copy_A - first_R[self.device_A]) * self.entries_RS.shape[1] + self.slot_A).int()


def begins(key_A: Tensor) -> Tensor:
    """int64 [A]: 1 where a run of equal keys begins, else 0."""
    begins_A = torch.ones_like(key_A)
    begins_A[1:] = key_A[1:] != key_A[:-1]
    return begins_A


@dataclass(frozen=True, eq=False)
class Arrivals:
    """The entries that arrived, from all source ranks in turn."""

    code_A: Tensor
    """int64 [A]: their codes."""
    first_R: Tensor
    """int64 [R]: at which of the copies that arrived the block of each source begins."""
    entries_R: Tensor
    """int64 [R]: entries from each source."""
    num_slots: int
    num_copies: int

    def row_map(self, by_copy_A: Tensor | None = None) -> RowMap:
        """From the copies to rows sorted by slot, then source rank, then token.

        by_copy_A: `by_copy()`, where blocks of copies do not stand in the order of their sources.
        """
        copy_A = self._copy_A()
        order_M = torch.argsort(self.code_A % self.num_slots, stable=True)
        position_A = inverse(order_M)
        in_order_A = copy_A
        if by_copy_A is not None:
            in_order_A, position_A = copy_A[by_copy_A], position_A[by_copy_A]
        offset_C = torch.searchsorted(in_order_A, torch.arange(self.num_copies, device=copy_A.device))
        return RowMap(copy_A[order_M], position_A, offset_C)

    def by_copy(self) -> Tensor:
        """int64 [A]: the entries in the order of their copies, which is that of the map's `position_M` and of combine weights."""
        return torch.argsort(self._copy_A(), stable=True)

    def _copy_A(self) -> Tensor:
        first_A = self.first_R.repeat_interleave(self.entries_R, output_size=self.code_A.numel())
        return self.code_A.div(self.num_slots, rounding_mode="floor") + first_A
