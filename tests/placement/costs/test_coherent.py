"""Coherent traffic as a prediction: a small trace by hand, and the laws that any trace keeps."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crossdock.errors import BadData, UsageError
from crossdock.models.config import ModelConfig
from crossdock.placement.costs.coherent import Context, evaluate_coherent
from crossdock.placement.costs.cost import Workload
from crossdock.placement.costs.evaluate import evaluate
from crossdock.placement.costs.workload_file import load_context
from crossdock.placement.records.affinity import Affinity
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import NO_EXPERT, Trace
from crossdock.placement.solvers import load_peaks, solve
from crossdock.placement.solvers.coherent import Stay, cost_of, lower_bound
from crossdock.placement.solvers.problem import Constraints, Pin, Problem
from crossdock.placement.solvers.search import starts

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


# ---- planning for it


def everywhere(experts_TL: "np.ndarray[tuple[int, int], np.dtype[np.int64]]", num_experts: int, num_devices: int = 4) -> Trace:
    """Each token once at home on every device: what a problem means by homes anywhere alike."""
    home_T = np.tile(np.arange(num_devices, dtype=np.int32), len(experts_TL))
    return Trace(np.repeat(experts_TL, num_devices, axis=0)[:, :, None].astype(np.uint16), num_experts, home_T=home_T)


def chained(seed: int, num_layers: int, num_experts: int, tokens: int = 300) -> Trace:
    """Tokens that mostly follow one random successor of their expert; some experts are popular."""
    rng = np.random.default_rng(seed)
    share_E = np.arange(1, num_experts + 1) ** -0.7
    layers = [rng.choice(num_experts, tokens, p=share_E / share_E.sum())]
    for _ in range(num_layers - 1):
        follow_E, strays_T = rng.permutation(num_experts), rng.random(tokens) < 0.3
        layers.append(np.where(strays_T, rng.integers(0, num_experts, tokens), follow_E[layers[-1]]))
    return everywhere(np.stack(layers, axis=1), num_experts)


SLOW_LINKS = Topology.uniform(2, 2, flop_per_s=1e9, same_node_bytes_per_s=1e8, other_node_bytes_per_s=1e7, shared_by_node=True)
BUSY = Workload(tokens_per_rank=512, model_width=64, expert_width=64, wire="fp32", micro_batches=2, other_s=0.01, expert_overhead_s=1e-4)
ATTENTION = Context(key_value_bytes=64, attentions=2, dense_s=1e-6)


def coherent_problem(trace: Trace, **fields: Any) -> Problem:
    return Problem(Affinity.from_trace(trace), SLOW_LINKS, BUSY, mode="coherent", context=ATTENTION, **fields)


@pytest.mark.parametrize("seed", range(5))
def test_solvers_and_the_replay_price_alike(seed: int) -> None:
    trace = chained(seed, num_layers=4, num_experts=8)
    device_LE = np.stack([np.random.default_rng((seed, layer)).permutation(np.arange(8) % 4) for layer in range(4)])
    replayed = evaluate_coherent(trace, Plan.from_devices(device_LE, 4), SLOW_LINKS, BUSY, ATTENTION)
    assert cost_of(coherent_problem(trace), device_LE) == pytest.approx(replayed.step_s, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_solvers_and_the_replay_price_dropped_tokens_alike(seed: int) -> None:
    trace, rng = chained(seed, num_layers=4, num_experts=8), np.random.default_rng(seed)
    device_LE = np.stack([rng.permutation(np.arange(8) % 4) for _ in range(4)])
    experts_TLK = np.where(np.repeat(rng.random((300, 4, 1)) < 0.4, 4, axis=0), np.uint16(NO_EXPERT), trace.experts_TLK)
    dropped = replace(trace, experts_TLK=experts_TLK)
    assert (experts_TLK == NO_EXPERT).all(axis=1).any()  # some are dropped everywhere, and never leave home
    finite = replace(SLOW_LINKS, bytes_per_s_RR=np.where(np.eye(4, dtype=bool), 3e6, SLOW_LINKS.bytes_per_s_RR))
    problem = replace(coherent_problem(dropped), topology=finite)
    replayed = evaluate_coherent(dropped, Plan.from_devices(device_LE, 4), finite, BUSY, ATTENTION)
    assert cost_of(problem, device_LE) == pytest.approx(replayed.step_s, rel=1e-12)
    assert replayed.rows_LR.sum() == (experts_TLK != NO_EXPERT).sum()
    # routing that comes in two parts is the same routing
    halves = [Affinity.from_trace(dropped.select(np.arange(1200) % 8 // 4 == part)) for part in (0, 1)]
    assert cost_of(replace(problem, affinity=halves[0] + halves[1]), device_LE) == pytest.approx(replayed.step_s, rel=1e-12)
    hops = evaluate(dropped, Plan.from_devices(device_LE, 4), finite, BUSY).cross_device_hops
    off_device_RR = finite.link_class_RR > 0
    assert replayed.hops_LRR[:, off_device_RR].sum() / replayed.hops_LRR.sum() == pytest.approx(hops, rel=1e-12)


@pytest.mark.parametrize("drop", [0.0, 0.4])
def test_a_swap_prices_what_it_changes(drop: float) -> None:
    trace = chained(0, num_layers=4, num_experts=8)
    dropped_TL = np.random.default_rng(1).random((trace.num_tokens, 4, 1)) < drop
    problem = coherent_problem(replace(trace, experts_TLK=np.where(dropped_TL, np.uint16(NO_EXPERT), trace.experts_TLK)))
    stay = Stay(problem, np.tile(np.arange(8) % 4, (4, 1)))
    rng = np.random.default_rng(0)
    for _ in range(50):
        before_s = stay.step_s
        longer_s = stay.swap(int(rng.integers(4)), *(int(expert) for expert in rng.integers(8, size=2)))
        assert stay.step_s == pytest.approx(before_s + longer_s, rel=1e-12)
        assert stay.step_s == pytest.approx(Stay(problem, stay.device_LE).step_s, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_auto_finds_the_best_of_all_small_plans(seed: int) -> None:
    trace = chained(seed, num_layers=2, num_experts=4)
    problem = coherent_problem(trace)
    orders = [np.array(order) for order in itertools.permutations(range(4))]
    best_s = min(cost_of(problem, np.stack(pair)) for pair in itertools.product(orders, orders))
    assert solve(problem, "auto", seconds=3.0).cost == pytest.approx(best_s, rel=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_the_bound_never_exceeds_the_best_plan(seed: int) -> None:
    rng = np.random.default_rng(seed)
    uneven = replace(
        SLOW_LINKS,
        flop_per_s_R=rng.uniform(5e8, 2e9, 4),
        bytes_per_s_RR=np.where(np.eye(4, dtype=bool), 1e9, rng.uniform(1e7, 1e8, (4, 4))),
        node_bytes_per_s=None,
    )
    for topology in (SLOW_LINKS, uneven, replace(uneven, node_of_R=(0, 1, 1, 1))):
        problem = replace(coherent_problem(chained(seed, num_layers=2, num_experts=4)), topology=topology)
        orders = [np.array(order) for order in itertools.permutations(range(4))]
        best_s = min(cost_of(problem, np.stack(pair)) for pair in itertools.product(orders, orders))
        assert 0.3 * best_s <= lower_bound(problem) <= best_s


@pytest.mark.parametrize("cap", [None, 1.4])
def test_auto_is_never_worse_than_what_it_starts_from(cap: float | None) -> None:
    problem = coherent_problem(chained(1, num_layers=4, num_experts=16), constraints=Constraints(load_cap=cap, pins=(Pin(1, 3, 0),)))
    solution = solve(problem, "auto", seconds=2.0)
    assert solution.plan.mode == "coherent"
    assert solution.plan.device_of_LE()[1, 3] == 0
    assert solution.cost <= cost_of(problem, starts.contiguous(problem))
    assert solution.bound is not None
    assert 0 < solution.bound <= solution.cost
    if cap is not None:
        assert max(load_peaks(problem, solution)) <= cap + 1e-9


def test_what_mode_coherent_refuses() -> None:
    rng = np.random.default_rng(0)
    two = Trace(np.stack([rng.permutation(4)[:2] for _ in range(30)])[:, None].astype(np.uint16), 4)
    with pytest.raises(UsageError, match="2 per token"):
        Problem(Affinity.from_trace(two), TWO_BY_TWO, WORKLOAD, mode="coherent")
    trace = random_trace(0)
    with pytest.raises(UsageError, match="objective devices says nothing"):
        Problem(Affinity.from_trace(trace), TWO_BY_TWO, WORKLOAD, mode="coherent", objective="devices")
    problem = Problem(Affinity.from_trace(trace), TWO_BY_TWO, WORKLOAD, mode="coherent")
    with pytest.raises(UsageError, match="use auto"):
        solve(problem, "anneal")
    staying = solve(problem, "contiguous").plan
    with pytest.raises(UsageError, match="of mode coherent"):
        evaluate(trace, staying, TWO_BY_TWO, WORKLOAD)


@pytest.mark.parametrize("model", [{"num_heads": 8, "num_kv_heads": 2, "model_width": 64}, {"head_dim": 6, "moe_every": 1}, {}])
def test_keys_and_values_of_a_run(model: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({"model": {"block": "top_k", **model}}))
    config = ModelConfig(block="top_k", **model)
    assert load_context(path) == Context(2 * config.kv_heads * config.head_width * 4, attentions=config.moe_every)
