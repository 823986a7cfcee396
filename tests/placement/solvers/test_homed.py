"""Experts and homes together: tables that know homes, the joint optimum of small cases, and never worse than what it begins from."""

import dataclasses
import itertools

import numpy as np
import pytest

from crossdock.errors import InfeasiblePlan, UsageError
from crossdock.placement.analysis.homing_score import Setting, solve_with_homes
from crossdock.placement.costs.cost import Workload
from crossdock.placement.homing.forecast import Forecast
from crossdock.placement.homing.homes import CopyCosts, assign_homes, known_costs, sequences_of
from crossdock.placement.records.affinity import Affinity
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import Trace
from crossdock.placement.solvers import homed, solve
from crossdock.placement.solvers.problem import Constraints, Pin, Problem, Solution
from crossdock.placement.solvers.search.swaps import CopyState, TokenSets


def themed_trace(
    seed: int, *, num_sequences: int = 16, length: int = 10, num_experts: int = 8, num_layers: int = 2, themes: int = 2
) -> Trace:
    """Sequences of one theme prefer the experts of that theme, which are others in every layer."""
    rng = np.random.default_rng(seed)
    theme_Q = rng.integers(0, themes, num_sequences)
    liking_HLE = rng.random((themes, num_layers, num_experts)) ** 3
    score_TLE = np.repeat(liking_HLE[theme_Q], length, axis=0) + 0.5 * rng.random((num_sequences * length, num_layers, num_experts))
    experts_TLK = np.argsort(-score_TLE, axis=2)[:, :, :2]
    token_T = np.repeat(theme_Q, length) * 5 + rng.integers(0, 5, num_sequences * length)
    return Trace(experts_TLK, num_experts, sequence_T=np.arange(len(token_T)) // length, token_T=token_T)


def problem_of(trace: Trace, topology: Topology, objective: str = "devices", **options: object) -> Problem:
    return Problem(Affinity.from_trace(trace), topology, Workload(), objective=objective, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(4))
def test_swap_tables_know_what_a_copy_costs_from_each_home(seed: int) -> None:
    rng = np.random.default_rng(seed)
    member_UK = np.array([[0, 1, 8], [0, 2, 5], [3, 4, 6], [1, 7, 8], [2, 3, 7]])
    cost_HP = rng.integers(0, 9, (3, 4)).astype(float)
    sets = TokenSets(member_UK, rng.integers(1, 6, 5), 8, rng.integers(0, 3, 5))
    place_I = rng.permutation(np.arange(8) % 4)
    state = CopyState(sets, place_I, 4, cost_HP)
    for _ in range(12):
        a, b = rng.choice(8, 2, replace=False)
        if state.place_I[a] == state.place_I[b]:
            continue
        p, q = state.place_I[a], state.place_I[b]
        change = state.change_first(np.array([a]), np.array([b])), state.change_first(np.array([b]), np.array([a]))
        before = state.copies_P.copy()
        state.swap(int(a), int(b))
        anew = CopyState(sets, state.place_I, 4, cost_HP)
        np.testing.assert_allclose(state.copies_P, anew.copies_P)
        np.testing.assert_allclose(state._alone[:8, :8], anew._alone[:8, :8])
        np.testing.assert_allclose(state._absent[:8], anew._absent[:8])
        assert state.copies_P[p] - before[p] == pytest.approx(change[0][0])
        assert state.copies_P[q] - before[q] == pytest.approx(change[1][0])


def least_of_all(trace: Trace, costs: CopyCosts) -> float:
    """The joint optimum, by trying all placements of each layer; homes are exact for each."""
    sequence_T, num_experts = sequences_of(trace), trace.num_experts
    halves = [np.isin(np.arange(num_experts), half).astype(int) for half in itertools.combinations(range(num_experts), num_experts // 2)]
    best = np.inf
    for device_LE in itertools.product(halves, repeat=trace.num_layers):
        cost_QH = known_costs(trace, sequence_T, Plan.from_devices(np.stack(device_LE), 2), costs)
        best = min(best, float(cost_QH[np.arange(len(cost_QH)), assign_homes(cost_QH)].sum()))
    return best


@pytest.mark.parametrize("seed", range(4))
def test_small_cases_reach_the_joint_optimum(seed: int) -> None:
    trace, topology = themed_trace(seed, num_sequences=6, length=4, num_experts=4, num_layers=2), Topology.uniform(1, 2)
    problem, costs = problem_of(trace, topology), CopyCosts.of(topology, Workload(), "devices")
    begun = [solve(problem, method, 1.0, 0).plan.device_of_LE().astype(np.int64) for method in ("contiguous", "auto")]
    found = homed.improve(problem, trace, sequences_of(trace), costs, begun, 5.0, seed)
    assert found.value * trace.num_tokens * trace.num_layers == pytest.approx(least_of_all(trace, costs))
    assert np.bincount(found.home_Q).tolist() == [3, 3]


@pytest.mark.parametrize("objective", ["devices", "nodes", "seconds"])
@pytest.mark.parametrize("dispatch", ["flat", "deduplicated", "hierarchical"])
def test_it_is_never_worse_than_the_plans_it_begins_from(objective: str, dispatch: str) -> None:
    trace, topology = themed_trace(1, num_sequences=24, num_experts=12, themes=4), Topology.uniform(2, 2, other_node_bytes_per_s=1e9)
    workload = Workload(dispatch=dispatch, tokens_per_rank=60, expert_width=64)  # type: ignore[arg-type]
    problem = Problem(Affinity.from_trace(trace), topology, workload, objective=objective)  # type: ignore[arg-type]
    costs, sequence_T = CopyCosts.of(topology, workload, objective), sequences_of(trace)
    plans = [solve(problem, method, 1.0, 0).plan for method in ("contiguous", "auto")]
    found = homed.improve(problem, trace, sequence_T, costs, [plan.device_of_LE().astype(np.int64) for plan in plans], 4.0, 0)

    def cost_of(plan: Plan) -> float:
        cost_QH = known_costs(trace, sequence_T, plan, costs)
        return float(cost_QH[np.arange(len(cost_QH)), assign_homes(cost_QH)].sum())

    joint = Plan.from_devices(found.device_LE, 4)
    if objective == "seconds":  # load counts as well there
        assert found.value > 0
        assert cost_of(joint) <= 1.2 * min(map(cost_of, plans))
    else:
        assert cost_of(joint) <= min(map(cost_of, plans)) * (1 + 1e-9)
        assert found.value * trace.num_tokens * trace.num_layers == pytest.approx(cost_of(joint))


def test_planning_with_homes_beats_homes_for_a_plan_without() -> None:
    """Two themes with experts of their own: with homes nearly everything stays, whatever co-activation alone would do."""
    trace, topology = themed_trace(5, num_sequences=32, num_experts=8, num_layers=3), Topology.uniform(1, 2)
    problem = problem_of(trace, topology)
    setting, forecast = Setting.of(problem, trace, batch_sequences=8), Forecast.fit(trace)
    auto = solve(problem, "auto", 1.0, 0)
    joint = solve_with_homes(setting, [auto], forecast, 3.0, 0)
    of_auto, of_joint = setting.row("auto", auto.plan, forecast), setting.row("joint", joint.plan, forecast)
    assert of_auto.forecast is not None
    assert of_joint.forecast is not None
    assert of_joint.forecast.remote_copies < of_auto.forecast.remote_copies < of_auto.read.remote_copies
    assert of_joint.known.remote_copies <= of_joint.forecast.remote_copies
    assert joint.cost == pytest.approx(of_joint.forecast.remote_copies)
    assert joint.plan.method == "auto+homing"
    assert of_joint.saved == pytest.approx(1 - of_joint.forecast.remote_copies / of_joint.read.remote_copies)


def test_pins_slots_and_load_caps_are_kept() -> None:
    trace, topology = themed_trace(2), Topology.uniform(1, 2)
    constraints = Constraints(load_cap=1.3, slots=5, pins=(Pin(0, 3, 1), Pin(1, 6, 0)))
    problem = problem_of(trace, topology, constraints=constraints)
    begun = solve(problem, "anneal", 1.0, 0)
    joint = solve_with_homes(Setting.of(problem, trace), [begun], None, 2.0, 0)
    device_LE = joint.plan.device_of_LE()
    assert (device_LE[0, 3], device_LE[1, 6]) == (1, 0)
    assert joint.plan.slots_per_device == 5
    for layer in range(2):
        load_R = np.bincount(device_LE[layer], problem.affinity.load_LE[layer], 2)
        assert load_R.max() / load_R.mean() <= 1.3 + 1e-9


def test_a_plan_with_replicas_may_win() -> None:
    trace, topology = themed_trace(0), Topology.uniform(1, 2)
    problem = problem_of(trace, topology, constraints=Constraints(slots=8))
    everywhere = Plan(np.tile(np.arange(8), (2, 2, 1)), 8, method="copies")  # nothing ever leaves its device
    copied = Solution(everywhere, 0.0, None, 0.0, "done")
    joint = solve_with_homes(Setting.of(problem, trace), [copied], None, 1.0, 0)
    assert joint.cost == 0.0
    assert (joint.plan.method, joint.plan.digest) == ("copies+homing", copied.plan.digest)


def test_what_keeps_to_no_constraint_is_not_returned() -> None:
    """Seven of ten choices are one expert's: no plan with one copy of it keeps to the cap; one with two is taken as it is."""
    rng = np.random.default_rng(0)
    experts_TLK = np.where(rng.random((400, 1, 1)) < 0.7, 0, rng.integers(1, 4, (400, 1, 1))).astype(np.uint16)
    trace = Trace(experts_TLK, 4, home_T=(np.arange(400) % 2).astype(np.int32), sequence_T=np.repeat(np.arange(40), 10).astype(np.int32))
    topology = Topology.uniform(1, 2)
    single = problem_of(trace, topology, constraints=Constraints(load_cap=1.3))
    broken = solve(problem_of(trace, topology), "contiguous", 1.0, 0)
    with pytest.raises(InfeasiblePlan, match=r"above load cap 1\.3"):
        solve_with_homes(Setting.of(single, trace), [broken], None, 0.5, 0)
    copied = problem_of(trace, topology, constraints=Constraints(load_cap=1.3, spare_slots=1))
    begun = solve(copied, "auto", 1.0, 0)
    found = solve_with_homes(Setting.of(copied, trace), [broken, begun], None, 0.5, 0)
    assert found.plan.digest == begun.plan.digest


@pytest.mark.parametrize("objective", ["devices", "nodes"])
def test_distinct_places_are_no_objective_for_copies_of_flat_dispatch(objective: str) -> None:
    trace, topology = themed_trace(0), Topology.uniform(2, 1)
    problem = Problem(Affinity.from_trace(trace), topology, Workload(dispatch="flat"), objective=objective)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=f"objective {objective} counts distinct {objective}, and flat dispatch sends a copy to each"):
        Setting.of(problem, trace)
    Setting.of(dataclasses.replace(problem, objective="seconds"), trace)
