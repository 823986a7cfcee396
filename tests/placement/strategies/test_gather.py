"""Expert-gather as a decision: who sends weights to whom, what tokens then carry, and the choice against every possible set."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossdock.errors import BadConfig, BadData
from crossdock.placement.costs.cost import Window, Workload
from crossdock.placement.costs.evaluate import evaluate
from crossdock.placement.records.plan import Plan, choose_replica
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import Trace
from crossdock.placement.strategies.gather import (
    GatherCost,
    Prefetch,
    WeightTransfer,
    choose_gathered,
    gathered_plan,
    weight_bytes,
    weight_hops,
)

NODES = (0, 0, 1, 1)
TWO_BY_TWO = Topology.uniform(nodes=2, devices_per_node=2)


def test_weights_cross_to_a_node_once() -> None:
    device_RE = np.tile([0, 1, 2, 3], (4, 1))
    first, second = weight_hops(device_RE, NODES, [1])
    assert first == (WeightTransfer(1, 0, 1), WeightTransfer(1, 3, 1))  # the neighbour, and the leader of the other node
    assert second == (WeightTransfer(3, 2, 1),)


def test_holders_serve_the_nearest() -> None:
    plan = Plan(np.array([[[0], [1], [0], [2]]]), 3)
    device_RE = choose_replica(plan, NODES)[0] // plan.slots_per_device
    assert weight_hops(device_RE, NODES, [0]) == ((WeightTransfer(0, 1, 0), WeightTransfer(2, 3, 0)), ())
    everywhere = Plan(np.array([[[0, 1], [1, 0], [0, 1], [1, 0]]]), 2)
    assert weight_hops(choose_replica(everywhere, NODES)[0] // 2, NODES, [0, 1]) == ((), ())


@st.composite
def layers(draw: st.DrawFn) -> tuple[Plan, tuple[int, ...], tuple[int, ...]]:
    """A plan of one layer with copies and empty slots, nodes, and experts to gather."""
    nodes = draw(st.sampled_from([(0,), (0, 0), (0, 1), NODES, (0, 0, 0, 1), (0, 1, 1, 0, 2, 2)]))
    num_experts = draw(st.integers(1, 6))
    holders = [draw(st.sets(st.integers(0, len(nodes) - 1), min_size=1)) for _ in range(num_experts)]
    slots = [[expert if device in holders[expert] else -1 for expert in range(num_experts)] for device in range(len(nodes))]
    return Plan(np.array([slots]), num_experts), nodes, tuple(sorted(draw(st.sets(st.integers(0, num_experts - 1)))))


@given(layers())
def test_every_rank_ends_with_every_gathered_expert(layer: tuple[Plan, tuple[int, ...], tuple[int, ...]]) -> None:
    plan, nodes, experts = layer
    holds = {(device, expert) for device in range(len(nodes)) for expert in experts if plan.slot_LRE[0, device, expert] >= 0}
    device_RE = choose_replica(plan, nodes)[0] // plan.slots_per_device
    crossings: list[tuple[int, int]] = []
    for hop in weight_hops(device_RE, nodes, experts):
        assert list(hop) == sorted(hop)
        before = set(holds)
        for transfer in hop:
            assert (transfer.source, transfer.expert) in before
            assert (transfer.target, transfer.expert) not in holds
            holds.add((transfer.target, transfer.expert))
            if nodes[transfer.source] != nodes[transfer.target]:
                crossings.append((nodes[transfer.target], transfer.expert))
    assert holds == set(itertools.product(range(len(nodes)), experts))
    assert len(crossings) == len(set(crossings))


@given(layers(), st.integers(0, 99))
def test_tokens_see_a_copy_everywhere(layer: tuple[Plan, tuple[int, ...], tuple[int, ...]], seed: int) -> None:
    plan, nodes, experts = layer
    chosen = choose_replica(gathered_plan(plan, [experts]), nodes)[0] // (plan.slots_per_device + len(experts))
    before = choose_replica(plan, nodes)[0] // plan.slots_per_device
    rest = [expert for expert in range(plan.num_experts) if expert not in experts]
    assert (chosen[:, list(experts)] == np.arange(len(nodes))[:, None]).all()
    assert (chosen[:, rest] == before[:, rest]).all()


def test_bytes_by_hand() -> None:
    plan = Plan.contiguous(2, 4, 4)
    # Expert 1 of layer 0: one neighbour, one leader, and the leader's neighbour; forward and backward.
    assert weight_bytes(plan, [[1], []], NODES, 100) == (0, 400, 200)
    assert weight_bytes(plan, [[0, 1], [3]], NODES, 10) == (0, 120, 60)
    assert weight_bytes(plan, [[0, 1], [3]], (0, 1, 2, 3), 10) == (0, 0, 180)


def test_what_it_refuses() -> None:
    plan = Plan.contiguous(1, 4, 4)
    for experts in ([4], [-1], [1, 1]):
        with pytest.raises(BadConfig, match=r"gathered experts are .* from 0 to 3"):
            gathered_plan(plan, [experts])
    with pytest.raises(BadData, match=r"loads are given for \(4, 3\)"):
        GatherCost(np.ones((4, 3)), plan, 0, TWO_BY_TWO, Workload(), 4)


def zipf_load(num_ranks: int, num_experts: int, rows: int, exponent: float, rng: np.random.Generator) -> np.ndarray:
    share_E = rng.permutation(np.arange(1, num_experts + 1) ** -exponent)
    return np.asarray(rng.multinomial(rows, share_E / share_E.sum(), size=num_ranks), dtype=float)


@pytest.mark.parametrize("seed", range(12))
def test_the_choice_against_every_set(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_experts = 8
    topology = Topology.uniform(
        nodes=int(rng.choice([1, 2])), devices_per_node=2, same_node_bytes_per_s=5e9, other_node_bytes_per_s=10 ** rng.uniform(7.5, 9.5)
    )
    devices = topology.num_devices
    workload = Workload(
        tokens_per_rank=4096, model_width=256, expert_width=int(rng.choice([128, 512])), wire="fp32", window=Window(0.01, 0.0, 0.0, 0.01)
    )
    plan = Plan.contiguous(1, num_experts, devices)
    load_RE = zipf_load(devices, num_experts, 4096, rng.uniform(0.0, 2.0), rng)
    cost = GatherCost(load_RE, plan, 0, topology, workload, 4, Prefetch(0.002, 0.004))
    choice = choose_gathered(cost)
    sets_BE = np.array(list(itertools.product([False, True], repeat=num_experts)))
    best_s = cost.of_sets(sets_BE).min()
    assert choice.block_without_s == cost.of(())
    assert choice.block_s == cost.of(choice.experts)
    assert best_s <= choice.block_s <= best_s * 1.01


def test_the_cost_of_nothing_gathered_is_the_blocks() -> None:
    rng = np.random.default_rng(0)
    plan, workload = Plan.contiguous(1, 6, 4), Workload(dispatch="flat", tokens_per_rank=500, expert_overhead_s=1e-4)
    trace = Trace(rng.integers(0, 6, (2000, 1, 1)).astype(np.uint16), 6, home_T=np.repeat(np.arange(4), 500))
    load_RE = np.zeros((4, 6))
    np.add.at(load_RE, (trace.home_T, trace.experts_TLK[:, 0, 0]), 1)
    for experts in ((), (2,), (0, 5)):
        tokens = evaluate(trace, gathered_plan(plan, [experts]), TWO_BY_TWO, workload)
        cost = GatherCost(load_RE, plan, 0, TWO_BY_TWO, workload, 4)
        if not experts:
            assert cost.of(experts) == pytest.approx(float(tokens.block.total_s[0]))
        else:  # with the time for its weights
            assert cost.of(experts) > float(tokens.block.total_s[0])
            hidden = GatherCost(load_RE, plan, 0, TWO_BY_TWO, workload, 4, Prefetch(1e9, 1e9))
            assert hidden.of(experts) == pytest.approx(float(tokens.block.total_s[0]))


def test_hot_experts_are_gathered_where_that_pays() -> None:
    plan = Plan.contiguous(1, 4, 4)
    load_RE = np.tile([9000.0, 300.0, 300.0, 300.0], (4, 1))
    slow = Topology.uniform(nodes=4, devices_per_node=1, other_node_bytes_per_s=1e8)
    small, large = (Workload(model_width=512, expert_width=width, wire="fp32") for width in (1024, 65_536))
    assert 0 in choose_gathered(GatherCost(load_RE, plan, 0, slow, small, 4)).experts
    assert choose_gathered(GatherCost(load_RE, plan, 0, slow, large, 4)).experts == ()
