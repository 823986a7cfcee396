"""Sweeps, the annealed chain search and recombination: they count right, only get better, and find what is known."""

import itertools

import numpy as np
import pytest

from crossdock.placement.costs.cost import Workload
from crossdock.placement.records.affinity import Affinity
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import Trace
from crossdock.placement.solvers import load_peaks, solve
from crossdock.placement.solvers.problem import Constraints, Objective, Pin, Problem
from crossdock.placement.solvers.search import chain_search, nested, starts
from crossdock.placement.solvers.search.chain import Chain, greedy
from crossdock.placement.solvers.search.layer_search import Deadline
from crossdock.placement.solvers.search.recombine import interchangeable, recombined
from crossdock.placement.solvers.search.swaps import CopyState, TokenSets
from crossdock.placement.solvers.solution import cost_of
from tests.placement.conftest import random_trace

TWO_NODES = Topology.uniform(2, 2)


def problem_of(
    trace: Trace, topology: Topology = TWO_NODES, objective: Objective = "hops", node_weight: float = 1.0, **constraints: object
) -> Problem:
    return Problem(
        Affinity.from_trace(trace),
        topology,
        Workload(),
        objective=objective,
        constraints=Constraints(**constraints),  # type: ignore[arg-type]
        node_weight=node_weight,
    )


@pytest.mark.parametrize("node_weight", [1.0, 4.0])
def test_one_assignment_is_the_best_of_a_layer_between_its_neighbours(node_weight: float) -> None:
    problem = problem_of(random_trace(1, num_tokens=80, num_layers=3, num_experts=5), node_weight=node_weight)
    chain = Chain(problem, starts.random(problem, 3))
    chain.assign(1, 0.0, np.random.default_rng(0))
    device_LE = chain.device_LE.copy()
    costs = []
    for devices in itertools.product(range(4), repeat=5):
        if (np.bincount(devices, minlength=4) <= problem.slots_R).all():
            device_LE[1] = devices
            costs.append(cost_of(problem, device_LE))
    assert cost_of(problem, chain.device_LE) == pytest.approx(min(costs), rel=1e-12)


@pytest.mark.parametrize("load_cap", [None, 1.4])
def test_polishing_never_makes_a_chain_worse(load_cap: float | None) -> None:
    for seed in range(4):
        problem = problem_of(random_trace(seed, num_tokens=150, num_layers=5, num_experts=9), load_cap=load_cap)
        chain = Chain(problem, starts.random(problem, seed))
        before = chain.key()
        chain.polish(Deadline(20.0))
        assert chain.key() <= before


def test_recombination_takes_the_best_layers_of_several_plans() -> None:
    rng = np.random.default_rng(4)
    follow_LE = np.stack([rng.permutation(8) for _ in range(6)])
    trace = Trace(follow_LE[:, np.arange(400) % 8].T[:, :, None].astype(np.uint16), 8)
    problem = problem_of(trace, Topology.uniform(1, 4))
    group_E = np.repeat(np.arange(4), 2)
    perfect_LE = np.empty((6, 8), dtype=np.int64)
    np.put_along_axis(perfect_LE, follow_LE, np.tile(group_E, (6, 1)), axis=1)
    scrambled = starts.random(problem, 0)
    front, back = scrambled.copy(), scrambled.copy()
    front[:3] = perfect_LE[:3]
    back[3:] = (perfect_LE[3:] + 1) % 4  # the same groups under other names
    assert cost_of(problem, recombined(problem, np.stack([front, back]))) == 0.0


def test_recombination_is_never_worse_than_its_parents() -> None:
    for seed in range(3):
        problem = problem_of(random_trace(seed, num_layers=5, num_tokens=200), Topology.uniform(1, 4))
        pool = np.stack([starts.random(problem, 10 * seed + number) for number in range(4)])
        child_LE = recombined(problem, pool)
        assert all((np.bincount(device_E, minlength=4) == problem.slots_R).all() for device_E in child_LE)
        assert cost_of(problem, child_LE) <= min(cost_of(problem, device_LE) for device_LE in pool)


def test_devices_are_interchangeable_only_where_nothing_tells_them_apart() -> None:
    trace = random_trace()
    assert interchangeable(problem_of(trace))
    assert not interchangeable(problem_of(trace, node_weight=3.0))
    assert interchangeable(problem_of(trace, Topology.uniform(4, 1), node_weight=3.0))
    assert not interchangeable(problem_of(trace, pins=(Pin(0, 0, 0),)))


def test_greedy_follows_the_layer_before() -> None:
    trace = Trace(np.stack([np.arange(8) for _ in range(60)])[:, :, None].repeat(4, axis=1).reshape(-1, 4)[:, :, None].astype(np.uint16), 8)
    problem = problem_of(trace, Topology.uniform(1, 4))
    assert cost_of(problem, greedy(problem).device_LE) == 0.0


def test_the_search_starts_from_what_it_is_given() -> None:
    problem = problem_of(random_trace(5, num_layers=4, num_tokens=300))
    good = solve(problem, "anneal", seconds=20.0).plan.device_of_LE().astype(np.int64)
    chain, stopped_by = chain_search.search(problem, 1, Deadline(1e-9), (good,))
    assert stopped_by == "seconds"
    assert cost_of(problem, chain.device_LE) <= cost_of(problem, good)


@pytest.mark.parametrize("objective", ["hops", "devices", "seconds", "nodes"])
def test_sweep_is_never_worse_than_its_starts_and_keeps_pins(objective: Objective) -> None:
    pins = (Pin(0, 7, 0), Pin(1, 1, 3))
    problem = problem_of(random_trace(6, num_tokens=200, num_experts=12, top_k=3), objective=objective, pins=pins)
    solution = solve(problem, "sweep", seconds=20.0)
    assert [solution.plan.device_of_LE()[pin.layer, pin.expert] for pin in pins] == [0, 3]
    for start in (starts.contiguous, starts.balanced):
        assert solution.cost <= cost_of(problem, start(problem)) + 1e-12


@pytest.mark.parametrize("method", ["sweep", "anneal"])
def test_hops_keep_to_a_load_cap(method: str) -> None:
    problem = problem_of(random_trace(7, num_tokens=400, num_layers=4), load_cap=1.2)
    solution = solve(problem, method, seconds=20.0)
    assert max(load_peaks(problem, solution)) <= 1.2 + 1e-9


def test_arriving_counts_what_an_item_brings_to_an_emptied_place() -> None:
    rng = np.random.default_rng(9)
    member_UK = np.sort(np.array([rng.choice(8, 3, replace=False) for _ in range(50)]), axis=1)
    state = CopyState(TokenSets(member_UK, rng.integers(1, 9, 50), 8), np.repeat(np.arange(4), 2), 4)
    taken = np.array([0, 3, 5, 6])
    arriving = state.arriving(taken)
    for x, item in enumerate(taken):
        for y, away in enumerate(taken):
            there = [other for other in range(8) if state.place_I[other] == state.place_I[away] and other not in taken]
            counted = sum(
                count
                for member_K, count in zip(member_UK, state.sets.count_U, strict=True)
                if item in member_K and not np.isin(member_K, there).any()
            )
            assert arriving[x, y] == counted


class Ticks(Deadline):
    """Time that passes by one with every question for it, so that a search ends at every place where it may."""

    def __init__(self, left: float) -> None:
        self.left = left

    @property
    def left_s(self) -> float:
        self.left = max(0.0, self.left - 1.0)
        return self.left

    @property
    def passed(self) -> bool:
        return self.left <= 0.0

    def share(self, parts: float) -> "Ticks":
        return Ticks(self.left / parts)


@pytest.mark.parametrize("load_cap", [None, 1.3])
def test_more_time_never_gives_a_worse_nested_start(load_cap: float | None) -> None:
    problem = problem_of(random_trace(3, num_tokens=600, num_layers=6, num_experts=16), node_weight=4.0, load_cap=load_cap)
    least = nested.start(problem, 0, Ticks(0)).key()
    keys = [nested.start(problem, 0, Ticks(left)).key() for left in range(1, 30)]
    assert max(keys) <= least
    assert min(keys) < least  # time is used


@pytest.mark.parametrize("load_cap", [None, 1.3])
def test_a_nested_start_is_whole_and_close_to_its_polished_self(load_cap: float | None) -> None:
    """Every device holds its slots, and fewer tokens leave their node than under a random plan."""
    problem = problem_of(random_trace(3, num_tokens=600, num_layers=6, num_experts=16), node_weight=4.0, load_cap=load_cap)
    assert nested.suits(problem)
    chain = nested.start(problem, 0, Deadline(5.0))
    assert chain.node_LI is None
    assert all((np.bincount(device_I, minlength=4) == problem.slots_R).all() for device_I in chain.device_LI)
    assert chain.cost_tokens() < 0.95 * Chain(problem, starts.random(problem, 0)).cost_tokens()


def test_an_assignment_stays_within_the_nodes_that_are_fixed() -> None:
    problem = problem_of(random_trace(4, num_tokens=200, num_layers=3, num_experts=8), node_weight=4.0)
    chain = Chain(problem, starts.random(problem, 1))
    node_R = np.array(problem.topology.node_of_R)
    chain.node_LI = node_R[chain.device_LI]
    before = chain.device_LI.copy()
    chain.assign(1, 50.0, np.random.default_rng(2))
    assert (node_R[chain.device_LI] == node_R[before]).all()
    assert (chain.device_LI[1] != before[1]).any()


def test_nodes_first_only_where_they_differ_in_nothing() -> None:
    trace = random_trace(5, num_tokens=100, num_layers=3, num_experts=8)
    assert not nested.suits(problem_of(trace, node_weight=1.0))
    assert not nested.suits(problem_of(trace, Topology.uniform(1, 4), node_weight=4.0))
    assert not nested.suits(problem_of(trace, Topology.uniform(4, 1), node_weight=4.0))
    assert not nested.suits(problem_of(trace, node_weight=4.0, pins=(Pin(0, 0, 0),)))
