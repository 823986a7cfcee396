"""Mixtral and Qwen3-MoE of Hugging Face transformers in Crossdock's terms: configurations both ways, and where every tensor goes.

A model is one of them where its block is `top_k` with SwiGLU experts and it routes by plain top-k of the softmax. With `qk_norm` it is a
Qwen3-MoE (every layer or every second one has experts), else a Mixtral (every layer, weights that sum to 1). Nothing is computed on the
way: tensors are cut, joined and transposed, so that both ways keep every bit.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crossdock import strict_yaml
from crossdock.errors import BadConfig, BadData
from crossdock.models.config import ModelConfig
from crossdock.models.gates.capacity import Dropless
from crossdock.strict_yaml import Document


@dataclass(frozen=True)
class Source:
    """One tensor of theirs from one of ours: rows `first` to `last` of `key`, and then perhaps its transpose."""

    theirs: str
    ours: str
    shape: tuple[int, ...]
    """Of theirs."""
    first: int = 0
    last: int | None = None
    is_transposed: bool = False

    def take(self, ours: Tensor) -> Tensor:
        """Theirs, from ours."""
        part = ours[self.first : self.last]
        return (part.T if self.is_transposed else part).contiguous()


# ---- configurations ----------------------------------------------------------------------------------------------------


def to_hugging_face(config: ModelConfig, seq_len: int) -> dict[str, Any]:
    """The `config.json` of a model, but for its dtype. Raises `BadConfig`, naming the first thing that neither architecture has.

    The balance loss's coefficient is carried over as it is; their loss is K times ours, over all layers at once.
    """
    normalises = _normalises(config)
    _refuse(config, normalises)
    every, heads = config.moe_every == 1, config.num_heads
    shared = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.model_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": seq_len,
        "initializer_range": config.initial_std,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},  # the same for transformers 5
        "tie_word_embeddings": config.tied_head,
        "num_experts_per_tok": config.top_k,
        "router_aux_loss_coef": getattr(config.gate, "balance_loss", 0.0),
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if not config.qk_norm:
        own = {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "intermediate_size": config.routed_width,
            "num_local_experts": config.num_experts,
            "sliding_window": None,
        }
    else:
        own = {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "intermediate_size": config.dense_width,
            "moe_intermediate_size": config.routed_width,
            "num_experts": config.num_experts,
            "norm_topk_prob": normalises,
            "decoder_sparse_step": 1 if every else 2,
            "mlp_only_layers": [],
            "attention_bias": False,
            "use_sliding_window": False,
        }
    return {**own, **shared}


def _normalises(config: ModelConfig) -> bool | None:
    """Whether a token's weights sum to 1; None where the gate is no top-k of the softmax outside training."""
    gate = config.gate
    if gate.kind == "softmax_topk":
        return gate.normalise
    return {"switch": False, "noisy_topk": config.top_k > 1, "gshard": True}.get(gate.kind)


def _refuse(config: ModelConfig, normalises: bool | None) -> None:
    capacity = config.gate.eval_capacity or config.gate.capacity
    reasons = {
        f"block {config.block}": config.block != "top_k",
        f"activation {config.activation}": config.activation != "swiglu",
        f"gate {config.gate.kind}": normalises is None,
        f"capacity {capacity.policy}, which drops tokens": not isinstance(capacity, Dropless),
        "routing weights that do not sum to 1, without qk_norm": normalises is False and not config.qk_norm,
        "experts in every second layer, without qk_norm": config.moe_every == 2 and not config.qk_norm,
    }
    for reason, holds in reasons.items():
        if holds:
            raise BadConfig(
                f"the model has {reason}: neither Mixtral nor Qwen3-MoE; export models with block: top_k, activation: swiglu, gate.kind: "
                "softmax_topk, no capacity, and moe_every: 1 or qk_norm: true"
            )


def from_hugging_face(value: Mapping[str, Any], name: str) -> ModelConfig:
    """The model of a `config.json`. Raises `BadData`, naming the first thing that Crossdock does not have."""
    architecture = value.get("model_type")
    if architecture not in ("mixtral", "qwen3_moe"):
        raise BadData(f"{name} is of model_type {architecture!r}; models of type mixtral and qwen3_moe can be imported")
    is_qwen = architecture == "qwen3_moe"
    rope = value.get("rope_parameters") or value.get("rope_scaling") or {}
    sparse_step = value.get("decoder_sparse_step", 1) if is_qwen else 1
    unknown = {
        f"hidden_act {value.get('hidden_act')!r}": value.get("hidden_act", "silu") != "silu",
        f"rope type {rope.get('rope_type')!r}": rope.get("rope_type", "default") != "default",
        "attention_bias": bool(value.get("attention_bias")),
        f"sliding_window {value.get('sliding_window')}": bool(
            value.get("use_sliding_window") if is_qwen else value.get("sliding_window") is not None
        ),
        f"mlp_only_layers {value.get('mlp_only_layers')}": bool(value.get("mlp_only_layers")),
        f"decoder_sparse_step {sparse_step}": sparse_step not in (1, 2),
        "quantized weights": value.get("quantization_config") is not None,
    }
    for reason, holds in unknown.items():
        if holds:
            raise BadData(f"{name} has {reason}, which Crossdock does not have; it cannot be imported")
    try:
        heads = value["num_attention_heads"]
        fields = {
            "vocab_size": value["vocab_size"],
            "num_layers": value["num_hidden_layers"],
            "model_width": value["hidden_size"],
            "num_heads": heads,
            "num_kv_heads": value.get("num_key_value_heads") or heads,
            "head_dim": value.get("head_dim") or value["hidden_size"] // heads,
            "qk_norm": is_qwen,
            "mlp_width": value["intermediate_size"],
            "expert_width": value["moe_intermediate_size" if is_qwen else "intermediate_size"],
            "rope_base": float(rope.get("rope_theta") or value.get("rope_theta") or (10_000.0 if is_qwen else 1e6)),
            "norm_eps": float(value.get("rms_norm_eps", 1e-6 if is_qwen else 1e-5)),
            "tied_head": bool(value.get("tie_word_embeddings", False)),
            "initial_std": float(value.get("initializer_range", 0.02)),
            "block": "top_k",
            "moe_every": sparse_step,
            "num_experts": value.get("num_experts") or value["num_local_experts"],
            "top_k": value["num_experts_per_tok"],
            "activation": "swiglu",
            "gate": {
                "kind": "softmax_topk",
                "balance_loss": float(value.get("router_aux_loss_coef", 1e-3)),
                "normalise": bool(value.get("norm_topk_prob", False)) if is_qwen else True,
            },
        }
    except KeyError as error:
        raise BadData(f"{name} has no {error}; is it the whole config.json of a {architecture} model?") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise BadData(f"{name} does not describe a {architecture} model: {str(error).splitlines()[0]}") from error
    return strict_yaml.validated(ModelConfig, Document(fields, name, {}), BadData)


# ---- tensors -----------------------------------------------------------------------------------------------------------


def tensors(config: ModelConfig) -> Iterator[Source]:
    """Every tensor of theirs, with the key in a checkpoint (its state left out) that it comes from."""
    width = config.model_width
    yield Source("model.embed_tokens.weight", "dense/embedding.weight", (config.vocab_size, width))
    for layer in range(config.num_layers):
        block, place = divmod(layer, config.moe_every)
        prefix, ours = f"model.layers.{layer}.", f"dense/blocks.{block}."
        yield from _attention(config, prefix, f"{ours}attention_{place}.")
        if place == config.moe_every - 1:
            yield Source(f"{prefix}post_attention_layernorm.weight", f"{ours}routed_norm.weight", (width,))
            yield from _experts(config, prefix, ours, block)
        else:
            yield Source(f"{prefix}post_attention_layernorm.weight", f"{ours}mlp_0.norm.weight", (width,))
            hidden = config.dense_width
            yield Source(f"{prefix}mlp.gate_proj.weight", f"{ours}mlp_0.ffn.gate_up.weight", (hidden, width), 0, hidden)
            yield Source(f"{prefix}mlp.up_proj.weight", f"{ours}mlp_0.ffn.gate_up.weight", (hidden, width), hidden, 2 * hidden)
            yield Source(f"{prefix}mlp.down_proj.weight", f"{ours}mlp_0.ffn.down.weight", (width, hidden))
    yield Source("model.norm.weight", "dense/norm.weight", (width,))
    if not config.tied_head:
        yield Source("lm_head.weight", "dense/head.weight", (config.vocab_size, width))


def _attention(config: ModelConfig, theirs: str, ours: str) -> Iterator[Source]:
    width, queries, keys = config.model_width, config.num_heads * config.head_width, config.kv_heads * config.head_width
    yield Source(f"{theirs}input_layernorm.weight", f"{ours}norm.weight", (width,))
    first = 0
    for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        yield Source(f"{theirs}self_attn.{name}.weight", f"{ours}qkv.weight", (rows, width), first, first + rows)
        first += rows
    yield Source(f"{theirs}self_attn.o_proj.weight", f"{ours}out.weight", (width, queries))
    if config.qk_norm:
        yield Source(f"{theirs}self_attn.q_norm.weight", f"{ours}query_norm.weight", (config.head_width,))
        yield Source(f"{theirs}self_attn.k_norm.weight", f"{ours}key_norm.weight", (config.head_width,))


def _experts(config: ModelConfig, theirs: str, ours: str, moe_layer: int) -> Iterator[Source]:
    width, hidden = config.model_width, config.routed_width
    theirs += "mlp." if config.qk_norm else "block_sparse_moe."
    gate, up, down = ("gate_proj", "up_proj", "down_proj") if config.qk_norm else ("w1", "w3", "w2")
    yield Source(f"{theirs}gate.weight", f"{ours}moe.gate.weight_ED", (config.num_experts, width))
    for expert in range(config.num_experts):
        key, name = f"expert/{moe_layer}/{expert}/", f"{theirs}experts.{expert}."
        yield Source(f"{name}{gate}.weight", f"{key}inner", (hidden, width), 0, hidden)
        yield Source(f"{name}{up}.weight", f"{key}inner", (hidden, width), hidden, 2 * hidden)
        yield Source(f"{name}{down}.weight", f"{key}outer", (width, hidden), is_transposed=True)


@dataclass(frozen=True)
class Target:
    """One tensor of ours from theirs, in the order of its rows."""

    ours: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]

    def join(self, theirs: list[Tensor]) -> Tensor:
        """Ours, from theirs in the order of `sources`."""
        parts = [values.T if source.is_transposed else values for source, values in zip(self.sources, theirs, strict=True)]
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)


def targets(config: ModelConfig) -> Iterator[Target]:
    """Every tensor of ours; where some of theirs make one of ours, they follow one another in `tensors`."""
    group: list[Source] = []
    for source in (*tensors(config), None):
        if group and (source is None or source.ours != group[0].ours):
            shape = group[0].shape[::-1] if group[0].is_transposed else group[0].shape
            rows = sum(part.shape[0] for part in group) if len(group) > 1 else shape[0]
            yield Target(group[0].ours, (rows, *shape[1:]), tuple(group))
            group = []
        if source is not None:
            group.append(source)
