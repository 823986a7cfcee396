"""The evaluator: an example worked by hand, a slow obvious evaluator that it must equal, and what must hold for any trace and plan."""

import itertools
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossdock.errors import BadData, UsageError
from crossdock.placement.costs.cost import Dispatch, Workload, block_cost, step_seconds, transfer_seconds
from crossdock.placement.costs.evaluate import Evaluation, evaluate
from crossdock.placement.records.plan import Plan, choose_replica
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import NO_EXPERT, Trace
from tests.placement.conftest import random_plan, random_trace

TWO_BY_TWO = Topology.uniform(2, 2)
WORKLOAD = Workload(tokens_per_rank=16, model_width=4, expert_width=8, wire="bf16")
FLAT = replace(WORKLOAD, dispatch="flat")


@dataclass
class Slow:
    """What `slow_evaluate` finds: the definitions, one token at a time, in exact fractions."""

    copies: dict[tuple[int, int, int], Fraction] = field(default_factory=dict)
    rows: dict[tuple[int, int], Fraction] = field(default_factory=dict)
    devices: Fraction = Fraction(0)
    nodes: Fraction = Fraction(0)
    hops: Fraction = Fraction(0)
    device_hops: Fraction = Fraction(0)
    node_hops: Fraction = Fraction(0)


def slow_evaluate(trace: Trace, plan: Plan, topology: Topology, *, flat: bool) -> Slow:
    chosen_LRE = choose_replica(plan, topology.node_of_R)
    node_of_R = topology.node_of_R
    slow = Slow()
    for token in range(trace.num_tokens):
        homes = range(topology.num_devices) if trace.home_T is None else [int(trace.home_T[token])]
        for home in homes:
            share = Fraction(1, len(homes))
            before = None
            for layer in range(trace.num_layers):
                experts = [int(expert) for expert in trace.experts_TLK[token, layer]]
                devices = [int(chosen_LRE[layer, home, expert]) // plan.slots_per_device for expert in experts if expert != NO_EXPERT]
                for device in devices if flat else set(devices):
                    slow.copies[layer, home, device] = slow.copies.get((layer, home, device), Fraction(0)) + share
                for device in devices:
                    slow.rows[layer, device] = slow.rows.get((layer, device), Fraction(0)) + share
                slow.devices += share * len(set(devices))
                slow.nodes += share * len({node_of_R[device] for device in devices})
                first = devices[0] if experts[0] != NO_EXPERT else None
                if before is not None and first is not None:
                    slow.hops += share
                    slow.device_hops += share * (before != first)
                    slow.node_hops += share * (node_of_R[before] != node_of_R[first])
                before = first
    return slow


def assert_equal_to_slow(fast: Evaluation, trace: Trace, plan: Plan, topology: Topology, workload: Workload) -> None:
    slow = slow_evaluate(trace, plan, topology, flat=workload.dispatch == "flat")
    copies_LRR = np.zeros(fast.copies_LRR.shape)
    for place, count in slow.copies.items():
        copies_LRR[place] = count
    rows_LR = np.zeros(fast.rows_LR.shape)
    for spot, count in slow.rows.items():
        rows_LR[spot] = count
    np.testing.assert_allclose(fast.copies_LRR, copies_LRR, rtol=1e-12)
    np.testing.assert_allclose(fast.rows_LR, rows_LR, rtol=1e-12)
    sizes = [0.0, 0.0, 0.0]
    for (_, home, device), count in slow.copies.items():
        link_class = 0 if home == device else 1 if topology.node_of_R[home] == topology.node_of_R[device] else 2
        sizes[link_class] += float(count * 4 * workload.copy_bytes)
    assert fast.bytes_by_class == pytest.approx(sizes)
    visits = trace.num_tokens * trace.num_layers
    assert fast.devices_per_token == pytest.approx(float(slow.devices / visits))
    assert fast.nodes_per_token == pytest.approx(float(slow.nodes / visits))
    assert fast.cross_device_hops == pytest.approx(float(slow.device_hops / slow.hops) if slow.hops else 0.0)
    assert fast.cross_node_hops == pytest.approx(float(slow.node_hops / slow.hops) if slow.hops else 0.0)
    scale = workload.tokens_per_rank * topology.num_devices / trace.num_tokens
    gradient_s = slow_gradient_seconds(plan, topology, workload)
    assert fast.gradient_s == pytest.approx(gradient_s)
    assert fast.step_s == pytest.approx(
        step_seconds(block_cost(copies_LRR * scale, rows_LR * scale, topology, workload), workload) + gradient_s
    )


def slow_gradient_seconds(plan: Plan, topology: Topology, workload: Workload) -> float:
    """Holder j of an expert's m copies gets share j from all others, parameter p belonging to share p mod m; then it sends the sum back."""
    hops = np.zeros((2, plan.num_devices, plan.num_devices))
    for slots_RS in plan.slots_LRS.tolist():
        for expert in range(plan.num_experts):
            holders = [device for device, slots_S in enumerate(slots_RS) if expert in slots_S]
            shares = [len(range(share, workload.expert_parameters, len(holders))) for share in range(len(holders))]
            for one, other in itertools.permutations(range(len(holders)), 2):
                hops[0, holders[one], holders[other]] += shares[other] * workload.gradient_bytes
                hops[1, holders[one], holders[other]] += shares[one] * workload.gradient_bytes
    return float(transfer_seconds(hops, topology).sum()) if hops.any() else 0.0


# Two tokens, two layers, experts 0 1 | 2 3 on devices 0 | 1 in layer 0 and swapped in layer 1.
HAND_TRACE = Trace(np.array([[[0, 1], [2, 0]], [[3, 0], [1, NO_EXPERT]]]), 4, home_T=np.array([0, 1]))
HAND_PLAN = Plan(np.array([[[0, 1], [2, 3]], [[2, 3], [0, 1]]]), 4)


def test_by_hand() -> None:
    result = evaluate(HAND_TRACE, HAND_PLAN, Topology.uniform(2, 1), WORKLOAD)
    # layer 0: token 0 (home 0) needs device 0 once; token 1 (home 1) needs devices 1 and 0
    assert result.copies_LRR[0].tolist() == [[1, 0], [1, 1]]
    # layer 1: token 0 needs devices 0 and 1; token 1 needs device 1 and dropped its second choice
    assert result.copies_LRR[1].tolist() == [[1, 1], [0, 1]]
    assert result.rows_LR.tolist() == [[3, 1], [1, 2]]
    # 4 copies stay and 2 cross, 4 directions x 4 elements x 2 bytes
    assert result.bytes_by_class == (4 * 32, 0, 2 * 32)
    assert all(type(size) is int for size in result.bytes_by_class)
    assert result.exact
    assert result.copies_LRR.dtype == np.int64
    assert result.devices_per_token == result.nodes_per_token == 6 / 4
    # first choices: expert 0 on device 0 then 2 on 0; expert 3 on device 1 then 1 on 1
    assert result.cross_device_hops == result.cross_node_hops == 0.0
    assert result.load_max_over_mean == pytest.approx((3 / 2 + 2 / 1.5) / 2)
    assert (result.moved, result.kept) == (pytest.approx(2 / 7), pytest.approx(5 / 7))
    assert result.bytes_for(10) == (640.0, 0.0, 320.0)


def test_by_hand_flat() -> None:
    result = evaluate(HAND_TRACE, HAND_PLAN, Topology.uniform(1, 2), FLAT)
    assert result.copies_LRR[0].tolist() == [[2, 0], [1, 1]]
    assert result.bytes_by_class == (5 * 32, 2 * 32, 0)
    assert result.devices_per_token == 6 / 4  # a matter of the plan, not of the dispatch
    assert result.nodes_per_token == 1.0


def test_by_hand_without_homes() -> None:
    result = evaluate(replace(HAND_TRACE, home_T=None), HAND_PLAN, Topology.uniform(2, 1), WORKLOAD)
    assert result.copies_LRR[0].tolist() == [[1.0, 0.5], [1.0, 0.5]]
    assert not result.exact
    assert result.bytes_by_class == (3 * 32.0, 0.0, 3 * 32.0)


cases = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10_000),
        "homes": st.booleans(),
        "num_slots": st.sampled_from([2, 3]),
        "drop": st.sampled_from([0.0, 0.3]),
        "top_k": st.integers(1, 4),
        "num_layers": st.integers(1, 3),
        "topology": st.sampled_from([Topology.uniform(1, 4), TWO_BY_TWO, Topology.uniform(4, 1, shared_by_node=True)]),
        "workload": st.sampled_from([WORKLOAD, FLAT]),
    }
)


def drawn(case: dict[str, Any]) -> tuple[Trace, Plan, Topology, Workload]:
    trace = random_trace(
        case["seed"],
        num_tokens=12,
        num_layers=case["num_layers"],
        top_k=case["top_k"],
        num_homes=4 if case["homes"] else None,
        drop=case["drop"],
    )
    return trace, random_plan(case["seed"], num_layers=case["num_layers"], num_slots=case["num_slots"]), case["topology"], case["workload"]


@settings(max_examples=80, deadline=None)
@given(cases)
def test_equals_the_slow_evaluator(case: dict[str, Any]) -> None:
    trace, plan, topology, workload = drawn(case)
    assert_equal_to_slow(evaluate(trace, plan, topology, workload), trace, plan, topology, workload)


@settings(max_examples=40, deadline=None)
@given(cases)
def test_what_holds_for_any_plan(case: dict[str, Any]) -> None:
    trace, plan, topology, _ = drawn(case)
    shared, flat = evaluate(trace, plan, topology, WORKLOAD), evaluate(trace, plan, topology, FLAT)
    choices_L = (trace.experts_TLK != NO_EXPERT).sum(axis=(0, 2))
    np.testing.assert_allclose(flat.rows_LR.sum(axis=1), choices_L)
    np.testing.assert_allclose(shared.rows_LR, flat.rows_LR)
    np.testing.assert_allclose(flat.copies_LRR.sum(axis=1), flat.rows_LR)
    assert (shared.copies_LRR <= flat.copies_LRR + 1e-9).all()
    busy_L = (trace.experts_TLK != NO_EXPERT).any(axis=2).sum(axis=0)
    assert (shared.copies_LRR.sum(axis=(1, 2)) >= busy_L - 1e-9).all()
    assert shared.devices_per_token <= trace.top_k
    assert shared.nodes_per_token <= min(shared.devices_per_token + 1e-9, topology.num_nodes)
    assert shared.cross_node_hops <= shared.cross_device_hops
    assert shared.load_max_over_mean >= 1.0
    assert 0.0 <= shared.moved <= flat.moved <= 1.0
    assert shared.step_s <= flat.step_s + 1e-12


@settings(max_examples=40, deadline=None)
@given(cases, st.booleans())
def test_relabelling_the_devices_of_a_node_changes_no_bytes(case: dict[str, Any], nodes_too: bool) -> None:
    """Homes move with their devices, or are uniform anyway. One copy of each expert, so that no turn can fall elsewhere."""
    case = case | {"num_slots": 2, "topology": TWO_BY_TWO}
    trace, plan, topology, workload = drawn(case)
    order = np.array([3, 2, 1, 0] if nodes_too else [1, 0, 3, 2])  # its own inverse
    relabelled = Plan(plan.slots_LRS[:, order], plan.num_experts)
    moved_trace = trace if trace.home_T is None else replace(trace, home_T=order[trace.home_T])
    before, after = evaluate(trace, plan, topology, workload), evaluate(moved_trace, relabelled, topology, workload)
    assert after.bytes_by_class == pytest.approx(before.bytes_by_class)
    assert after.step_s == pytest.approx(before.step_s)
    assert after.devices_per_token == before.devices_per_token


@settings(max_examples=20, deadline=None)
@given(cases, st.integers(1, 11))
def test_parts_of_a_trace_add_up(case: dict[str, Any], cut: int) -> None:
    trace, plan, topology, workload = drawn(case)
    whole = evaluate(trace, plan, topology, workload)
    parts = [evaluate(trace.select(tokens), plan, topology, workload) for tokens in (slice(0, cut), slice(cut, None))]
    np.testing.assert_allclose(whole.copies_LRR, parts[0].copies_LRR + parts[1].copies_LRR)
    assert whole.bytes_by_class == pytest.approx([a + b for a, b in zip(parts[0].bytes_by_class, parts[1].bytes_by_class, strict=True)])


@settings(max_examples=20, deadline=None)
@given(cases)
def test_expectation_is_the_mean_over_homes(case: dict[str, Any]) -> None:
    trace, plan, topology, workload = drawn(case | {"homes": False})
    expected = evaluate(trace, plan, topology, workload)
    every_home = [evaluate(replace(trace, home_T=np.full(trace.num_tokens, home)), plan, topology, workload) for home in range(4)]
    np.testing.assert_allclose(expected.copies_LRR, np.mean([result.copies_LRR for result in every_home], axis=0))
    np.testing.assert_allclose(expected.rows_LR, np.mean([result.rows_LR for result in every_home], axis=0))
    for name in ("devices_per_token", "nodes_per_token", "cross_device_hops", "moved"):
        assert getattr(expected, name) == pytest.approx(np.mean([getattr(result, name) for result in every_home]))


def test_one_device_per_expert_set_is_one_copy() -> None:
    trace = Trace(np.array([[[0, 1]], [[2, 3]], [[1, 0]]]), 4)
    assert evaluate(trace, Plan.contiguous(1, 4, 2), Topology.uniform(2, 1), WORKLOAD).devices_per_token == 1.0
    assert evaluate(trace, Plan(np.array([[[0, 2], [1, 3]]]), 4), Topology.uniform(2, 1), WORKLOAD).devices_per_token == 2.0


def test_a_copy_everywhere_moves_nothing() -> None:
    everywhere = Plan(np.tile(np.arange(8), (3, 4, 1)), 8)
    result = evaluate(random_trace(num_homes=4), everywhere, TWO_BY_TWO, WORKLOAD)
    assert result.bytes_by_class[1:] == (0, 0)
    assert result.moved == 0.0


def test_layers_that_nobody_routes_to() -> None:
    experts_TLK = np.full((3, 2, 1), NO_EXPERT)
    result = evaluate(Trace(experts_TLK, 4), Plan.contiguous(2, 4, 2), Topology.uniform(1, 2), WORKLOAD)
    assert (result.load_max_over_mean, result.cross_device_hops, result.moved) == (1.0, 0.0, 0.0)


def test_misfits_are_refused() -> None:
    trace = random_trace(num_homes=4)
    with pytest.raises(BadData, match=r"3 MoE layers x 8 experts on 4 devices.* 3 layers x 8 experts on 2 devices"):
        evaluate(trace, random_plan(), Topology.uniform(1, 2), WORKLOAD)
    with pytest.raises(BadData, match=r"lives on device 3, and topology 1x2 has devices 0\.\.1"):
        evaluate(trace, random_plan(num_devices=2), Topology.uniform(1, 2), WORKLOAD)
    with pytest.raises(UsageError, match=r"is of mode coherent, .* give a plan of mode home"):
        evaluate(trace, replace(random_plan(), mode="coherent"), TWO_BY_TWO, WORKLOAD)


def test_real_trace(real_trace: Trace) -> None:
    """A few tokens against the slow evaluator, and all of them against sums that are known beforehand."""
    topology = Topology.load("2x4-nvlink-ib")
    plan = random_plan(1, num_layers=real_trace.num_layers, num_experts=real_trace.num_experts, num_devices=8)
    part = replace(real_trace.select(slice(0, 40)), home_T=np.arange(40) % 8)
    assert_equal_to_slow(evaluate(part, plan, topology, WORKLOAD), part, plan, topology, WORKLOAD)
    whole = evaluate(real_trace, plan, topology, FLAT)
    assert whole.rows_LR.sum() == real_trace.num_tokens * real_trace.num_layers * real_trace.top_k
    assert whole.moved == pytest.approx(7 / 8)


@pytest.mark.parametrize("dispatch", ["deduplicated", "hierarchical"])
def test_the_numbers_of_nodes_mean_nothing(dispatch: Dispatch) -> None:
    """Nodes 0 and 1, or the other way round: the same devices stand together, and every link carries the same."""
    trace, plan = random_trace(num_homes=4), random_plan()
    workload = replace(WORKLOAD, dispatch=dispatch)
    found = [evaluate(trace, plan, replace(TWO_BY_TWO, node_of_R=nodes), workload) for nodes in ((0, 0, 1, 1), (1, 1, 0, 0))]
    assert found[0].bytes_by_class == found[1].bytes_by_class
    assert (found[0].hops_HLRR == found[1].hops_HLRR).all()
