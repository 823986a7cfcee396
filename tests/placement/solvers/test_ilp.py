"""The integer program against every plan there is, on instances small enough to list them."""

import itertools

import numpy as np
import pytest

from crossdock.errors import InfeasiblePlan, UsageError
from crossdock.placement.costs.cost import Window, Workload
from crossdock.placement.records.affinity import Affinity
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import Trace
from crossdock.placement.solvers import solve
from crossdock.placement.solvers.problem import Constraints, Objective, Pin, Problem
from crossdock.placement.solvers.solution import cost_of


def make_trace(seed: int, num_layers: int = 2, num_experts: int = 6, top_k: int = 2, num_tokens: int = 300) -> Trace:
    """Tokens with skewed loads and a strong liking for a few pairs."""
    rng = np.random.default_rng(seed)
    taste_EE = rng.normal(size=(4, num_layers, num_experts)) * 1.5
    kind_T = rng.integers(4, size=num_tokens)
    score_TLE = taste_EE[kind_T] + rng.gumbel(size=(num_tokens, num_layers, num_experts))
    return Trace(np.argsort(-score_TLE, axis=2)[:, :, :top_k].astype(np.uint16), num_experts)


TOPOLOGIES = {
    "one node": Topology.uniform(1, 3),
    "two nodes": Topology.uniform(2, 2, same_node_bytes_per_s=1e10, other_node_bytes_per_s=1e9),
    "two nodes, one card each": Topology.uniform(2, 2, same_node_bytes_per_s=1e10, other_node_bytes_per_s=1e9, shared_by_node=True),
    "unequal": Topology(
        "unequal",
        (0, 0, 1),
        np.array([1e12, 2e12, 3e12]),
        np.full(3, 1e9),
        np.array([[np.inf, 2e9, 1e8], [1e9, np.inf, 3e8], [2e8, 2e8, np.inf]]),
        np.array([[0, 1e-5, 2e-5], [1e-5, 0, 2e-5], [3e-5, 2e-5, 0]]),
    ),
}
WORKLOAD = Workload(tokens_per_rank=256, model_width=64, expert_width=128, wire="fp32")


def all_plans(num_experts: int, slots_R: np.ndarray):
    for devices in itertools.product(range(len(slots_R)), repeat=num_experts):
        if (np.bincount(devices, minlength=len(slots_R)) <= slots_R).all():
            yield np.array(devices)


def brute_force(problem: Problem, layer_trace: Trace) -> float:
    """The best cost of a problem, layer by layer, priced through the public cost model: nothing of the search is shared."""
    best = 0.0
    for layer in range(problem.num_layers):
        one = Problem(
            Affinity.from_trace(Trace(layer_trace.experts_TLK[:, layer : layer + 1], layer_trace.num_experts)),
            problem.topology,
            problem.workload,
            objective=problem.objective,
            constraints=Constraints(slots=problem.constraints.slots),
        )
        cap = problem.constraints.load_cap
        costs = []
        for device_E in all_plans(one.num_experts, one.slots_R):
            load_R = np.bincount(device_E, one.affinity.load_LE[0], one.num_devices)
            if cap is None or load_R.max() <= cap * load_R.mean() + 1e-9:
                costs.append(cost_of(one, device_E[None]))
        best += min(costs)
    return best if problem.objective == "seconds" else best / problem.num_layers


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
@pytest.mark.parametrize("objective", ["seconds", "devices", "nodes"])
def test_equals_brute_force(topology: str, objective: Objective) -> None:
    trace = make_trace(1)
    problem = Problem(Affinity.from_trace(trace), TOPOLOGIES[topology], WORKLOAD, objective=objective)
    best = brute_force(problem, trace)
    solution = solve(problem, "ilp", seconds=60.0)
    assert solution.cost == pytest.approx(best, rel=1e-6)
    assert solution.bound is not None
    assert best * (1 - 1e-5) <= solution.bound <= best * (1 + 1e-9)
    assert solution.stopped_by == "optimal"


@pytest.mark.parametrize(
    ("workload", "constraints"),
    [
        (
            Workload(
                tokens_per_rank=256, model_width=64, expert_width=128, wire="fp32", window=Window(1e-5, 2e-4, 5e-5, 0.0), micro_batches=3
            ),
            Constraints(),
        ),
        (Workload(tokens_per_rank=256, model_width=64, expert_width=128, dispatch="flat", expert_overhead_s=1e-5), Constraints()),
        (WORKLOAD, Constraints(slots=3)),
        (WORKLOAD, Constraints(load_cap=1.6, slots=3)),
    ],
    ids=["window", "flat", "spare slots", "load cap"],
)
def test_equals_brute_force_under_other_workloads_and_constraints(workload: Workload, constraints: Constraints) -> None:
    trace = make_trace(2, num_experts=5, num_layers=1)
    problem = Problem(Affinity.from_trace(trace), TOPOLOGIES["two nodes"], workload, constraints=constraints)
    solution, best = solve(problem, "ilp", seconds=60.0), brute_force(problem, trace)
    assert solution.cost == pytest.approx(best, rel=1e-6)
    assert solution.bound == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("objective", ["seconds", "devices", "nodes"])
def test_never_above_a_heuristic_and_the_bound_holds(objective: Objective) -> None:
    problem = Problem(Affinity.from_trace(make_trace(3, num_experts=8)), TOPOLOGIES["two nodes"], WORKLOAD, objective=objective)
    best = solve(problem, "ilp", seconds=60.0)
    for method in ("contiguous", "random", "balance", "anneal"):
        other = solve(problem, method, seconds=10.0)
        assert best.cost <= other.cost * (1 + 1e-9)
        assert other.bound is not None
        assert other.bound <= best.cost * (1 + 1e-9)


def test_a_search_cut_off_at_once_keeps_the_heuristic_and_an_honest_bound() -> None:
    problem = Problem(Affinity.from_trace(make_trace(4, num_layers=3, num_experts=16, top_k=4)), TOPOLOGIES["two nodes"], WORKLOAD)
    hurried, exact = solve(problem, "ilp", seconds=0.2), solve(problem, "balance")
    assert hurried.cost <= exact.cost
    assert hurried.bound is not None
    assert hurried.bound <= hurried.cost
    assert hurried.stopped_by == "seconds"


def test_pins_hold() -> None:
    pins = (Pin(0, 1, 3), Pin(0, 4, 3), Pin(1, 0, 2))
    problem = Problem(Affinity.from_trace(make_trace(5)), TOPOLOGIES["two nodes"], WORKLOAD, constraints=Constraints(pins=pins))
    device_LE = solve(problem, "ilp", seconds=30.0).plan.device_of_LE()
    assert [device_LE[pin.layer, pin.expert] for pin in pins] == [3, 3, 2]


def test_refuses_what_is_too_large_with_numbers() -> None:
    problem = Problem(Affinity.from_trace(make_trace(6, num_experts=64, top_k=6, num_tokens=4000)), TOPOLOGIES["two nodes"], WORKLOAD)
    with pytest.raises(UsageError, match=r"distinct expert sets x 4 devices = \d+ copy variables"):
        solve(problem, "ilp")


def test_refuses_hops() -> None:
    problem = Problem(Affinity.from_trace(make_trace(6)), TOPOLOGIES["two nodes"], WORKLOAD, objective="hops")
    with pytest.raises(UsageError, match="use method anneal"):
        solve(problem, "ilp")


def test_proves_that_a_load_cap_cannot_be_met() -> None:
    trace = Trace(np.zeros((50, 1, 1), dtype=np.uint16), 4)
    problem = Problem(Affinity.from_trace(trace), TOPOLOGIES["two nodes"], WORKLOAD, constraints=Constraints(load_cap=1.5))
    with pytest.raises(InfeasiblePlan, match="proved"):
        solve(problem, "ilp", seconds=5.0)
