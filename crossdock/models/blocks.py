"""One block for every architecture: a shared stream of stages, and a routed strand that branches off it and joins it at its end.

    dense            attention, mlp
    top_k            [attention, mlp,] attention | routed
    shared_expert    [attention, mlp,] attention | shared, routed
    scmoe, Pos-1     [attention, mlp,] | attention, shared, routed
    scmoe, Pos-2     attention | mlp, attention, shared, routed
    scmoe, Pos-3     | attention, mlp, attention, shared, routed
    dgmoe, Pos-2     attention | mlp, attention, current, routed

The bar stands where the routed experts read (H^MH_l for Pos-2: arXiv 2404.05019, section 3); the stages right of it run while tokens
travel. What is in brackets is the dense layer of a pair, and missing with moe_every 1. DGMoE routes the tokens a second time, as the last
of the stages: gate and experts are those of the strand, and no token gets an expert twice. docs/blocks.md has the equations.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from crossdock.models.attention import MLP, Attention, RMSNorm, SwiGLU
from crossdock.models.config import ModelConfig
from crossdock.models.counts import stage_flop_per_token
from crossdock.models.gates.base import Routing, Turn, wide
from crossdock.models.kinds import Stage
from crossdock.models.moe import MoELayer
from crossdock.runtime.experts.overlap import Chunked, Schedule, balanced_expert_slot, run
from crossdock.runtime.training.context import StepContext


class Stream(NamedTuple):
    """The shared stream between two stages."""

    x_QPD: Tensor
    routed_scale: Tensor | None = None
    """[Q, P, 1]: what CG-2 multiplies the routed output by, known once the shared expert has run."""
    routing: Routing | None = None
    """The choice for the current layer's representation, known once DGMoE's last stage has run."""


class SharedExpert(nn.Module):
    """The expert that every token uses, with the coefficient that joins it and the routed ones (arXiv 2404.05019, section 3.1).

    direct: x + shared + routed. CG-1: x + sigmoid(n W) shared + routed. CG-2: x + c1 shared + c2 routed, (c1, c2) = softmax(n W); n is the
    normalised input of the shared expert.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.coefficient = config.coefficient
        self.norm = RMSNorm(config.model_width, config.norm_eps, dtype)
        self.ffn = SwiGLU(config.model_width, config.shared_width, dtype)
        if self.coefficient != "direct":
            self.scale = nn.Linear(config.model_width, 1 if self.coefficient == "cg1" else 2, bias=False, dtype=dtype)

    def forward(self, x_QPD: Tensor, normed_QPD: Tensor | None = None) -> Stream:
        """x plus its share of the shared expert; `normed_QPD` is norm(x) where the caller has it already."""
        if normed_QPD is None:
            normed_QPD = self.norm(x_QPD)
        shared_QPD = self.ffn(normed_QPD)
        if self.coefficient == "direct":
            return Stream(x_QPD + shared_QPD)
        logits = self.scale(normed_QPD).to(wide(x_QPD.dtype))
        if self.coefficient == "cg1":
            return Stream(x_QPD + logits.sigmoid().to(x_QPD.dtype) * shared_QPD)
        shared_scale, routed_scale = logits.softmax(dim=-1).to(x_QPD.dtype).split(1, dim=-1)
        return Stream(x_QPD + shared_scale * shared_QPD, routed_scale)


class CurrentHalf(nn.Module):
    """The half of DGMoE that routes the current layer's representation: x + routed(norm(x)), with the strand's gate and experts."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = RMSNorm(config.model_width, config.norm_eps, dtype)

    def forward(self, x_QPD: Tensor, moe: MoELayer, context: StepContext, turn: Turn, schedule: Schedule) -> Stream:
        """`turn` bars what the strand chose. There is nothing left to hide its own tokens under but, in chunks, its experts."""
        normed_TD = self.norm(x_QPD).flatten(0, 1)
        routing = moe.route(normed_TD, context, x_QPD.shape[1], turn)
        _, routed_TD = run(replace(schedule, expert_slot=0), moe, normed_TD, routing.assignment, [], None)
        return Stream(x_QPD + routed_TD.view_as(x_QPD), routing=routing)


STAGES: dict[Stage, Callable[[ModelConfig, torch.dtype], nn.Module]] = {
    "attention": Attention,
    "mlp": MLP,
    "shared": SharedExpert,
    "current": CurrentHalf,
}


class DenseBlock(nn.Module):
    """A layer without experts: attention, then MLP."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.attention = Attention(config, dtype)
        self.mlp = MLP(config, dtype)

    def forward(self, x_QPD: Tensor) -> Tensor:
        return self.mlp(self.attention(x_QPD))


class MoEBlock(nn.Module):
    """One layer, or a pair of which the second is MoE: stages from `config.stages`, the routed strand from stage `config.source` on.

    `use` numbers the blocks that share `moe`. `schedule` is a value and may be replaced between steps; every rank must use the same one.
    """

    def __init__(self, config: ModelConfig, moe: MoELayer, dtype: torch.dtype, use: int = 0) -> None:
        super().__init__()
        self.config, self.use = config, use
        self.moe: MoELayer
        # Registered in the order of use, because gradients are reduced in the reverse order of registration while backward runs.
        stages: list[nn.Module] = []
        seen: Counter[str] = Counter()
        for number, kind in enumerate((*config.stages, None)):
            if number == config.source:
                if not self._shares_norm:
                    self.routed_norm = RMSNorm(config.model_width, config.norm_eps, dtype)
                if use == 0:
                    self.moe = moe
                else:  # the first block has registered it, and nobody shall count or save its parameters twice
                    self.__dict__["moe"] = moe
            if kind is not None:
                stage = STAGES[kind](config, dtype)
                self.add_module(f"{kind}_{seen[kind]}", stage)
                seen[kind] += 1
                stages.append(stage)
        self._stages = tuple(stages)
        self.schedule: Schedule | None = None

    def forward(self, x_QPD: Tensor, context: StepContext) -> tuple[Tensor, tuple[Routing, ...]]:
        """(output [Q, P, D], the gate's choice for each representation; their statistics are yet to be summed over the world)."""
        self.moe.prefetch()
        for stage in self._stages[: self.config.source]:
            x_QPD = stage(x_QPD)
        norm = cast(SharedExpert, self._stages[-1]).norm if self._shares_norm else self.routed_norm
        normed_QPD = norm(x_QPD)
        normed_TD = normed_QPD.reshape(-1, normed_QPD.shape[-1])
        schedule = self.schedule_for(x_QPD.shape[1])
        turn = self.use * self.config.kind.turns_per_block
        routing = self.moe.route(normed_TD, context, x_QPD.shape[1], Turn(turn))
        given: dict[type[nn.Module], tuple[Any, ...]] = {
            SharedExpert: (normed_QPD,) if self._shares_norm else (),
            CurrentHalf: (self.moe, context, Turn(turn + 1, routing.expert_TK), schedule),
        }
        stages = [partial(_advance, stage, given.get(type(stage), ())) for stage in self.window_stages]
        stream, routed_TD = run(schedule, self.moe, normed_TD, routing.assignment, stages, Stream(x_QPD))
        routed_QPD = routed_TD.view_as(x_QPD)
        if stream.routed_scale is not None:
            routed_QPD = stream.routed_scale * routed_QPD
        return stream.x_QPD + routed_QPD, (routing,) if stream.routing is None else (routing, stream.routing)

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        """All stages of the shared stream, in order."""
        return self._stages

    @property
    def _shares_norm(self) -> bool:
        """Whether the routed experts read the very thing that the shared expert reads."""
        return self.config.window[:1] == ("shared",)

    @property
    def early_stages(self) -> tuple[nn.Module, ...]:
        """The stages before the routed experts' input is known, in order; weights of gathered experts travel under them."""
        return self._stages[: self.config.source]

    @property
    def window_stages(self) -> tuple[nn.Module, ...]:
        """The stages that may run while tokens travel, in order."""
        return self._stages[self.config.source :]

    def schedule_for(self, num_positions: int) -> Schedule:
        """The schedule that was set, or else the configured one; slot `auto` makes the windows as even as possible by FLOP."""
        if self.schedule is not None:
            return self.schedule
        configured = self.config.schedule
        slot = configured.expert_slot
        if slot == "auto":
            slot = balanced_expert_slot([stage_flop_per_token(self.config, stage, num_positions) for stage in self.config.window])
        return Chunked(slot, configured.forward_chunks, configured.backward_chunks, configured.overlap)


def _advance(stage: nn.Module, given: tuple[Any, ...], stream: Stream) -> Stream:
    """One stage of the window; the shared expert, or the current half, is the last of them if it is there at all."""
    result = stage(stream.x_QPD, *given)
    return result if isinstance(result, Stream) else Stream(result)
