"""Rows of `plan compare`: gaps that no plan can contradict, and tighter ones for more time."""

import dataclasses

import pytest

from crossdock.placement.analysis import compare
from crossdock.placement.analysis.compare import Candidate, Row, proven, row_of
from crossdock.placement.costs.cost import Workload
from crossdock.placement.records.affinity import Affinity
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import Trace
from crossdock.placement.solvers import solve
from crossdock.placement.solvers.problem import OBJECTIVES, Objective, Problem
from tests.placement.conftest import random_trace

TOPOLOGY = Topology.uniform(2, 2)


def row(problem: Problem, trace: Trace, plan: Plan, seconds: float) -> Row:
    least = proven(problem, seconds)
    return row_of(Candidate("plan", plan), problem, trace, fitted=False, bound=least.objective, least_devices=least.devices)[0]


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "hops"])
def test_gaps_of_moved_and_kept_are_proven_under_every_objective(objective: Objective) -> None:
    for seed in range(3):
        trace = random_trace(seed, num_tokens=200, top_k=3)
        problem = Problem(Affinity.from_trace(trace), TOPOLOGY, Workload(), objective=objective)
        fewest = solve(dataclasses.replace(problem, objective="devices"), "dp").plan
        best = row(problem, trace, fewest, 0.0)
        other = row(problem, trace, Plan.contiguous(3, 8, 4), 2.0)
        assert other.gap_moved is not None
        assert other.gap_kept is not None
        assert other.moved * (1 - other.gap_moved) <= best.moved * (1 + 1e-9)
        least = other.moved * (1 - other.gap_moved)
        assert other.gap_kept == pytest.approx((other.moved - least) / (1 - least))


@pytest.mark.parametrize("objective", ["seconds", "nodes"])
def test_time_tightens_the_gap_of_moved_traffic(objective: Objective) -> None:
    trace = random_trace(5, num_tokens=600, num_experts=12, top_k=4)
    problem = Problem(Affinity.from_trace(trace), TOPOLOGY, Workload(), objective=objective)
    quick, slow = (row(problem, trace, solve(problem, "auto").plan, seconds) for seconds in (0.0, 4.0))
    assert quick.moved == slow.moved
    assert slow.gap_moved is not None
    assert quick.gap_moved is not None
    assert slow.gap_moved < quick.gap_moved


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_cost_of_a_solution_is_not_counted_again(objective: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = random_trace(3, num_tokens=150)
    problem = Problem(Affinity.from_trace(trace), TOPOLOGY, Workload(), objective=objective)
    solution = solve(problem, "balance")
    counted = row(problem, trace, solution.plan, 0.0)
    monkeypatch.setattr(compare, "cost_of", lambda *arguments: pytest.fail("counted again"))
    told, _ = row_of(Candidate("plan", solution.plan, solution), problem, trace, fitted=True, bound=0.0)
    assert told.cost == counted.cost is not None
    with pytest.raises(pytest.fail.Exception):
        row(problem, trace, solution.plan, 0.0)
