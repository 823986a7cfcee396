"""Capacity: how many assignments an expert takes from one group of tokens, and which ones are dropped beyond that."""

import math

import torch
from torch import Tensor

from crossdock.errors import BadConfig


def capacity_of(factor: float, group_tokens: int, top_k: int, num_experts: int) -> int:
    """Assignments that one expert takes from one group: ceil(factor x K x group tokens / E), at least 1 (GShard, arXiv 2006.16668)."""
    return max(1, math.ceil(factor * top_k * group_tokens / num_experts))


def keep_within_capacity(expert_TK: Tensor, wanted_TK: Tensor, num_experts: int, group_tokens: int, capacity: int) -> Tensor:
    """The drop policy `position`: True [T, K] where the assignment fits its expert's capacity.

    Within a group of `group_tokens` consecutive tokens an expert is filled first by first choices in token order, then by second
    choices in token order, and so on; what comes after the capacity is dropped, and the token passes on by its residual. Assignments that
    `wanted_TK` excludes take no room. Groups are counted in tokens, never in ranks, so the drops do not depend on the number of ranks.

    Raises `BadConfig` where the group does not divide the rank's tokens.
    """
    num_tokens, top_k = expert_TK.shape
    if num_tokens % group_tokens:
        raise BadConfig(
            f"capacity_group_tokens {group_tokens} does not divide the {num_tokens} tokens of a rank; "
            f"choose a divisor of the sequence length, or leave it out for one group per sequence"
        )
    num_groups = num_tokens // group_tokens
    # One queue per (group, expert), in order of choice and then of token; a stable sort by queue keeps that order inside each.
    group_G11 = torch.arange(num_groups, device=expert_TK.device)[:, None, None]
    expert_GKt = expert_TK.view(num_groups, group_tokens, top_k).transpose(1, 2)
    wanted_GKt = wanted_TK.view(num_groups, group_tokens, top_k).transpose(1, 2)
    nowhere = num_groups * num_experts
    queue_A = torch.where(wanted_GKt, group_G11 * num_experts + expert_GKt, nowhere).reshape(-1)
    sorted_A, order_A = torch.sort(queue_A, stable=True)
    length_W = torch.zeros(nowhere + 1, dtype=torch.int64, device=queue_A.device).scatter_add_(0, queue_A, torch.ones_like(queue_A))
    start_W = length_W.cumsum(0) - length_W
    place_A = torch.empty_like(queue_A)
    place_A[order_A] = torch.arange(len(queue_A), device=queue_A.device) - start_W[sorted_A]
    kept_A = (place_A < capacity) & (queue_A < nowhere)
    return kept_A.view(num_groups, top_k, group_tokens).transpose(1, 2).reshape(num_tokens, top_k)
