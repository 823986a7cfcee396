"""One block for every architecture: a shared stream of stages, and a routed strand that branches off it and joins it at its end.

    dense            attention, mlp
    top_k            [attention, mlp,] attention | routed
    shared_expert    [attention, mlp,] attention | shared, routed
    scmoe, Pos-1     [attention, mlp,] | attention, shared, routed
    scmoe, Pos-2     attention | mlp, attention, shared, routed
    scmoe, Pos-3     | attention, mlp, attention, shared, routed

The bar stands where the routed experts read (H^MH_l for Pos-2: arXiv 2404.05019, section 3); the stages right of it run while tokens
travel. What is in brackets is the dense layer of a pair, and missing with moe_every 1.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from crossdock.models.attention import MLP, Attention, RMSNorm, SwiGLU
from crossdock.models.config import ModelConfig, Stage
from crossdock.models.counts import stage_flop_per_token
from crossdock.models.gates.base import Routing, wide
from crossdock.models.moe import MoELayer
from crossdock.runtime.context import StepContext
from crossdock.runtime.overlap import Overlapped, Schedule, Sequential, balanced_expert_slot, run


class Stream(NamedTuple):
    """The shared stream between two stages."""

    x_QPD: Tensor
    routed_scale: Tensor | None = None
    """[Q, P, 1]: what CG-2 multiplies the routed output by, known once the shared expert has run."""


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


STAGES: dict[Stage, Callable[[ModelConfig, torch.dtype], nn.Module]] = {"attention": Attention, "mlp": MLP, "shared": SharedExpert}


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

    `schedule` is a value and may be replaced between steps; every rank must use the same one.
    """

    def __init__(self, config: ModelConfig, moe: MoELayer, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        # Registered in the order of use, because gradients are reduced in the reverse order of registration while backward runs.
        stages: list[nn.Module] = []
        seen: Counter[str] = Counter()
        for number, kind in enumerate((*config.stages, None)):
            if number == config.source:
                if config.block != "shared_expert":
                    self.routed_norm = RMSNorm(config.model_width, config.norm_eps, dtype)
                self.moe = moe
            if kind is not None:
                stage = STAGES[kind](config, dtype)
                self.add_module(f"{kind}_{seen[kind]}", stage)
                seen[kind] += 1
                stages.append(stage)
        self._stages = tuple(stages)
        self.schedule: Schedule | None = None

    def forward(self, x_QPD: Tensor, context: StepContext) -> tuple[Tensor, Routing]:
        """(output [Q, P, D], the gate's choice, whose statistics are yet to be summed over the world)."""
        source = self.config.source
        self.moe.prefetch()
        for stage in self._stages[:source]:
            x_QPD = stage(x_QPD)
        shares_norm = self.config.block == "shared_expert"  # the routed experts read what the shared expert reads
        norm = cast(SharedExpert, self._stages[-1]).norm if shares_norm else self.routed_norm
        normed_QPD = norm(x_QPD)
        normed_TD = normed_QPD.reshape(-1, normed_QPD.shape[-1])
        routing = self.moe.route(normed_TD, context, x_QPD.shape[1])
        stages = [partial(_advance, stage, normed_QPD if shares_norm else None) for stage in self.window_stages]
        stream, routed_TD = run(self.schedule_for(x_QPD.shape[1]), self.moe, normed_TD, routing.assignment, stages, Stream(x_QPD))
        routed_QPD = routed_TD.view_as(x_QPD)
        if stream.routed_scale is not None:
            routed_QPD = stream.routed_scale * routed_QPD
        return stream.x_QPD + routed_QPD, routing

    @property
    def window_stages(self) -> tuple[nn.Module, ...]:
        """The stages that may run while tokens travel, in order."""
        return self._stages[self.config.source :]

    def schedule_for(self, num_positions: int) -> Schedule:
        """The schedule that was set, or else the configured one; slot `auto` makes the windows as even as possible by FLOP."""
        if self.schedule is not None:
            return self.schedule
        configured = self.config.schedule
        kind = Overlapped if configured.overlap else Sequential
        if configured.expert_slot != "auto":
            return kind(configured.expert_slot)
        return kind(balanced_expert_slot([stage_flop_per_token(self.config, stage, num_positions) for stage in self.config.window]))


def _advance(stage: nn.Module, normed_QPD: Tensor | None, stream: Stream) -> Stream:
    """One stage of the window; the shared expert is the last of them, if it is there at all."""
    if isinstance(stage, SharedExpert):
        return stage(stream.x_QPD, normed_QPD)
    return Stream(stage(stream.x_QPD))
