"""The table of gates, and the configuration that picks one of them by `kind`."""

from typing import Annotated

import torch
from pydantic import Field

from crossdock.models.gates.base import Gate
from crossdock.models.gates.deepseek_v3 import DeepSeekV3, DeepSeekV3Config
from crossdock.models.gates.gshard import GShard, GShardConfig
from crossdock.models.gates.noisy_topk import NoisyTopK, NoisyTopKConfig
from crossdock.models.gates.softmax_topk import SoftmaxTopK, SoftmaxTopKConfig
from crossdock.models.gates.switch import Switch, SwitchConfig

AnyGateConfig = Annotated[NoisyTopKConfig | SoftmaxTopKConfig | SwitchConfig | GShardConfig | DeepSeekV3Config, Field(discriminator="kind")]

GATES: dict[str, type[Gate]] = {
    "noisy_topk": NoisyTopK,
    "softmax_topk": SoftmaxTopK,
    "switch": Switch,
    "gshard": GShard,
    "deepseek_v3": DeepSeekV3,
}


def build_gate(config: AnyGateConfig, layer: int, model_width: int, num_experts: int, top_k: int, dtype: torch.dtype) -> Gate:
    """The gate of a layer. Raises `BadConfig` where it cannot choose `top_k` of `num_experts`."""
    return GATES[config.kind](config, layer, model_width, num_experts, top_k, dtype)
