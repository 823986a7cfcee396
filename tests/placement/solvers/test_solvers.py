"""Promises of every method in the table, lower bounds against every plan there is, starts, and symmetry."""

import dataclasses
import itertools

import numpy as np
import pytest

from crossdock.errors import InfeasiblePlan, UsageError
from crossdock.placement.costs.cost import Workload
from crossdock.placement.costs.evaluate import evaluate
from crossdock.placement.records.affinity import Affinity
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import NO_EXPERT, Trace
from crossdock.placement.solvers import SOLVERS, load_peaks, solve
from crossdock.placement.solvers.certificates.bounds import lower_bound
from crossdock.placement.solvers.problem import OBJECTIVES, Constraints, Objective, Pin, Problem
from crossdock.placement.solvers.search import starts
from crossdock.placement.solvers.search.symmetry import ordered_devices, ordered_nodes
from crossdock.placement.solvers.solution import cost_of
from tests.placement.conftest import random_trace

TWO_NODES = Topology.uniform(2, 2, same_node_bytes_per_s=1e10, other_node_bytes_per_s=1e9)
WORKLOAD = Workload(tokens_per_rank=256, model_width=64, expert_width=128)


def problem_of(trace: Trace, topology: Topology = TWO_NODES, objective: Objective = "seconds", **constraints: object) -> Problem:
    return Problem(Affinity.from_trace(trace), topology, WORKLOAD, objective=objective, constraints=Constraints(**constraints))  # type: ignore[arg-type]


ANY_OBJECTIVE = [method for method in SOLVERS if method not in ("columns", "replicas")]
"""columns is for devices, replicas wants room for copies; both have tests of their own."""


@pytest.mark.parametrize("method", ANY_OBJECTIVE)
@pytest.mark.parametrize("objective", ["seconds", "devices", "nodes"])
def test_every_method_returns_a_whole_plan_and_the_evaluators_cost(method: str, objective: Objective) -> None:
    trace = random_trace(1, num_tokens=100, num_experts=7, top_k=3, drop=0.1)
    solution = solve(problem_of(trace, objective=objective), method, seconds=1.0, seed=4)
    plan = solution.plan
    plan.check_model(3, 7, 4)
    assert (plan.method, plan.objective, plan.mode, plan.seed) == (method, objective, "home", 4)
    assert (plan.cost, plan.bound) == (solution.cost, solution.bound)
    assert plan.topology_hash == TWO_NODES.digest
    assert plan.trace_hash == trace.digest
    evaluation = evaluate(trace, plan, TWO_NODES, WORKLOAD)
    value = {"seconds": evaluation.step_s, "devices": evaluation.devices_per_token, "nodes": evaluation.nodes_per_token}[objective]
    assert solution.cost == pytest.approx(value, rel=1e-12)
    assert solution.bound is not None
    assert 0.0 <= solution.bound <= solution.cost


@pytest.mark.parametrize("method", ["contiguous", "eplb", "dp", "sweep", "anneal", "auto"])
@pytest.mark.parametrize("dispatch", ["flat", "deduplicated", "hierarchical"])
def test_seconds_are_the_evaluators_whatever_the_dispatch(method: str, dispatch: str) -> None:
    trace = random_trace(3, num_tokens=200, num_experts=8, top_k=3, drop=0.1)
    workload = dataclasses.replace(WORKLOAD, dispatch=dispatch)  # type: ignore[arg-type]
    for slots in (2, 3):
        problem = Problem(Affinity.from_trace(trace), TWO_NODES, workload, constraints=Constraints(slots=slots))
        solution = solve(problem, method, seconds=1.0)
        assert solution.cost == pytest.approx(evaluate(trace, solution.plan, TWO_NODES, workload).step_s, rel=1e-12)
        assert lower_bound(problem) <= solve(problem, "dp").cost


def test_ilp_refuses_two_hops() -> None:
    workload = dataclasses.replace(WORKLOAD, dispatch="hierarchical")
    with pytest.raises(UsageError, match="two hops of hierarchical dispatch"):
        solve(Problem(Affinity.from_trace(random_trace()), TWO_NODES, workload), "ilp")


@pytest.mark.parametrize("method", ANY_OBJECTIVE)
@pytest.mark.parametrize("objective", ["seconds", "devices", "nodes"])
@pytest.mark.parametrize("load_cap", [None, 3.0])
def test_a_layer_where_nothing_was_chosen_is_no_obstacle(method: str, objective: Objective, load_cap: float | None) -> None:
    experts_TLK = np.array(random_trace(num_layers=2).experts_TLK)
    experts_TLK[:, 1] = NO_EXPERT
    solution = solve(problem_of(Trace(experts_TLK, 8), objective=objective, load_cap=load_cap), method, seconds=1.0)
    solution.plan.check_model(2, 8, 4)
    assert solution.bound is not None


@pytest.mark.parametrize("method", ["contiguous", "random", "balance", "sweep", "anneal"])
def test_hops_are_the_evaluators(method: str) -> None:
    trace = random_trace(2, num_tokens=100, num_layers=4)
    solution = solve(problem_of(trace, objective="hops"), method, seconds=5.0)
    assert solution.cost == pytest.approx(evaluate(trace, solution.plan, TWO_NODES, WORKLOAD).cross_device_hops, rel=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dispatch", ["deduplicated", "flat"])
def test_lower_bounds_hold_for_every_plan(objective: Objective, dispatch: str) -> None:
    topology = (
        Topology.uniform(2, 1, other_node_bytes_per_s=1e9) if objective == "hops" else Topology.uniform(1, 3, same_node_bytes_per_s=1e9)
    )
    for seed in range(4):
        trace = random_trace(seed, num_tokens=60, num_layers=2, num_experts=6, top_k=3)
        workload = dataclasses.replace(WORKLOAD, dispatch=dispatch)  # type: ignore[arg-type]
        problem = Problem(Affinity.from_trace(trace), topology, workload, objective=objective)
        plans = [
            np.array(devices)
            for devices in itertools.product(range(topology.num_devices), repeat=6)
            if (np.bincount(devices, minlength=topology.num_devices) <= problem.slots_R).all()
        ]
        both = itertools.product(plans, plans) if objective == "hops" else zip(plans, plans, strict=True)
        best = min(cost_of(problem, np.stack(pair)) for pair in both)
        assert lower_bound(problem) <= best * (1 + 1e-12)
        assert lower_bound(problem) >= 0.4 * best


def test_the_bound_on_devices_worked_by_hand() -> None:
    # 4 experts, 2 devices of 2 slots: 10 tokens use {0, 1}, 6 use {1, 2}, 4 use {3}; chord j = 0: load - best fellow / 2, expert by expert
    experts = [[0, 1]] * 10 + [[1, 2]] * 6 + [[3, 65535]] * 4
    problem = problem_of(Trace(np.array(experts)[:, None], 4), Topology.uniform(1, 2), "devices")
    owed = (10 - 10 / 2) + (16 - 10 / 2) + (6 - 6 / 2) + 4
    assert lower_bound(problem) == pytest.approx(owed / 20)
    best = solve(problem, "ilp", seconds=10.0)
    assert best.cost == pytest.approx((10 + 12 + 4) / 20)


def test_balance_packs_the_heaviest_first() -> None:
    trace = Trace(np.repeat(np.arange(6), [60, 50, 40, 30, 20, 10])[:, None, None].astype(np.uint16), 6)
    solution = solve(problem_of(trace, Topology.uniform(1, 2)), "balance")
    assert [sorted(device) for device in solution.plan.slots_LRS[0].tolist()] == [[0, 3, 4], [1, 2, 5]]
    assert load_peaks(problem_of(trace, Topology.uniform(1, 2)), solution) == [pytest.approx(110 / 105)]


def test_balance_loads_fast_devices_more() -> None:
    topology = dataclasses.replace(Topology.uniform(1, 2), flop_per_s_R=np.array([3e12, 1e12]))
    trace = Trace(np.repeat(np.arange(4), 25)[:, None, None].astype(np.uint16), 4)
    solution = solve(problem_of(trace, topology, slots=4), "balance")
    assert (solution.plan.slots_LRS[0] >= 0).sum(axis=1).tolist() == [3, 1]


def test_contiguous_fills_blocks_that_differ_by_one_at_most() -> None:
    solution = solve(problem_of(random_trace(num_experts=10)), "contiguous")
    assert solution.plan.slots_LRS[0].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, -1], [8, 9, -1]]


def test_random_draws_depend_on_the_seed_alone() -> None:
    problem = problem_of(random_trace())
    digests = [solve(problem, "random", seed=seed).plan.digest for seed in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    "start", [starts.contiguous, starts.balanced, starts.evened, starts.clustered, lambda problem: starts.random(problem, 0)]
)
def test_starts_keep_to_slots_and_pins(start) -> None:  # type: ignore[no-untyped-def]
    pins = (Pin(0, 0, 3), Pin(0, 1, 3), Pin(1, 5, 2))
    problem = problem_of(random_trace(num_experts=11), pins=pins)
    device_LE = start(problem)
    assert all(device_LE[pin.layer, pin.expert] == pin.device for pin in pins)
    assert all((np.bincount(device_E, minlength=4) <= problem.slots_R).all() for device_E in device_LE)


def test_evened_lowers_what_greedy_packing_leaves() -> None:
    for seed in range(20):
        trace = random_trace(seed, num_tokens=300, num_experts=16, top_k=1)
        problem = problem_of(trace, Topology.uniform(1, 4))
        peaks = [
            max(np.bincount(start(problem)[layer], problem.affinity.load_LE[layer], 4).max() for layer in range(3))
            for start in (starts.balanced, starts.evened)
        ]
        assert peaks[1] <= peaks[0]


def test_clustered_puts_companions_together() -> None:
    experts = [[0, 3]] * 9 + [[1, 2]] * 8 + [[0, 1]]
    problem = problem_of(Trace(np.array(experts)[:, None], 4), Topology.uniform(1, 2))
    device_E = starts.clustered(problem)[0]
    assert device_E[0] == device_E[3] != device_E[1] == device_E[2]


def test_a_method_that_ignores_the_load_cap_is_refused_where_it_breaks_it() -> None:
    problem = problem_of(random_trace(num_tokens=200), load_cap=1.3)
    with pytest.raises(InfeasiblePlan, match=r"contiguous loads a device of layer \d with \d\.\d+ of the mean, above load cap 1\.3"):
        solve(problem, "contiguous")


def test_unknown_method_and_no_time_are_usage_errors() -> None:
    problem = problem_of(random_trace())
    with pytest.raises(UsageError, match="choose from contiguous, random, balance"):
        solve(problem, "magic")
    with pytest.raises(UsageError, match="more than 0"):
        solve(problem, "anneal", seconds=0.0)


def test_symmetry_knows_equal_devices_and_nodes() -> None:
    problem = problem_of(random_trace())
    assert [(a.tolist(), b.tolist()) for a, b in ordered_devices(problem)] == [([0], [1]), ([2], [3])]
    assert [(a.tolist(), b.tolist()) for a, b in ordered_nodes(problem)] == [([0, 1], [2, 3])]
    faster = dataclasses.replace(TWO_NODES, flop_per_s_R=np.array([2e12, 1e12, 1e12, 1e12]))
    assert [(a.tolist(), b.tolist()) for a, b in ordered_devices(problem_of(random_trace(), faster))] == [([2], [3])]
    assert ordered_nodes(problem_of(random_trace(), faster)) == []
