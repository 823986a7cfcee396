"""Assignments from fixed-k gates, with and without drops."""

import pytest
import torch

from crossdock.runtime.dispatch.assignment import Assignment

EXPERT_TK = torch.tensor([[4, 1], [4, 2], [0, 3]], dtype=torch.int32)
WEIGHT_TK = torch.tensor([[0.7, 0.3], [0.9, 0.1], [0.6, 0.4]])


def test_every_entry_is_kept_by_default() -> None:
    assignment = Assignment.from_topk(EXPERT_TK, WEIGHT_TK)
    assert assignment.token_A.tolist() == [0, 0, 1, 1, 2, 2]
    assert assignment.expert_A.tolist() == [4, 1, 4, 2, 0, 3]
    assert torch.equal(assignment.weight_A, WEIGHT_TK.flatten())
    assert (assignment.num_tokens, assignment.num_entries, assignment.uniform_k, assignment.num_dropped) == (3, 6, 2, 0)
    assert assignment.offset_T.tolist() == [0, 2, 4]


def test_dropped_entries_are_missing() -> None:
    keep = torch.tensor([[True, False], [False, False], [True, True]])
    assignment = Assignment.from_topk(EXPERT_TK, WEIGHT_TK, keep)
    assert assignment.token_A.tolist() == [0, 2, 2]
    assert assignment.expert_A.tolist() == [4, 0, 3]
    assert (assignment.num_tokens, assignment.uniform_k, assignment.num_dropped) == (3, None, 3)
    assert assignment.offset_T.tolist() == [0, 1, 1]


def test_gradients_reach_the_gate_through_kept_entries_only() -> None:
    weight = WEIGHT_TK.clone().requires_grad_()
    keep = torch.tensor([[True, False], [True, True], [False, True]])
    Assignment.from_topk(EXPERT_TK, weight, keep).weight_A.sum().backward()
    assert torch.equal(weight.grad, keep.float())  # type: ignore[arg-type]


def test_no_tokens() -> None:
    assignment = Assignment.from_topk(EXPERT_TK[:0], WEIGHT_TK[:0])
    assert (assignment.num_tokens, assignment.num_entries, assignment.uniform_k) == (0, 0, 2)
    assert assignment.offset_T.tolist() == []


@pytest.mark.parametrize(
    ("expert", "weight", "uniform_k", "message"),
    [
        (torch.tensor([1, 2]), torch.ones(3), None, r"all must be \[A\]"),
        (torch.tensor([1, 2, 0], dtype=torch.int32), torch.ones(3), None, "int64"),
        (torch.tensor([1, 2, 0]), torch.ones(3), 2, "3 entries are not 2 for each of 2 tokens"),
    ],
)
def test_entries_that_do_not_fit_together(expert: torch.Tensor, weight: torch.Tensor, uniform_k: int | None, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        Assignment(torch.tensor([0, 0, 1]), expert, weight, 2, uniform_k)
