"""Certificates never exceed an exact optimum, close most of the gap, and know load caps, two-level costs and vacancies."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossdock.errors import InfeasiblePlan
from crossdock.placement.costs.cost import Workload
from crossdock.placement.records.affinity import Affinity
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import Trace
from crossdock.placement.solvers import solve
from crossdock.placement.solvers.certificates.bounds import lower_bound
from crossdock.placement.solvers.certificates.certificate import certified
from crossdock.placement.solvers.problem import Constraints, Objective, Problem
from tests.placement.conftest import random_trace

TOPOLOGIES = (Topology.uniform(1, 2), Topology.uniform(1, 3), Topology.uniform(1, 4), Topology.uniform(2, 2))


def markov_trace(seed: int, num_tokens: int = 300, num_layers: int = 4, num_experts: int = 8, loyalty: float = 0.6) -> Trace:
    """Top 1: a token stays with the expert's successor with probability `loyalty`, else goes anywhere."""
    rng = np.random.default_rng(seed)
    expert_TL = np.empty((num_tokens, num_layers), dtype=np.uint16)
    expert_TL[:, 0] = rng.integers(0, num_experts, (2, num_tokens)).min(axis=0)
    for layer in range(1, num_layers):
        successor_E = rng.permutation(num_experts)
        stays_T = rng.random(num_tokens) < loyalty
        expert_TL[:, layer] = np.where(stays_T, successor_E[expert_TL[:, layer - 1]], rng.integers(0, num_experts, num_tokens))
    return Trace(expert_TL[:, :, None], num_experts)


def problem_of(trace: Trace, topology: Topology, objective: Objective = "hops", node_weight: float = 1.0, **constraints: object) -> Problem:
    return Problem(
        Affinity.from_trace(trace),
        topology,
        Workload(),
        objective=objective,
        constraints=Constraints(**constraints),  # type: ignore[arg-type]
        node_weight=node_weight,
    )


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from(TOPOLOGIES),
    st.integers(4, 8),
    st.sampled_from([1.0, 4.0]),
    st.sampled_from([None, 1.2, 1.6]),
    st.sampled_from(["hops", "devices", "nodes", "seconds"]),
)
def test_a_certificate_never_exceeds_the_optimum(
    seed: int, topology: Topology, num_experts: int, node_weight: float, load_cap: float | None, objective: Objective
) -> None:
    trace = markov_trace(seed, 60, 3, num_experts) if objective == "hops" else random_trace(seed, num_experts=num_experts, num_layers=2)
    problem = problem_of(trace, topology, objective, node_weight, load_cap=load_cap)
    try:
        best = solve(problem, "dp").cost
    except InfeasiblePlan:
        return
    bound = certified(problem, 1.0)
    assert lower_bound(problem) <= bound <= best * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("node_weight", [1.0, 4.0])
def test_hops_are_certified_to_within_a_few_per_cent(node_weight: float) -> None:
    problem = problem_of(markov_trace(1, 4000), Topology.uniform(2, 2), node_weight=node_weight)
    best, bound = solve(problem, "dp").cost, certified(problem, 20.0)
    assert lower_bound(problem) < bound
    assert bound >= 0.9 * best


def test_a_load_cap_raises_the_bound() -> None:
    trace = markov_trace(2, 3000, num_experts=8)
    free, capped = (problem_of(trace, Topology.uniform(1, 4), load_cap=cap) for cap in (None, 1.15))
    assert solve(capped, "dp").cost > solve(free, "dp").cost
    assert certified(capped, 10.0) > certified(free, 10.0)


def test_real_routing_is_certified(real_trace: Trace) -> None:
    few = Trace(real_trace.experts_TLK[:, :6], real_trace.num_experts)
    problem = problem_of(few, Topology.uniform(1, 8))
    cost = solve(problem, "anneal", seconds=3.0).cost
    bound = certified(problem, 10.0)
    assert bound <= cost
    assert (cost - bound) / cost < 0.12
