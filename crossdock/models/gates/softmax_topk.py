"""Plain top-k of the softmax, as Mixtral and Qwen3-MoE route (arXiv 2401.04088, section 2.1; arXiv 2505.09388): no noise, any K."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from crossdock.models.gates.base import Gate, GateConfig, Statistics, Turn, share_loss, without
from crossdock.runtime.training.context import StepContext


class SoftmaxTopKConfig(GateConfig):
    """Options of plain top-k. Neither model uses a z-loss, so it is off unless asked for."""

    kind: Literal["softmax_topk"] = "softmax_topk"
    z_loss: float = Field(0.0, ge=0)
    balance_loss: float = Field(1e-2, ge=0)
    """Coefficient of E x sum_i f_i P_i, where f_i is expert i's part of all choices (Switch, equation 4, for any K)."""
    normalise: bool = True
    """The K weights sum to 1; otherwise they are the probabilities themselves. Mixtral always does, Qwen3-MoE by `norm_topk_prob`."""


class SoftmaxTopK(Gate):
    """Top-K of the softmax over all experts. With K = 1 and `normalise` the weight is 1: the router then learns from its losses alone."""

    config: SoftmaxTopKConfig

    def _route(
        self, x_TD: Tensor, logits_TE: Tensor, context: StepContext, tokens_per_sequence: int, turn: Turn
    ) -> tuple[Tensor, Tensor, Tensor | None, Statistics]:
        probability_TE = logits_TE.softmax(dim=-1)
        expert_TK = without(probability_TE, turn.barred_TK).topk(self.top_k, dim=-1).indices
        weight_TK = probability_TE.gather(1, expert_TK)
        if self.config.normalise:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        return expert_TK, weight_TK, None, {"probability": probability_TE.sum(0)}

    def _losses(self, statistics: Statistics) -> dict[str, Tensor]:
        share = share_loss(statistics["chosen"], statistics["probability"], statistics["tokens"])
        return {"balance": self.config.balance_loss * share}
