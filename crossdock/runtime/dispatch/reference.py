"""Dispatch and combine, slow and obvious, for all ranks in one process: the specification that every dispatcher must equal.

Nothing here is for speed: Python loops over tokens, ordinary autograd, no process group.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crossdock.runtime.dispatch.assignment import Assignment
from crossdock.runtime.dispatch.layout import ExpertLayout


@dataclass(frozen=True, eq=False)
class Arrived:
    """What one rank's experts receive."""

    rows_MD: Tensor
    """Sorted by local slot, then home rank, then token, then the gate's order."""
    count_S: Tensor
    """int64: rows of each of the rank's slots."""
    origin_M: tuple[tuple[int, int], ...]
    """(home rank, entry of its assignment) of every row."""


def dispatch(x: Sequence[Tensor], assignments: Sequence[Assignment], layouts: Sequence[ExpertLayout]) -> list[Arrived]:
    """Rows that every rank of an expert group receives; element r of each argument is rank r's tokens [T, D], entries and layout."""
    arrived = []
    for rank, layout in enumerate(layouts):
        entries = sorted(
            (slot % layout.num_slots, home, entry)
            for home, assignment in enumerate(assignments)
            for entry, expert in enumerate(assignment.expert_A.tolist())
            if (slot := int(layouts[home].slot_of_expert_E[expert])) // layout.num_slots == rank
        )
        rows = [x[home][int(assignments[home].token_A[entry])] for _, home, entry in entries]
        slots = [slot for slot, _, _ in entries]
        arrived.append(
            Arrived(
                rows_MD=torch.stack(rows) if rows else x[rank].new_zeros(0, x[rank].shape[1]),
                count_S=torch.tensor([slots.count(slot) for slot in range(len(layout.local_experts))], dtype=torch.int64),
                origin_M=tuple((home, entry) for _, home, entry in entries),
            )
        )
    return arrived


def combine(outputs: Sequence[Tensor], arrived: Sequence[Arrived], assignments: Sequence[Assignment]) -> list[Tensor]:
    """Every rank's y_TD: for each token, in the order of its entries, the sum of weight times expert output."""
    output_of = {origin: outputs[rank][m] for rank, rows in enumerate(arrived) for m, origin in enumerate(rows.origin_M)}
    results = []
    for home, assignment in enumerate(assignments):
        y = [outputs[home].new_zeros(outputs[home].shape[1]) for _ in range(assignment.num_tokens)]
        for entry, token in enumerate(assignment.token_A.tolist()):
            y[token] = y[token] + assignment.weight_A[entry] * output_of[home, entry]
        results.append(torch.stack(y) if y else outputs[home].new_zeros(0, outputs[home].shape[1]))
    return results


def moe(x_TD: Tensor, assignment: Assignment, expert: Callable[[int, Tensor], Tensor]) -> Tensor:
    """A whole MoE layer as a model on one rank means it; `expert(e, row_D)` is logical expert e's output [D].

    y[t] = sum over the entries of t of weight * expert(x[t])
    """
    y = [torch.zeros_like(row) for row in x_TD]
    for token, number, weight in zip(assignment.token_A.tolist(), assignment.expert_A.tolist(), assignment.weight_A, strict=True):
        y[token] = y[token] + weight * expert(number, x_TD[token])
    return torch.stack(y) if y else torch.zeros_like(x_TD)
