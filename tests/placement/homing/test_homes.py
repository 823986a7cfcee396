"""Homes: exact against brute force, always equally many, and costs that are the evaluator's copies times what their links cost."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossdock.errors import BadData, UsageError
from crossdock.placement.costs.cost import Workload
from crossdock.placement.costs.evaluate import evaluate
from crossdock.placement.homing import homes as homing
from crossdock.placement.homing.homes import Batches, CopyCosts, assign_homes, homes_as_read, known_costs, sequences_of
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import Trace
from tests.placement.conftest import random_plan, random_trace


def least_cost(cost_QR: np.ndarray) -> float:
    """Over all homes whose numbers of sequences differ by one at most."""
    num_sequences, num_homes = cost_QR.shape
    best = np.inf
    for homes in itertools.product(range(num_homes), repeat=num_sequences):
        count_R = np.bincount(homes, minlength=num_homes)
        if count_R.max() - count_R.min() <= 1:
            best = min(best, float(cost_QR[np.arange(num_sequences), list(homes)].sum()))
    return best


@pytest.mark.parametrize(("num_sequences", "num_homes"), [(4, 2), (6, 3), (6, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("seed", range(5))
def test_homes_are_the_cheapest_of_all(num_sequences: int, num_homes: int, seed: int) -> None:
    cost_QR = np.random.default_rng(seed).integers(0, 20, (num_sequences, num_homes))
    home_Q = assign_homes(cost_QR)
    assert cost_QR[np.arange(num_sequences), home_Q].sum() == least_cost(cost_QR)


@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 10_000), st.integers(1, 20))
def test_every_home_gets_equally_many(num_homes: int, rounds: int, seed: int, part: int) -> None:
    cost_QR = np.random.default_rng(seed).integers(0, 50, (num_homes * rounds, num_homes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(homing, "MAX_PART", part)
        home_Q = assign_homes(cost_QR)
    assert np.bincount(home_Q, minlength=num_homes).tolist() == [rounds] * num_homes
    as_read = homes_as_read(len(home_Q), num_homes)
    assert np.bincount(as_read, minlength=num_homes).tolist() == [rounds] * num_homes
    if part >= len(home_Q):
        assert cost_QR[np.arange(len(home_Q)), home_Q].sum() <= cost_QR[np.arange(len(home_Q)), as_read].sum()


def test_sequences_that_do_not_divide_differ_by_one() -> None:
    home_Q = assign_homes(np.zeros((7, 3)))
    assert sorted(np.bincount(home_Q).tolist()) == [2, 2, 3]


@pytest.mark.parametrize("dispatch", ["flat", "deduplicated", "hierarchical"])
@pytest.mark.parametrize("num_slots", [2, 4])
def test_costs_are_the_copies_that_the_evaluator_counts_times_their_links(dispatch: str, num_slots: int) -> None:
    topology = replace(Topology.uniform(2, 2), name="uneven links")
    topology = replace(topology, bytes_per_s_RR=topology.bytes_per_s_RR * np.arange(1, 17).reshape(4, 4))
    workload = Workload(dispatch=dispatch)  # type: ignore[arg-type]
    trace = random_trace(3, num_tokens=60, num_homes=4, num_sequences=7, drop=0.2)
    plan = random_plan(2, num_devices=4, num_slots=num_slots)
    assert plan.has_replicas == (num_slots == 4)
    costs = CopyCosts.of(topology, workload)
    sequence_T = np.arange(trace.num_tokens)  # every token a sequence of its own, at home where the trace has it
    cost_TH = known_costs(trace, sequence_T, plan, costs)
    assert trace.home_T is not None
    counted_HLRR = evaluate(trace, plan, topology, workload).hops_HLRR
    link_s_RR = np.where(np.eye(4, dtype=bool), 0.0, workload.copy_bytes / topology.bytes_per_s_RR)
    assert cost_TH[sequence_T, trace.home_T].sum() == pytest.approx((counted_HLRR * link_s_RR).sum(), rel=1e-12)


def test_under_objective_devices_a_copy_costs_1_and_at_home_nothing() -> None:
    # two tokens: experts 0 and 1 live on device 0, 2 and 3 on device 1
    trace = Trace(np.array([[[0, 1]], [[1, 2]]]), 4)
    plan = random_plan(0, num_layers=1, num_experts=4, num_devices=2)
    plan = type(plan)(np.array([[[0, 1], [2, 3]]]), 4)
    costs = CopyCosts.of(Topology.uniform(1, 2), Workload(), "devices")
    assert known_costs(trace, np.array([0, 1]), plan, costs).tolist() == [[0.0, 1.0], [1.0, 1.0]]


def test_a_shared_card_makes_its_nodes_links_dearer() -> None:
    own = CopyCosts.of(Topology.uniform(2, 2, other_node_bytes_per_s=1e9), Workload())
    shared = CopyCosts.of(Topology.uniform(2, 2, other_node_bytes_per_s=1e9, shared_by_node=True), Workload())
    assert shared.device_HR[0, 2] == pytest.approx(2 * own.device_HR[0, 2])
    assert shared.device_HR[0, 1] == own.device_HR[0, 1]


def test_hops_have_no_homes() -> None:
    with pytest.raises(UsageError, match="objective hops counts steps between experts"):
        CopyCosts.of(Topology.uniform(1, 2), Workload(), "hops")


# ---- sequences and batches -------------------------------------------------------------------------------------------


def test_sequences_are_numbered_cut_and_refused() -> None:
    experts_TLK = np.zeros((10, 1, 1), dtype=np.uint16)
    named = Trace(experts_TLK, 2, sequence_T=np.array([7, 7, 3, 3, 7, 7, 3, 3, 3, 9]))
    with pytest.raises(UsageError, match=r"1 to 5 tokens.*--sequence-tokens 1"):
        sequences_of(named)
    assert sequences_of(named, 2).tolist() == [2, 2, 0, 0, 3, 3, 1, 1, -1, -1]
    assert sequences_of(named.select(slice(0, 8))).tolist() == [1, 1, 0, 0, 1, 1, 0, 0]
    assert sequences_of(Trace(experts_TLK, 2), 4).tolist() == [0] * 4 + [1] * 4 + [-1] * 2
    with pytest.raises(UsageError, match="names no sequences"):
        sequences_of(Trace(experts_TLK, 2))
    with pytest.raises(BadData, match=r"has 11 tokens; the longest has 10"):
        sequences_of(Trace(experts_TLK, 2), 11)


def test_batches_hold_every_sequence_once_and_give_it_one_home() -> None:
    trace = random_trace(1, num_tokens=60, num_sequences=None)
    sequence_T = sequences_of(trace, 5)
    batches = Batches.draw(12, 4, 2, seed=3)
    assert sorted(batches.sequence_BQ.reshape(-1).tolist()) == list(range(12))
    cost_QR = np.random.default_rng(0).integers(0, 9, (12, 2))
    homes_BQ = batches.homes(cost_QR)
    assert (np.sort(homes_BQ, axis=1) == [0, 0, 1, 1]).all()
    there = batches.trace_at(trace, sequence_T, homes_BQ)
    assert there.num_tokens == 60
    home_of = dict(zip(batches.sequence_BQ.reshape(-1).tolist(), homes_BQ.reshape(-1).tolist(), strict=True))
    assert there.home_T is not None
    assert there.home_T.tolist() == [home_of[number] for number in sequence_T.tolist()]
    with pytest.raises(UsageError, match="5 sequences of a batch do not divide over 2 devices; give --batch-sequences 6"):
        Batches.draw(12, 5, 2, seed=0)
    with pytest.raises(BadData, match="12 sequences, fewer than one batch of 14"):
        Batches.draw(12, 14, 2, seed=0)
