"""Noisy top-k (Shazeer et al., "Outrageously Large Neural Networks", arXiv 1701.06538, section 2.1 and appendix A); ScMoE's router.

H = x W_g + N(0, 1) softplus(x W_noise); the top K of H are chosen and weighted by softmax over the chosen ones.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from crossdock.models.gates.base import Gate, GateConfig, Statistics, Turn, count_experts, without
from crossdock.models.gates.noise import LOGIT_NOISE, normal_TC
from crossdock.models.initial import Fill
from crossdock.runtime.training.context import StepContext

MIN_NOISE = 1e-2  # floor of the noise's standard deviation, as in tensor2tensor: the load loss divides by it


class NoisyTopKConfig(GateConfig):
    """Options of noisy top-k. The losses' coefficients are ScMoE's 0.01 (arXiv 2404.05019, section 4); Shazeer et al. use up to 0.1."""

    kind: Literal["noisy_topk"] = "noisy_topk"
    importance_loss: float = Field(1e-2, ge=0)
    load_loss: float = Field(1e-2, ge=0)


class NoisyTopK(Gate):
    """Noisy top-k with the importance and load losses, both squared coefficients of variation over the global batch.

    With K = 1 the softmax over the chosen one is the constant 1 and would leave the router without a gradient from the task, so its weight
    is the softmax over all experts, as in Switch.
    """

    config: NoisyTopKConfig

    def __init__(self, config: NoisyTopKConfig, layer: int, model_width: int, num_experts: int, top_k: int, dtype: torch.dtype) -> None:
        super().__init__(config, layer, model_width, num_experts, top_k, dtype)
        self.noise_weight_ED = nn.Parameter(torch.empty_like(self.weight_ED))

    def reset_parameters(self, fill: Fill, std: float) -> None:
        """W_noise starts at zero, as in the paper; W_g does not, so that no evaluation before the first step has to break ties."""
        super().reset_parameters(fill, std)
        fill("noise_weight_ED", self.noise_weight_ED, 0.0)

    def _route(
        self, x_TD: Tensor, logits_TE: Tensor, context: StepContext, tokens_per_sequence: int, turn: Turn
    ) -> tuple[Tensor, Tensor, Tensor | None, Statistics]:
        noisy_TE = logits_TE
        if context.training:
            deviation_TE = F.softplus(F.linear(x_TD, self.noise_weight_ED)) + MIN_NOISE
            noise_TE = normal_TC(context, self.layer, LOGIT_NOISE, turn.number, logits_TE.shape, logits_TE.device)
            noisy_TE = logits_TE + noise_TE.to(logits_TE.dtype) * deviation_TE
        # One more than K, where there is one: the runner-up is the threshold that a chosen expert has to beat.
        num_free = self.num_experts - (0 if turn.barred_TK is None else turn.barred_TK.shape[1])
        value_TK, expert_TK = without(noisy_TE, turn.barred_TK).topk(min(self.top_k + 1, num_free), dim=-1)
        chosen_TK = expert_TK[:, : self.top_k]
        weight_TK = value_TK[:, : self.top_k].softmax(dim=-1) if self.top_k > 1 else noisy_TE.softmax(dim=-1).gather(1, chosen_TK)
        importance_E = torch.zeros_like(logits_TE).scatter(1, chosen_TK, weight_TK).sum(0)
        if context.training and self.top_k < num_free:
            load_E = self._smooth_load_E(logits_TE, deviation_TE, noisy_TE, value_TK, turn.barred_TK)
        else:
            load_E = count_experts(chosen_TK, None, self.num_experts)
        return chosen_TK, weight_TK, None, {"importance": importance_E, "smooth_load": load_E}

    def _smooth_load_E(
        self, logits_TE: Tensor, deviation_TE: Tensor, noisy_TE: Tensor, value_TK: Tensor, barred_TK: Tensor | None
    ) -> Tensor:
        """Sum over tokens of the chance that a fresh draw of expert i's own noise would choose it (paper, equations 8 to 10)."""
        entry_T1, runner_up_T1 = value_TK[:, self.top_k - 1, None], value_TK[:, self.top_k, None]
        threshold_TE = torch.where(noisy_TE >= entry_T1, runner_up_T1, entry_T1)
        chance_TE = torch.special.ndtr((logits_TE - threshold_TE) / deviation_TE)
        return (chance_TE if barred_TK is None else chance_TE.scatter(1, barred_TK, 0.0)).sum(0)

    def _losses(self, statistics: Statistics) -> dict[str, Tensor]:
        return {
            "importance": self.config.importance_loss * squared_variation(statistics["importance"]),
            "load": self.config.load_loss * squared_variation(statistics["smooth_load"]),
        }


def squared_variation(value_E: Tensor) -> Tensor:
    """(standard deviation / mean)^2 over experts; 0 when even."""
    return value_E.var(correction=0) / (value_E.mean().square() + 1e-10)
