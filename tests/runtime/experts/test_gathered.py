"""Gathered experts change no output and no gradient, under any plan, and carry the bytes that are predicted."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crossdock.errors import BadConfig
from crossdock.placement.costs.cost import Workload
from crossdock.placement.costs.evaluate import evaluate
from crossdock.placement.records.plan import choose_replica
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import NO_EXPERT, Trace
from crossdock.placement.strategies.gather import gathered_plan, weight_bytes
from crossdock.runtime.dispatch import reference
from crossdock.runtime.dispatch.dispatcher import DISPATCHERS
from crossdock.runtime.dispatch.layout import ExpertLayout
from crossdock.runtime.experts.expert_bank import ExpertBank
from crossdock.runtime.experts.gathered import GatheringBank
from crossdock.runtime.transport.ledger import bytes_by_class, profile
from crossdock.runtime.transport.wire import wire_named
from tests.pool import Pool, mesh_for
from tests.runtime.movement_cases import HIDDEN, WIDTH, Case, Outcome, as_slots, inputs, part, random_slots

NODES = (0, 0, 1, 1)
CONTIGUOUS = ((0, 1), (2, 3), (4, 5), (6, 7))


def skewed(seed: int, world_size: int, num_experts: int, top_k: int, num_tokens: int = 9) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Most tokens choose the first experts."""
    rng = np.random.default_rng(seed)
    share_E = np.arange(1, num_experts + 1) ** -1.2
    share_E /= share_E.sum()
    return tuple(
        tuple(tuple(int(e) for e in rng.choice(num_experts, top_k, replace=False, p=share_E)) for _ in range(num_tokens))
        for _ in range(world_size)
    )


def filled_bank(layout: ExpertLayout, case: Case) -> ExpertBank:
    bank = ExpertBank(layout, WIDTH, HIDDEN, activation="gelu", dtype=case.dtype)
    bank.reset_parameters(case.seed, std=0.5)
    return bank


def run_gathered(rank: int, world_size: int, name: str, case: Case, experts: tuple[int, ...]) -> Outcome:
    """The layer on one rank with `experts` gathered; gradients of the bank's tensors by logical expert, zero where it lacks one."""
    mesh = mesh_for(rank, world_size, case.expert_parallel, case.node_of_rank)
    base = ExpertLayout.from_plan(case.plan, 0, mesh)
    layout = base.with_gathered(experts, mesh)
    bank = filled_bank(base, case)
    gathering = GatheringBank(bank, layout, mesh)
    dispatcher = DISPATCHERS[name](mesh, layout, wire_named(case.wire))
    x, assignment, grad_y = inputs(case, rank)
    mesh.ledger.take()

    gathering.start()
    gathering.enter()
    bounds = torch.linspace(0, len(x), case.chunks + 1).long().tolist()
    chunks = list(itertools.pairwise(bounds))
    arriving = [dispatcher.dispatch_start(x[begin:end], part(assignment, begin, end)) for begin, end in chunks]
    leaving = []
    for pending in arriving:
        rows, count_S, handle = pending.wait()
        gathering.arrive()
        leaving.append(dispatcher.combine_start(gathering(rows, count_S), handle))
    y = torch.cat([pending.wait() for pending in leaving])
    y.backward(grad_y)
    grad_in, grad_out = (torch.zeros(case.num_experts, *p.shape[1:], dtype=case.dtype) for p in (bank.inner, bank.outer))
    for slot, expert in enumerate(base.local_experts):
        if expert >= 0:
            assert bank.inner.grad is not None
            assert bank.outer.grad is not None
            grad_in[expert] += bank.inner.grad[slot]
            grad_out[expert] += bank.outer.grad[slot]
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in (x, assignment.weight_A)]
    return Outcome(y.detach(), *grads, grad_in, grad_out, flights=mesh.ledger.take())


def alone(case: Case) -> list[Outcome]:
    """The same by the reference in one process; the parameters' gradients of all ranks stand in the first."""
    layout = ExpertLayout(0, torch.arange(case.num_experts), tuple(range(case.num_experts)), case.num_experts, 1)
    bank = filled_bank(layout, case)

    def one_expert(expert: int, row: Tensor) -> Tensor:
        return torch.nn.functional.gelu(row @ bank.inner[expert].T) @ bank.outer[expert]

    outcomes = []
    for rank in range(case.world_size):
        x, assignment, grad_y = inputs(case, rank)
        y = reference.moe(x, assignment, one_expert)
        if y.requires_grad:
            y.backward(grad_y)
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in (x, assignment.weight_A)]
        outcomes.append(Outcome(y.detach(), *grads, torch.zeros(0), torch.zeros(0)))
    totals = [p.grad if p.grad is not None else torch.zeros_like(p) for p in (bank.inner, bank.outer)]
    first = outcomes[0]
    return [Outcome(first.y, first.grad_x, first.grad_weight, *totals), *outcomes[1:]]


def assert_equals_one_process(ranks: Pool, name: str, case: Case, experts: tuple[int, ...]) -> list[Outcome]:
    got, wanted = ranks.run(case.world_size, run_gathered, name, case, experts), alone(case)
    close = {"rtol": 1e-12, "atol": 1e-12}
    for mine, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine.y, other.y, **close)
        torch.testing.assert_close(mine.grad_x, other.grad_x, **close)
        torch.testing.assert_close(mine.grad_weight, other.grad_weight, **close)
    torch.testing.assert_close(sum(o.grad_in_EDF for o in got), wanted[0].grad_in_EDF, **close)
    torch.testing.assert_close(sum(o.grad_out_EFD for o in got), wanted[0].grad_out_EFD, **close)
    return got


@pytest.mark.parametrize("name", sorted(DISPATCHERS))
@pytest.mark.parametrize("experts", [(0,), (0, 3), (1, 2, 7), tuple(range(8))])
@pytest.mark.parametrize("nodes", [None, NODES], ids=["one node", "two nodes"])
def test_contiguous_plan(ranks: Pool, name: str, experts: tuple[int, ...], nodes: tuple[int, ...] | None) -> None:
    assert_equals_one_process(ranks, name, Case(4, 8, CONTIGUOUS, skewed(1, 4, 8, 2), nodes), experts)


@pytest.mark.parametrize("name", sorted(DISPATCHERS))
@pytest.mark.parametrize("expert_parallel", [1, 2, 4])
def test_random_plan_with_replicas_and_empty_slots(ranks: Pool, name: str, expert_parallel: int) -> None:
    slots = as_slots(random_slots(np.random.default_rng(3), 6, expert_parallel, 12 // expert_parallel, copies=3))
    case = Case(expert_parallel, 6, slots, skewed(3, 4, 6, 3), NODES, seed=3, chunks=2)
    assert_equals_one_process(ranks, name, case, (0, 1, 4))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, tuple[int, ...]]:
    world_size = draw(st.sampled_from([2, 4]))
    expert_parallel = draw(st.sampled_from([r for r in (1, 2, 4) if r <= world_size]))
    num_experts = draw(st.integers(1, 6))
    num_slots = draw(st.integers(-(-num_experts // expert_parallel), num_experts))
    copies, seed = draw(st.integers(0, expert_parallel * num_slots - num_experts)), draw(st.integers(0, 99))
    token = st.lists(st.integers(0, num_experts - 1), max_size=3, unique=True).map(tuple)
    chosen = tuple(draw(st.lists(token, max_size=6).map(tuple)) for _ in range(world_size))
    slots = as_slots(random_slots(np.random.default_rng(seed), num_experts, expert_parallel, num_slots, copies))
    nodes = draw(st.sampled_from([None, tuple(rank // 2 for rank in range(world_size))]))
    experts = tuple(sorted(draw(st.sets(st.integers(0, num_experts - 1)))))
    return Case(expert_parallel, num_experts, slots, chosen, nodes, seed, chunks=draw(st.integers(1, 3))), experts


@given(drawn=cases(), name=st.sampled_from(sorted(DISPATCHERS)))
@settings(max_examples=25)
def test_any_routing_any_plan_any_experts(ranks: Pool, drawn: tuple[Case, tuple[int, ...]], name: str) -> None:
    assert_equals_one_process(ranks, name, *drawn)


@pytest.mark.parametrize("name", ["flat", "deduplicated"])
@pytest.mark.parametrize("copies", [0, 4])
def test_counted_bytes_equal_predicted_bytes(ranks: Pool, name: str, copies: int) -> None:
    experts = (0, 1, 5)
    slots = as_slots(random_slots(np.random.default_rng(7), 7, 4, 3, copies))
    case = Case(4, 7, slots, skewed(2, 4, 7, 2, num_tokens=20), NODES, dtype=torch.float32)
    outcomes = ranks.run(4, run_gathered, name, case, experts)
    trace = Trace(
        np.array([[list(chosen) + [NO_EXPERT] * (2 - len(chosen))] for tokens in case.chosen for chosen in tokens], dtype=np.uint16),
        7,
        home_T=np.repeat(np.arange(4), 20),
    )
    workload = Workload(model_width=WIDTH, wire="fp32", dispatch=name)  # type: ignore[arg-type]
    topology = Topology.uniform(nodes=2, devices_per_node=2)
    tokens = evaluate(trace, gathered_plan(case.plan, [experts]), topology, workload)
    assert tuple(np.sum([bytes_by_class(o.flights) for o in outcomes], axis=0)) == tokens.bytes_by_class
    assert sum(tokens.bytes_by_class[1:]) < sum(evaluate(trace, case.plan, topology, workload).bytes_by_class[1:])
    weights = weight_bytes(case.plan, [experts], NODES, 2 * WIDTH * HIDDEN * 4)
    assert tuple(np.sum([bytes_by_class(o.flights, "weights") for o in outcomes], axis=0)) == weights
    assert min(weights[1:]) > 0
    assert all(len(profile(o.flights)) == 1 for o in outcomes)


def layouts_of(rank: int, world_size: int, case: Case, experts: tuple[int, ...]) -> tuple[ExpertLayout, ExpertLayout]:
    mesh = mesh_for(rank, world_size, case.expert_parallel, case.node_of_rank)
    base = ExpertLayout.from_plan(case.plan, 0, mesh)
    return base, base.with_gathered(experts, mesh)


def test_the_layout_is_that_of_copies_everywhere(ranks: Pool) -> None:
    case = Case(4, 8, CONTIGUOUS, ((),) * 4, NODES)
    experts = (2, 5)
    chosen_RE = choose_replica(gathered_plan(case.plan, [experts]), NODES)[0]
    for rank, (base, layout) in enumerate(ranks.run(4, layouts_of, case, experts)):
        assert base.num_slots == 2
        assert layout.num_slots == 4
        device_E = layout.slot_of_expert_E // layout.num_slots
        assert device_E.tolist() == (chosen_RE[rank] // 4).tolist()
        mine = [(e, s) for e, s in enumerate(layout.slot_of_expert_E.tolist()) if s // 4 == rank]
        assert all(layout.local_experts[slot % 4] == expert for expert, slot in mine)
        assert {e for e, _ in mine} == {*CONTIGUOUS[rank], *experts}


def test_it_refuses_what_is_no_expert() -> None:
    mesh = mesh_for(0, 1, 1)
    with pytest.raises(BadConfig, match="gathered experts are"):
        ExpertLayout.contiguous(0, 4, mesh).with_gathered([4], mesh)
