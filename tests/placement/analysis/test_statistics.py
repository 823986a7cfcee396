"""Error bars cover what a fresh sample shows, curves flatten, drift is a distance."""

import numpy as np
import pytest

from crossdock.errors import UsageError
from crossdock.placement.analysis.statistics import SCORES, chance_drift, drift, enough_tokens, error_bars
from crossdock.placement.costs.cost import Workload
from crossdock.placement.costs.evaluate import evaluate
from crossdock.placement.records.affinity import Affinity
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import Trace
from crossdock.placement.solvers.problem import Problem
from tests.placement.conftest import random_trace

TOPOLOGY = Topology.uniform(2, 2)


def test_error_bars_hold_the_value_of_the_whole_trace_and_widen_with_less_text() -> None:
    long, short = (random_trace(1, num_tokens=tokens, num_sequences=tokens // 20) for tokens in (4000, 400))
    plan = Plan.contiguous(3, 8, 4)
    bars = error_bars(long, plan, TOPOLOGY, Workload())
    whole = evaluate(long, plan, TOPOLOGY, Workload())
    for name in SCORES:
        bar = bars[name]
        assert bar.value == pytest.approx(getattr(whole, name), rel=1e-9)
        assert bar.low <= bar.high
    wide = error_bars(short, plan, TOPOLOGY, Workload())["devices_per_token"]
    assert wide.high - wide.low > 1.5 * (bars["devices_per_token"].high - bars["devices_per_token"].low)


def test_error_bars_cover_fresh_samples_about_as_often_as_they_say() -> None:
    everything = random_trace(2, num_tokens=20_000, num_sequences=1000)
    plan = Plan.contiguous(3, 8, 4)
    truth = evaluate(everything, plan, TOPOLOGY, Workload()).devices_per_token
    assert everything.sequence_T is not None
    hits = 0
    for seed in range(40):
        chosen = np.isin(everything.sequence_T, np.random.default_rng(seed).choice(1000, 40, replace=False))
        bar = error_bars(everything.select(chosen), plan, TOPOLOGY, Workload(), repeats=200)["devices_per_token"]
        hits += bar.low <= truth <= bar.high
    assert 28 <= hits <= 40


def test_one_block_has_no_error_bars() -> None:
    with pytest.raises(UsageError, match="one block of 40 tokens"):
        error_bars(random_trace(), Plan.contiguous(3, 8, 4), TOPOLOGY, Workload())


def test_more_tokens_fit_other_text_better() -> None:
    trace, other = (random_trace(seed, num_tokens=6000, num_sequences=300) for seed in (3, 4))
    problem = Problem(Affinity.from_trace(trace), Topology.uniform(1, 4), Workload(), objective="devices")
    points = enough_tokens(problem, trace, Affinity.from_trace(other), [20, 200, 6000], "dp", 5.0)
    assert [point.num_tokens for point in points] == [20, 200, 6000]
    assert points[-1].held_out <= points[0].held_out
    assert abs(points[-1].fit - points[-1].held_out) < abs(points[0].fit - points[0].held_out)
    with pytest.raises(UsageError, match="from 1 to 6000"):
        enough_tokens(problem, trace, Affinity.from_trace(other), [7000], "dp", 5.0)


def test_drift_of_one_layer_has_no_steps_between_layers() -> None:
    rng = np.random.default_rng(0)
    first, second = (Trace(rng.integers(0, 4, (4096, 1, 1)).astype(np.uint16), 4) for _ in range(2))
    apart, chance = drift(Affinity.from_trace(first), Affinity.from_trace(second)), chance_drift(first, second, repeats=5)
    assert (len(apart.load_L), len(apart.transitions_L), len(chance.transitions_L)) == (1, 0, 0)


def test_drift_is_nothing_for_the_same_text_and_all_for_disjoint_experts() -> None:
    affinity = Affinity.from_trace(random_trace(5))
    assert drift(affinity, affinity).load_L.tolist() == [0.0, 0.0, 0.0]
    low, high = (Affinity.from_trace(Trace(np.full((30, 3, 1), expert, dtype=np.uint16), 8)) for expert in (0, 7))
    assert drift(low, high).load_L.tolist() == [1.0, 1.0, 1.0]
    assert drift(low, high).transitions_L.tolist() == [1.0, 1.0]
