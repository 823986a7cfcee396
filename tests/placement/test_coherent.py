"""Coherent traffic as a prediction: a small trace by hand, and the laws that any trace keeps."""

from dataclasses import replace

import numpy as np
import pytest

from crossdock.errors import BadData
from crossdock.placement.coherent import Context, evaluate_coherent
from crossdock.placement.cost import Workload
from crossdock.placement.evaluate import evaluate
from crossdock.placement.plan import Plan
from crossdock.placement.topology import Topology
from crossdock.placement.trace import NO_EXPERT, Trace

TWO_BY_ONE = Topology.uniform(nodes=2, devices_per_node=1)
TWO_BY_TWO = Topology.uniform(nodes=2, devices_per_node=2)
WORKLOAD = Workload(model_width=10, wire="bf16", tokens_per_rank=100)


def test_by_hand() -> None:
    plan = Plan.contiguous(2, 2, 2)  # expert e on device e
    trace = Trace(np.array([[[0], [1]], [[1], [1]], [[0], [0]], [[1], [0]]]), 2, home_T=np.array([0, 0, 1, 1]))
    found = evaluate_coherent(trace, plan, TWO_BY_ONE, WORKLOAD, Context(key_value_bytes=6, attentions=2))
    assert found.moves_LRR.tolist() == [[[1, 1], [1, 1]], [[1, 1], [1, 1]], [[0, 2], [2, 0]]]
    assert found.residents_LR.tolist() == [[2, 2], [2, 2]]
    assert found.token_bytes == (4 * 40, 0, 8 * 40)  # a row is 20 bytes, once forward and once backward
    assert found.key_value_bytes == (2 * 4 * 24, 0, 2 * 4 * 24)  # two layers, four tokens, one other device
    assert found.moved == 0.5


def random_trace(seed: int, num_layers: int = 3, num_experts: int = 8) -> Trace:
    rng = np.random.default_rng(seed)
    return Trace(rng.integers(0, num_experts, (400, num_layers, 1)).astype(np.uint16), num_experts, home_T=np.repeat(np.arange(4), 100))


def test_tokens_are_never_lost() -> None:
    trace = random_trace(0)
    found = evaluate_coherent(trace, Plan.contiguous(3, 8, 4), TWO_BY_TWO, WORKLOAD, Context(6))
    assert (found.moves_LRR.sum(axis=(1, 2)) == 400).all()
    for before, after in zip(found.moves_LRR, found.moves_LRR[1:], strict=False):
        assert (before.sum(axis=0) == after.sum(axis=1)).all()
    assert found.moves_LRR[-1].sum(axis=0).tolist() == [100] * 4


def test_a_plan_that_follows_the_transitions_moves_nothing_but_homes() -> None:
    rng = np.random.default_rng(1)
    first_T = rng.integers(0, 4, 400)
    trace = Trace(
        np.stack([first_T, (first_T + 1) % 4, first_T], axis=1)[:, :, None].astype(np.uint16), 4, home_T=np.repeat(np.arange(4), 100)
    )
    device_LE = np.array([[0, 1, 2, 3], [3, 0, 1, 2], [0, 1, 2, 3]])
    aware, blind = Plan.from_devices(device_LE, 4), Plan.contiguous(3, 4, 4)
    context = Context(key_value_bytes=4)
    follows, ignores = (evaluate_coherent(trace, plan, TWO_BY_TWO, WORKLOAD, context) for plan in (aware, blind))
    assert follows.moves_LRR[1:-1].trace(axis1=1, axis2=2).tolist() == [400, 400]
    assert follows.moved < ignores.moved
    assert follows.step_s < ignores.step_s
    assert follows.key_value_bytes == ignores.key_value_bytes
    # hops are what the evaluator of the other mode already knew
    assert evaluate(trace, aware, TWO_BY_TWO, WORKLOAD).cross_device_hops == 0.0


def test_dense_imbalance_is_counted() -> None:
    trace = Trace(np.zeros((400, 3, 1), dtype=np.uint16), 8, home_T=np.repeat(np.arange(4), 100))  # everybody wants expert 0
    plan = Plan.contiguous(3, 8, 4)
    found = evaluate_coherent(trace, plan, TWO_BY_TWO, WORKLOAD, Context(6))
    assert found.residents_LR.tolist() == [[100] * 4, [400, 0, 0, 0], [400, 0, 0, 0]]
    assert found.dense_max_over_mean == pytest.approx((1 + 4 + 4) / 3)
    with_dense = evaluate_coherent(trace, plan, TWO_BY_TWO, WORKLOAD, Context(6, dense_s=1e-3))
    assert with_dense.step_s - found.step_s == pytest.approx(3 * 1e-3 * (100 + 400 + 400))


def test_dropped_tokens_stay() -> None:
    trace = Trace(np.array([[[NO_EXPERT], [3]], [[3], [NO_EXPERT]]], dtype=np.uint16), 4, home_T=np.array([0, 1]))
    found = evaluate_coherent(trace, Plan.contiguous(2, 4, 4), TWO_BY_TWO, WORKLOAD, Context(6))
    assert found.moves_LRR[0][0, 0] == 1
    assert found.moves_LRR[1][3, 3] == 1


def test_what_it_refuses() -> None:
    plan = Plan.contiguous(3, 8, 4)
    trace = random_trace(2)
    with pytest.raises(BadData, match="one expert per token"):
        evaluate_coherent(
            replace(trace, experts_TLK=np.tile(np.array([0, 1], dtype=np.uint16), (400, 3, 1))), plan, TWO_BY_TWO, WORKLOAD, Context(6)
        )
    with pytest.raises(BadData, match="no homes"):
        evaluate_coherent(replace(trace, home_T=None), plan, TWO_BY_TWO, WORKLOAD, Context(6))
    with pytest.raises(BadData, match="lives on device 9"):
        evaluate_coherent(replace(trace, home_T=np.full(400, 9)), plan, TWO_BY_TWO, WORKLOAD, Context(6))
