"""The swap search: its tables and prices against recounting, its promises, and its strength where the optimum is known."""

import dataclasses

import numpy as np
import pytest

from crossdock.errors import InfeasiblePlan
from crossdock.placement.costs.cost import Window, Workload, block_cost
from crossdock.placement.records.affinity import Affinity
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import Trace
from crossdock.placement.solvers import anneal, load_peaks, solve, sweep
from crossdock.placement.solvers.problem import OBJECTIVES, Constraints, Objective, Pin, Problem
from crossdock.placement.solvers.search import starts
from crossdock.placement.solvers.search.chain import Chain
from crossdock.placement.solvers.search.layer_search import Deadline, LayerSearch, descend, placed_at
from crossdock.placement.solvers.search.price import BlockSeconds, layer_of, price_of
from crossdock.placement.solvers.search.swaps import CopyState, TokenSets
from crossdock.placement.solvers.solution import cost_of
from tests.placement.conftest import random_trace

TWO_NODES = Topology.uniform(2, 2, same_node_bytes_per_s=1e10, other_node_bytes_per_s=1e9, shared_by_node=True)
LOPSIDED = Topology(
    "lopsided",
    (0, 1, 1),
    np.array([1e12, 2e12, 4e12]),
    np.full(3, 1e9),
    np.array([[np.inf, 2e9, 1e8], [1e9, np.inf, 3e8], [2e8, 5e8, np.inf]]),
    np.array([[0, 1e-5, 2e-5], [1e-5, 0, 2e-5], [3e-5, 2e-5, 0]]),
)
WORKLOAD = Workload(
    tokens_per_rank=256, model_width=64, expert_width=128, window=Window(1e-5, 2e-5, 3e-5, 0.0), other_s=1e-3, micro_batches=2
)


def problem_of(trace: Trace, topology: Topology = TWO_NODES, objective: Objective = "seconds", **constraints: object) -> Problem:
    return Problem(Affinity.from_trace(trace), topology, WORKLOAD, objective=objective, constraints=Constraints(**constraints))  # type: ignore[arg-type]


def planted_trace(seed: int, num_groups: int = 4, group_size: int = 4, num_tokens: int = 600) -> tuple[Trace, np.ndarray]:
    """Every token of a layer uses three experts of one hidden group; groups are equally loaded. Returns the group of each expert."""
    rng = np.random.default_rng(seed)
    group_E = rng.permutation(np.repeat(np.arange(num_groups), group_size))
    members = [np.flatnonzero(group_E == group) for group in range(num_groups)]
    experts = [[rng.permutation(members[token % num_groups])[:3]] for token in range(num_tokens)]
    return Trace(np.array(experts, dtype=np.uint16), num_groups * group_size), group_E


@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_swap_tables_equal_a_fresh_count(drop: float) -> None:
    rng = np.random.default_rng(0)
    problem = problem_of(random_trace(1, num_tokens=200, num_experts=10, top_k=4, drop=drop))
    layer = layer_of(problem, 0)
    sets = TokenSets(layer.member_UK, layer.count_U, layer.num_items)
    state = CopyState(sets, rng.permutation(np.repeat(np.arange(4), 3)), 4)
    for _ in range(60):
        a, b = (int(item) for item in rng.choice(layer.num_items, 2, replace=False))
        p, q = state.place_I[[a, b]]
        expected = state.copies_P.copy()
        if p != q:
            expected[p] += state.change_first(np.array([a]), np.array([b]))[0]
            expected[q] += state.change_first(np.array([b]), np.array([a]))[0]
        state.swap(a, b)
        fresh = CopyState(sets, state.place_I, 4)
        np.testing.assert_array_equal(state.copies_P, expected)
        np.testing.assert_array_equal(state.copies_P, fresh.copies_P)
        np.testing.assert_array_equal(state._alone[:-1, :-1], fresh._alone[:-1, :-1])
        np.testing.assert_array_equal(state._absent[:-1], fresh._absent[:-1])


@pytest.mark.parametrize("topology", [TWO_NODES, LOPSIDED, Topology.uniform(1, 1)], ids=lambda topology: topology.name)
@pytest.mark.parametrize("dispatch", ["deduplicated", "flat"])
def test_linear_ports_equal_the_cost_model(topology: Topology, dispatch: str) -> None:
    rng = np.random.default_rng(2)
    R = topology.num_devices
    workload = Workload(tokens_per_rank=100, model_width=32, expert_width=16, dispatch=dispatch, window=Window(1e-6, 0, 2e-6, 1e-7))  # type: ignore[arg-type]
    problem = Problem(Affinity.from_trace(random_trace(num_experts=6)), topology, workload)
    copies_PR, rows_PR = rng.integers(0, 500, (20, R)).astype(float), rng.integers(0, 900, (20, R)).astype(float)
    sent_PR = copies_PR if dispatch == "deduplicated" else rows_PR
    scale = problem.tokens_per_trace_token
    expected = block_cost(np.repeat(sent_PR[:, None], R, axis=1) * scale / R, rows_PR * scale, topology, workload).total_s
    np.testing.assert_allclose(BlockSeconds.of(problem)(copies_PR, np.zeros((20, 1)), rows_PR), expected, rtol=1e-12)


@pytest.mark.parametrize("objective", ["seconds", "devices", "nodes"])
@pytest.mark.parametrize("topology", [TWO_NODES, LOPSIDED], ids=lambda topology: topology.name)
def test_the_price_of_every_swap_equals_the_cost_after_it(objective: Objective, topology: Topology) -> None:
    problem = problem_of(random_trace(3, num_tokens=150, num_layers=1, num_experts=8, top_k=3), topology, objective, load_cap=1.3)
    layer, price = layer_of(problem, 0), price_of(problem)
    sets = TokenSets(layer.member_UK, layer.count_U, layer.num_items)
    device_I = np.random.default_rng(1).permutation(np.repeat(np.arange(topology.num_devices), problem.slots_R))
    search = LayerSearch(layer, sets, price, np.array(topology.node_of_R), device_I)
    first, second = search.crossing(*search.chunks(np.random.default_rng(0))[0])
    for a, b, energy in zip(first.tolist(), second.tolist(), search.energies(first, second).tolist(), strict=True):
        search.swap(a, b)
        placed = search.placed()
        assert search.energy(placed) == pytest.approx(energy, rel=1e-12)
        assert placed.value + price.constant == pytest.approx(cost_of(problem, placed.device_I[None, :8]), rel=1e-12)
        search.swap(a, b)


def test_descent_ends_where_no_swap_helps() -> None:
    problem = problem_of(random_trace(4, num_tokens=300, num_layers=1, num_experts=16, top_k=4), objective="devices")
    layer = layer_of(problem, 0)
    sets = TokenSets(layer.member_UK, layer.count_U, layer.num_items)
    search = LayerSearch(layer, sets, price_of(problem), np.array(TWO_NODES.node_of_R), np.repeat(np.arange(4), 4))
    rng = np.random.default_rng(0)
    descend(search, rng, Deadline(30.0))
    first, second = search.crossing(*search.chunks(rng)[0])
    assert search.energies(first, second).min() >= search.energy(search.placed()) * (1 - 1e-9)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_never_worse_than_the_simple_methods(objective: Objective) -> None:
    for seed in range(3):
        problem = problem_of(random_trace(seed, num_tokens=120, num_experts=12, top_k=3), objective=objective)
        annealed = solve(problem, "anneal", seconds=20.0)
        assert annealed.bound is not None
        assert annealed.bound <= annealed.cost
        for method in ("contiguous", "random", "balance"):
            assert annealed.cost <= solve(problem, method).cost


@pytest.mark.parametrize("objective", ["seconds", "devices", "nodes"])
@pytest.mark.parametrize("dispatch", ["deduplicated", "hierarchical"])
def test_a_start_is_priced_without_tables_as_with_them(objective: Objective, dispatch: str) -> None:
    workload = Workload(dispatch=dispatch)  # type: ignore[arg-type]
    trace = random_trace(9, num_tokens=300, num_experts=10, top_k=4, drop=0.2)
    constraints = Constraints(load_cap=1.1)
    problem = Problem(Affinity.from_trace(trace), TWO_NODES, workload, objective=objective, constraints=constraints)
    price, rng = price_of(problem), np.random.default_rng(0)
    for number in range(problem.num_layers):
        layer = layer_of(problem, number)
        device_I = rng.permutation(np.repeat(np.arange(4), problem.slots_R))
        sets = TokenSets(layer.member_UK, layer.count_U, layer.num_items)
        with_tables = LayerSearch(layer, sets, price, np.array(TWO_NODES.node_of_R), device_I).placed()
        without = placed_at(layer, price, np.array(TWO_NODES.node_of_R), device_I)
        assert dataclasses.astuple(without)[1:] == dataclasses.astuple(with_tables)[1:]
        np.testing.assert_array_equal(without.device_I, with_tables.device_I)


def test_without_time_no_tables_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of every pair of items takes a tenth of a second for 128 devices, and there are nine starts for every layer."""
    problem = problem_of(random_trace(5, num_tokens=300, num_experts=16), objective="devices")
    made, begin = [], CopyState.__init__
    monkeypatch.setattr(CopyState, "__init__", lambda self, *given: (made.append(self), begin(self, *given))[1])
    plans = [starts.contiguous(problem), starts.random(problem, 3)]
    anneal.search_layers(problem, 0, Deadline(0.0), plans)
    sweep.exchanged_layers(problem, 0, Deadline(0.0))
    assert not made
    sweep.exchanged_layers(problem, 0, Deadline(30.0))
    assert len(made) == 2 * problem.num_layers  # for the starts that are exchanged


def test_even_a_search_without_time_is_not_worse() -> None:
    problem = problem_of(random_trace(5, num_tokens=2000, num_layers=6, num_experts=32, top_k=4))
    hurried = solve(problem, "anneal", seconds=1e-6)
    assert hurried.stopped_by == "seconds"
    assert hurried.cost <= min(solve(problem, method).cost for method in ("contiguous", "balance"))


@pytest.mark.parametrize("objective", ["seconds", "devices"])
def test_finds_planted_groups(objective: Objective) -> None:
    trace, group_E = planted_trace(6)
    solution = solve(problem_of(trace, Topology.uniform(1, 4), objective), "anneal", seconds=20.0)
    device_E = solution.plan.device_of_LE()[0]
    assert [len(set(device_E[group_E == group])) for group in range(4)] == [1, 1, 1, 1]
    if objective == "devices":
        assert solution.cost == 1.0
        assert solution.stopped_by == "optimal"


def test_finds_planted_groups_of_nodes() -> None:
    trace, group_E = planted_trace(7, num_groups=2, group_size=4)
    solution = solve(problem_of(trace, TWO_NODES, "nodes"), "anneal", seconds=20.0)
    node_E = np.array(TWO_NODES.node_of_R)[solution.plan.device_of_LE()[0]]
    assert solution.cost == 1.0
    assert [len(set(node_E[group_E == group])) for group in range(2)] == [1, 1]


def test_finds_planted_chains() -> None:
    rng = np.random.default_rng(8)
    follow_LE = np.stack([rng.permutation(8) for _ in range(5)])
    first_T = np.arange(400) % 8
    trace = Trace(follow_LE[:, first_T].T[:, :, None].astype(np.uint16), 8)
    solution = solve(problem_of(trace, Topology.uniform(1, 4), "hops"), "anneal", seconds=20.0)
    assert solution.cost == 0.0
    assert solution.stopped_by == "optimal"


def test_chain_counts_what_the_objective_counts() -> None:
    problem = problem_of(random_trace(9, num_tokens=100, num_layers=4), objective="hops")
    device_LE = np.random.default_rng(0).permuted(np.tile(np.repeat(np.arange(4), 2), (4, 1)), axis=1)
    chain = Chain(problem, device_LE)
    moved = chain.key()[1]
    assert moved / problem.affinity.transitions_LEE.sum() == pytest.approx(cost_of(problem, device_LE))
    for layer in range(4):
        kept_IR, elsewhere = chain.attraction(layer), (device_LE[layer, 3] + 1) % 4
        changed_LE = device_LE.copy()
        changed_LE[layer, 3] = elsewhere
        change = kept_IR[3, device_LE[layer, 3]] - kept_IR[3, elsewhere]
        assert cost_of(problem, changed_LE) * problem.affinity.transitions_LEE.sum() == pytest.approx(moved + change)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_same_seed_same_plan(objective: Objective) -> None:
    problem = problem_of(random_trace(10, num_tokens=80, num_layers=2), objective=objective)
    plans = [solve(problem, "anneal", seconds=60.0, seed=seed).plan for seed in (3, 3)]
    assert plans[0].digest == plans[1].digest
    assert plans[0].seed == 3


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_load_cap_pins_and_slots_hold(objective: Objective) -> None:
    pins = (Pin(0, 7, 0), Pin(0, 0, 0), Pin(2, 1, 3))
    problem = problem_of(random_trace(11, num_tokens=200), objective=objective, load_cap=1.35, slots=3, pins=pins)
    solution = solve(problem, "anneal", seconds=20.0)
    device_LE = solution.plan.device_of_LE()
    assert max(load_peaks(problem, solution)) <= 1.35 + 1e-9
    assert [device_LE[pin.layer, pin.expert] for pin in pins] == [0, 0, 3]
    assert solution.plan.slots_per_device == 3


@pytest.mark.parametrize("objective", ["seconds", "hops"])
def test_a_load_cap_that_cannot_be_met_is_refused_with_numbers(objective: Objective) -> None:
    trace = Trace(np.zeros((30, 2, 1), dtype=np.uint16), 4)
    with pytest.raises(InfeasiblePlan, match=r"no plan found within load cap 1\.2"):
        solve(problem_of(trace, objective=objective, load_cap=1.2), "anneal", seconds=5.0)


def test_more_slots_than_needed_are_used_where_they_pay() -> None:
    trace, _ = planted_trace(12, num_groups=4, group_size=3)
    tight = solve(problem_of(trace, Topology.uniform(1, 3), "devices"), "anneal", seconds=20.0)
    roomy = solve(problem_of(trace, Topology.uniform(1, 3), "devices", slots=6), "anneal", seconds=20.0)
    assert tight.cost > 1.0
    assert roomy.cost == 1.0


@pytest.mark.parametrize("topology", [Topology.uniform(1, 8), Topology.uniform(2, 4)], ids=lambda topology: topology.name)
def test_real_routing_comes_near_the_best_known(real_trace: Trace, topology: Topology) -> None:
    few = Trace(real_trace.experts_TLK[:, ::8], real_trace.num_experts)
    problem = Problem(Affinity.from_trace(few), topology, Workload(), objective="devices")
    annealed, contiguous = solve(problem, "anneal", seconds=30.0), solve(problem, "contiguous")
    assert annealed.cost < 0.78 * contiguous.cost
