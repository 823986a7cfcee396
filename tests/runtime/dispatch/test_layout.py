"""Layouts as single ranks see them, and the slow reference worked by hand."""

import numpy as np
import pytest
import torch

from crossdock.errors import BadData
from crossdock.placement.records.plan import Plan, choose_replica
from crossdock.runtime.dispatch import reference
from crossdock.runtime.dispatch.assignment import Assignment
from crossdock.runtime.dispatch.layout import ExpertLayout
from crossdock.runtime.transport.mesh import Mesh

CPU = torch.device("cpu")


def mesh_of(rank: int, world_size: int, expert_parallel: int, nodes: tuple[int, ...]) -> Mesh:
    return Mesh(rank, world_size, expert_parallel, nodes, CPU)


def test_a_replica_is_used_by_the_rank_that_holds_it() -> None:
    plan = Plan(np.array([[[0, 1, -1], [2, 3, 0]]]), 4)
    first, second = (ExpertLayout.from_plan(plan, 0, mesh_of(rank, 2, 2, (0, 1))) for rank in range(2))
    assert first.slot_of_expert_E.tolist() == [0, 1, 3, 4]
    assert second.slot_of_expert_E.tolist() == [5, 1, 3, 4]
    assert (first.local_experts, second.local_experts) == ((0, 1), (2, 3, 0))
    assert (first.num_slots, first.num_experts, first.num_ranks) == (3, 4, 2)


def test_every_copy_of_the_expert_group_has_its_own_nodes() -> None:
    slots = np.array([[[0, 1], [0, 2], [0, 3], [0, 4]]])
    plan = Plan(slots, 5)
    nodes = (0, 0, 1, 1, 2, 3, 2, 3)
    for rank in range(8):
        layout = ExpertLayout.from_plan(plan, 0, mesh_of(rank, 8, 4, nodes))
        wanted = choose_replica(plan, nodes[:4] if rank < 4 else nodes[4:])[0, rank % 4]
        assert layout.slot_of_expert_E.tolist() == wanted.tolist()


def test_contiguous() -> None:
    layouts = [ExpertLayout.contiguous(7, 4, mesh_of(rank, 2, 2, (0, 0))) for rank in range(2)]
    assert [layout.local_experts for layout in layouts] == [(0, 1), (2, 3)]
    assert all(layout.slot_of_expert_E.tolist() == [0, 1, 2, 3] and layout.layer == 7 for layout in layouts)


@pytest.mark.parametrize(("layer", "num_devices"), [(0, 4), (2, 2), (-1, 2)])
def test_a_plan_for_something_else_is_refused(layer: int, num_devices: int) -> None:
    with pytest.raises(BadData, match=rf"places 2 layers on {num_devices} devices, but layer {layer} on 2"):
        ExpertLayout.from_plan(Plan.contiguous(2, 4, num_devices), layer, mesh_of(0, 2, 2, (0, 0)))


def test_the_reference_by_hand() -> None:
    """Two ranks, two experts, expert e multiplies by e + 2; rank 0 holds expert 1, rank 1 expert 0."""
    plan = Plan(np.array([[[1], [0]]]), 2)
    layouts = [ExpertLayout.from_plan(plan, 0, mesh_of(rank, 2, 2, (0, 0))) for rank in range(2)]
    x = [torch.tensor([[1.0], [10.0]]), torch.tensor([[100.0]])]
    assignments = [
        Assignment(torch.tensor([0, 1, 1]), torch.tensor([1, 0, 1]), torch.tensor([1.0, 0.5, 0.25]), 2),
        Assignment(torch.tensor([0]), torch.tensor([1]), torch.tensor([2.0]), 1),
    ]
    arrived = reference.dispatch(x, assignments, layouts)
    assert [a.rows_MD.flatten().tolist() for a in arrived] == [[1.0, 10.0, 100.0], [10.0]]
    assert [a.count_S.tolist() for a in arrived] == [[3], [1]]
    assert [a.origin_M for a in arrived] == [((0, 0), (0, 2), (1, 0)), ((0, 1),)]
    y = reference.combine([arrived[0].rows_MD * 3, arrived[1].rows_MD * 2], arrived, assignments)
    assert [part.flatten().tolist() for part in y] == [[3.0, 17.5], [600.0]]
    assert reference.moe(x[0], assignments[0], lambda e, row: row * (e + 2)).flatten().tolist() == [3.0, 17.5]
