"""EPLB, ExFlow, MoETuner and auto: each is what it claims to be, and auto is never worse than any."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossdock.errors import InfeasiblePlan, UsageError
from crossdock.placement.costs.cost import Workload
from crossdock.placement.costs.evaluate import evaluate
from crossdock.placement.records.affinity import Affinity
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import Trace
from crossdock.placement.solvers import SOLVERS, auto, exflow, load_peaks, moetuner, solve
from crossdock.placement.solvers.eplb import pack, replicated
from crossdock.placement.solvers.problem import OBJECTIVES, Constraints, Objective, Pin, Problem
from crossdock.placement.solvers.search.layer_search import Deadline
from crossdock.placement.solvers.solution import cost_of
from tests.placement.conftest import random_trace

TWO_NODES = Topology.uniform(2, 2, same_node_bytes_per_s=1e10, other_node_bytes_per_s=1e9)
WORKLOAD = Workload(tokens_per_rank=64, model_width=32, expert_width=32)


def problem_of(trace: Trace, topology: Topology = TWO_NODES, objective: Objective = "hops", **constraints: object) -> Problem:
    return Problem(Affinity.from_trace(trace), topology, WORKLOAD, objective=objective, constraints=Constraints(**constraints))  # type: ignore[arg-type]


def test_replicas_go_where_the_load_per_copy_is_highest() -> None:
    assert replicated(np.array([90.0, 40.0, 10.0]), 6).tolist() == [3, 2, 1]


def test_packing_is_heaviest_first_and_never_puts_twins_together() -> None:
    kind_C = np.array([0, 0, 1, 2])
    place_C = pack(np.array([45.0, 45.0, 40.0, 10.0]), kind_C, np.array([2, 2]))
    assert place_C.tolist() == [0, 1, 1, 0] or place_C.tolist() == [0, 1, 0, 1]
    assert pack(np.array([5.0, 5.0]), np.array([0, 0]), np.array([2])).tolist() == [0, -1]


def test_eplb_spends_extra_slots_on_hot_experts_and_evens_the_load() -> None:
    trace = Trace(np.repeat(np.arange(8), [400, 50, 50, 50, 50, 50, 50, 50])[:, None, None].astype(np.uint16), 8)
    tight, roomy = (problem_of(trace, Topology.uniform(1, 4), "seconds", slots=slots) for slots in (2, 3))
    without, with_replicas = solve(tight, "eplb"), solve(roomy, "eplb")
    assert not without.plan.has_replicas
    assert np.count_nonzero(with_replicas.plan.slot_LRE[0, :, 0] >= 0) == 4
    assert load_peaks(roomy, with_replicas)[0] < 1.1 < 2.0 < load_peaks(tight, without)[0]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_cost_of_a_plan_with_replicas_is_the_evaluators(objective: Objective) -> None:
    trace = random_trace(2, num_tokens=150, num_layers=2)
    problem = problem_of(trace, objective=objective, slots=4)
    solution = solve(problem, "eplb")
    assert solution.plan.has_replicas
    evaluation = evaluate(trace, solution.plan, TWO_NODES, WORKLOAD)
    value = {
        "seconds": evaluation.step_s,
        "devices": evaluation.devices_per_token,
        "nodes": evaluation.nodes_per_token,
        "hops": evaluation.cross_device_hops,
    }[objective]
    assert solution.cost == pytest.approx(value, rel=1e-9)
    np.testing.assert_allclose(load_peaks(problem, solution), evaluation.rows_LR.max(axis=1) / evaluation.rows_LR.mean(axis=1), rtol=1e-9)


def test_exflow_is_optimal_where_one_stage_is_everything() -> None:
    for seed in range(2):
        problem = problem_of(random_trace(seed, num_tokens=60, num_layers=3, num_experts=4), Topology.uniform(1, 2))
        solution = solve(problem, "exflow", seconds=30.0)
        assert solution.cost == pytest.approx(solve(problem, "dp").cost)


def test_exflow_splits_nodes_before_devices() -> None:
    problem = problem_of(random_trace())
    assert exflow._halves(problem, [0, 1, 2, 3]) == [[0, 1], [2, 3]]
    assert exflow._halves(problem, [2, 3]) == [[2], [3]]
    assert exflow._halves(problem_of(random_trace(num_experts=9), Topology.uniform(3, 1)), [0, 1, 2]) == [[0], [1], [2]]


def test_moetuners_first_program_is_the_most_even_packing() -> None:
    problem = problem_of(random_trace(1, num_tokens=200, num_layers=1, num_experts=6), Topology.uniform(1, 3))
    cluster_E, done = moetuner._clusters(problem, 0, np.zeros(6, dtype=np.int64), Deadline(30.0))
    load_E = problem.affinity.load_LE[0]

    def unevenness(clusters: np.ndarray) -> float:
        load_C = np.bincount(clusters, load_E, 3)
        return float(np.abs(load_C - load_C.mean()).sum())

    every = [np.array(devices) for devices in itertools.product(range(3), repeat=6) if sorted(map(devices.count, range(3))) == [2, 2, 2]]
    assert done
    assert np.bincount(cluster_E).tolist() == [2, 2, 2]
    assert unevenness(cluster_E) <= min(map(unevenness, every)) * (1 + moetuner.TOLERANCE) + 1e-6


@pytest.mark.parametrize("at_once", [True, False])
def test_moetuners_second_program_lowers_the_busiest_links(at_once: bool) -> None:
    problem = problem_of(random_trace(3, num_tokens=200, num_layers=3))
    cluster_LE = np.stack([np.random.default_rng(layer).permutation(np.repeat(np.arange(4), 2)) for layer in range(3)])
    flows, cost = moetuner._flows(problem, cluster_LE), moetuner._seconds_per_token(problem)
    mapped = (moetuner._mapped_at_once if at_once else moetuner._mapped_in_turn)(problem, flows, Deadline(30.0))[0]

    def busiest(device_LC: np.ndarray) -> float:
        return float(sum((flow * cost[np.ix_(a, b)]).max() for flow, a, b in zip(flows, device_LC, device_LC[1:], strict=False)))

    assert [sorted(device_C.tolist()) for device_C in mapped] == [[0, 1, 2, 3]] * 3
    orders = [np.array(order) for order in itertools.permutations(range(4))]
    assert busiest(mapped) <= np.mean([busiest(np.stack([a, b, c])) for a in orders[:1] for b in orders for c in orders])
    if at_once:
        best = min(busiest(np.stack([a, b, c])) for a in orders for b in orders for c in orders)
        assert busiest(mapped) <= best * (1 + moetuner.TOLERANCE) + 1e-9


def test_methods_that_know_no_pins_say_which_pin_they_break() -> None:
    problem = problem_of(random_trace(4, num_tokens=100), pins=(Pin(1, 0, 3), Pin(2, 7, 0)))
    with pytest.raises(InfeasiblePlan, match=r"method eplb breaks pins: layer \d has no copy of expert \d on device \d"):
        solve(problem, "eplb")
    assert solve(problem, "auto", seconds=5.0).plan.device_of_LE()[2, 7] == 0


def test_moetuner_needs_equal_devices() -> None:
    even, workload = Topology.uniform(1, 2), Workload()
    memory_R = np.array([6.5, 2.5]) * 3 * workload.expert_state_bytes
    uneven = Topology("uneven", (0, 0), even.flop_per_s_R, memory_R, even.bytes_per_s_RR, even.latency_s_RR)
    constraints = Constraints(slots=6, memory_fraction=1.0)
    problem = Problem(Affinity.from_trace(random_trace(num_experts=7)), uneven, workload, constraints=constraints)
    assert problem.slots_R.tolist() == [6, 2]
    with pytest.raises(UsageError, match="equally many slots"):
        solve(problem, "moetuner")
    assert np.count_nonzero(solve(problem, "auto", seconds=2.0).plan.slots_LRS >= 0, axis=2).max(axis=0).tolist() <= [6, 2]


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(OBJECTIVES), st.integers(5, 12), st.sampled_from([None, 1.6, 2.5]))
def test_auto_is_never_worse_and_everything_keeps_to_the_constraints(
    seed: int, objective: Objective, num_experts: int, load_cap: float | None
) -> None:
    trace = random_trace(seed, num_tokens=80, num_layers=2, num_experts=num_experts, drop=0.05)
    problem = problem_of(trace, objective=objective, load_cap=load_cap)
    solutions = {}
    for method in SOLVERS:
        if method in ("auto", "ilp", "exflow", "moetuner", "columns"):
            continue
        try:
            solutions[method] = solve(problem, method, seconds=1.0, seed=seed)
        except (InfeasiblePlan, UsageError):
            continue
    try:
        best = auto.improved(problem, 1.0, seed, solutions.values())
    except InfeasiblePlan:
        assert not solutions
        return
    for method, solution in [*solutions.items(), ("auto", best)]:
        solution.plan.check_model(2, num_experts, 4)
        assert max(load_peaks(problem, solution)) <= (load_cap or np.inf) + 1e-9
        assert best.cost <= solution.cost * (1 + 1e-9), method
        assert solution.bound is not None
        assert solution.bound <= best.cost * (1 + 1e-9)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(OBJECTIVES))
def test_renaming_devices_of_a_node_changes_no_evaluation(seed: int, objective: Objective) -> None:
    problem = problem_of(random_trace(seed, num_tokens=60), objective=objective)
    device_LE = solve(problem, "random", seed=seed).plan.device_of_LE().astype(np.int64)
    swapped = np.array([3, 2, 0, 1])  # the nodes change places, and their devices too
    assert cost_of(problem, swapped[device_LE]) == pytest.approx(cost_of(problem, device_LE), rel=1e-12)
