"""What every gate is: a router in fp32 or wider, its choice for this rank's tokens, and balance losses over the global batch.

A gate decides in `forward` and moves no data (but for one number, where a capacity is relative to the batch's largest demand).
It returns sums over this rank's tokens; whoever holds the mesh adds them up over the world once per model (`reduce_statistics`) and hands
them back to `balance`. Losses are therefore those of the global batch on every rank, whatever the number of ranks, and all layers share one
small all-reduce.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from crossdock.errors import BadConfig
from crossdock.models.gates.capacity import AnyCapacity, Dropless, Largest, keep_TK, largest_alone
from crossdock.models.initial import Fill
from crossdock.runtime.dispatch.assignment import Assignment
from crossdock.runtime.training.context import StepContext
from crossdock.runtime.transport.collectives import sum_over_world
from crossdock.runtime.transport.mesh import Mesh
from crossdock.strict_yaml import StrictModel

Statistics = dict[str, Tensor]  # name -> [n], sums over tokens; differentiable where a loss needs it


class GateConfig(StrictModel):
    """Options of every gate."""

    z_loss: float = Field(1e-3, ge=0)
    """Coefficient of mean(logsumexp(logits)^2), which keeps logits small (ST-MoE, arXiv 2202.08906, equation 5)."""
    capacity: AnyCapacity = Dropless()
    """What an expert takes at most, and who stays: see `crossdock.models.gates.capacity`."""
    eval_capacity: AnyCapacity | None = None
    """Outside training; as in training where left out."""

    def check(self, num_experts: int, top_k: int, num_barred: int = 0) -> None:
        """Raise `BadConfig` where the gate cannot choose `top_k` of `num_experts` of which `num_barred` are taken."""
        if top_k > num_experts:
            raise BadConfig(f"top_k {top_k} is more than num_experts {num_experts}; choose top_k from 1 to {num_experts}")
        if top_k + num_barred > num_experts:
            raise BadConfig(
                f"the block chooses {top_k} experts for each of two representations, never one twice, and num_experts is {num_experts}; "
                f"choose num_experts of at least {top_k + num_barred}"
            )


@dataclass(frozen=True, eq=False)
class Turn:
    """Which of a gate's uses in one forward pass this is; only blocks that route a token several times (DGMoE) need it."""

    number: int = 0
    """Part of the key of random draws, so that no two uses draw alike."""
    barred_TK: Tensor | None = None
    """int64 [T, K]: experts that each token may not choose, because an earlier turn gave them to it."""


FIRST = Turn()


@dataclass(frozen=True, eq=False)
class Routing:
    """A gate's choice for the rank's tokens, and the sums from which `Gate.balance` makes the losses."""

    assignment: Assignment
    statistics: Statistics
    expert_TK: Tensor
    """int64 [T, K]: the choice before anything was dropped."""


@dataclass(frozen=True, eq=False)
class Balance:
    """Losses (already times their coefficients) and load of one layer over the global batch: equal on every rank."""

    losses: dict[str, Tensor]
    load_E: Tensor  # assignments that each expert serves, after drops; float64, no gradient
    dropped: Tensor  # assignments beyond capacity; scalar, no gradient


class Gate(nn.Module, abc.ABC):
    """Base of all gates: the router matrix, capacity, z-loss and the sums that all share.

    A gate implements `_route` (which experts, what weights, which sums) and `_losses` (from the global sums).
    """

    def __init__(self, config: GateConfig, layer: int, model_width: int, num_experts: int, top_k: int, dtype: torch.dtype) -> None:
        super().__init__()
        config.check(num_experts, top_k)
        self.config = config
        self.layer, self.num_experts, self.top_k = layer, num_experts, top_k
        self.weight_ED = nn.Parameter(torch.empty(num_experts, model_width, dtype=wide(dtype)))

    def forward(
        self, x_TD: Tensor, context: StepContext, tokens_per_sequence: int, turn: Turn = FIRST, largest: Largest = largest_alone
    ) -> Routing:
        """Choose experts for the rank's tokens [T, D]; `tokens_per_sequence` divides T."""
        with torch.autocast(x_TD.device.type, enabled=False):
            wide_TD = x_TD.to(self.weight_ED.dtype)
            logits_TE = F.linear(wide_TD, self.weight_ED)
            expert_TK, weight_TK, wanted_TK, statistics = self._route(wide_TD, logits_TE, context, tokens_per_sequence, turn)
        kept_TK = self._kept_TK(expert_TK, weight_TK, wanted_TK, context.training, tokens_per_sequence, largest)
        statistics |= {
            "tokens": logits_TE.new_full((1,), len(x_TD)),
            "chosen": count_experts(expert_TK, wanted_TK, self.num_experts),
            "load": count_experts(expert_TK, kept_TK, self.num_experts),
            "z": torch.logsumexp(logits_TE, dim=-1).square().sum().view(1),
        }
        assignment = Assignment.from_topk(expert_TK, weight_TK, kept_TK)
        if wanted_TK is not None:  # what the gate itself left out has not been dropped
            num_wanted = assignment.num_entries if kept_TK is wanted_TK else int(wanted_TK.sum())
            assignment = replace(assignment, num_dropped=num_wanted - assignment.num_entries)
        return Routing(assignment, statistics, expert_TK)

    def balance(self, statistics: Statistics, training: bool) -> Balance:
        """Losses and load from the sums over the global batch."""
        losses = self._losses(statistics)
        if self.config.z_loss:
            losses["z"] = self.config.z_loss * (statistics["z"] / statistics["tokens"].clamp(min=1)).squeeze(0)
        load_E = statistics["load"].detach()
        if training:
            self._observe(statistics["chosen"].detach())
        return Balance(losses, load_E, (statistics["chosen"].detach() - load_E).sum())

    def reset_parameters(self, fill: Fill, std: float) -> None:
        """Router weights from a normal distribution; `fill(name, tensor, std)` draws them keyed by name."""
        fill("weight_ED", self.weight_ED, std)

    @abc.abstractmethod
    def _route(
        self, x_TD: Tensor, logits_TE: Tensor, context: StepContext, tokens_per_sequence: int, turn: Turn
    ) -> tuple[Tensor, Tensor, Tensor | None, Statistics]:
        """(expert [T, K] by falling preference, none of `turn.barred_TK`, weight [T, K], wanted [T, K] or None for all, sums)."""

    @abc.abstractmethod
    def _losses(self, statistics: Statistics) -> dict[str, Tensor]:
        """The gate's own losses, from sums over the world, by name."""

    def _observe(self, chosen_E: Tensor) -> None:
        """Called once per training forward with the global load: for gates that learn from it without a loss."""

    def _kept_TK(
        self,
        expert_TK: Tensor,
        weight_TK: Tensor,
        wanted_TK: Tensor | None,
        training: bool,
        tokens_per_sequence: int,
        largest: Largest,
    ) -> Tensor | None:
        policy = self.config.capacity
        if not training and self.config.eval_capacity is not None:
            policy = self.config.eval_capacity
        if isinstance(policy, Dropless):
            return wanted_TK
        wanted_TK = torch.ones_like(expert_TK, dtype=torch.bool) if wanted_TK is None else wanted_TK
        return keep_TK(policy, expert_TK, weight_TK, wanted_TK, self.num_experts, tokens_per_sequence, largest)


def without(score_TE: Tensor, barred_TK: Tensor | None) -> Tensor:
    """Scores for choosing, -inf where a token may not go; weights are taken from the scores themselves, never from these."""
    return score_TE if barred_TK is None else score_TE.scatter(1, barred_TK, -torch.inf)


def add_statistics(first: Statistics, second: Statistics) -> Statistics:
    """The sums over the tokens of both: two turns of one gate are one batch to its losses."""
    return {name: value + second[name] for name, value in first.items()}


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

    f_i is expert i's part of all choices and carries no gradient; P_i is its mean probability. A batch without tokens has no loss: 0.
    """
    return len(chosen_E) * torch.dot(chosen_E / chosen_E.sum().clamp(min=1), probability_E / tokens_1.clamp(min=1))


def largest_over_world(value: Tensor, mesh: Mesh) -> Tensor:
    """The largest of a scalar over all ranks, without a gradient."""
    of_rank_W = torch.zeros(mesh.world_size, dtype=torch.float64, device=value.device)
    of_rank_W[mesh.rank] = value
    return sum_over_world(of_rank_W, mesh).max()


def reduce_statistics(statistics: Sequence[Statistics], mesh: Mesh) -> list[Statistics]:
    """Sum the statistics of all layers over the world in one all-reduce, in float64."""
    parts = [value.to(torch.float64) for layer in statistics for value in layer.values()]
    total_V = torch.cat(parts)
    if mesh.world_size > 1:
        total_V = sum_over_world(total_V, mesh)
    pieces = iter(torch.split(total_V, [len(part) for part in parts]))
    return [{name: next(pieces) for name in layer} for layer in statistics]
