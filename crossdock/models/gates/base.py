"""What every gate is: a router in fp32 or wider, its choice for this rank's tokens, and balance losses over the global batch.

A gate decides in `forward` and moves no data. It returns sums over this rank's tokens; whoever holds the mesh adds them up over the world
once per model (`reduce_statistics`) and hands them back to `balance`. Losses are therefore those of the global batch on every rank,
whatever the number of ranks, and all layers share one small all-reduce.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from crossdock.errors import BadConfig
from crossdock.models.gates.capacity import capacity_of, keep_within_capacity
from crossdock.models.initial import Fill
from crossdock.runtime.assignment import Assignment
from crossdock.runtime.collectives import sum_over_world
from crossdock.runtime.context import StepContext
from crossdock.runtime.mesh import Mesh
from crossdock.strict_yaml import StrictModel

Statistics = dict[str, Tensor]  # name -> [n], sums over tokens; differentiable where a loss needs it


class GateConfig(StrictModel):
    """Options of every gate. Dropless unless a capacity factor is given."""

    z_loss: float = Field(1e-3, ge=0)
    """Coefficient of mean(logsumexp(logits)^2), which keeps logits small (ST-MoE, arXiv 2202.08906, equation 5)."""
    capacity_factor: float | None = Field(None, gt=0)
    eval_capacity_factor: float | None = Field(None, gt=0)
    """Outside training; the training factor where left out."""
    capacity_group_tokens: int | None = Field(None, ge=1)
    """Consecutive tokens that share one capacity; one sequence where left out. Must divide the tokens of a rank."""

    def check(self, num_experts: int, top_k: int) -> None:
        """Raise `BadConfig` where the gate cannot choose `top_k` of `num_experts`."""
        if top_k > num_experts:
            raise BadConfig(f"top_k {top_k} is more than num_experts {num_experts}; choose top_k from 1 to {num_experts}")


@dataclass(frozen=True, eq=False)
class Routing:
    """A gate's choice for the rank's tokens, and the sums from which `Gate.balance` makes the losses."""

    assignment: Assignment
    statistics: Statistics


@dataclass(frozen=True, eq=False)
class Balance:
    """Losses (already times their coefficients) and load of one layer over the global batch: equal on every rank."""

    losses: dict[str, Tensor]
    load_E: Tensor  # assignments that each expert serves, after drops; float64, no gradient
    dropped: Tensor  # assignments beyond capacity; scalar, no gradient


class Gate(nn.Module):
    """Base of all gates: the router matrix, capacity, z-loss and the sums that all share.

    A gate implements `_route` (which experts, what weights, which sums) and `_losses` (from the global sums).
    """

    def __init__(self, config: GateConfig, layer: int, model_width: int, num_experts: int, top_k: int, dtype: torch.dtype) -> None:
        super().__init__()
        config.check(num_experts, top_k)
        self.config = config
        self.layer, self.num_experts, self.top_k = layer, num_experts, top_k
        self.weight_ED = nn.Parameter(torch.empty(num_experts, model_width, dtype=wide(dtype)))

    def forward(self, x_TD: Tensor, context: StepContext, tokens_per_sequence: int) -> Routing:
        """Choose experts for the rank's tokens [T, D]; `tokens_per_sequence` divides T."""
        with torch.autocast(x_TD.device.type, enabled=False):
            wide_TD = x_TD.to(self.weight_ED.dtype)
            logits_TE = F.linear(wide_TD, self.weight_ED)
            expert_TK, weight_TK, wanted_TK, statistics = self._route(wide_TD, logits_TE, context, tokens_per_sequence)
        keep_TK = self._keep(expert_TK, wanted_TK, context.training, tokens_per_sequence)
        statistics |= {
            "tokens": logits_TE.new_full((1,), len(x_TD)),
            "chosen": count_experts(expert_TK, wanted_TK, self.num_experts),
            "load": count_experts(expert_TK, keep_TK, self.num_experts),
            "z": torch.logsumexp(logits_TE, dim=-1).square().sum().view(1),
        }
        assignment = Assignment.from_topk(expert_TK, weight_TK, keep_TK)
        if wanted_TK is not None:  # what the gate itself left out has not been dropped
            assignment = replace(assignment, num_dropped=int(wanted_TK.sum()) - assignment.num_entries)
        return Routing(assignment, statistics)

    def balance(self, statistics: Statistics, training: bool) -> Balance:
        """Losses and load from the sums over the global batch."""
        losses = self._losses(statistics)
        if self.config.z_loss:
            losses["z"] = self.config.z_loss * (statistics["z"] / statistics["tokens"]).squeeze(0)
        load_E = statistics["load"].detach()
        if training:
            self._observe(statistics["chosen"].detach())
        return Balance(losses, load_E, (statistics["chosen"].detach() - load_E).sum())

    def reset_parameters(self, fill: Fill, std: float) -> None:
        """Router weights from a normal distribution; `fill(name, tensor, std)` draws them keyed by name."""
        fill("weight_ED", self.weight_ED, std)

    def _route(
        self, x_TD: Tensor, logits_TE: Tensor, context: StepContext, tokens_per_sequence: int
    ) -> tuple[Tensor, Tensor, Tensor | None, Statistics]:
        """(expert [T, K] by falling preference, weight [T, K], wanted [T, K] or None for all, sums)."""
        raise NotImplementedError

    def _losses(self, statistics: Statistics) -> dict[str, Tensor]:
        raise NotImplementedError

    def _observe(self, chosen_E: Tensor) -> None:
        """Called once per training forward with the global load: for gates that learn from it without a loss."""

    def _keep(self, expert_TK: Tensor, wanted_TK: Tensor | None, training: bool, tokens_per_sequence: int) -> Tensor | None:
        factor = self.config.capacity_factor
        if not training and self.config.eval_capacity_factor is not None:
            factor = self.config.eval_capacity_factor
        if factor is None:
            return wanted_TK
        group_tokens = self.config.capacity_group_tokens or tokens_per_sequence
        capacity = capacity_of(factor, group_tokens, self.top_k, self.num_experts)
        wanted_TK = torch.ones_like(expert_TK, dtype=torch.bool) if wanted_TK is None else wanted_TK
        return keep_within_capacity(expert_TK, wanted_TK, self.num_experts, group_tokens, capacity)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The precision of statistics: float32, or float64 where the model is float64."""
    return torch.promote_types(dtype, torch.float32)


def count_experts(expert_TK: Tensor, counted_TK: Tensor | None, num_experts: int) -> Tensor:
    """How often each expert is chosen, where `counted_TK` says so (None: everywhere): float64 [E] (exact for any batch), no gradient."""
    one_TK = torch.ones_like(expert_TK) if counted_TK is None else counted_TK.to(torch.int64)
    count_E = torch.zeros(num_experts, dtype=torch.int64, device=expert_TK.device)
    return count_E.scatter_add_(0, expert_TK.reshape(-1), one_TK.reshape(-1)).to(torch.float64)


def share_loss(chosen_E: Tensor, probability_E: Tensor, tokens_1: Tensor) -> Tensor:
    """E x sum_i f_i P_i of sums over the batch: 1 when even (Switch, arXiv 2101.03961, equation 4; GShard's E^2 x mean is the same).

    f_i is expert i's part of all choices and carries no gradient; P_i is its mean probability.
    """
    return len(chosen_E) * torch.dot(chosen_E / chosen_E.sum(), probability_E / tokens_1)


def reduce_statistics(statistics: Sequence[Statistics], mesh: Mesh) -> list[Statistics]:
    """Sum the statistics of all layers over the world in one all-reduce, in float64."""
    parts = [value.to(torch.float64) for layer in statistics for value in layer.values()]
    total_V = torch.cat(parts)
    if mesh.world_size > 1:
        total_V = sum_over_world(total_V, mesh)
    pieces = iter(torch.split(total_V, [len(part) for part in parts]))
    return [{name: next(pieces) for name in layer} for layer in statistics]
