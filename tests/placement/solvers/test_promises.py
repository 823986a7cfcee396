"""Promises of every plan, whatever was asked: all experts placed, every constraint kept or named, auto no worse than any.

Devices are equal or not, in one level or two, or linked at rates of no pattern; constraints come alone and together.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossdock.errors import CrossdockError, InfeasiblePlan, UsageError
from crossdock.placement.analysis.compare import proven
from crossdock.placement.costs.coherent import Context, evaluate_coherent
from crossdock.placement.costs.cost import Workload
from crossdock.placement.costs.evaluate import evaluate
from crossdock.placement.costs.replication import memory_bytes
from crossdock.placement.records.affinity import Affinity
from crossdock.placement.records.plan import EMPTY, Plan
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import Trace
from crossdock.placement.solvers import SOLVERS, load_peaks, solve
from crossdock.placement.solvers.auto import improved
from crossdock.placement.solvers.problem import Constraints, Pin, Problem, Solution
from tests.placement.conftest import random_plan, random_trace

WORKLOAD = Workload(tokens_per_rank=256, model_width=64, expert_width=128)
CONTEXT = Context(key_value_bytes=256, attentions=2, dense_s=1e-7)
NUM_EXPERTS = 7  # on four devices: a number that does not divide


def topologies() -> dict[str, Topology]:
    flat, two_level = Topology.uniform(1, 4), Topology.uniform(2, 2, other_node_bytes_per_s=1e9)
    speed_R, memory_R = np.array([4e14, 1e14, 3e14, 2e14]), np.array([8e10, 4e10, 2e10, 8e10])
    rng = np.random.default_rng(7)
    rates_RR = np.where(np.eye(4, dtype=bool), np.inf, rng.uniform(1e8, 1e11, (4, 4)))
    latency_s_RR = np.where(np.eye(4, dtype=bool), 0.0, rng.uniform(0, 1e-4, (4, 4)))
    return {
        "flat": flat,
        "two levels": two_level,
        "unequal devices": dataclasses.replace(two_level, flop_per_s_R=speed_R, memory_bytes_R=memory_R),
        "any links": dataclasses.replace(two_level, bytes_per_s_RR=rates_RR, latency_s_RR=latency_s_RR),
        "any nodes": dataclasses.replace(flat, node_of_R=(1, 0, 1, 1), bytes_per_s_RR=rates_RR, latency_s_RR=latency_s_RR),
    }


TOPOLOGIES = topologies()
CONSTRAINTS: dict[str, dict[str, Any]] = {
    "none": {},
    "load cap": {"load_cap": 1.5},
    "tight load cap": {"load_cap": 1.02},
    "memory": {"memory_fraction": 5.5 * 2 * WORKLOAD.expert_state_bytes / 8e10},
    "little memory": {"memory_fraction": 1.5 * 2 * WORKLOAD.expert_state_bytes / 8e10},
    "pins": {"pins": (Pin(0, 1, 3), Pin(1, 6, 0), Pin(1, 5, 0))},
    "pins and cap": {"pins": (Pin(0, 1, 3), Pin(1, 6, 0)), "load_cap": 1.6},
    "slots": {"slots": 3},
    "slots and memory": {"slots": 7, "memory_fraction": 3.5 * 2 * WORKLOAD.expert_state_bytes / 8e10},
    "spare slots": {"spare_slots": 1},
    "spare bytes": {"spare_bytes": 2.5 * 2 * WORKLOAD.expert_state_bytes},
    "replicas and cap": {"replicas": 2, "load_cap": 1.3},
    "a pinned copy": {"spare_slots": 1, "pins": (Pin(0, 1, 3), Pin(0, 1, 0))},
}
KINDS = [("home", objective) for objective in ("seconds", "devices", "nodes", "hops")] + [("coherent", "seconds"), ("coherent", "hops")]

asked = given(
    seed=st.integers(0, 999),
    links=st.sampled_from(list(TOPOLOGIES)),
    constraints=st.sampled_from(list(CONSTRAINTS)),
    kind=st.sampled_from(KINDS),
    dispatch=st.sampled_from(["flat", "deduplicated", "hierarchical"]),
)


def problem_of(seed: int, links: str, constraints: str, kind: tuple[str, str], dispatch: str) -> tuple[Trace, Problem]:
    """Raises as `Problem` does; a usage error is a question that makes no sense, such as copies in mode coherent."""
    mode, objective = kind
    if dispatch == "hierarchical" and links == "any nodes":
        dispatch = "deduplicated"  # two hops need nodes of one size
    trace = random_trace(seed, num_tokens=50, num_layers=2, num_experts=NUM_EXPERTS, top_k=1 if mode == "coherent" else 2, drop=0.1)
    workload = dataclasses.replace(WORKLOAD, dispatch=dispatch)  # type: ignore[arg-type]
    fields: dict[str, Any] = {
        "mode": mode,
        "objective": objective,
        "context": CONTEXT,
        "constraints": Constraints(**CONSTRAINTS[constraints]),
    }
    return trace, Problem(Affinity.from_trace(trace), TOPOLOGIES[links], workload, **fields)


def check(problem: Problem, trace: Trace, solution: Solution) -> None:
    """Every promise about one plan."""
    plan, constraints = solution.plan, problem.constraints
    plan.check_model(2, NUM_EXPERTS, 4)
    assert all(set(slots_RS[slots_RS != EMPTY].tolist()) == set(range(NUM_EXPERTS)) for slots_RS in plan.slots_LRS)
    held_LR = (plan.slots_LRS != EMPTY).sum(axis=2)
    assert (held_LR <= problem.slots_R).all()
    assert all(plan.slot_LRE[pin.layer, pin.device, pin.expert] >= 0 for pin in constraints.pins)
    if constraints.replicas is not None:
        assert (held_LR.sum(axis=1) - NUM_EXPERTS <= constraints.replicas).all()
    if constraints.memory_fraction is not None:
        state_R = held_LR.sum(axis=0) * problem.workload.expert_state_bytes
        assert (state_R <= constraints.memory_fraction * problem.topology.memory_bytes_R * (1 + 1e-12)).all()
        np.testing.assert_allclose(memory_bytes(plan, problem.workload), state_R)
    if constraints.load_cap is not None:
        assert max(load_peaks(problem, solution)) <= constraints.load_cap + 1e-9
    assert (plan.mode, plan.objective) == (problem.mode, problem.objective)
    assert solution.cost == pytest.approx(evaluated(problem, trace, plan), rel=1e-9, abs=1e-15)
    if solution.bound is not None:
        assert solution.bound <= solution.cost * (1 + 1e-12)


def evaluated(problem: Problem, trace: Trace, plan: Plan) -> float:
    """The objective by the evaluators, which know nothing of affinities."""
    if problem.mode == "coherent" and problem.objective == "seconds":
        anywhere = Trace(np.repeat(trace.experts_TLK, 4, axis=0), NUM_EXPERTS, home_T=np.tile(np.arange(4), trace.num_tokens))
        return evaluate_coherent(anywhere, plan, problem.topology, problem.workload, problem.context).step_s
    found = evaluate(trace, dataclasses.replace(plan, mode="home"), problem.topology, problem.workload)
    values = {
        "seconds": found.step_s,
        "devices": found.devices_per_token,
        "nodes": found.nodes_per_token,
        "hops": found.cross_device_hops,
    }
    return values[problem.objective]


@asked
@settings(max_examples=60, deadline=None)
def test_every_method_keeps_every_promise_or_names_what_cannot_hold(
    seed: int, links: str, constraints: str, kind: tuple[str, str], dispatch: str
) -> None:
    try:
        trace, problem = problem_of(seed, links, constraints, kind, dispatch)
    except (InfeasiblePlan, UsageError) as error:
        check_refusal(error)
        return
    costs: dict[str, float] = {}
    found: list[Solution] = []
    for method in SOLVERS:
        try:
            solution = solve(problem, method, seconds=0.1, seed=seed)
        except UsageError as error:
            check_question(method, error)
            continue
        except InfeasiblePlan as error:
            check_refusal(error)
            continue
        check(problem, trace, solution)
        costs[method] = solution.cost
        found.append(solution)
    if not found:
        return
    best = improved(problem, 0.2, seed, found)
    check(problem, trace, best)
    assert best.cost <= min(costs.values()) * (1 + 1e-12)
    least = proven(problem, 0.2).objective
    if not any(solution.plan.has_replicas for solution in found):
        assert least <= min(costs.values()) * (1 + 1e-9)


def check_refusal(error: CrossdockError) -> None:
    assert error.exit_code == (3 if isinstance(error, InfeasiblePlan) else 2)
    assert any(word in str(error) for word in ("load cap", "slots", "memory", "pin", "replicas", "copies", "spare")), str(error)


def check_question(method: str, error: UsageError) -> None:
    """Only methods for some questions refuse one, and copies, which mode coherent and hops have no price for."""
    assert method not in ("contiguous", "random", "balance", "auto"), str(error)


@given(
    seed=st.integers(0, 999),
    links=st.sampled_from(list(TOPOLOGIES)),
    dispatch=st.sampled_from(["flat", "deduplicated"]),
    copies=st.booleans(),
    homes=st.booleans(),
    order=st.permutations(range(4)),
)
@settings(max_examples=60, deadline=None)
def test_renaming_devices_changes_no_evaluation(seed: int, links: str, dispatch: str, copies: bool, homes: bool, order: list[int]) -> None:
    """Speeds, links, nodes, slots and homes go with a device to its new number. Which of equally near copies a token takes is a matter of
    numbers, so plans with copies hold all experts everywhere."""
    topology = TOPOLOGIES[links]
    workload = dataclasses.replace(WORKLOAD, dispatch=dispatch)  # type: ignore[arg-type]
    trace = random_trace(seed, num_tokens=60, num_experts=8, num_homes=4 if homes else None, drop=0.1)
    plan = random_plan(seed)
    if copies:
        plan = Plan(np.tile(np.arange(8), (3, 4, 1)), 8)
    device_R = np.array(order)  # the old number of each new device
    nodes = {node: number for number, node in enumerate(dict.fromkeys(np.array(topology.node_of_R)[device_R].tolist()))}
    renamed = dataclasses.replace(
        topology,
        node_of_R=tuple(nodes[topology.node_of_R[device]] for device in device_R),
        flop_per_s_R=topology.flop_per_s_R[device_R],
        memory_bytes_R=topology.memory_bytes_R[device_R],
        bytes_per_s_RR=topology.bytes_per_s_RR[np.ix_(device_R, device_R)],
        latency_s_RR=topology.latency_s_RR[np.ix_(device_R, device_R)],
    )
    other = dataclasses.replace(plan, slots_LRS=plan.slots_LRS[:, device_R])
    moved = trace if trace.home_T is None else dataclasses.replace(trace, home_T=np.argsort(device_R)[trace.home_T])
    first, second = evaluate(trace, plan, topology, workload), evaluate(moved, other, renamed, workload)
    for name in ("step_s", "moved", "bytes_by_class", "devices_per_token", "nodes_per_token", "cross_device_hops", "load_max_over_mean"):
        assert getattr(second, name) == pytest.approx(getattr(first, name), rel=1e-12), name
    if not copies:
        one = dataclasses.replace(trace, experts_TLK=trace.experts_TLK[:, :, :1], home_T=np.arange(60) % 4)
        its = dataclasses.replace(one, home_T=np.argsort(device_R)[np.arange(60) % 4])
        stays = evaluate_coherent(one, plan, topology, workload, CONTEXT)
        other_stays = evaluate_coherent(its, other, renamed, workload, CONTEXT)
        assert other_stays.step_s == pytest.approx(stays.step_s, rel=1e-12)
        assert other_stays.token_bytes == stays.token_bytes
