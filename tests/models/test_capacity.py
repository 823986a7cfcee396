"""Capacity: each policy and order against queues filled one assignment at a time, its promises, and what depends on ranks."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import Tensor

from crossdock.errors import BadConfig
from crossdock.models.gates.base import Gate, largest_over_world, reduce_statistics
from crossdock.models.gates.capacity import ORDERS, BatchMax, Fixed, Order, capacity_of, keep_TK, keep_within_capacity, largest_alone
from crossdock.models.gates.table import GATES, AnyGateConfig, build_gate
from crossdock.models.initial import named_fill
from crossdock.runtime.training.context import StepContext
from crossdock.runtime.transport.mesh import Mesh
from tests.pool import Pool, mesh_for

E, K, D = 5, 3, 6


@dataclass(frozen=True)
class Choices:
    """What a gate might have chosen, in groups of equal size."""

    expert_TK: Tensor
    weight_TK: Tensor
    wanted_TK: Tensor
    size: int


@st.composite
def choices(draw: st.DrawFn) -> Choices:
    groups, size = draw(st.integers(0, 3)), draw(st.integers(1, 6))
    num_tokens = groups * size
    rows = [draw(st.permutations(range(E)))[:K] for _ in range(num_tokens)]
    weights = [[draw(st.integers(1, 4)) / 4 for _ in range(K)] for _ in range(num_tokens)]  # few values, so that some are equal
    wanted = [[draw(st.booleans()) or draw(st.booleans()) for _ in range(K)] for _ in range(num_tokens)]
    return Choices(
        torch.tensor(rows, dtype=torch.int64).view(num_tokens, K),
        torch.tensor(weights).view(num_tokens, K),
        torch.tensor(wanted, dtype=torch.bool).view(num_tokens, K),
        size,
    )


def turn_of(order: Order, drawn: Choices, token: int, choice: int) -> tuple[float, ...]:
    """The smaller, the earlier this assignment is served."""
    wanted = drawn.wanted_TK[token]
    if order == "probability":
        return (-float(drawn.weight_TK[token, choice]), choice, token)
    if order == "batch":
        best = max((float(weight) for weight in drawn.weight_TK[token][wanted]), default=0.0)
        return (choice, -best, token)
    return (choice, token)


def kept_slowly(order: Order, drawn: Choices, capacity: int) -> list[list[bool]]:
    kept = [[False] * K for _ in drawn.expert_TK]
    for first in range(0, len(drawn.expert_TK), drawn.size):
        entries = [(token, choice) for token in range(first, first + drawn.size) for choice in range(K) if drawn.wanted_TK[token, choice]]
        room = [capacity] * E
        for token, choice in sorted(entries, key=lambda entry: turn_of(order, drawn, *entry)):
            expert = int(drawn.expert_TK[token, choice])
            kept[token][choice] = room[expert] > 0
            room[expert] -= 1
    return kept


@pytest.mark.parametrize("order", ORDERS)
@given(choices(), st.integers(1, 6))
def test_queues_fill_in_their_order(order: Order, drawn: Choices, capacity: int) -> None:
    kept_TK = keep_within_capacity(drawn.expert_TK, drawn.weight_TK, drawn.wanted_TK, E, drawn.size, capacity, order)
    assert kept_TK.tolist() == kept_slowly(order, drawn, capacity)


@pytest.mark.parametrize("order", ORDERS)
@given(choices(), st.floats(0.05, 2.0))
def test_no_expert_takes_more_than_its_capacity_and_none_is_left_idle(order: Order, drawn: Choices, factor: float) -> None:
    policy = Fixed(factor=factor, group_tokens=drawn.size, order=order)
    kept_TK = keep_TK(policy, drawn.expert_TK, drawn.weight_TK, drawn.wanted_TK, E, drawn.size, largest_alone)
    capacity = capacity_of(factor, drawn.size, K, E)
    assert not (kept_TK & ~drawn.wanted_TK).any()
    for group in torch.arange(len(kept_TK)).split(drawn.size) if len(kept_TK) else ():
        for expert in range(E):
            asked = ((drawn.expert_TK[group] == expert) & drawn.wanted_TK[group]).sum()
            served = ((drawn.expert_TK[group] == expert) & kept_TK[group]).sum()
            assert served == min(asked, capacity)


@given(choices(), st.integers(1, 4))
def test_probability_keeps_the_larger_weights(drawn: Choices, capacity: int) -> None:
    kept_TK = keep_within_capacity(drawn.expert_TK, drawn.weight_TK, drawn.wanted_TK, E, drawn.size, capacity, "probability")
    for group in torch.arange(len(kept_TK)).split(drawn.size) if len(kept_TK) else ():
        for expert in range(E):
            here = (drawn.expert_TK[group] == expert) & drawn.wanted_TK[group]
            kept, dropped = drawn.weight_TK[group][here & kept_TK[group]], drawn.weight_TK[group][here & ~kept_TK[group]]
            assert not len(dropped) or kept.min() >= dropped.max()


@given(choices())
def test_batch_max_drops_nothing_at_one_and_cuts_to_its_part_below(drawn: Choices) -> None:
    arguments = (drawn.expert_TK, drawn.weight_TK, drawn.wanted_TK, E, drawn.size)
    assert torch.equal(keep_TK(BatchMax(), *arguments, largest_alone), drawn.wanted_TK)
    kept_TK = keep_TK(BatchMax(factor=0.5), *arguments, largest_alone)
    demand = max(
        (
            int(((drawn.expert_TK[group] == expert) & drawn.wanted_TK[group]).sum())
            for group in torch.arange(len(kept_TK)).split(drawn.size)
            for expert in range(E)
            if len(kept_TK)
        ),
        default=0,
    )
    assert kept_TK.tolist() == kept_slowly("position", drawn, max(1, -(-demand // 2)))


def test_by_hand() -> None:
    # Four tokens of one group, one room in each expert. Experts 0 and 1; weights of first and second choice.
    expert_TK = torch.tensor([[0, 1], [0, 1], [1, 0], [0, 1]])
    weight_TK = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.7, 0.3], [0.5, 0.5]])
    wanted_TK = torch.ones(4, 2, dtype=torch.bool)

    def kept(order: Order) -> list[tuple[int, int]]:
        kept_TK = keep_within_capacity(expert_TK, weight_TK, wanted_TK, 2, 4, 1, order)
        return [(token, choice) for token, choice in kept_TK.nonzero().tolist()]

    assert kept("position") == [(0, 0), (2, 0)]
    assert kept("probability") == [(1, 0), (2, 0)]
    assert kept("batch") == [(1, 0), (2, 0)]
    # A strong second choice beats a weak first one by probability alone.
    expert_TK, weight_TK = torch.tensor([[0, 1], [1, 0], [1, 0], [1, 0]]), torch.tensor([[0.5, 0.49], [0.45, 0.1], [0.4, 0.1], [0.3, 0.1]])
    assert kept("probability") == [(0, 0), (0, 1)]
    assert kept("batch") == [(0, 0), (1, 0)]
    assert capacity_of(1.25, 8, 2, 4) == 5
    assert capacity_of(1.0, 1, 1, 64) == 1


def test_groups() -> None:
    with pytest.raises(BadConfig, match=r"capacity.group_tokens 4 does not divide the 6 tokens"):
        Fixed(group_tokens=4).group_of(6, 3)
    assert Fixed().group_of(6, 3) == 3
    assert Fixed(order="batch").group_of(6, 3) == 6
    assert Fixed(order="batch", group_tokens=2).group_of(6, 3) == 2


# ---- in gates --------------------------------------------------------------------------------------------------------------


def gate_of(kind: str, **options: Any) -> Gate:
    config = TypeAdapter(AnyGateConfig).validate_python({"kind": kind, **options})
    gate = build_gate(config, 0, D, 4, 1 if kind == "switch" else 2, torch.float64)
    gate.reset_parameters(named_fill(1), 1.0)
    return gate


def tokens(num_tokens: int) -> Tensor:
    return torch.randn(num_tokens, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def context_of(training: bool = True, first_token: int = 0) -> StepContext:
    return StepContext(3, 0, training, torch.zeros(0, dtype=torch.int64), first_token)


POLICIES: dict[str, dict[str, Any]] = {
    "fixed": {"policy": "fixed", "factor": 0.5},
    "fixed_probability": {"policy": "fixed", "factor": 0.5, "order": "probability"},
    "fixed_batch": {"policy": "fixed", "factor": 0.5, "order": "batch", "group_tokens": 8},
    "batch_max": {"policy": "batch_max", "factor": 0.4},
    "batch_max_probability": {"policy": "batch_max", "factor": 0.4, "order": "probability"},
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", GATES)
def test_every_gate_drops_and_counts(kind: str, policy: str) -> None:
    gate = gate_of(kind, capacity=POLICIES[policy], eval_capacity={"policy": "dropless"})
    routing = gate(tokens(16), context_of(), 8)
    (sums,) = reduce_statistics([routing.statistics], Mesh.single())
    balance = gate.balance(sums, True)
    assert balance.load_E.tolist() == torch.bincount(routing.assignment.expert_A, minlength=4).tolist()
    assert balance.dropped == routing.assignment.num_dropped > 0
    if "fixed" in policy:
        assert balance.load_E.max() <= 2 * capacity_of(0.5, 8, gate.top_k, 4)  # two groups of 8 tokens
    assert gate(tokens(16), context_of(training=False), 8).assignment.num_dropped == 0


def kept_on(rank: int, world_size: int, options: dict[str, Any]) -> list[tuple[int, int]]:
    """(token of the whole batch, expert) of what this rank's share of 16 tokens keeps."""
    mesh = mesh_for(rank, world_size, 1)
    share_TD = tokens(16).chunk(world_size)[rank]
    first = rank * len(share_TD)
    routing = gate_of("noisy_topk", capacity=options)(
        share_TD, context_of(first_token=first), 4, largest=partial(largest_over_world, mesh=mesh)
    )
    return [
        (first + token, expert)
        for token, expert in zip(routing.assignment.token_A.tolist(), routing.assignment.expert_A.tolist(), strict=True)
    ]


@pytest.mark.parametrize(
    "options", [*POLICIES.values(), {"policy": "batch_max", "factor": 0.6, "order": "batch", "group_tokens": 4}], ids=str
)
def test_drops_do_not_depend_on_the_number_of_ranks(ranks: Pool, options: dict[str, Any]) -> None:
    options = options | ({"group_tokens": 4} if options.get("order") == "batch" else {})
    alone = kept_on(0, 1, options)
    assert len(alone) < 32
    for world_size in (2, 4):
        assert [entry for kept in ranks.run(world_size, kept_on, options) for entry in kept] == alone


def test_batch_order_takes_the_tokens_of_a_rank_for_one_group(ranks: Pool) -> None:
    options = {"policy": "fixed", "factor": 0.5, "order": "batch"}
    alone, halves = kept_on(0, 1, options), ranks.run(2, kept_on, options)
    by_half = kept_on(0, 1, options | {"group_tokens": 8})
    assert halves[0] + halves[1] == by_half
    assert by_half != alone
