"""The model's configuration: what a YAML under `model:` may say, what follows from it, and what does not go together."""

from typing import Literal, Self

from pydantic import Field, model_validator

from crossdock.errors import BadConfig
from crossdock.models.gates.noisy_topk import NoisyTopKConfig
from crossdock.models.gates.table import AnyGateConfig
from crossdock.models.kinds import BLOCKS, SHORTCUT_BLOCKS, BlockKind, BlockName, Stage
from crossdock.placement.strategies.gather import check_gathered
from crossdock.runtime.experts.grouped_mlp import Recompute
from crossdock.strict_yaml import StrictModel

MAX_LAYERS, MAX_EXPERTS = 4096, 65_534
"""More than any model has; a mistyped number is refused before its layers are counted one by one."""
Coefficient = Literal["direct", "cg1", "cg2"]


class ShortcutConfig(StrictModel):
    """Where a shortcut block's routed experts read, and how the shared expert joins them (arXiv 2404.05019, section 3)."""

    position: Literal[1, 2, 3] | None = None
    """Input of the routed experts: 1 the preceding block's output, 2 between its attention and MLP, 3 its input. 2 where left out, or
    1 with moe_every 1."""
    coefficient: Coefficient | None = None
    """direct: plain sum. cg1: sigmoid(x W) scales the shared expert. cg2: softmax(x W) weighs shared and routed. cg1 where left out."""


class ScheduleConfig(StrictModel):
    """What runs while tokens travel: see `crossdock.runtime.experts.overlap`."""

    overlap: bool = True
    expert_slot: Literal["auto"] | int = "auto"
    """Stages of the shared stream before the experts run; auto: windows as even as possible by FLOP."""
    forward_chunks: int = Field(1, ge=1)
    """Pieces in which a layer's tokens travel, so that the experts compute one while others are on the way."""
    backward_chunks: int = Field(1, ge=1)
    """The same for their gradients."""


class ModelConfig(StrictModel):
    """A decoder-only transformer: RMSNorm, RoPE, grouped-query attention, SwiGLU, and routed experts in every or every second layer."""

    vocab_size: int = Field(256, ge=2)
    num_layers: int = Field(4, ge=1, le=MAX_LAYERS)
    model_width: int = Field(128, ge=2)
    num_heads: int = Field(4, ge=1)
    num_kv_heads: int | None = Field(None, ge=1)
    """Heads of keys and values, shared by equal groups of query heads; as many as query heads where left out."""
    head_dim: int | None = Field(None, ge=2)
    """Width of one head; model_width over num_heads where left out."""
    qk_norm: bool = False
    """RMSNorm over each head of queries and keys, before RoPE (Qwen3, arXiv 2505.09388)."""
    mlp_width: int | None = Field(None, ge=1)
    """Hidden width of dense SwiGLU layers; 8/3 of the model width, rounded up to a multiple of 8, where left out."""
    rope_base: float = Field(10_000.0, gt=1)
    norm_eps: float = Field(1e-6, gt=0)
    tied_head: bool = False
    """The output projection is the embedding's transpose: fewer parameters, and a model that begins by predicting its own input."""
    initial_std: float = Field(0.02, gt=0)
    """Residual output projections get this over sqrt(2 x num_layers) (GPT-2)."""

    block: BlockName = "scmoe"
    moe_every: Literal[1, 2] = 2
    """Routed experts in every layer, or in the second of every pair."""
    num_experts: int = Field(8, ge=1, le=MAX_EXPERTS)
    top_k: int = Field(2, ge=1)
    """Routed experts per token and representation: 1 is the paper's ScMoE, 2 its ScMoE-2; dgmoe chooses twice, 1 is the paper's."""
    expert_width: int | None = Field(None, ge=1)
    """Hidden width of a routed expert; mlp_width where left out."""
    shared_expert_width: int | None = Field(None, ge=1)
    """Hidden width of the shared expert; expert_width where left out."""
    activation: Literal["swiglu", "gelu"] = "swiglu"
    """Of the routed experts."""
    gate: AnyGateConfig = NoisyTopKConfig()
    shortcut: ShortcutConfig | None = None
    """Of scmoe, dgmoe and dgmoe_share."""
    schedule: ScheduleConfig = ScheduleConfig()
    expert_recompute: Recompute = "none"
    """What routed experts compute again in backward instead of keeping it: nothing, the activation, or all hidden values."""
    traffic: Literal["home", "coherent"] = "home"
    """home: tokens return after every layer. coherent: they stay with their expert, and keys and values come to them; block top_k with
    top_k 1 only. See `crossdock.models.coherent`."""
    gathered_experts: list[int] = Field(default_factory=list)
    """Routed experts of every MoE layer whose weights travel to all ranks, so that their tokens stay: see `strategies/gather.py`."""

    @model_validator(mode="after")
    def _cross_check(self) -> Self:
        if self.head_dim is None and self.model_width % self.num_heads:
            raise BadConfig(
                f"model_width {self.model_width} does not divide over num_heads {self.num_heads}; choose a multiple of {self.num_heads}, "
                "or set head_dim"
            )
        if self.head_dim is not None and self.head_dim % 2:
            raise BadConfig(f"head_dim {self.head_dim} is odd, and RoPE turns pairs; choose head_dim: {self.head_dim + 1}")
        if self.head_width % 2:
            raise BadConfig(
                f"model_width {self.model_width} over num_heads {self.num_heads} gives heads of odd width {self.head_width}, and RoPE "
                f"turns pairs; choose model_width as a multiple of {2 * self.num_heads}"
            )
        if self.num_heads % self.kv_heads:
            divisors = ", ".join(str(n) for n in range(1, self.num_heads + 1) if self.num_heads % n == 0)
            raise BadConfig(
                f"num_heads {self.num_heads} do not divide over num_kv_heads {self.kv_heads}; choose num_kv_heads from {divisors}"
            )
        if self.block == "dense":
            return self
        if self.num_layers % self.moe_every:
            raise BadConfig(
                f"moe_every 2 pairs the layers, and num_layers {self.num_layers} is odd; choose num_layers: {self.num_layers + 1}, "
                "or moe_every: 1"
            )
        if self.num_blocks % self.kind.blocks_per_moe:
            multiple = self.kind.blocks_per_moe * self.moe_every
            raise BadConfig(
                f"block {self.block} gives {self.kind.blocks_per_moe} blocks one MoE layer, and num_layers {self.num_layers} with "
                f"moe_every {self.moe_every} makes {self.num_blocks}; choose num_layers as a multiple of {multiple}"
            )
        if self.shortcut is not None and not self.kind.shortcut:
            raise BadConfig(
                f"model.shortcut belongs to blocks {', '.join(SHORTCUT_BLOCKS)}, block is {self.block}; leave it out, or set block: scmoe"
            )
        if self.shortcut is not None and self.shortcut.coefficient in ("cg1", "cg2") and "shared" not in self.kind.own:
            raise BadConfig(
                f"shortcut.coefficient {self.shortcut.coefficient} weighs a shared expert, and block {self.block} has none; leave it out, "
                "or set block: scmoe"
            )
        if self.kind.shortcut and self.moe_every == 1 and self.position != 1:
            raise BadConfig(
                f"shortcut.position {self.position} reads inside the preceding dense layer, and with moe_every 1 there is none; "
                "choose position: 1, or moe_every: 2"
            )
        self.gate.check(self.num_experts, self.top_k, num_barred=self.top_k * (self.kind.turns_per_block - 1))
        check_gathered(self.gathered_experts, self.num_experts)
        if self.traffic == "coherent":
            self._check_coherent()
        slot, stages = self.schedule.expert_slot, self.window
        if slot != "auto" and not 0 <= slot <= len(stages):
            raise BadConfig(
                f"schedule.expert_slot {slot} is not among the slots of block {self.block} with stages ({', '.join(stages)}); "
                f"choose 0 to {len(stages)}, or auto"
            )
        return self

    def _check_coherent(self) -> None:
        """What cannot follow tokens that live anywhere: several experts, sequences that a gate wants whole, weights that travel as well."""
        if self.block != "top_k" or self.top_k != 1:
            raise BadConfig(
                f"traffic coherent keeps a token with its one expert, and block {self.block} with top_k {self.top_k} has others; "
                "set block: top_k and top_k: 1, or traffic: home"
            )
        capacities = (self.gate.capacity, self.gate.eval_capacity)
        if any(capacity is not None and capacity.policy != "dropless" for capacity in capacities):
            raise BadConfig("traffic coherent scatters sequences over ranks, and capacity counts in them; leave gate.capacity out")
        if self.gate.kind == "deepseek_v3" and self.gate.sequence_loss:
            raise BadConfig("traffic coherent scatters sequences over ranks, and gate.sequence_loss wants them whole; set it to 0")
        if self.gathered_experts:
            raise BadConfig("traffic coherent moves every token to its expert, so gathered_experts would not be used; leave them out")

    @property
    def kind(self) -> BlockKind:
        """The architecture of the blocks, as data."""
        return BLOCKS[self.block]

    @property
    def head_width(self) -> int:
        return self.head_dim or self.model_width // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def dense_width(self) -> int:
        return self.mlp_width or -(-8 * self.model_width // 24) * 8

    @property
    def routed_width(self) -> int:
        return self.expert_width or self.dense_width

    @property
    def shared_width(self) -> int:
        return self.shared_expert_width or self.routed_width

    @property
    def position(self) -> int:
        """Where a shortcut block's routed experts read, 1 to 3."""
        if self.shortcut is not None and self.shortcut.position is not None:
            return self.shortcut.position
        return 1 if self.moe_every == 1 else 2

    @property
    def coefficient(self) -> Coefficient:
        """How shared and routed outputs are joined; only ScMoE has anything but the plain sum."""
        if self.block != "scmoe":
            return "direct"
        return (self.shortcut and self.shortcut.coefficient) or "cg1"

    @property
    def num_moe_layers(self) -> int:
        """MoE layers (gate and experts), the L of a plan."""
        return 0 if self.block == "dense" else self.num_blocks // self.kind.blocks_per_moe

    @property
    def turns_per_layer(self) -> int:
        """How often a forward pass routes each token in one MoE layer."""
        return self.kind.turns_per_block * self.kind.blocks_per_moe

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The shared stream of one block: one layer, or a pair of them where every second one is MoE."""
        paired = self.block != "dense" and self.moe_every == 2
        return ("attention", "mlp", *self.kind.own) if paired else self.kind.own

    @property
    def source(self) -> int:
        """How many stages run before the routed experts' input is known."""
        if self.kind.shortcut:
            return 3 - self.position if self.moe_every == 2 else 0
        return 3 if self.moe_every == 2 else 1

    @property
    def window(self) -> tuple[Stage, ...]:
        """The stages that may run while tokens travel."""
        return self.stages[self.source :] if self.block != "dense" else ()

    @property
    def num_blocks(self) -> int:
        """Blocks of the network: layers, or pairs of them."""
        return self.num_layers if self.block == "dense" else self.num_layers // self.moe_every
