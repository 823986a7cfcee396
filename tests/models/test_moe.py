"""The MoE layer by itself: against the slow reference, under a new layout, without a context, and what it refuses."""

import numpy as np
import pytest
import torch
from torch import Tensor

from crossdock.errors import BadConfig, BadData
from crossdock.models.moe import MoELayer
from crossdock.placement.records.plan import Plan
from crossdock.runtime.dispatch.layout import ExpertLayout
from crossdock.runtime.transport.mesh import Mesh
from tests.pool import Pool, mesh_for

D, F, E = 8, 12, 6


def layer_of(mesh: Mesh | None = None, plan: Plan | None = None, dispatch: str = "deduplicated") -> MoELayer:
    return MoELayer(D, F, E, 2, mesh=mesh, plan=plan, dispatch=dispatch, dtype=torch.float64, initial_std=0.5).eval()


def x_QPD() -> Tensor:
    return torch.randn(4, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def plan_of(*slots: list[int]) -> Plan:
    return Plan(slots_LRS=np.array([slots], dtype=np.int32), num_experts=E)


def move_experts(rank: int, world_size: int) -> list[Tensor]:
    """Outputs of this rank's sequences before and after its experts change places; the second number of slots differs from the first."""
    mesh = mesh_for(rank, world_size, world_size)
    before, after = plan_of([0, 1, 2], [3, 4, 5]), plan_of([5, 3, 0, -1], [4, -1, 1, 2])
    layer, target = layer_of(mesh, before), layer_of(mesh, after)
    x = x_QPD().chunk(world_size)[rank]
    first = layer(x).detach()
    layer.set_layout(ExpertLayout.from_plan(after, 0, mesh), {name: t.detach().clone() for name, t in target.bank.expert_tensors().items()})
    assert layer.bank.inner.shape[0] == 4
    return [first, layer(x).detach()]


def test_a_new_layout_changes_no_output(ranks: Pool) -> None:
    expected = layer_of()(x_QPD())
    results = ranks.run(2, move_experts)
    for number in (0, 1):
        torch.testing.assert_close(torch.cat([result[number] for result in results]), expected, rtol=1e-12, atol=1e-12)


def test_any_shape_of_input() -> None:
    layer, x = layer_of(), x_QPD()
    y = layer(x)
    assert y.shape == x.shape
    torch.testing.assert_close(layer(x.view(2, 2, 5, D)).view_as(y), y)
    torch.testing.assert_close(layer(x.view(20, D)).view_as(y), y)
    with torch.inference_mode():
        assert torch.equal(layer(x), y)


def test_without_a_context_steps_are_counted_in_training_only() -> None:
    layer, x = layer_of().train(), x_QPD()
    assert not torch.equal(layer(x), layer(x))  # other noise in another step
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert set(layer.losses) == {"importance", "load", "z"}


def test_what_it_refuses() -> None:
    with pytest.raises(BadConfig, match=r"flatt.*choose from flat, deduplicated"):
        layer_of(dispatch="flatt")
    with pytest.raises(BadData, match=r"2 devices"):
        layer_of(plan=plan_of([0, 1, 2], [3, 4, 5]))
    with pytest.raises(BadData, match=r"plan places 4 experts, and the layer has 6"):
        layer_of(plan=Plan.contiguous(1, 4, 1))


def refuse_copies(rank: int, world_size: int) -> None:
    layer = layer_of(mesh_for(rank, world_size, world_size), plan_of([0, 1, 2, 3], [3, 4, 5, 0]))
    layer(x_QPD().chunk(world_size)[rank]).sum().backward()
    with pytest.raises(BadConfig, match="copies of an expert"):
        layer.finish_gradients()


def test_copies_of_an_expert_need_the_engine(ranks: Pool) -> None:
    ranks.run(2, refuse_copies)
