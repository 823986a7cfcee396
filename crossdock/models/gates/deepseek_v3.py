"""DeepSeek-V3's gate: sigmoid scores, balance by a bias instead of a loss, choice limited to few groups (arXiv 2412.19437, 2.1.2).

The bias enters the choice alone, never the weights (Wang et al., "Auxiliary-Loss-Free Load Balancing", arXiv 2408.15664).
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from crossdock.errors import BadConfig
from crossdock.models.gates.base import Gate, GateConfig, Statistics, Turn, without
from crossdock.runtime.training.context import StepContext


class DeepSeekV3Config(GateConfig):
    """Options of DeepSeek-V3's gate, with the values of its report (there: 8 of 256 experts, 8 groups of which 4)."""

    kind: Literal["deepseek_v3"] = "deepseek_v3"
    z_loss: float = Field(0.0, ge=0)
    bias_step: float = Field(1e-3, ge=0)
    """Each step adds this to the bias of an expert below the mean load and takes it from one above."""
    sequence_loss: float = Field(1e-4, ge=0)
    """Coefficient of the complementary balance loss inside each sequence (equations 17 to 20)."""
    scaling: float = Field(2.5, gt=0)
    """Factor on the normalised weights."""
    num_groups: int = Field(1, ge=1)
    """Groups of consecutive logical experts; a plan that keeps a group on one node makes the limit one of nodes."""
    top_groups: int = Field(1, ge=1)
    """Groups that one token may use."""

    def check(self, num_experts: int, top_k: int, num_barred: int = 0) -> None:
        """Groups must divide the experts and hold enough of them."""
        super().check(num_experts, top_k, num_barred)
        if num_experts % self.num_groups:
            divisors = ", ".join(str(n) for n in range(1, num_experts + 1) if num_experts % n == 0)
            raise BadConfig(f"{num_experts} experts do not divide into {self.num_groups} groups; choose gate.num_groups from {divisors}")
        if self.top_groups > self.num_groups:
            raise BadConfig(
                f"gate.top_groups {self.top_groups} is more than gate.num_groups {self.num_groups}; choose at most {self.num_groups}"
            )
        reachable = self.top_groups * (num_experts // self.num_groups) - num_barred
        if reachable < top_k:
            raise BadConfig(
                f"top_k {top_k} is more than the {reachable} experts{' left' if num_barred else ''} of gate.top_groups {self.top_groups}; "
                "raise top_groups or lower top_k"
            )


class DeepSeekV3(Gate):
    """Top-k of sigmoid(x W) + bias within the best groups; weights sigmoid / sum of the chosen x scaling.

    With K = 1 the normalised weight would be constant, so it stays the sigmoid x scaling. The bias that a step uses follows from the global
    load of the steps before: `_observe` adds the load up, and the first training forward of a new step moves the bias by it, however many
    micro-batches a step has. Both are buffers, so a resumed run continues bit by bit.
    """

    config: DeepSeekV3Config
    bias_E: Tensor
    observed_E: Tensor

    def __init__(self, config: DeepSeekV3Config, layer: int, model_width: int, num_experts: int, top_k: int, dtype: torch.dtype) -> None:
        super().__init__(config, layer, model_width, num_experts, top_k, dtype)
        self.register_buffer("bias_E", torch.zeros(num_experts, dtype=self.weight_ED.dtype))
        self.register_buffer("observed_E", torch.zeros(num_experts, dtype=torch.float64))
        self._observed_step: int | None = None

    def _route(
        self, x_TD: Tensor, logits_TE: Tensor, context: StepContext, tokens_per_sequence: int, turn: Turn
    ) -> tuple[Tensor, Tensor, Tensor | None, Statistics]:
        if context.training and context.step != self._observed_step:
            self._move_bias()
            self._observed_step = context.step
        score_TE = logits_TE.sigmoid()
        expert_TK = self._choose_TK(without(score_TE.detach() + self.bias_E, turn.barred_TK))
        weight_TK = score_TE.gather(1, expert_TK)
        if self.top_k > 1:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        statistics = self._sequence_balance(score_TE, expert_TK, tokens_per_sequence)
        return expert_TK, weight_TK * self.config.scaling, None, statistics

    def _choose_TK(self, biased_TE: Tensor) -> Tensor:
        """The top K experts inside the `top_groups` groups whose two best scores sum highest (section 2.1.2, node-limited routing)."""
        if self.config.top_groups < self.config.num_groups:
            biased_TGe = biased_TE.view(len(biased_TE), self.config.num_groups, self.num_experts // self.config.num_groups)
            group_TG = biased_TGe.topk(min(2, biased_TGe.shape[-1]), dim=-1).values.sum(-1)
            best_TG = group_TG.topk(self.config.top_groups, dim=-1).indices
            barred_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter(1, best_TG, False)
            biased_TE = biased_TGe.masked_fill(barred_TG[..., None], -torch.inf).view_as(biased_TE)
        return biased_TE.topk(self.top_k, dim=-1).indices

    def _sequence_balance(self, score_TE: Tensor, expert_TK: Tensor, tokens_per_sequence: int) -> Statistics:
        """Sum over this rank's sequences of sum_i f_i P_i, and their number; a sequence never spans ranks."""
        num_sequences = len(score_TE) // tokens_per_sequence
        share_TE = score_TE / score_TE.sum(-1, keepdim=True)
        share_QE = share_TE.view(num_sequences, tokens_per_sequence, self.num_experts).mean(1)
        expert_Qk = expert_TK.view(num_sequences, tokens_per_sequence * self.top_k)
        count_QE = torch.zeros_like(share_QE).scatter_add_(1, expert_Qk, torch.ones_like(expert_Qk, dtype=share_QE.dtype))
        even = self.top_k * tokens_per_sequence / self.num_experts
        balance = (count_QE / even * share_QE).sum().view(1)
        return {"sequence_balance": balance, "sequences": balance.new_full((1,), num_sequences)}

    def _losses(self, statistics: Statistics) -> dict[str, Tensor]:
        mean = (statistics["sequence_balance"] / statistics["sequences"].clamp(min=1)).squeeze(0)
        return {"balance": self.config.sequence_loss * mean}

    def _observe(self, chosen_E: Tensor) -> None:
        self.observed_E += chosen_E

    @torch.no_grad()
    def _move_bias(self) -> None:
        self.bias_E += self.config.bias_step * torch.sign(self.observed_E.mean() - self.observed_E).to(self.bias_E.dtype)
        self.observed_E.zero_()
