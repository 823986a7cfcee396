"""The MoE layer by itself: against the slow reference, under a new layout, without a context, and what it refuses."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from crossdock.errors import BadConfig, BadData
from crossdock.models.gates.capacity import BatchMax, Fixed
from crossdock.models.gates.deepseek_v3 import DeepSeekV3Config
from crossdock.models.gates.gshard import GShardConfig
from crossdock.models.gates.noisy_topk import NoisyTopKConfig
from crossdock.models.gates.softmax_topk import SoftmaxTopKConfig
from crossdock.models.moe import MoELayer
from crossdock.placement.records.plan import Plan
from crossdock.runtime.dispatch.layout import ExpertLayout
from crossdock.runtime.training.context import StepContext
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
    before, after = plan_of([0, 1, 2], [3, 4, 5]), plan_of([5, 3, 0, 1], [4, 2, -1, -1])
    layer, target = layer_of(mesh, before), layer_of(mesh, after)
    x = x_QPD().chunk(world_size)[rank]
    first = layer(x).detach()
    layer.set_layout(ExpertLayout.from_plan(after, 0, mesh), {name: t.detach().clone() for name, t in target.bank.expert_tensors().items()})
    assert layer.bank.inner.shape[0] == (4, 2)[rank]
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


GATES = {
    "noisy_topk": NoisyTopKConfig(),
    "softmax_topk": SoftmaxTopKConfig(z_loss=1e-3),
    "gshard": GShardConfig(),
    "deepseek_v3": DeepSeekV3Config(),
    "fixed": NoisyTopKConfig(capacity=Fixed(factor=0.5)),
    "batch_max": NoisyTopKConfig(capacity=BatchMax(factor=0.5)),
}


def trained(gate: str, mesh: Mesh | None, x: Tensor, first_token: int) -> list[Tensor]:
    """y, the layer's losses and the experts' gradients of the sum over all ranks' tokens."""
    layer = MoELayer(D, F, E, 2, gate=GATES[gate], mesh=mesh, dtype=torch.float64, initial_std=0.5)
    context = StepContext(0, 0, True, torch.zeros(x.shape[:-1].numel(), dtype=torch.int64), first_token)
    y = layer(x, context)
    (y.square().sum() + sum(layer.losses.values())).backward()
    layer.finish_gradients()
    world_size = 1 if mesh is None else mesh.world_size
    gradients = [parameter.grad * world_size for parameter in layer.bank.parameters() if parameter.grad is not None]
    return [y.detach(), torch.stack(list(layer.losses.values())).detach(), *gradients]


def train_with_an_idle_rank(rank: int, world_size: int, gate: str) -> list[Tensor]:
    x = x_QPD()[0] if rank == 1 else x_QPD()[0, :0]
    return trained(gate, mesh_for(rank, world_size, world_size), x, 0)


@pytest.mark.parametrize("gate", GATES)
def test_a_rank_without_tokens_takes_part(ranks: Pool, gate: str) -> None:
    y, losses, *gradients = trained(gate, None, x_QPD()[0], 0)
    of_ranks = ranks.run(2, train_with_an_idle_rank, gate)
    assert of_ranks[0][0].shape == (0, D)
    torch.testing.assert_close(of_ranks[1][0], y)
    for found in of_ranks:
        torch.testing.assert_close(found[1], losses)
    for number, expected in enumerate(gradients, start=2):
        torch.testing.assert_close(torch.cat([found[number] for found in of_ranks]), expected)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("shape", [(0, D), (3, 0, D), (0, 5, D)])
def test_a_batch_without_tokens_has_no_loss(gate: str, shape: tuple[int, ...]) -> None:
    y, losses, *gradients = trained(gate, None, torch.zeros(shape, dtype=torch.float64), 0)
    assert y.shape == shape
    assert not losses.any()
    assert not any(gradient.any() for gradient in gradients)


def test_other_precisions_come_in_and_go_out_again() -> None:
    layer = MoELayer(D, F, E, 2, initial_std=0.5).eval()
    projection, x = torch.nn.Linear(D, D), x_QPD().float()
    with torch.autocast("cpu", torch.bfloat16):
        projected = projection(x)
        y = layer(projected)
    assert projected.dtype == y.dtype == torch.bfloat16
    assert torch.equal(y, layer(projected.float()).bfloat16())
    y.float().sum().backward()
    assert projection.weight.grad is not None
    with pytest.raises(BadConfig, match=r"float16 have no wire format"):
        MoELayer(D, F, E, 2, dtype=torch.float16).eval()(x)


def test_another_width_is_refused() -> None:
    for shape in ((4, D + 1), (D,)):
        with pytest.raises(BadData, match=rf"width {D}; give it \[\.\.\., tokens, {D}\]"):
            layer_of()(torch.zeros(shape, dtype=torch.float64))


def test_activation_checkpointing_draws_the_same_noise_or_is_refused() -> None:
    layer, x = layer_of().train(), x_QPD().requires_grad_()
    context = StepContext(0, 3, True, torch.zeros(20, dtype=torch.int64), 0)
    (expected,) = torch.autograd.grad(layer(x, context).square().sum(), x)
    (found,) = torch.autograd.grad(checkpoint(layer, x, context, use_reentrant=False).square().sum(), x)
    assert torch.equal(found, expected)
    y = checkpoint(layer, x, use_reentrant=False)
    with pytest.raises(BadConfig, match="draw other noise"):
        y.sum().backward()
