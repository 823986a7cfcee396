"""Copies of hot experts: priced as the evaluator prices them, within every constraint or refused, and never a loss."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossdock.errors import InfeasiblePlan, UsageError
from crossdock.placement.costs.cost import Dispatch, Workload
from crossdock.placement.costs.evaluate import evaluate
from crossdock.placement.costs.replication import gradient_bytes, gradient_bytes_by_class, gradient_seconds, memory_bytes, share_sizes
from crossdock.placement.records.affinity import Affinity
from crossdock.placement.records.plan import EMPTY, Plan
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import Trace
from crossdock.placement.solvers import load_peaks, solve
from crossdock.placement.solvers.problem import Constraints, Objective, Pin, Problem
from crossdock.placement.solvers.replicas import add_copies, slots_of
from crossdock.placement.solvers.search.copied_layer import CopiedLayer
from crossdock.placement.solvers.search.layer_search import Deadline
from crossdock.placement.solvers.solution import cost_of_plan
from tests.placement.conftest import random_plan, random_trace

TWO_NODES = Topology.uniform(2, 2, same_node_bytes_per_s=1e10, other_node_bytes_per_s=1e9)
WORKLOAD = Workload(tokens_per_rank=4096, model_width=64, expert_width=16)


def hot_trace(seed: int = 0, *, hot: float = 0.6, num_layers: int = 2, num_experts: int = 8, num_tokens: int = 200) -> Trace:
    """Top-1 routing where expert 0 of every layer takes the share `hot`."""
    rng = np.random.default_rng(seed)
    experts_TL = rng.integers(1, num_experts, (num_tokens, num_layers))
    experts_TL[rng.random((num_tokens, num_layers)) < hot] = 0
    return Trace(experts_TL[:, :, None].astype(np.uint16), num_experts)


def holds_of(plan: Plan) -> np.ndarray:
    return plan.slot_LRE != EMPTY


def problem_of(trace: Trace, topology: Topology = TWO_NODES, workload: Workload = WORKLOAD, **kwargs: object) -> Problem:
    fields = {name: kwargs.pop(name) for name in ("objective", "also") if name in kwargs}
    return Problem(Affinity.from_trace(trace), topology, workload, constraints=Constraints(**kwargs), **fields)  # type: ignore[arg-type]


# ---- what gradients of copies carry -------------------------------------------------------------------------------


def test_gradients_of_copies_worked_by_hand() -> None:
    # expert 0 on devices 0, 1 and 2, expert 1 on 3 alone: 7 parameters of 4 bytes in shares of 3, 2 and 2
    plan = Plan(np.array([[[0], [0], [0], [1]]]), 2)
    workload = Workload(model_width=7, expert_width=1, expert_matrices=1)
    assert share_sizes(7, 3).tolist() == [3, 2, 2]
    bytes_RR = gradient_bytes(plan, workload)
    assert bytes_RR.tolist() == [[0, 8, 8, 0], [12, 0, 8, 0], [12, 8, 0, 0], [0, 0, 0, 0]]
    assert gradient_bytes_by_class(bytes_RR, TWO_NODES) == (0, 2 * (8 + 12), 2 * (8 + 8 + 12 + 8))
    # device 2 receives 16 bytes over the node's edge, then sends them back; latencies of both classes once a hop
    assert gradient_seconds(bytes_RR, TWO_NODES) == pytest.approx(2 * 2e-5 + (20 + 20) / 1e9, rel=1e-6)
    assert gradient_seconds(np.zeros((4, 4)), TWO_NODES) == 0.0


def test_a_step_contains_the_gradients_of_copies() -> None:
    trace, plan = random_trace(3), random_plan(1, num_slots=4)
    assert plan.has_replicas
    found = evaluate(trace, plan, TWO_NODES, WORKLOAD)
    assert found.gradient_s == pytest.approx(float(gradient_seconds(gradient_bytes(plan, WORKLOAD), TWO_NODES)))
    assert found.step_s == pytest.approx(float(found.block.total_s.sum()) + found.gradient_s)
    assert sum(found.gradient_bytes_by_class) > 0
    assert evaluate(trace, random_plan(1), TWO_NODES, WORKLOAD).gradient_s == 0.0


# ---- the price of a copy --------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 999),
    objective=st.sampled_from(["seconds", "devices", "nodes"]),
    dispatch=st.sampled_from(["flat", "deduplicated", "hierarchical"]),
)
@settings(max_examples=60)
def test_every_copy_is_priced_as_the_slow_path_prices_it(seed: int, objective: Objective, dispatch: Dispatch) -> None:
    trace = random_trace(seed, num_tokens=60, num_layers=1, top_k=3, drop=0.1)
    workload = dataclasses.replace(WORKLOAD, dispatch=dispatch)
    problem = problem_of(trace, workload=workload, objective=objective, spare_slots=2)
    plan = random_plan(seed, num_layers=1, num_slots=4)
    layer = CopiedLayer(problem, 0, holds_of(plan)[0])
    rng = np.random.default_rng(seed)
    for _ in range(3):
        expert = int(rng.integers(8))
        target_B = np.flatnonzero(~layer.holds_RE[:, expert])
        if not len(target_B):
            continue
        priced = layer.with_copy(expert, target_B)
        for target, value in zip(target_B.tolist(), priced.value_B, strict=True):
            assert value == pytest.approx(slow_value(problem, layer.holds_RE, expert, target), rel=1e-9)
        layer.add(expert, int(target_B[0]))
        assert layer.priced().value_B[0] == pytest.approx(slow_value(problem, layer.holds_RE), rel=1e-9)


def slow_value(problem: Problem, holds_RE: np.ndarray, expert: int = 0, target: int | None = None) -> float:
    """The objective without the gradients' share, by `cost_of_plan`."""
    holds_RE = holds_RE.copy()
    if target is not None:
        holds_RE[target, expert] = True
    slots = [[*np.flatnonzero(held_E), *[EMPTY] * (8 - int(held_E.sum()))] for held_E in holds_RE]
    plan = Plan(np.array([slots]), 8)
    gradients = float(gradient_seconds(gradient_bytes(plan, problem.workload), problem.topology)) if problem.objective == "seconds" else 0.0
    return cost_of_plan(problem, plan) - gradients


# ---- promises --------------------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 999),
    method=st.sampled_from(["replicas", "auto", "eplb"]),
    room=st.sampled_from([{"slots": 4}, {"spare_slots": 1}, {"replicas": 3}, {"spare_bytes": 5e5}, {"spare_slots": 2, "replicas": 2}]),
    load_cap=st.sampled_from([None, 1.2, 1.6]),
    objective=st.sampled_from(["seconds", "devices", "nodes"]),
    memory_fraction=st.sampled_from([None, 1e-5, 2e-5]),
    pinned=st.booleans(),
)
@settings(max_examples=40)
def test_every_plan_places_every_expert_within_every_constraint_or_is_refused(
    seed: int,
    method: str,
    room: dict[str, float],
    load_cap: float | None,
    objective: Objective,
    memory_fraction: float | None,
    pinned: bool,
) -> None:
    trace = hot_trace(seed) if seed % 2 else random_trace(seed, num_layers=2)
    pins = (Pin(0, seed % 8, seed % 4), Pin(1, seed % 7, 3)) if pinned else ()
    other = Affinity.from_trace(hot_trace(seed + 1, hot=0.3))
    affinity = Affinity.from_trace(trace)
    refusal: InfeasiblePlan | None = None
    also = (affinity, other) if load_cap and seed % 3 == 0 else ()
    try:
        constraints = Constraints(load_cap=load_cap, memory_fraction=memory_fraction, pins=pins, **room)  # type: ignore[arg-type]
        problem = Problem(affinity, TWO_NODES, WORKLOAD, objective=objective, constraints=constraints, also=also)
        solution = solve(problem, method, seconds=0.2, seed=seed)
    except InfeasiblePlan as error:
        refusal = error
    if refusal is not None:
        assert refusal.exit_code == 3
        assert any(word in str(refusal) for word in ("load cap", "slots", "memory", "pins", "replicas"))
        return
    plan = solution.plan  # that every expert has a slot is checked by Plan itself
    plan.check_model(2, 8, 4)
    held_LR = (plan.slots_LRS != EMPTY).sum(axis=2)
    assert (held_LR <= problem.slots_R).all()
    assert all(plan.slot_LRE[pin.layer, pin.device, pin.expert] >= 0 for pin in pins)
    if "replicas" in room:
        assert (held_LR.sum(axis=1) - 8 <= room["replicas"]).all()
    if memory_fraction is not None:
        assert (memory_bytes(plan, WORKLOAD) <= memory_fraction * TWO_NODES.memory_bytes_R).all()
    if load_cap is not None:
        assert max(load_peaks(problem, solution)) <= load_cap + 1e-9
    found = evaluate(trace, plan, TWO_NODES, WORKLOAD)
    value = {"seconds": found.step_s, "devices": found.devices_per_token, "nodes": found.nodes_per_token}[objective]
    assert solution.cost == pytest.approx(value, rel=1e-9)


@given(seed=st.integers(0, 999), other_node_bytes_per_s=st.sampled_from([1e7, 1e9, 1e11]))
@settings(max_examples=40)
def test_copies_are_never_a_loss(seed: int, other_node_bytes_per_s: float) -> None:
    topology = Topology.uniform(2, 2, flop_per_s=1e11, same_node_bytes_per_s=1e11, other_node_bytes_per_s=other_node_bytes_per_s)
    problem = problem_of(hot_trace(seed), topology, spare_slots=2)
    base = random_plan(seed, num_layers=2)
    found_LRE, _ = add_copies(problem, holds_of(base), Deadline(5.0))
    assert (found_LRE >= holds_of(base)).all()
    after = Plan(slots_of_holds(found_LRE), 8)
    assert cost_of_plan(problem, after) <= cost_of_plan(problem, base) * (1 + 1e-12)


def slots_of_holds(holds_LRE: np.ndarray) -> np.ndarray:
    return np.array([[[*np.flatnonzero(held_E), *[EMPTY] * (8 - int(held_E.sum()))] for held_E in holds_RE] for holds_RE in holds_LRE])


def test_a_hot_expert_is_copied_where_compute_is_slow_and_not_where_links_are() -> None:
    trace = hot_trace(num_layers=3)
    slow = Topology.uniform(1, 4, flop_per_s=1e10, same_node_bytes_per_s=1e10)
    copied = solve(problem_of(trace, slow, spare_slots=1), "auto", seconds=3.0)
    assert (holds_of(copied.plan)[:, :, 0].sum(axis=1) == 4).all()  # 60 % of the load, on a device each
    assert copied.cost < 0.6 * solve(problem_of(trace, slow), "auto", seconds=3.0).cost
    narrow = Topology.uniform(1, 4, flop_per_s=1e14, same_node_bytes_per_s=1e6)
    wide = dataclasses.replace(WORKLOAD, tokens_per_rank=16, expert_width=4096)
    alone = solve(problem_of(trace, narrow, wide, spare_slots=1), "auto", seconds=3.0)
    assert not alone.plan.has_replicas
    assert alone.cost < solve(problem_of(trace, narrow, wide, spare_slots=1), "eplb", seconds=3.0).cost


def test_copies_keep_to_a_load_cap_that_single_experts_cannot_keep_to() -> None:
    trace = hot_trace(num_layers=2)
    with pytest.raises(InfeasiblePlan, match="load cap"):
        solve(problem_of(trace, load_cap=1.3), "auto", seconds=1.0)
    problem = problem_of(trace, load_cap=1.3, spare_slots=1)
    for method in ("replicas", "auto"):
        assert max(load_peaks(problem, solve(problem, method, seconds=2.0))) <= 1.3 + 1e-9


def test_auto_with_room_is_no_worse_than_the_methods_it_knows() -> None:
    problem = problem_of(hot_trace(5, hot=0.4), slots=4)
    best = solve(problem, "auto", seconds=2.0)
    assert best.plan.method == "auto"
    assert all(best.cost <= solve(problem, method, seconds=2.0).cost * (1 + 1e-12) for method in ("eplb", "eplb_global", "balance"))


def test_slots_of_one_device_each_are_the_plan() -> None:
    problem = problem_of(random_trace(), slots=2)
    device_LE = random_plan(4).device_of_LE()
    assert Plan(slots_of(problem, device_LE), 8).digest == Plan.from_devices(device_LE, 4, 2).digest


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_memory_that_holds_no_copy_is_named() -> None:
    state_bytes = WORKLOAD.expert_state_bytes
    with pytest.raises(InfeasiblePlan, match=r"spare bytes 55,000 hold no copy: a slot in each of 3 layers takes 165,888 bytes"):
        problem_of(random_trace(), spare_bytes=55_000)
    assert problem_of(random_trace(), spare_bytes=6.5 * state_bytes).slots_R.tolist() == [4] * 4
    with pytest.raises(InfeasiblePlan, match=r"memory fraction .* leaves no room for copies: 2 to 2 slots on 4 devices hold 8 experts"):
        problem_of(random_trace(), memory_fraction=6.5 * state_bytes / 8e10, spare_slots=2)


@given(
    seed=st.integers(0, 999),
    objective=st.sampled_from(["seconds", "devices", "nodes"]),
    room=st.sampled_from([{"spare_slots": 1}, {"slots": 3}, {"replicas": 3}]),
    method=st.sampled_from(["auto", "replicas"]),
)
@settings(max_examples=30, deadline=None)
def test_an_expert_may_be_pinned_to_several_devices(seed: int, objective: Objective, room: dict[str, int], method: str) -> None:
    rng = np.random.default_rng(seed)
    pins = tuple(Pin(layer, int(expert), int(device)) for layer in (0, 1) for expert in rng.permutation(8)[:2]
                 for device in rng.permutation(4)[: 1 + int(rng.integers(2))])  # fmt: skip
    problem = problem_of(hot_trace(seed), objective=objective, pins=pins, **room)
    solution = solve(problem, method, seconds=0.3, seed=seed)
    assert all(solution.plan.slot_LRE[pin.layer, pin.device, pin.expert] >= 0 for pin in pins)


@pytest.mark.parametrize(
    ("method", "room"), [("auto", {"slots": 2}), ("auto", {"slots": 4, "replicas": 1}), ("replicas", {"slots": 4, "replicas": 1})]
)
def test_more_pinned_copies_than_there_may_be_are_named(method: str, room: dict[str, int]) -> None:
    pins = (Pin(1, 5, 0), Pin(1, 5, 1), Pin(1, 5, 2))
    with pytest.raises(InfeasiblePlan, match=r"pin"):
        solve(problem_of(random_trace(), pins=pins, **room), method, seconds=0.3)


def test_what_makes_no_sense_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="slots and spare slots both say"):
        Constraints(slots=4, spare_slots=1)
    with pytest.raises(UsageError, match="objective hops; choose one of those"):
        problem_of(random_trace(), objective="hops", replicas=4)
    with pytest.raises(UsageError, match="no slots for copies"):
        solve(problem_of(random_trace()), "replicas")
    with pytest.raises(UsageError, match="replicas is -1"):
        Constraints(replicas=-1)
