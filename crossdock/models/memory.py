"""Memory of a rank by kind, from the configuration alone: what `crossdock train --dry-run` prints.

Activations are what one micro-batch keeps for its backward pass, at the moment when that begins; what comes and goes within an operation is
not counted. The formulas follow the modules stage by stage and are held against what modules really keep in `tests/models/test_memory.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from crossdock.models.config import ModelConfig
from crossdock.models.counts import parameter_count
from crossdock.models.kinds import Stage

INDEX_BYTES = 8
MAPS_PER_ROW = 4
"""Index tensors that tell where a row came from and where it goes back to."""
KEPT_BY_GATE = {"noisy_topk": 7, "softmax_topk": 2, "switch": 4, "gshard": 2, "deepseek_v3": 3}
"""Values [tokens, experts] that a gate keeps: logits, probabilities, noise."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. gradients and optimizer state are in master precision; the optimizer holds masters of bf16 parameters as well."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.buffers

    def as_json(self) -> dict[str, int]:
        """Bytes by kind, and all of them."""
        return {
            "parameters": self.parameters,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "buffers": self.buffers,
            "total": self.total,
        }


@dataclass(frozen=True)
class Widths:
    """Bytes of a value: as computed, where precision matters (norms, gates, losses), and in masters."""

    compute: int
    wide: int
    master: int

    @classmethod
    def of(cls, precision: str) -> "Widths":
        """Of `precision.compute`."""
        return {"fp32": cls(4, 4, 4), "bf16": cls(2, 4, 4), "fp64": cls(8, 8, 8)}[precision]


@dataclass(frozen=True)
class Zero:
    """How DeepSpeed's ZeRO divides the state: dense parameters' over `dense_ranks` ranks, experts' over `expert_ranks`."""

    stage: int
    dense_ranks: int
    expert_ranks: int
    bucket_elements: int
    """Gradients on their way; one such buffer for each format of dense parameters, and one for experts."""


def rank_memory(
    config: ModelConfig,
    precision: str,
    experts: int,
    tokens: int,
    seq_len: int,
    rows: Sequence[float],
    visitors: int = 0,
    outputs_at_home: bool = False,
    zero: Zero | None = None,
    fsdp_ranks: int = 1,
) -> Memory:
    """Bytes of a rank that holds `experts` of them, over all layers, and brings `tokens` a micro-batch, in sequences of `seq_len`.

    rows: for each MoE layer, how many (token, expert) pairs its experts compute for one turn. visitors: over all layers, gathered experts
    that live elsewhere. outputs_at_home: whether outputs of experts are weighted, and so kept, at home, as in flat dispatch, and not where
    the experts are. zero: None for the native engine. fsdp_ranks: ranks over which FSDP2 cuts what is dense and no gate; the blocks that it
    gathers for a moment are not counted, as nothing is that comes and goes.
    """
    width, count = Widths.of(precision), parameter_count(config)
    routed = experts * _expert_parameters(config)
    plain = count.total - count.routed - count.routers + routed  # what is of the compute format; gates are wide
    total = plain + count.routers
    parameters = plain * width.compute + count.routers * width.wide
    masters = plain * width.master if width.compute != width.master else 0
    if fsdp_ranks > 1:
        part = -(-(plain - routed) // fsdp_ranks)  # in master precision, and its own master
        parameters = part * width.master + routed * width.compute + count.routers * width.wide
        masters = routed * width.master if width.compute != width.master else 0
        total = part + routed + count.routers
    biases = config.num_moe_layers * config.num_experts * (width.wide + 8) if config.gate.kind == "deepseek_v3" else 0
    rotations = seq_len * config.head_width * width.wide
    gradients, optimizer = total * width.master, 2 * total * width.master + masters
    if zero is not None:
        gradients, optimizer = _divided(zero, width, total - routed, routed, count.routers)
    return Memory(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        activations=round(_activations(config, width, tokens, rows, outputs_at_home))
        + visitors * _expert_parameters(config) * width.compute,
        buffers=biases + rotations,
    )


def _divided(zero: Zero, width: Widths, dense: int, experts: int, routers: int) -> tuple[int, int]:
    """Bytes of gradients at the end of backward, and of optimizer state, under ZeRO: it keeps masters of fp32 parameters as well.

    In fp32 stage 2 keeps the gradient of a tensor at the edge of its part whole: of most models a small addition, and not counted.
    """
    part = -(-dense // zero.dense_ranks) + -(-experts // zero.expert_ranks)
    formats = [width.compute]
    if routers:
        formats += [width.compute, *({width.wide} - {width.compute})]
    bucket = zero.bucket_elements * sum(formats if zero.stage == 2 else [width.master] * len(formats))
    return (part if zero.stage == 2 else dense + experts) * width.master + bucket, 3 * part * width.master


def _activations(config: ModelConfig, width: Widths, tokens: int, rows: Sequence[float], outputs_at_home: bool) -> float:
    """What is kept between forward and backward."""
    stream = _stream(config, width)
    stages = config.num_blocks * sum(_stage(config, width, stage) for stage in config.stages)
    ends = stream + _norm(config.model_width, width) + config.vocab_size * (width.compute + width.wide) + 2 * INDEX_BYTES
    kept: float = tokens * (stages + ends)
    shares_norm = config.window[:1] == ("shared",)
    for layer_rows in rows:
        turns = config.turns_per_layer
        blocks = config.kind.blocks_per_moe
        kept += tokens * blocks * ((0 if shares_norm else _norm(config.model_width, width)) + stream)
        if config.coefficient == "cg2":
            kept += tokens * blocks * config.model_width * width.compute  # the routed output, which its weight's gradient needs
        kept += turns * (tokens * _gate(config, width) + layer_rows * _row(config, width))
        if outputs_at_home:
            kept += turns * (tokens * config.top_k - layer_rows) * config.model_width * width.compute
    return kept


def _stream(config: ModelConfig, width: Widths) -> int:
    """The residual stream between two stages is what the next norm keeps; in bf16 that keeps its widened copy alone."""
    return config.model_width * width.compute if width.compute == width.wide else 0


def _stage(config: ModelConfig, width: Widths, stage: Stage) -> int:
    """Bytes that a stage keeps for each token, the stream behind it included."""
    model = config.model_width
    begin_and_end = _norm(model, width) + _stream(config, width)
    if stage == "current":
        return begin_and_end  # its gate and rows are the MoE layer's
    if stage == "attention":
        queries, keys = config.num_heads * config.head_width, config.kv_heads * config.head_width
        projected = (queries + 2 * keys) * width.compute
        turned = (queries + keys) * width.compute
        mixed = queries * width.compute + config.num_heads * width.wide
        return begin_and_end + projected + turned + mixed + (_head_norms(config, width) if config.qk_norm else 0)
    hidden = config.dense_width if stage == "mlp" else config.shared_width
    scaled = model * width.compute if stage == "shared" and config.coefficient != "direct" else 0
    return begin_and_end + 4 * hidden * width.compute + scaled


def _norm(model: int, width: Widths) -> int:
    """RMSNorm: the normalised values and their product with the weight; in bf16 the widened input as well."""
    return 2 * model * width.wide + width.wide + (model * width.compute if width.compute != width.wide else 0)


def _head_norms(config: ModelConfig, width: Widths) -> int:
    """RMSNorm of queries and keys: as `_norm`, but nobody keeps the products, and the input is there anyhow."""
    heads = config.num_heads + config.kv_heads
    widened = 2 if width.compute != width.wide else 1
    return heads * (widened * config.head_width * width.wide + width.wide)


def _gate(config: ModelConfig, width: Widths) -> int:
    """Bytes that a gate keeps for each token of one turn."""
    widened = config.model_width * width.wide if width.compute != width.wide else 0
    return widened + KEPT_BY_GATE[config.gate.kind] * config.num_experts * width.wide + config.top_k * (INDEX_BYTES + width.wide)


def _row(config: ModelConfig, width: Widths) -> int:
    """Bytes for each (token, expert) pair: its row, its hidden values, its output, its places."""
    inputs = 2 if config.activation == "swiglu" else 1
    hidden = {"none": inputs + 1, "activation": inputs, "all": 0}[config.expert_recompute] * config.routed_width
    return (2 * config.model_width + hidden) * width.compute + MAPS_PER_ROW * INDEX_BYTES + width.wide


def _expert_parameters(config: ModelConfig) -> int:
    return (3 if config.activation == "swiglu" else 2) * config.model_width * config.routed_width
