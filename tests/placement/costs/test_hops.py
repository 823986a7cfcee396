"""Hops of hierarchical dispatch: an example by hand, and an evaluator that follows one token at a time."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossdock.errors import BadConfig
from crossdock.placement.costs.cost import Workload, transfer_seconds
from crossdock.placement.costs.evaluate import evaluate
from crossdock.placement.costs.hops import check_nodes, devices_per_node
from crossdock.placement.records.plan import Plan, choose_replica
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import NO_EXPERT, Trace
from tests.placement.conftest import random_plan, random_trace

WORKLOAD = Workload(tokens_per_rank=16, model_width=4, expert_width=8, dispatch="hierarchical")
TWO_BY_TWO = Topology.uniform(2, 2)


@pytest.mark.parametrize(
    ("nodes", "size"),
    [((5, 5, 2, 2), 2), ((0, 1, 2), 1), ((0, 0, 0), 3), ((0, 1, 0, 1), None), ((0, 0, 1), None), ((0, 0, 1, 1, 0, 0), None), ((), None)],
)
def test_devices_per_node(nodes: tuple[int, ...], size: int | None) -> None:
    assert devices_per_node(nodes) == size


def test_nodes_that_cannot_relay_are_refused() -> None:
    with pytest.raises(BadConfig, match="these lie on nodes 0, 0, 1; use dispatch deduplicated"):
        check_nodes((0, 0, 1))
    trace, plan = Trace(np.array([[[0]]]), 3, home_T=np.array([0])), Plan(np.array([[[0], [1], [2]]]), 3)
    uneven = replace(Topology.uniform(1, 3), node_of_R=(0, 0, 1))
    with pytest.raises(BadConfig, match="equally many consecutive devices"):
        evaluate(trace, plan, uneven, WORKLOAD)


def test_by_hand() -> None:
    # Experts 0..3 on devices 0..3, devices 0 and 1 on node 0. One token of device 0 with all four experts, one of device 3 with expert 0.
    trace = Trace(np.array([[[0, 1, 2, 3]], [[0, NO_EXPERT, NO_EXPERT, NO_EXPERT]]]), 4, home_T=np.array([0, 3]))
    result = evaluate(trace, Plan(np.arange(4).reshape(1, 4, 1), 4), TWO_BY_TWO, WORKLOAD)
    rail, inside = result.hops_HLRR[:, 0].tolist()
    assert rail == [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]  # 0 -> 2 for node 1, and 3 -> 1 for node 0
    # home 0 keeps one and sends one to 1; rank 2 passes one to 3 and keeps one (no link); rank 1 passes one to 0
    assert inside == [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    unit = 4 * WORKLOAD.copy_bytes
    assert result.bytes_by_class == (1 * unit, 3 * unit, 2 * unit)
    direct = evaluate(trace, Plan(np.arange(4).reshape(1, 4, 1), 4), TWO_BY_TWO, replace(WORKLOAD, dispatch="deduplicated"))
    assert direct.bytes_by_class == (1 * unit, 1 * unit, 3 * unit)
    assert result.moved == direct.moved
    scale = 16 * 4 / 2 * WORKLOAD.copy_bytes
    assert result.block.dispatch_s[0] == pytest.approx(sum(transfer_seconds(np.array(hop) * scale, TWO_BY_TWO) for hop in (rail, inside)))
    assert result.block.combine_s[0] == pytest.approx(sum(transfer_seconds(np.array(hop).T * scale, TWO_BY_TWO) for hop in (rail, inside)))


def follow(trace: Trace, plan: Plan, topology: Topology) -> np.ndarray:
    """[L, R, R], both hops: one token at a time, from link to link."""
    chosen_LRE, node_of = choose_replica(plan, topology.node_of_R), topology.node_of_R
    per_node = topology.num_devices // topology.num_nodes
    links = np.zeros((trace.num_layers, topology.num_devices, topology.num_devices), dtype=int)
    assert trace.home_T is not None
    for token, home in enumerate(trace.home_T.tolist()):
        for layer in range(trace.num_layers):
            experts = [int(e) for e in trace.experts_TLK[token, layer] if e != NO_EXPERT]
            devices = {int(chosen_LRE[layer, home, e]) // plan.slots_per_device for e in experts}
            for node in {node_of[d] for d in devices}:
                relay = node * per_node + home % per_node
                if relay != home:
                    links[layer, home, relay] += 1
                for device in devices:
                    if node_of[device] == node and (device != relay or device == home):
                        links[layer, relay, device] += 1
    return links


@given(st.integers(0, 10**6), st.sampled_from([(2, 2), (3, 2), (2, 3), (1, 4), (4, 1)]), st.booleans())
def test_equals_following_each_token(seed: int, shape: tuple[int, int], replicas: bool) -> None:
    topology = Topology.uniform(*shape)
    trace = random_trace(seed, num_tokens=20, num_layers=2, top_k=3, num_homes=topology.num_devices, drop=0.2)
    plan = random_plan(seed, num_layers=2, num_devices=topology.num_devices, num_slots=4 if replicas else None)
    result = evaluate(trace, plan, topology, WORKLOAD)
    assert np.array_equal(result.hops_HLRR.sum(axis=0), follow(trace, plan, topology))
    assert result.exact
    if 1 in shape:
        assert result.bytes_by_class == evaluate(trace, plan, topology, replace(WORKLOAD, dispatch="deduplicated")).bytes_by_class


def test_unknown_homes_are_the_mean_of_all_homes() -> None:
    trace, plan = random_trace(3, num_tokens=12), random_plan(3, num_slots=3)
    everywhere = [evaluate(replace(trace, home_T=np.full(12, home)), plan, TWO_BY_TWO, WORKLOAD).hops_HLRR for home in range(4)]
    np.testing.assert_allclose(evaluate(trace, plan, TWO_BY_TWO, WORKLOAD).hops_HLRR, np.mean(everywhere, axis=0))
