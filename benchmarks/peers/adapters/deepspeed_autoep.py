"""DeepSpeed AutoEP: a one-layer Mixtral of transformers given to `deepspeed.initialize`, whose converted layer is then driven alone."""

from typing import Any, cast

import deepspeed
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.utils import output_capturing

from benchmarks.peers.case import Case, LayerWeights

VARIANTS = {"deepspeed AutoEP": "preset mixtral; patched: transformers' registry of recorded outputs answers get(key, default)"}


def join() -> None:
    """DeepSpeed's own way in."""
    # DeepSpeed 0.19.8 asks the registry of transformers 5.23 as if it were a dict, and its `get` takes a model and no default.
    registry: Any = output_capturing._CanRecordRegistry
    registry.get = _get
    deepspeed.init_distributed("gloo")


def _get(registry: dict[str, Any], key: Any, default: Any = None) -> Any:
    return dict.get(registry, key if isinstance(key, str) else str(key.__class__), default) or default or {}


def build(variant: str, case: Case, weights: LayerWeights, rank: int) -> nn.Module:
    """The layer of this rank."""
    sizes = case.sizes
    config = MixtralConfig(
        vocab_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        hidden_size=sizes.model_width, intermediate_size=sizes.expert_width,
        num_local_experts=sizes.num_experts, num_experts_per_tok=sizes.top_k,
    )  # fmt: skip
    model: Any = MixtralForCausalLM(config)
    block = model.model.layers[0].mlp
    with torch.no_grad():
        block.gate.weight.copy_(weights.router_ED)
        block.experts.gate_up_proj.copy_(torch.cat([weights.gate_EFD, weights.up_EFD], dim=1))
        block.experts.down_proj.copy_(weights.down_EDF)
    # The engine's bf16 mode wants an optimizer; a model that is bf16 already runs without either.
    model = model.to(weights.down_EDF.dtype)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "expert_parallel": {"enabled": True, "autoep_size": sizes.ranks, "preset_model": "mixtral"},
    }
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    return Batched(engine.module.model.layers[0].mlp)


def down_gradient(layer: nn.Module) -> Tensor | None:
    """Gradient of this rank's `down`, [S, D, F]."""
    return cast("Tensor | None", cast(Any, layer).block.experts.w2.grad)


class Batched(nn.Module):
    """x [T, D] -> y [T, D] through a layer that wants [1, T, D]."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x_TD: Tensor) -> Tensor:
        y = self.block(x_TD.unsqueeze(0))
        return cast(Tensor, y[0] if isinstance(y, tuple) else y).reshape(x_TD.shape)
