"""The convex relaxation of who shares a group: never above an exact optimum, tight where groups are clear, better than the quick bound."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossdock.errors import InfeasiblePlan
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import Trace
from crossdock.placement.solvers import solve
from crossdock.placement.solvers.certificates.bounds import copies_to_devices
from crossdock.placement.solvers.certificates.certificate import certified
from crossdock.placement.solvers.certificates.together import _clipped_to_load, _Layer, fewest_copies
from crossdock.placement.solvers.problem import Objective
from crossdock.placement.solvers.search.layer_search import Deadline
from crossdock.placement.solvers.solution import copies_to
from tests.placement.conftest import random_trace
from tests.placement.solvers.certificates.test_certificate import problem_of


def grouped_trace(seed: int, num_experts: int, size: int, stray: float, num_tokens: int = 3000, top_k: int = 4) -> Trace:
    """Hidden groups of `size` experts; a token takes its experts from one of them, each with probability `stray` from anywhere."""
    rng = np.random.default_rng(seed)
    group_GS = rng.permutation(num_experts).reshape(-1, size)
    experts_TK = np.stack([rng.permutation(group_GS[group])[:top_k] for group in rng.integers(0, len(group_GS), num_tokens)])
    for token, choice in zip(*np.nonzero(rng.random(experts_TK.shape) < stray), strict=True):
        free = np.setdiff1d(np.arange(num_experts), experts_TK[token])
        experts_TK[token, choice] = rng.choice(free)
    return Trace(experts_TK[:, None], num_experts)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(4, 8), st.sampled_from([2, 3, 4]), st.sampled_from([None, 1.2, 1.6]), st.sampled_from([2, 3]))
def test_the_bound_never_exceeds_the_fewest_copies_of_any_plan(seed, num_experts, num_devices, load_cap, top_k):
    trace = random_trace(seed, num_experts=num_experts, num_layers=2, top_k=top_k, drop=0.1)
    problem = problem_of(trace, Topology.uniform(1, num_devices), "devices", load_cap=load_cap)
    try:
        plan = solve(problem, "dp").plan
    except InfeasiblePlan:
        return
    fewest_L = copies_to(problem, plan.device_of_LE().astype(np.int64), num_devices).sum(axis=1)
    bound_L = fewest_copies(problem, num_devices, Deadline(0.3), capped=True)
    assert (bound_L <= fewest_L * (1 + 1e-9)).all()


@pytest.mark.parametrize("objective", ["devices", "nodes", "seconds"])
def test_hidden_groups_of_64_experts_are_certified_to_within_two_per_cent(objective: Objective):
    problem = problem_of(
        grouped_trace(0, 64, 8, 0.02), Topology.uniform(8, 1) if objective == "nodes" else Topology.uniform(1, 8), objective
    )
    best = solve(problem, "auto", 2.0)
    bound = certified(problem, 10.0)
    assert bound <= best.cost * (1 + 1e-9)
    if objective != "seconds":  # seconds also hold the busiest port, for which copies are spread evenly in the bound
        assert bound >= 0.98 * best.cost


def test_scattered_tokens_are_bounded_far_better_than_by_the_largest_coactivations():
    problem = problem_of(grouped_trace(1, 64, 8, 0.3), Topology.uniform(1, 8), "devices")
    best = solve(problem, "auto", 2.0).cost * problem.affinity.num_tokens
    quick, bound = copies_to_devices(problem)[0], fewest_copies(problem, 8, Deadline(10.0), capped=True)[0]
    assert quick < bound <= best
    assert best - bound < 0.6 * (best - quick)


def test_a_load_cap_raises_the_bound():
    trace = grouped_trace(2, 32, 4, 0.05)
    popular = Trace(np.concatenate([trace.experts_TLK, np.repeat(trace.experts_TLK[:1], 2000, axis=0)]), 32)
    free, capped = (problem_of(popular, Topology.uniform(1, 8), "devices", load_cap=cap) for cap in (None, 1.1))
    assert fewest_copies(capped, 8, Deadline(5.0), capped=True) > 1.02 * fewest_copies(free, 8, Deadline(5.0), capped=True)
    assert fewest_copies(capped, 8, Deadline(5.0), capped=False) == pytest.approx(
        fewest_copies(free, 8, Deadline(5.0), capped=True), rel=0.01
    )


def test_the_tangent_touches_at_a_real_grouping():
    trace = random_trace(5, num_experts=8, top_k=3, drop=0.1)
    problem = problem_of(trace, Topology.uniform(1, 4), "devices")
    device_LE = np.random.default_rng(0).permuted(np.tile(np.arange(8) // 2, (3, 1)), axis=1)
    copies_L = copies_to(problem, device_LE, 4).sum(axis=1)
    for number in range(3):
        layer = _Layer(problem, number, 4, None)
        together_EE = (device_LE[number][:, None] == device_LE[number]).astype(float)
        constant, slopes_EE = layer._tangent(together_EE)
        assert constant - (slopes_EE * together_EE).sum() == pytest.approx(copies_L[number])
        other_EE = (np.arange(8)[:, None] // 2 == np.arange(8) // 2).astype(float)
        elsewhere = copies_to(problem, np.tile(np.arange(8) // 2, (3, 1)), 4).sum(axis=1)[number]
        assert constant - (slopes_EE * other_EE).sum() <= elsewhere + 1e-9


def test_it_says_nothing_where_it_knows_nothing():
    problem = problem_of(random_trace(top_k=1), Topology.uniform(1, 4), "devices")
    assert fewest_copies(problem, 4, Deadline(1.0), capped=True).tolist() == [0.0] * 3
    assert fewest_copies(problem_of(random_trace(), Topology.uniform(1, 4), "devices"), 3, Deadline(1.0), capped=True).tolist() == [0.0] * 3


def test_the_projection_onto_the_load_is_the_nearest_point() -> None:
    rng = np.random.default_rng(4)
    target_II, load_I = rng.normal(0.5, 0.5, (6, 6)), rng.random(6)
    box, price_I = _clipped_to_load(target_II, load_I)
    assert (box @ load_I <= 1 + 1e-9).all()
    np.testing.assert_allclose(box, np.clip(target_II - price_I[:, None] * load_I, 0, 1))
    assert all(price == 0 or row @ load_I == pytest.approx(1.0) for price, row in zip(price_I, box, strict=True))
