"""Method dp against every plan there is, its states against counting, and its refusals."""

import itertools

import numpy as np
import pytest

from crossdock.errors import InfeasiblePlan, UsageError
from crossdock.placement.costs.cost import Workload
from crossdock.placement.records.affinity import Affinity
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import Trace
from crossdock.placement.solvers import dp, load_peaks, solve
from crossdock.placement.solvers.problem import OBJECTIVES, Constraints, Objective, Pin, Problem
from crossdock.placement.solvers.search.price import layer_of
from crossdock.placement.solvers.solution import cost_of
from tests.placement.conftest import random_trace

UNIFORM, TWO_NODES = Topology.uniform(1, 2), Topology.uniform(2, 2, other_node_bytes_per_s=1e9)


def problem_of(trace: Trace, topology: Topology, objective: Objective = "hops", node_weight: float = 1.0, **constraints: object) -> Problem:
    return Problem(
        Affinity.from_trace(trace),
        topology,
        Workload(tokens_per_rank=64, model_width=32, expert_width=32),
        objective=objective,
        constraints=Constraints(**constraints),  # type: ignore[arg-type]
        node_weight=node_weight,
    )


def best_of_all(problem: Problem) -> float:
    """The least cost of any plan within slots, pins and load cap, by trying all of them."""
    layers = []
    for number in range(problem.num_layers):
        load_E, kept = problem.affinity.load_LE[number], []
        for devices in itertools.product(range(problem.num_devices), repeat=problem.num_experts):
            device_E = np.array(devices)
            load_R = np.bincount(device_E, load_E, problem.num_devices)
            fits = (np.bincount(device_E, minlength=problem.num_devices) <= problem.slots_R).all()
            pinned = all(device_E[pin.expert] == pin.device for pin in problem.constraints.pins if pin.layer == number)
            cap = problem.constraints.load_cap
            if fits and pinned and (cap is None or load_R.max() <= cap * load_R.mean() * (1 + 1e-12)):
                kept.append(device_E)
        layers.append(kept)
    return min(cost_of(problem, np.stack(plan)) for plan in itertools.product(*layers))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    ("topology", "num_experts", "node_weight", "constraints"),
    [
        (UNIFORM, 6, 1.0, {}),
        (UNIFORM, 5, 1.0, {"slots": 4, "load_cap": 1.5}),
        (TWO_NODES, 4, 1.0, {}),
        (TWO_NODES, 4, 3.0, {}),
        (TWO_NODES, 4, 3.0, {"pins": (Pin(0, 1, 2), Pin(1, 3, 0))}),
    ],
    ids=["two devices", "odd sizes and cap", "two nodes", "two levels", "pins"],
)
def test_equals_the_best_of_all_plans(
    objective: Objective, topology: Topology, num_experts: int, node_weight: float, constraints: dict[str, object]
) -> None:
    for seed in range(2):
        trace = random_trace(seed, num_tokens=60, num_layers=2, num_experts=num_experts, drop=0.1)
        problem = problem_of(trace, topology, objective, node_weight, **constraints)
        solution = solve(problem, "dp")
        assert solution.cost == pytest.approx(best_of_all(problem), rel=1e-12)
        assert solution.bound == solution.cost
        assert solution.stopped_by == "optimal"
        assert [solution.plan.device_of_LE()[pin.layer, pin.expert] for pin in problem.constraints.pins] == [
            pin.device for pin in problem.constraints.pins
        ]
        assert max(load_peaks(problem, solution)) <= (problem.constraints.load_cap or np.inf) + 1e-9


@pytest.mark.parametrize("node_weight", [1.0, 4.0])
def test_paths_through_many_layers_are_the_best(node_weight: float) -> None:
    for seed in range(3):
        problem = problem_of(random_trace(seed, num_tokens=80, num_layers=4, num_experts=4), TWO_NODES, "hops", node_weight)
        chain = [np.array(order) for order in itertools.permutations(range(4))]
        best_P = np.zeros(len(chain))  # a plain shortest path over all labelled states
        for layer in range(1, 4):
            transitions_EE = problem.affinity.transitions_LEE[layer - 1]
            step_PP = np.array([[(transitions_EE * problem.hop_cost_RR[np.ix_(p, q)]).sum() for q in chain] for p in chain])
            best_P = (best_P[:, None] + step_PP).min(axis=0)
        tokens = problem.affinity.transitions_LEE.sum()
        assert solve(problem, "dp").cost == pytest.approx(best_P.min() / tokens, rel=1e-12)


@pytest.mark.parametrize(("num_experts", "num_devices", "slots"), [(8, 4, 2), (5, 3, 2), (4, 2, 4), (6, 6, 1)])
def test_states_are_all_assignments_within_the_slots(num_experts: int, num_devices: int, slots: int) -> None:
    problem = problem_of(random_trace(num_experts=num_experts), Topology.uniform(1, num_devices), slots=slots)
    device_PE = dp.states(problem)
    assert len(device_PE) == dp._num_states(problem) == len(np.unique(device_PE, axis=0))
    every = itertools.product(range(num_devices), repeat=num_experts)
    assert len(device_PE) == sum(max(map(devices.count, devices)) <= slots for devices in every)


def test_mixtrals_experts_on_four_devices_are_105_partitions() -> None:
    problem = problem_of(random_trace(), Topology.uniform(1, 4))
    device_PE = dp.states(problem)
    assert (len(device_PE), len(dp._classes(problem, device_PE)[1])) == (2520, 105)


def test_the_table_of_sets_counts_tokens() -> None:
    problem = problem_of(random_trace(3, num_tokens=100, num_experts=6, top_k=3, drop=0.2), UNIFORM)
    layer = layer_of(problem, 0)
    touched_M = dp._touched_by_mask(layer, 6)
    for mask in range(64):
        members = [expert for expert in range(6) if mask >> expert & 1]
        assert touched_M[mask] == layer.count_U[np.isin(layer.member_UK, members).any(axis=1)].sum()


def test_refusals_name_the_numbers() -> None:
    with pytest.raises(UsageError, match="32 experts have too many"):
        solve(problem_of(random_trace(num_experts=32), UNIFORM), "dp")
    with pytest.raises(UsageError, match=r"would list 63,063,000 placements"):
        solve(problem_of(random_trace(num_experts=16), Topology.uniform(1, 4)), "dp")
    one = Trace(np.zeros((30, 2, 1), dtype=np.uint16), 4)
    with pytest.raises(InfeasiblePlan, match=r"layer 0: none of the 6 placements .* load cap 1\.2"):
        solve(problem_of(one, UNIFORM, load_cap=1.2), "dp")
