"""The search for the cheapest set of a group against all sets, and the bound on it against exact optima and the listed program."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import Trace
from crossdock.placement.solvers import columns, solve
from crossdock.placement.solvers.certificates import generated
from crossdock.placement.solvers.certificates.certificate import certified
from crossdock.placement.solvers.certificates.pricing import Pricing
from crossdock.placement.solvers.problem import Problem
from crossdock.placement.solvers.search.layer_search import Deadline
from crossdock.placement.solvers.search.price import Layer, layer_of
from crossdock.placement.solvers.solution import copies_to
from tests.placement.conftest import random_trace
from tests.placement.solvers.certificates.test_certificate import problem_of
from tests.placement.solvers.certificates.test_together import grouped_trace


def costs_of_all(layer: Layer, size: int, price_I: np.ndarray) -> dict[tuple[int, ...], float]:
    """Every set of items with the tokens that use it less its prices, by counting."""
    uses_UI = np.zeros((len(layer.count_U), layer.num_items + 1), dtype=bool)
    np.put_along_axis(uses_UI, layer.member_UK, True, axis=1)
    sets = combinations(range(layer.num_items), size)
    return {members: float(layer.count_U[uses_UI[:, members].any(axis=1)].sum() - price_I[list(members)].sum()) for members in sets}


def layer_and_problem(seed: int, num_experts: int, num_devices: int, top_k: int) -> tuple[Layer, Problem]:
    trace = random_trace(seed, num_tokens=200, num_experts=num_experts, num_layers=1, top_k=top_k, drop=0.1)
    problem = problem_of(trace, Topology.uniform(1, num_devices), "devices")
    return layer_of(problem, 0), problem


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(7, 12), st.integers(3, 6), st.integers(1, 6), st.floats(0.0, 1.0))
def test_the_search_finds_every_set_below_the_threshold_and_the_cheapest(seed, num_experts, size, top_k, share):
    layer, _ = layer_and_problem(seed, num_experts, 1, top_k)
    price_I = np.random.default_rng(seed).uniform(0.0, 60.0, layer.num_items)
    cost = costs_of_all(layer, size, price_I)
    threshold = float(np.quantile(list(cost.values()), 0.3 * share)) + 0.01
    search = Pricing(layer, price_I, size, threshold, Deadline(60.0))
    lowest = search.lowest()
    assert lowest == pytest.approx(min(*cost.values(), threshold))
    assert search.is_finished == (len(search.found) < 400)
    if search.is_finished:
        found = {tuple(members.tolist()): value for value, members in search.found}
        assert found == pytest.approx({members: value for members, value in cost.items() if value < threshold})


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(4, 5), st.integers(2, 5), st.integers(0, 2))
def test_a_search_that_must_stop_still_proves_a_bound(seed, size, top_k, most_nodes):
    layer, _ = layer_and_problem(seed, 11, 1, top_k)
    price_I = np.random.default_rng(seed).uniform(0.0, 60.0, layer.num_items)

    class After(Deadline):
        @property
        def passed(self) -> bool:
            return search.num_nodes > most_nodes

    cheapest = min(costs_of_all(layer, size, price_I).values())
    search = Pricing(layer, price_I, size, cheapest + 20.0, After(60.0))
    assert search.lowest() <= cheapest + 1e-9


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(6, 2), (7, 2), (8, 2)]), st.sampled_from([2, 3, 4]), st.sampled_from([0, 3]))
def test_the_bound_never_exceeds_the_fewest_copies_of_any_plan(seed, shape, top_k, quiet):
    num_experts, num_devices = shape
    trace = random_trace(seed, num_experts=num_experts, num_layers=2, top_k=top_k, drop=0.1)
    problem = problem_of(trace, Topology.uniform(1, num_devices), "devices")
    fewest_L = copies_to(problem, solve(problem, "dp").plan.device_of_LE().astype(np.int64), num_devices).sum(axis=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generated, "QUIET", quiet)  # without the local search the first prices are wrong, and the proof has to say so
        bound_L, open_L = generated.fewest_copies(problem, num_devices, Deadline(30.0))
    assert (bound_L <= fewest_L).all()
    assert not open_L.any()


def test_the_bound_of_listed_sets_is_reached():
    problem = problem_of(grouped_trace(0, 24, 4, 0.4), Topology.uniform(1, 6), "devices")
    listed = columns.solve_layers(problem, Deadline(60.0), bounds_only=True)[0].bound
    bound_L, _ = generated.fewest_copies(problem, 6, Deadline(60.0))
    assert listed * (1.0 - 1.5 * generated.SLACKS[-1]) <= bound_L[0] <= listed


def test_prices_that_are_not_the_best_cost_sharpness_and_no_validity(monkeypatch):
    monkeypatch.setattr(generated, "QUIET", 0)  # no local search: only the sets beside a quick plan are known
    problem = problem_of(random_trace(3, num_tokens=400, num_experts=20, num_layers=1, top_k=4), Topology.uniform(1, 4), "devices")
    listed = columns.solve_layers(problem, Deadline(60.0), bounds_only=True)[0].bound
    layer = generated.Generation(layer_of(problem, 0), generated._begun(problem, 4)[0], 4, Deadline(60.0))
    bounds = []
    for slack in (0.0, *[1e-6] * 12):
        layer.prove(slack)
        bounds.append(layer.bound)
    assert 0.0 < bounds[0] < 0.99 * listed
    assert bounds[0] < bounds[-1] <= listed


def test_scattered_tokens_of_64_experts_are_certified_to_within_two_per_cent():
    problem = problem_of(grouped_trace(1, 64, 8, 0.3), Topology.uniform(1, 8), "devices")
    best = solve(problem, "auto", 2.0)
    bound = certified(problem, 60.0)
    assert 0.98 * best.cost <= bound <= best.cost * (1 + 1e-9)


def test_nodes_are_groups_as_well_and_vacancies_items():
    trace = Trace(grouped_trace(2, 40, 5, 0.2).experts_TLK[:, :, :3], 40)
    problem = problem_of(trace, Topology.uniform(7, 1), "nodes", slots=6)  # 42 slots for 40 experts
    bound_L, open_L = generated.fewest_copies(problem, 7, Deadline(60.0))
    assert not open_L.any()
    best = solve(problem, "auto", 2.0).cost * trace.num_tokens
    assert 0.97 * best <= bound_L[0] <= best * (1 + 1e-9)
