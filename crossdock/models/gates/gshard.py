"""GShard's top-2 gate: a random second expert and capacity per group (Lepikhin et al., arXiv 2006.16668, section 2.2 and algorithm 1)."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from crossdock.errors import BadConfig
from crossdock.models.gates.base import Gate, GateConfig, Statistics, Turn, count_experts, share_loss, without
from crossdock.models.gates.noise import SECOND_EXPERT, uniform_TC
from crossdock.runtime.training.context import StepContext


class GShardConfig(GateConfig):
    """Options of GShard's gate. The paper's capacity factor is 2.0; later practice 1.2 in training and 2.4 outside."""

    kind: Literal["gshard"] = "gshard"
    balance_loss: float = Field(1e-2, ge=0)
    random_second: bool = True
    """In training the second expert is used with probability min(1, 2 x its weight)."""

    def check(self, num_experts: int, top_k: int, num_barred: int = 0) -> None:
        """GShard chooses exactly two experts."""
        super().check(num_experts, top_k, num_barred)
        if top_k != 2:
            raise BadConfig(
                f"gate gshard chooses 2 experts per token, top_k is {top_k}; set top_k: 2, or choose gate noisy_topk or deepseek_v3"
            )


class GShard(Gate):
    """Top-2 of the softmax, weights normalised over the two before any of them is left out."""

    config: GShardConfig

    def _route(
        self, x_TD: Tensor, logits_TE: Tensor, context: StepContext, tokens_per_sequence: int, turn: Turn
    ) -> tuple[Tensor, Tensor, Tensor | None, Statistics]:
        probability_TE = logits_TE.softmax(dim=-1)
        expert_TK = without(probability_TE, turn.barred_TK).topk(2, dim=-1).indices
        top_TK = probability_TE.gather(1, expert_TK)
        weight_TK = top_TK / top_TK.sum(-1, keepdim=True)
        wanted_TK = None
        if context.training and self.config.random_second:
            uniform_T1 = uniform_TC(context, self.layer, SECOND_EXPERT, turn.number, (len(x_TD), 1), x_TD.device)
            wanted_TK = weight_TK.detach().new_ones(weight_TK.shape).bool()
            wanted_TK[:, 1:] = 2 * weight_TK[:, 1:].detach() > uniform_T1
        first_E = count_experts(expert_TK[:, :1], None, self.num_experts)
        return expert_TK, weight_TK, wanted_TK, {"probability": probability_TE.sum(0), "first": first_E}

    def _losses(self, statistics: Statistics) -> dict[str, Tensor]:
        share = share_loss(statistics["first"], statistics["probability"], statistics["tokens"])
        return {"balance": self.config.balance_loss * share}
