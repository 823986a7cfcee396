"""Parameter and FLOP counts from the configuration equal those of the module."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from crossdock.models.config import ModelConfig
from crossdock.models.counts import flop_per_token, parameter_count
from crossdock.models.transformer import Transformer
from crossdock.runtime.experts import grouped_mlp
from crossdock.runtime.training.context import StepContext

CONFIGS: dict[str, dict[str, Any]] = {
    "dense": {"block": "dense", "num_layers": 3},
    "dense_gqa": {"block": "dense", "num_kv_heads": 1, "tied_head": True, "mlp_width": 24},
    "top1": {"block": "top_k", "top_k": 1, "gate": {"kind": "switch"}},
    "top2_every": {"block": "top_k", "moe_every": 1, "activation": "gelu", "gate": {"kind": "gshard", "random_second": False}},
    "shared": {"block": "shared_expert", "shared_expert_width": 20, "expert_width": 12},
    "scmoe_direct": {"shortcut": {"position": 1, "coefficient": "direct"}},
    "scmoe_cg1": {"top_k": 3, "gate": {"kind": "deepseek_v3"}},
    "dgmoe": {"block": "dgmoe", "top_k": 1},
    "dgmoe_groups_every": {"block": "dgmoe", "moe_every": 1, "gate": {"kind": "deepseek_v3"}, "shortcut": {"position": 1}},
    "dgmoe_share": {"block": "dgmoe_share", "num_layers": 8, "num_experts": 9, "activation": "gelu"},
    "qk_norm": {"block": "top_k", "moe_every": 1, "head_dim": 6, "num_kv_heads": 2, "qk_norm": True, "gate": {"kind": "softmax_topk"}},
    "scmoe_cg2": {"num_layers": 4, "shortcut": {"position": 3, "coefficient": "cg2"}, "tied_head": True},
}


def config_of(name: str) -> ModelConfig:
    return ModelConfig.model_validate({"vocab_size": 40, "num_layers": 2, "model_width": 16, "num_experts": 8} | CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters(name: str) -> None:
    config = config_of(name)
    model, count = Transformer(config), parameter_count(config)
    banks = [sum(p.numel() for p in moe.bank.parameters()) for moe in model.moe_layers]
    assert count.total == sum(p.numel() for p in model.parameters())
    assert count.routed == sum(banks)
    turns = {"dgmoe": 2, "dgmoe_share": 4}.get(config.block, 1)
    assert count.active == count.total - sum(banks) * (config.num_experts - turns * config.top_k) // config.num_experts
    assert count.embedding == sum(p.numel() for name, p in model.named_parameters() if name in ("embedding.weight", "head.weight"))


@pytest.mark.parametrize("name", CONFIGS)
def test_flop(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_mlp, "ROW_MULTIPLE", 1)  # the CPU kernel rounds rows up for speed; that is no work of the model
    config = config_of(name)
    model, token_QP = Transformer(config), torch.randint(0, 40, (3, 8), generator=torch.Generator().manual_seed(0))
    # The counter knows no fused attention of the CPU; the plain one does every product that causal attention may skip.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(token_QP, StepContext(0, 0, True, token_QP.reshape(-1), 0))
    count = flop_per_token(config, 8)
    assert counter.get_total_flops() == token_QP.numel() * count.forward
    by_module = counter.get_flop_counts()
    experts = sum(sum(ops.values()) for module, ops in by_module.items() if module.endswith("moe.bank"))
    assert experts == token_QP.numel() * count.routed


def test_backward_is_twice_forward() -> None:
    config = config_of("dense")
    model, token_QP = Transformer(config), torch.zeros((2, 8), dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(token_QP, StepContext(0, 0, True, token_QP.reshape(-1), 0)).logits_QPV.sum().backward()
    assert counter.get_total_flops() == 16 * flop_per_token(config, 8).training


def test_a_known_model() -> None:
    # GPT-2 small's shape with SwiGLU of 2048 and tied embeddings: 50257 x 768 + 12 x (4 x 768^2 + 3 x 768 x 2048 + 2 x 768) + 768.
    config = ModelConfig(vocab_size=50257, num_layers=12, model_width=768, num_heads=12, block="dense", tied_head=True)
    assert parameter_count(config).total == 50257 * 768 + 12 * (4 * 768**2 + 3 * 768 * 2048 + 2 * 768) + 768
    assert config.dense_width == 2048
