"""Switch routing: one expert per token, its probability as weight, jitter and one balance loss (Fedus et al., arXiv 2101.03961)."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from crossdock.errors import BadConfig
from crossdock.models.gates.base import Gate, GateConfig, Statistics, Turn, share_loss, without
from crossdock.models.gates.noise import JITTER, uniform_TC
from crossdock.runtime.training.context import StepContext


class SwitchConfig(GateConfig):
    """Options of Switch, with the paper's coefficients; the paper's capacity factor is 1.0 to 1.25."""

    kind: Literal["switch"] = "switch"
    balance_loss: float = Field(1e-2, ge=0)
    jitter: float = Field(1e-2, ge=0, lt=1)
    """In training each logit is multiplied by a uniform draw from [1 - jitter, 1 + jitter]."""

    def check(self, num_experts: int, top_k: int, num_barred: int = 0) -> None:
        """Switch chooses exactly one expert."""
        super().check(num_experts, top_k, num_barred)
        if top_k != 1:
            raise BadConfig(
                f"gate switch chooses 1 expert per token, top_k is {top_k}; set top_k: 1, or choose gate noisy_topk or deepseek_v3"
            )


class Switch(Gate):
    """Top-1 of the softmax."""

    config: SwitchConfig

    def _route(
        self, x_TD: Tensor, logits_TE: Tensor, context: StepContext, tokens_per_sequence: int, turn: Turn
    ) -> tuple[Tensor, Tensor, Tensor | None, Statistics]:
        if context.training and self.config.jitter:
            uniform_TE = uniform_TC(context, self.layer, JITTER, turn.number, logits_TE.shape, logits_TE.device)
            logits_TE = logits_TE * (1 + self.config.jitter * (2 * uniform_TE - 1)).to(logits_TE.dtype)
        probability_TE = logits_TE.softmax(dim=-1)
        expert_TK = without(probability_TE, turn.barred_TK).topk(1, dim=-1).indices
        return expert_TK, probability_TE.gather(1, expert_TK), None, {"probability": probability_TE.sum(0)}

    def _losses(self, statistics: Statistics) -> dict[str, Tensor]:
        share = share_loss(statistics["chosen"], statistics["probability"], statistics["tokens"])
        return {"balance": self.config.balance_loss * share}
