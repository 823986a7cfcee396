"""DeepSpeed's `moe.layer.MoE` with SwiGLU experts, unmodified."""

from typing import Any, cast

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from benchmarks.peers.case import Case, LayerWeights

VARIANTS = {"deepspeed MoE": "drops nothing: every expert padded to the longest"}


def join() -> None:
    """DeepSpeed's own way in."""
    deepspeed.init_distributed("gloo")


def build(variant: str, case: Case, weights: LayerWeights, rank: int) -> nn.Module:
    """The layer of this rank."""
    sizes = case.sizes
    moe = MoE(
        sizes.model_width,
        Expert(sizes.model_width, sizes.expert_width),
        sizes.num_experts,
        ep_size=sizes.ranks,
        k=sizes.top_k,
        drop_tokens=False,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )
    moe.set_deepspeed_parallelism()
    moe = moe.to(weights.down_EDF.dtype)
    mine = weights.of_rank(rank, sizes)
    with torch.no_grad():
        moe.deepspeed_moe.gate.wg.weight.copy_(weights.router_ED)
        for slot, expert in enumerate(moe.deepspeed_moe.experts.deepspeed_experts):
            expert.gate.weight.copy_(mine.gate_EFD[slot])
            expert.up.weight.copy_(mine.up_EFD[slot])
            expert.down.weight.copy_(mine.down_EDF[slot])
    return OutputAlone(moe)


def down_gradient(layer: nn.Module) -> Tensor | None:
    """Gradient of this rank's `down`, [S, D, F]."""
    experts = cast(Any, layer).moe.deepspeed_moe.experts.deepspeed_experts
    return torch.stack([expert.down.weight.grad for expert in experts])


class Expert(nn.Module):
    """SwiGLU."""

    def __init__(self, model_width: int, expert_width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(model_width, expert_width, bias=False)
        self.up = nn.Linear(model_width, expert_width, bias=False)
        self.down = nn.Linear(expert_width, model_width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


class OutputAlone(nn.Module):
    """x [T, D] -> y [T, D], without the balance loss and the counts."""

    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x_TD: Tensor) -> Tensor:
        y: Tensor = self.moe(x_TD)[0]
        return y
