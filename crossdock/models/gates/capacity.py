"""Capacity: how many assignments an expert takes from one group of tokens, and which ones are dropped beyond that.

    dropless    every assignment is served
    fixed       ceil(factor x K x group tokens / E) for each expert of each group (GShard, arXiv 2006.16668, section 2.2)
    batch_max   ceil(factor x the largest demand), the demand being what any one expert is asked for by any one group of the global batch

A group is a number of consecutive tokens, one sequence unless said otherwise, and never spans ranks: under `fixed` nothing depends on the
number of ranks, and no rank has to ask another. `batch_max` is the capacity of padded expert parallelism, where the buffers of all ranks
must have one shape: factor 1 fits the fullest expert exactly (Tutel's capacity factor 0, arXiv 2206.03382), and since Crossdock sends rows
and no padding, it then drops nothing and is the same as dropless. Below 1 it cuts the fullest experts down to that part of the largest
demand, which is one number agreed over all ranks, before the dispatch: one small all-reduce per layer and forward pass.

Who stays, where a group asks an expert for more than its capacity (`order`):

    position       first choices before second ones, then the earlier token (GShard)
    probability    the larger weight, whichever choice it is (Megatron-Core's drop policy `probs`)
    batch          batch-prioritised routing: tokens by their largest weight, first choices before second ones (V-MoE, arXiv 2106.05974,
                   section 4)

V-MoE orders the tokens of all images on a device, so `batch` takes all tokens of a rank for one group unless `group_tokens` says otherwise:
then, and only then, drops depend on how the batch is cut over ranks. Orders other than `position` let a later token of a sequence push out
an earlier one, and `position` does so where K > 1 (second choices wait for all first ones): a causal model can learn from that in training
what generation will not tell it. `group_tokens: 1` and dropless are free of it.
"""

import math
from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from crossdock.errors import BadConfig
from crossdock.strict_yaml import StrictModel

Order = Literal["position", "probability", "batch"]
Largest = Callable[[Tensor], Tensor]
"""largest(value): the largest of a scalar over the ranks that share the batch."""


def largest_alone(value: Tensor) -> Tensor:
    """The `Largest` of one rank."""
    return value


class Dropless(StrictModel):
    """Every assignment is served."""

    policy: Literal["dropless"] = "dropless"


class _Capped(StrictModel):
    group_tokens: int | None = Field(None, ge=1)
    """Consecutive tokens that share one capacity; must divide the tokens of a rank. Left out: a sequence; the rank with order batch."""
    order: Order = "position"

    def group_of(self, num_tokens: int, tokens_per_sequence: int) -> int:
        """Tokens of a group, out of `num_tokens` on this rank. Raises `BadConfig` where groups do not fill them."""
        group_tokens = self.group_tokens or (max(1, num_tokens) if self.order == "batch" else tokens_per_sequence)
        if num_tokens % group_tokens:
            raise BadConfig(
                f"capacity.group_tokens {group_tokens} does not divide the {num_tokens} tokens of a rank; "
                f"choose a divisor of the sequence length, or leave it out for one group per sequence"
            )
        return group_tokens


class Fixed(_Capped):
    """A capacity known before the batch."""

    policy: Literal["fixed"] = "fixed"
    factor: float = Field(1.25, gt=0)
    """Over the even share of an expert."""


class BatchMax(_Capped):
    """A capacity that follows the batch."""

    policy: Literal["batch_max"] = "batch_max"
    factor: float = Field(1.0, gt=0, le=1)
    """Part of the largest demand; 1 drops nothing."""


AnyCapacity = Annotated[Dropless | Fixed | BatchMax, Field(discriminator="policy")]


def capacity_of(factor: float, group_tokens: int, top_k: int, num_experts: int) -> int:
    """Assignments that one expert takes from one group: ceil(factor x K x group tokens / E), at least 1 (GShard, arXiv 2006.16668)."""
    return max(1, math.ceil(factor * top_k * group_tokens / num_experts))


def keep_TK(
    policy: Fixed | BatchMax,
    expert_TK: Tensor,
    weight_TK: Tensor,
    wanted_TK: Tensor,
    num_experts: int,
    tokens_per_sequence: int,
    largest: Largest,
) -> Tensor:
    """True [T, K] where the assignment is served under `policy`; `largest` is called once, and only by `BatchMax` with factor below 1."""
    group_tokens = policy.group_of(len(expert_TK), tokens_per_sequence)
    if isinstance(policy, Fixed):
        capacity: int | Tensor = capacity_of(policy.factor, group_tokens, expert_TK.shape[1], num_experts)
    elif policy.factor == 1.0:
        return wanted_TK
    else:
        demand = largest(largest_demand(expert_TK, wanted_TK, num_experts, group_tokens))
        capacity = (policy.factor * demand.to(torch.float64)).ceil().clamp(min=1).to(torch.int64)
    return keep_within_capacity(expert_TK, weight_TK, wanted_TK, num_experts, group_tokens, capacity, policy.order)


def keep_within_capacity(
    expert_TK: Tensor,
    weight_TK: Tensor,
    wanted_TK: Tensor,
    num_experts: int,
    group_tokens: int,
    capacity: int | Tensor,
    order: Order = "position",
) -> Tensor:
    """True [T, K] where the assignment is among the first `capacity` of its expert in its group, in the given order.

    The others are dropped, and the token passes on by its residual. Assignments that `wanted_TK` excludes take no room. `group_tokens`
    divides T. Equal weights stay in the order of position, so that nothing depends on chance.
    """
    queue_A = _queue_A(expert_TK, wanted_TK, num_experts, group_tokens)
    nowhere = len(expert_TK) // group_tokens * num_experts
    weight_GKt = torch.where(wanted_TK, weight_TK.detach(), -torch.inf).view(-1, group_tokens, expert_TK.shape[1]).transpose(1, 2)
    turn_A = ORDERS[order](weight_GKt)
    # Stable sorts, last key first: within each queue the entries stay in the order of their turns.
    sorted_A, by_queue_A = torch.sort(queue_A[turn_A], stable=True)
    length_W = torch.zeros(nowhere + 1, dtype=torch.int64, device=queue_A.device).scatter_add_(0, queue_A, torch.ones_like(queue_A))
    start_W = length_W.cumsum(0) - length_W
    place_A = torch.empty_like(queue_A)
    place_A[turn_A[by_queue_A]] = torch.arange(len(queue_A), device=queue_A.device) - start_W[sorted_A]
    kept_A = (place_A < capacity) & (queue_A < nowhere)
    return kept_A.view(weight_GKt.shape).transpose(1, 2).reshape(expert_TK.shape)


def largest_demand(expert_TK: Tensor, wanted_TK: Tensor, num_experts: int, group_tokens: int) -> Tensor:
    """int64 scalar: the most assignments that any group of this rank wants from any one expert; 0 where there is none."""
    queue_A = _queue_A(expert_TK, wanted_TK, num_experts, group_tokens)
    num_queues = len(expert_TK) // group_tokens * num_experts
    demand_W = torch.zeros(num_queues + 1, dtype=torch.int64, device=queue_A.device).scatter_add_(0, queue_A, torch.ones_like(queue_A))
    demand_W[num_queues] = 0
    return demand_W.max()


def _queue_A(expert_TK: Tensor, wanted_TK: Tensor, num_experts: int, group_tokens: int) -> Tensor:
    """int64 [G K t]: the queue, group x E + expert, of each assignment, laid out by group, choice, token; G E where it is not wanted."""
    num_groups, top_k = len(expert_TK) // group_tokens, expert_TK.shape[1]
    group_G11 = torch.arange(num_groups, device=expert_TK.device)[:, None, None]
    expert_GKt = expert_TK.view(num_groups, group_tokens, top_k).transpose(1, 2)
    wanted_GKt = wanted_TK.view(num_groups, group_tokens, top_k).transpose(1, 2)
    return torch.where(wanted_GKt, group_G11 * num_experts + expert_GKt, num_groups * num_experts).reshape(-1)


def _by_position(weight_GKt: Tensor) -> Tensor:
    return torch.arange(weight_GKt.numel(), device=weight_GKt.device)


def _by_probability(weight_GKt: Tensor) -> Tensor:
    return weight_GKt.reshape(-1).argsort(descending=True, stable=True)


def _by_batch(weight_GKt: Tensor) -> Tensor:
    best_Gt = weight_GKt.amax(1)
    token_Gt = best_Gt.argsort(dim=1, descending=True, stable=True)
    place_GKt = torch.arange(weight_GKt.numel(), device=weight_GKt.device).view(weight_GKt.shape)
    return place_GKt.gather(2, token_Gt[:, None].expand_as(place_GKt)).reshape(-1)


ORDERS: dict[Order, Callable[[Tensor], Tensor]] = {"position": _by_position, "probability": _by_probability, "batch": _by_batch}
"""Weights [G, K, t] of assignments by group, choice and token (-inf: not wanted) -> places of that layout, flat, in the order served."""
