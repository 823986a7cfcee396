"""torchtitan's MoE with its all-to-all token dispatcher, on CPUs."""

import sys
from types import ModuleType
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.case import Case, LayerWeights


class _NoKernels(ModuleType):
    """Stands for a module of Triton kernels, which this dispatcher does not use and CPUs do not have."""

    def __getattr__(self, name: str) -> Any:
        return None


_KERNELS = "torchtitan.distributed.minimal_async_ep.kernels"
sys.modules[_KERNELS] = _NoKernels(_KERNELS)

from torchtitan.distributed.utils import set_spmd_backend  # noqa: E402
from torchtitan.models.common.linear import Linear  # noqa: E402
from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter  # noqa: E402
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher  # noqa: E402

VARIANTS = {"torchtitan": "patched: a module of Triton kernels left out; in fp32 the experts' casts to bf16 left out"}


def join() -> None:
    """Plain torch, and collectives of torch instead of spmd_types, which wants a mesh of its own."""
    dist.init_process_group("gloo")
    set_spmd_backend("default")


def build(variant: str, case: Case, weights: LayerWeights, rank: int) -> nn.Module:
    """The layer of this rank."""
    sizes = case.sizes
    config = MoE.Config(
        num_experts=sizes.num_experts,
        load_balance_coeff=None,
        routed_experts=RoutedExperts.Config(
            inner_experts=GroupedExperts.Config(dim=sizes.model_width, hidden_dim=sizes.expert_width, num_experts=sizes.num_slots),
            token_dispatcher=AllToAllTokenDispatcher.Config(num_experts=sizes.num_experts, top_k=sizes.top_k),
        ),
        router=TokenChoiceTopKRouter.Config(
            num_experts=sizes.num_experts,
            top_k=sizes.top_k,
            score_func="softmax",
            route_norm=True,
            gate=Linear.Config(in_features=sizes.model_width, out_features=sizes.num_experts, bias=False),
        ),
    )
    moe = config.build().to(weights.down_EDF.dtype)
    moe.routed_experts.token_dispatcher.wire_meshes(ep_mesh=dist.device_mesh.init_device_mesh("cpu", (sizes.ranks,)))
    mine, experts = weights.of_rank(rank, sizes), moe.routed_experts.inner_experts
    with torch.no_grad():
        moe.router.gate.weight.copy_(weights.router_ED)
        experts.w1_EFD.copy_(mine.gate_EFD)
        experts.w3_EFD.copy_(mine.up_EFD)
        experts.w2_EDF.copy_(mine.down_EDF)
    if weights.down_EDF.dtype != torch.bfloat16:
        experts.forward = lambda x_RD, counts: _without_casts(experts, x_RD, counts)
    return Batched(moe)


def _without_casts(experts: Any, x_RD: Tensor, count_E: Tensor) -> Tensor:
    """`GroupedExperts.forward` in the dtype of its inputs."""
    offset_E = torch.cumsum(count_E, dim=0, dtype=torch.int32)
    hidden = F.silu(torch._grouped_mm(x_RD, experts.w1_EFD.transpose(-2, -1), offs=offset_E))
    hidden = hidden * torch._grouped_mm(x_RD, experts.w3_EFD.transpose(-2, -1), offs=offset_E)
    return torch._grouped_mm(hidden, experts.w2_EDF.transpose(-2, -1), offs=offset_E)


def down_gradient(layer: nn.Module) -> Tensor | None:
    """Gradient of this rank's `down`, [S, D, F]."""
    return cast("Tensor | None", cast(Any, layer).moe.routed_experts.inner_experts.w2_EDF.grad)


class Batched(nn.Module):
    """x [T, D] -> y [T, D] through a layer that wants [1, T, D]."""

    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x_TD: Tensor) -> Tensor:
        y: Tensor = self.moe(x_TD.unsqueeze(0))
        return y.squeeze(0)
