"""Dispatchers equal the reference and one rank, outputs and every gradient, whatever the plan and the routing."""

import dataclasses
import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crossdock.errors import BadConfig
from crossdock.runtime.dispatch import reference
from crossdock.runtime.dispatch.assignment import Assignment
from crossdock.runtime.dispatch.dispatcher import DISPATCHERS, Deduplicated, Flat
from crossdock.runtime.dispatch.layout import ExpertLayout
from crossdock.runtime.transport.all_to_all import Route
from crossdock.runtime.transport.background import Background
from crossdock.runtime.transport.collectives import broadcast_object
from crossdock.runtime.transport.ledger import bytes_by_way
from crossdock.runtime.transport.wire import WIRES
from tests.pool import Pool, mesh_for
from tests.runtime.movement_cases import WIDTH, Case, as_slots, assert_equals_one_process, inputs, random_slots, run_layer

NAMES = sorted(DISPATCHERS)
CONTIGUOUS = {1: ((0, 1, 2, 3),), 2: ((0, 1), (2, 3)), 4: ((0,), (1,), (2,), (3,))}
RAILS = (0, 0, 1, 1)
LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]


def routing(seed: int, world_size: int, num_experts: int, num_tokens: int = 7, top_k: int = 2) -> tuple[tuple[tuple[int, ...], ...], ...]:
    rng = np.random.default_rng(seed)
    return tuple(tuple(tuple(int(e) for e in rng.permutation(num_experts)[:top_k]) for _ in range(num_tokens)) for _ in range(world_size))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("world_size", "expert_parallel"), LAYOUTS)
def test_contiguous_plan(ranks: Pool, name: str, world_size: int, expert_parallel: int) -> None:
    assert_equals_one_process(ranks, name, Case(expert_parallel, 4, CONTIGUOUS[expert_parallel], routing(1, world_size, 4)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("expert_parallel", [2, 4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_plan_with_replicas_and_empty_slots(ranks: Pool, name: str, expert_parallel: int, seed: int) -> None:
    slots = as_slots(random_slots(np.random.default_rng(seed), 6, expert_parallel, 12 // expert_parallel, copies=3))
    assert_equals_one_process(
        ranks, name, Case(expert_parallel, 6, slots, routing(seed, 4, 6, top_k=3), node_of_rank=(0, 0, 1, 1), seed=seed)
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param((((0, 1),) * 4, (), ((2, 0),), ((3, 2),) * 3), id="a rank without tokens"),
        pytest.param(((), (), (), ()), id="no token at all"),
        pytest.param(((), (), ((1, 3),), ()), id="one token"),
        pytest.param((((2,),) * 5,) * 4, id="all tokens on one expert"),
        pytest.param((((), (1,), (3, 0, 1), ()), ((2, 1),), ((), ()), ((0, 1, 2, 3), (3,), ())), id="variable number of experts"),
        pytest.param((((), ()),) * 4, id="every entry dropped"),
    ],
)
@pytest.mark.parametrize("expert_parallel", [1, 2, 4])
def test_odd_routing(ranks: Pool, name: str, chosen: tuple[tuple[tuple[int, ...], ...], ...], expert_parallel: int) -> None:
    assert_equals_one_process(ranks, name, Case(expert_parallel, 4, CONTIGUOUS[expert_parallel], chosen))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    world_size = draw(st.sampled_from([2, 4]))
    expert_parallel = draw(st.sampled_from([r for r in (1, 2, 4) if r <= world_size]))
    num_experts = draw(st.integers(1, 6))
    num_slots = draw(st.integers(-(-num_experts // expert_parallel), num_experts))
    copies = draw(st.integers(0, expert_parallel * num_slots - num_experts))
    seed = draw(st.integers(0, 99))
    token = st.lists(st.integers(0, num_experts - 1), max_size=3, unique=True).map(tuple)
    uniform = draw(st.booleans())
    if uniform:
        top_k = draw(st.integers(1, min(3, num_experts)))
        token = st.lists(st.integers(0, num_experts - 1), min_size=top_k, max_size=top_k, unique=True).map(tuple)
    chosen = tuple(draw(st.lists(token, max_size=6).map(tuple)) for _ in range(world_size))
    slots = random_slots(np.random.default_rng(seed), num_experts, expert_parallel, num_slots, copies)
    nodes = draw(st.sampled_from([None, tuple(rank // 2 for rank in range(world_size))]))
    return Case(expert_parallel, num_experts, as_slots(slots), chosen, nodes, seed, draw(st.integers(1, 3)), draw(st.booleans()))


@given(case=cases(), name=st.sampled_from(NAMES))
def test_any_routing_any_plan(ranks: Pool, case: Case, name: str) -> None:
    assert_equals_one_process(ranks, name, case)


def rows_of_rank(rank: int, world_size: int, name: str, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    mesh = mesh_for(rank, world_size, case.expert_parallel, case.node_of_rank)
    x, assignment, _ = inputs(case, rank)
    dispatcher = DISPATCHERS[name](mesh, ExpertLayout.from_plan(case.plan, 0, mesh), None)
    rows, count_S, handle = dispatcher.dispatch_start(x.detach(), assignment).wait()
    dispatcher.combine_start(rows, handle).wait()
    return rows, count_S


def layouts_of(rank: int, world_size: int, case: Case) -> ExpertLayout:
    return ExpertLayout.from_plan(case.plan, 0, mesh_for(rank, world_size, case.expert_parallel, case.node_of_rank))


@pytest.mark.parametrize("name", NAMES)
def test_rows_arrive_in_the_order_of_the_reference(ranks: Pool, name: str) -> None:
    slots = as_slots(random_slots(np.random.default_rng(5), 6, 4, 3, copies=3))
    case = Case(4, 6, slots, routing(5, 4, 6, top_k=3), node_of_rank=(0, 0, 1, 1))
    got = ranks.run(4, rows_of_rank, name, case)
    given_ = [inputs(case, rank) for rank in range(4)]
    x, assignments = [g[0].detach() for g in given_], [g[1] for g in given_]
    arrived = reference.dispatch(x, assignments, ranks.run(4, layouts_of, case))
    for (rows, count_S), wanted in zip(got, arrived, strict=True):
        assert torch.equal(rows, wanted.rows_MD)
        assert torch.equal(count_S, wanted.count_S)
    doubled = reference.combine([a.rows_MD * 2 for a in arrived], arrived, assignments)
    wanted = [reference.moe(x[r], assignments[r], lambda _, row: row * 2) for r in range(4)]
    for y, z in zip(doubled, wanted, strict=True):
        torch.testing.assert_close(y, z, rtol=1e-12, atol=1e-12)


def test_flat_does_not_depend_on_the_plan_at_all(ranks: Pool) -> None:
    chosen = routing(3, 4, 6, top_k=3)
    plans = [as_slots(random_slots(np.random.default_rng(seed), 6, 4, 3, copies=0)) for seed in (1, 2)]
    # With identity experts there is no GEMM whose shape could differ: what is left is the order of summation.
    one, two = (ranks.run(4, identity_experts, Case(4, 6, slots, chosen)) for slots in plans)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def identity_experts(rank: int, world_size: int, case: Case) -> torch.Tensor:
    mesh = mesh_for(rank, world_size, case.expert_parallel)
    x, assignment, _ = inputs(case, rank)
    dispatcher = Flat(mesh, ExpertLayout.from_plan(case.plan, 0, mesh))
    rows, _, handle = dispatcher.dispatch_start(x, assignment).wait()
    return dispatcher.combine_start(rows, handle).wait().detach()


@pytest.mark.parametrize("name", NAMES)
def test_same_world_and_plan_give_the_same_bits(ranks: Pool, name: str) -> None:
    case = Case(4, 4, CONTIGUOUS[4], routing(9, 4, 4, num_tokens=33), dtype=torch.float32)
    one, two = (ranks.run(4, run_layer, name, case) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.y, b.y)
        assert torch.equal(a.grad_x, b.grad_x)
        assert torch.equal(a.grad_weight, b.grad_weight)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("dtype", "wire"),
    [(torch.float32, "bf16"), (torch.bfloat16, None), (torch.bfloat16, "fp32"), (torch.float32, "int8"), (torch.bfloat16, "int8")],
)
def test_low_precision_on_the_wire_and_in_compute(ranks: Pool, name: str, dtype: torch.dtype, wire: str | None) -> None:
    case = Case(4, 4, CONTIGUOUS[4], routing(4, 4, 4), RAILS, dtype=dtype, wire=wire)
    got = ranks.run(4, run_layer, name, case)
    exact = ranks.run(4, run_layer, name, Case(4, 4, CONTIGUOUS[4], case.chosen, RAILS))
    for mine, wanted in zip(got, exact, strict=True):
        for field in ("y", "grad_x", "grad_weight"):
            value = getattr(mine, field)
            assert value.dtype == dtype
            torch.testing.assert_close(value.double(), getattr(wanted, field), rtol=0.05, atol=0.1)
    if wire in ("bf16", "int8"):
        assert any(not torch.equal(mine.y.double(), wanted.y) for mine, wanted in zip(got, exact, strict=True))


def test_the_wire_rounds_tokens_and_results_exactly_once() -> None:
    mesh = mesh_for(0, 1, 1)
    x = torch.randn(6, WIDTH)
    assignment = Assignment.from_topk(torch.tensor([[0], [1]] * 3), torch.ones(6, 1))
    for kind in (Flat, Deduplicated):
        dispatcher = kind(mesh, ExpertLayout.contiguous(0, 2, mesh), WIRES["bf16"])
        rows, _, handle = dispatcher.dispatch_start(x, assignment).wait()
        assert rows.dtype == torch.float32
        assert torch.equal(dispatcher.combine_start(rows / 3, handle).wait(), (x.bfloat16().float() / 3).bfloat16().float())


def test_a_single_rank_copies_nothing_over_the_wire() -> None:
    mesh = mesh_for(0, 1, 1)
    x = torch.randn(8, WIDTH)
    assignment = Assignment.from_topk(torch.tensor([[0, 1]] * 8), torch.ones(8, 2))
    dispatcher = Deduplicated(mesh, ExpertLayout.contiguous(0, 2, mesh))
    pending = dispatcher.dispatch_start(x, assignment)
    assert pending.rows.in_flight.data_ptr() == x.data_ptr()  # type: ignore[attr-defined]


@settings(max_examples=40)
@given(case=cases().filter(lambda case: case.world_size == 4), spread=st.booleans())
def test_hierarchical_over_rails(ranks: Pool, case: Case, spread: bool) -> None:
    slots = (
        case.slots_RS if case.expert_parallel == 4 else as_slots(random_slots(np.random.default_rng(case.seed), case.num_experts, 4, 6, 2))
    )
    nodes = RAILS if spread else (1, 1, 0, 0)
    assert_equals_one_process(ranks, "hierarchical", dataclasses.replace(case, expert_parallel=4, slots_RS=slots, node_of_rank=nodes))


def prepared_early(rank: int, world_size: int, name: str, case: Case) -> tuple[bool, bool]:
    """Whether `prepare` returns while another rank has not come yet, and whether the result is that of `dispatch_start`."""
    mesh = mesh_for(rank, world_size, 4, RAILS)
    dispatcher = DISPATCHERS[name](mesh, ExpertLayout.from_plan(case.plan, 0, mesh), None)
    x, assignment, _ = inputs(case, rank)
    if rank == 3:
        broadcast_object(None, mesh)  # comes only when the others have prepared
    (prepared,) = dispatcher.prepare([assignment])
    all_prepared = rank == 3 or broadcast_object(True, mesh)
    rows, count_S, handle = prepared.start(x.detach()).wait()
    y = dispatcher.combine_start(rows, handle).wait()
    again, count_again_S, handle = dispatcher.dispatch_start(x.detach(), assignment).wait()
    same = torch.equal(y, dispatcher.combine_start(again, handle).wait())
    return bool(all_prepared), same and torch.equal(rows, again) and torch.equal(count_S, count_again_S)


@pytest.mark.parametrize("name", NAMES)
def test_counts_travel_before_the_rows_are_there(ranks: Pool, name: str) -> None:
    case = Case(4, 4, CONTIGUOUS[4], routing(2, 4, 4), RAILS)
    assert ranks.run(4, prepared_early, name, case) == [(True, True)] * 4


def second_hops(rank: int, world_size: int, case: Case) -> list[bool]:
    """Whether each second hop had been started, without anybody waiting for it, while the program did something else."""
    mesh = mesh_for(rank, world_size, 4, RAILS)
    dispatcher = DISPATCHERS["hierarchical"](mesh, ExpertLayout.from_plan(case.plan, 0, mesh), None)
    x, assignment, grad_y = inputs(case, rank)
    started = []

    def idle(background: Background) -> None:
        begin = time.monotonic()
        task = background.submit(lambda: Route(mesh, None, (), (), 0, "dispatch", "tokens", 0))  # type: ignore[arg-type, return-value]
        while not task._ran.is_set() and time.monotonic() < begin + 20:
            time.sleep(0.001)
        started.append(task._ran.is_set())

    class Idle(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor, background: Background) -> Tensor:
            ctx.background = background
            return value.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            idle(ctx.background)
            return grad, None

    pending = dispatcher.dispatch_start(x, assignment)
    idle(mesh.outward)
    other = Idle.apply(torch.ones(1, requires_grad=True), mesh.homeward)
    rows, _, handle = pending.wait()
    returning = dispatcher.combine_start(rows, handle)
    idle(mesh.homeward)
    other = Idle.apply(other, mesh.outward)
    ((returning.wait() * grad_y).sum() + other.sum()).backward()
    return started


def test_second_hops_start_by_themselves(ranks: Pool) -> None:
    case = Case(4, 4, CONTIGUOUS[4], routing(2, 4, 4), RAILS)
    assert ranks.run(4, second_hops, case) == [[True] * 4] * 4


def test_hierarchical_sends_one_row_for_each_node_over_the_slow_link(ranks: Pool) -> None:
    # Every token of every rank has all four experts: three rows leave a device directly, one leaves the node by a relay.
    case = Case(4, 4, CONTIGUOUS[4], (((0, 1, 2, 3),) * 5,) * 4, RAILS, dtype=torch.float32)
    row_bytes = 4 * WIDTH
    for name, (other_node, same_node) in {"deduplicated": (2, 1), "hierarchical": (1, 2)}.items():
        for outcome in ranks.run(4, run_layer, name, case):
            for way in bytes_by_way(outcome.flights).values():
                assert way == (5 * row_bytes, 5 * same_node * row_bytes, 5 * other_node * row_bytes)


@pytest.mark.parametrize(("expert_parallel", "nodes"), [(2, RAILS), (4, (0, 1, 2, 3)), (4, None)])
def test_hierarchical_without_a_second_hop_is_deduplicated(ranks: Pool, expert_parallel: int, nodes: tuple[int, ...] | None) -> None:
    assert ranks.run(4, kind_of_hierarchical, expert_parallel, nodes) == ["Deduplicated"] * 4


@pytest.mark.parametrize("nodes", [(0, 0, 0, 1), (0, 1, 0, 1)])
def test_hierarchical_refuses_nodes_that_cannot_relay(ranks: Pool, nodes: tuple[int, ...]) -> None:
    for answer in ranks.run(4, kind_of_hierarchical, 4, nodes):
        assert "equally many consecutive" in answer
        assert ", ".join(map(str, nodes)) in answer


def kind_of_hierarchical(rank: int, world_size: int, expert_parallel: int, nodes: tuple[int, ...] | None) -> str:
    mesh = mesh_for(rank, world_size, expert_parallel, nodes)
    try:
        return type(DISPATCHERS["hierarchical"](mesh, ExpertLayout.contiguous(0, 4, mesh), None)).__name__
    except BadConfig as error:
        return str(error)
