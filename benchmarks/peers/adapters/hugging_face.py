"""Hugging Face transformers: Mixtral's sparse block with its expert parallelism, unmodified."""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import MixtralConfig
from transformers.distributed.expert_parallel import apply_expert_parallelism
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from benchmarks.peers.case import Case, LayerWeights

VARIANTS = {
    "transformers eager": "all-to-all, its loop over the experts",
    "transformers grouped_mm": "all-to-all, its grouped matrix products",
}
PLAN = {"experts.gate_up_proj": "grouped_gemm", "experts.down_proj": "grouped_gemm", "experts": "ep_dispatch_experts"}


def build(variant: str, case: Case, weights: LayerWeights, rank: int) -> nn.Module:
    """The layer of this rank."""
    sizes = case.sizes
    named: dict[str, Any] = {
        "hidden_size": sizes.model_width,
        "intermediate_size": sizes.expert_width,
        "num_local_experts": sizes.num_experts,
        "num_experts_per_tok": sizes.top_k,
        "experts_implementation": variant.split()[1],
    }
    block = MixtralSparseMoeBlock(MixtralConfig(**named)).to(weights.down_EDF.dtype)
    with torch.no_grad():
        block.gate.weight.copy_(weights.router_ED)
        block.experts.gate_up_proj.copy_(torch.cat([weights.gate_EFD, weights.up_EFD], dim=1))
        block.experts.down_proj.copy_(weights.down_EDF)
    experts = dist.device_mesh.init_device_mesh("cpu", (sizes.ranks, 1), mesh_dim_names=("ep", "tp"))
    apply_expert_parallelism(block, experts["ep"], experts["tp"], PLAN, "all_to_all")
    return Batched(block)


def down_gradient(layer: nn.Module) -> Tensor | None:
    """Gradient of this rank's `down`, [S, D, F]."""
    gradient: Any = cast(Any, layer).block.experts.down_proj.grad
    return cast("Tensor | None", gradient.to_local() if isinstance(gradient, DTensor) else gradient)


class Batched(nn.Module):
    """x [T, D] -> y [T, D] through a block that wants [1, T, D]."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x_TD: Tensor) -> Tensor:
        y: Tensor = self.block(x_TD.unsqueeze(0))
        return y.squeeze(0)
