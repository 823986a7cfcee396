"""Parameters and FLOP of a model, from its configuration alone; the tests hold them equal to the module."""

from dataclasses import dataclass

from crossdock.models.config import ModelConfig
from crossdock.models.kinds import Stage


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of the whole model, over all ranks, each expert once."""

    total: int
    active: int  # those that one token may meet: of a layer's routed experts top_k per turn
    routed: int  # in routed experts
    embedding: int  # in embedding and output head
    routers: int  # in gates


@dataclass(frozen=True)
class FlopCount:
    """Floating-point operations per token; a multiply-add is 2. Matrix products alone, as usual; causal attention counted in full."""

    forward: int
    training: int  # forward and backward: three times forward
    routed: int  # part of forward in routed experts


def parameter_count(config: ModelConfig) -> ParameterCount:
    """Parameters by kind: exactly what the module holds."""
    width, blocks = config.model_width, config.num_blocks
    embedding = config.vocab_size * width * (1 if config.tied_head else 2)
    per_block = sum(_stage_parameters(config, stage) for stage in config.stages)
    routers = routed = one_expert = 0
    if config.num_moe_layers:
        routers = config.num_moe_layers * config.num_experts * width * _router_matrices(config)
        per_block += 0 if config.block == "shared_expert" else width  # the routed experts' own norm
        one_expert = _expert_matrices(config) * width * config.routed_width
        routed = config.num_moe_layers * config.num_experts * one_expert
    total = embedding + blocks * per_block + routers + routed + width  # the last norm
    idle = config.num_moe_layers * max(0, config.num_experts - config.top_k * config.turns_per_layer) * one_expert
    return ParameterCount(total, total - idle, routed, embedding, routers)


def flop_per_token(config: ModelConfig, sequence_length: int) -> FlopCount:
    """FLOP of one token of a sequence of `sequence_length` tokens, in training, with nothing dropped."""
    per_block = sum(stage_flop_per_token(config, stage, sequence_length) for stage in config.stages)
    routed = 0
    if config.num_moe_layers:
        per_block += _router_flop(config) + _experts_flop(config)  # what is no stage; stages have counted their own
        routed = config.num_blocks * config.kind.turns_per_block * _experts_flop(config)
    forward = config.num_blocks * per_block + 2 * config.model_width * config.vocab_size
    return FlopCount(forward, 3 * forward, routed)


def stage_flop_per_token(config: ModelConfig, stage: Stage, sequence_length: int) -> int:
    """Forward FLOP of one token in one stage of the shared stream."""
    width = config.model_width
    if stage == "mlp":
        return 6 * width * config.dense_width
    if stage == "shared":
        return 6 * width * config.shared_width + 2 * width * _num_scales(config)
    if stage == "current":
        return _router_flop(config) + _experts_flop(config)
    projections = 2 * width * (2 * config.num_heads + 2 * config.kv_heads) * config.head_width
    return projections + 4 * sequence_length * config.num_heads * config.head_width


def _stage_parameters(config: ModelConfig, stage: Stage) -> int:
    width = config.model_width
    if stage == "mlp":
        return width + 3 * width * config.dense_width
    if stage == "shared":
        return width + 3 * width * config.shared_width + width * _num_scales(config)
    if stage == "current":
        return width  # its norm: gate and experts are the MoE layer's
    norms = 2 * config.head_width if config.qk_norm else 0
    return width + norms + width * (2 * config.num_heads + 2 * config.kv_heads) * config.head_width


def _router_flop(config: ModelConfig) -> int:
    return 2 * config.num_experts * config.model_width * _router_matrices(config)


def _experts_flop(config: ModelConfig) -> int:
    """Of one turn."""
    return config.top_k * 2 * _expert_matrices(config) * config.model_width * config.routed_width


def _router_matrices(config: ModelConfig) -> int:
    return 2 if config.gate.kind == "noisy_topk" else 1


def _num_scales(config: ModelConfig) -> int:
    return {"direct": 0, "cg1": 1, "cg2": 2}[config.coefficient]


def _expert_matrices(config: ModelConfig) -> int:
    return 3 if config.activation == "swiglu" else 2
