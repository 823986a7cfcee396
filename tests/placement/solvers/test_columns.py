"""Method columns against every plan there is, its table against counting, its promises under load caps and pins."""

import dataclasses
import itertools

import numpy as np
import pytest

from crossdock.errors import InfeasiblePlan, UsageError
from crossdock.placement.costs.cost import Workload
from crossdock.placement.records.affinity import Affinity
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import Trace
from crossdock.placement.solvers import columns, load_peaks, solve
from crossdock.placement.solvers.problem import Constraints, Objective, Pin, Problem
from crossdock.placement.solvers.search.layer_search import Deadline
from crossdock.placement.solvers.search.price import layer_of
from crossdock.placement.solvers.search.resplit import improved, lookup
from crossdock.placement.solvers.solution import cost_of
from tests.placement.conftest import random_trace


def problem_of(trace: Trace, num_devices: int = 3, objective: Objective = "devices", **constraints: object) -> Problem:
    return Problem(
        Affinity.from_trace(trace),
        Topology.uniform(1, num_devices),
        Workload(),
        objective=objective,
        constraints=Constraints(**constraints),  # type: ignore[arg-type]
    )


def every_assignment(problem: Problem, layer: int) -> list[np.ndarray]:
    """All [E] of one layer that keep to slots, pins and load cap."""
    load_E, R = problem.affinity.load_LE[layer], problem.num_devices
    cap = problem.constraints.load_cap or np.inf
    kept = []
    for devices in itertools.product(range(R), repeat=problem.num_experts):
        device_E = np.array(devices)
        if (np.bincount(device_E, minlength=R) > problem.slots_R).any():
            continue
        if np.bincount(device_E, load_E, R).max() > cap * load_E.sum() / R * (1 + 1e-12):
            continue
        if any(pin.layer == layer and device_E[pin.expert] != pin.device for pin in problem.constraints.pins):
            continue
        kept.append(device_E)
    return kept


def best_cost(problem: Problem) -> float:
    layers = []
    for layer in range(problem.num_layers):
        plans = every_assignment(problem, layer)
        one = np.zeros((problem.num_layers, problem.num_experts), dtype=np.int64)
        costs = []
        for device_E in plans:
            one[layer] = device_E
            costs.append(cost_of(problem, one))
        layers.append(min(costs) - cost_of(problem, np.where(np.arange(problem.num_layers)[:, None] == layer, 0, one)))
    return cost_of(problem, np.zeros((problem.num_layers, problem.num_experts), dtype=np.int64)) + sum(layers)


@pytest.mark.parametrize(
    "constraints",
    [
        {},
        {"load_cap": 1.25},
        {"slots": 3},
        {"pins": (Pin(0, 0, 1), Pin(0, 1, 1), Pin(1, 5, 2))},
        {"pins": (Pin(0, 0, 1), Pin(0, 1, 2)), "load_cap": 1.3},
    ],
    ids=["free", "cap", "slots", "pins", "pins and cap"],
)
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_best_of_all_plans(seed: int, constraints: dict[str, object]) -> None:
    problem = problem_of(random_trace(seed, num_tokens=90, num_layers=2, num_experts=6, top_k=3, drop=0.1), 3, "devices", **constraints)
    solution = solve(problem, "columns", seconds=30.0)
    assert solution.cost == pytest.approx(best_cost(problem), rel=1e-12)
    assert solution.stopped_by == "optimal"
    device_LE = solution.plan.device_of_LE()
    assert all(device_LE[pin.layer, pin.expert] == pin.device for pin in problem.constraints.pins)
    assert max(load_peaks(problem, solution)) <= (problem.constraints.load_cap or np.inf) + 1e-9


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4])
def test_the_table_counts_tokens_that_use_any_expert_of_a_set(size: int) -> None:
    problem = problem_of(random_trace(1, num_tokens=120, num_experts=7, top_k=3, drop=0.2), slots=4)
    layer = layer_of(problem, 1)
    member_CS, cost_C = columns._touched(layer, 7, size)
    assert len(member_CS) == len(set(map(tuple, member_CS.tolist())))
    for member_S, cost in zip(member_CS, cost_C, strict=True):
        touched_U = np.isin(layer.member_UK, member_S).any(axis=1)
        assert cost == layer.count_U[touched_U].sum()


def test_a_relaxation_is_a_bound_for_every_plan() -> None:
    for seed in range(4):
        problem = problem_of(random_trace(seed, num_tokens=70, num_layers=1, num_experts=6, top_k=2), slots=3)
        answer = columns.solve_layers(problem, Deadline(10.0), bounds_only=True)[0]
        tokens = problem.affinity.num_tokens
        assert answer.bound / tokens <= min(cost_of(problem, device_E[None]) for device_E in every_assignment(problem, 0)) * (1 + 1e-9)


def test_resplitting_mends_what_is_not_allowed_and_never_loses_an_expert() -> None:
    problem = problem_of(random_trace(2, num_tokens=200, num_experts=8, top_k=3), 4, load_cap=1.4)
    table = columns._columns(problem, layer_of(problem, 0))
    cost_of_set = lookup(table.member_CS, table.cost_C, 8)
    start_RS = np.array([[6, 7], [4, 5], [2, 3], [0, 1]])
    assert not np.isfinite(cost_of_set(start_RS).sum())
    held_RS, cost = improved(start_RS, cost_of_set, 20, np.random.default_rng(0), 0.0, Deadline(10.0))
    assert np.isfinite(cost)
    assert sorted(held_RS.ravel().tolist()) == list(range(8))
    assert cost == cost_of_set(held_RS).sum()


def test_a_load_cap_that_cannot_be_met_is_refused_with_a_proof() -> None:
    trace = Trace(np.repeat(np.arange(6), [60, 5, 5, 5, 5, 5])[:, None, None].astype(np.uint16), 6)
    with pytest.raises(InfeasiblePlan, match=r"layer 0: .*load cap 1\.2 \(proven\)"):
        solve(problem_of(trace, load_cap=1.2), "columns", seconds=10.0)


@pytest.mark.parametrize("method", ["columns", "dp", "auto"])
def test_a_robust_plan_keeps_to_the_cap_on_other_routing_too(method: str) -> None:
    first, second = (Affinity.from_trace(random_trace(seed, num_tokens=150, num_experts=6, top_k=3)) for seed in (7, 8))
    reversed_loads = Affinity.from_trace(Trace(5 - random_trace(9, num_tokens=150, num_experts=6, top_k=3).experts_TLK, 6))
    constraints = Constraints(load_cap=1.3)
    alone, robust = (
        Problem(first + second, Topology.uniform(1, 3), Workload(), objective="devices", constraints=constraints, also=also)
        for also in ((), (first, second, reversed_loads))
    )
    free, held = solve(alone, method, seconds=20.0), solve(robust, method, seconds=20.0)
    assert held.cost >= free.cost
    for affinity in robust.also:
        assert max(load_peaks(dataclasses.replace(robust, affinity=affinity, also=()), held)) <= 1.3 + 1e-9
    assert held.cost == pytest.approx(solve(robust, "dp").cost)


def test_what_it_cannot_take_is_refused() -> None:
    with pytest.raises(UsageError, match="objective devices, not hops"):
        solve(problem_of(random_trace(), objective="hops"), "columns")
    with pytest.raises(UsageError, match=r"would enumerate \d"):
        solve(problem_of(random_trace(num_experts=64, top_k=4), 4), "columns")


def test_real_routing_is_solved_to_a_fraction_of_a_per_cent(real_trace: Trace) -> None:
    few = Trace(real_trace.experts_TLK[:, ::8], real_trace.num_experts)
    solution = solve(problem_of(few, 8), "columns", seconds=60.0)
    assert solution.bound is not None
    assert (solution.cost - solution.bound) / solution.cost < 0.01


def test_layers_whose_turn_does_not_come_in_time_have_no_plan_and_no_bound() -> None:
    problem = problem_of(random_trace(0, num_tokens=200, num_experts=6))
    first, *others = columns.solve_layers(problem, Deadline(0.0))
    assert first.device_E is not None
    assert 0.0 < first.bound <= first.copies
    assert [(answer.device_E, answer.bound) for answer in others] == [(None, 0.0)] * 2
    solution = solve(problem, "auto", seconds=1e-3)
    assert (np.sort(solution.plan.slots_LRS.reshape(3, -1)) == np.arange(6)).all()
    assert solution.bound <= best_cost(problem) + 1e-12
