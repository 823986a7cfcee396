"""Affinity: counts worked by hand, counts against plain loops, and that affinities add up."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossdock.errors import BadData
from crossdock.placement.records.affinity import Affinity
from crossdock.placement.records.trace import NO_EXPERT, Trace, concatenate
from tests.placement.conftest import random_trace

BY_HAND = Trace(
    np.array(
        [
            [[0, 1], [2, 0]],
            [[1, 0], [2, 1]],
            [[2, NO_EXPERT], [NO_EXPERT, NO_EXPERT]],
            [[1, 2], [0, 2]],
        ],
        dtype=np.uint16,
    ),
    3,
    sequence_T=np.array([5, 9, 9, 5]),
)


def test_by_hand() -> None:
    affinity = Affinity.from_trace(BY_HAND)
    assert (affinity.num_tokens, affinity.num_layers, affinity.num_experts, affinity.top_k) == (4, 2, 3, 2)
    assert affinity.sets[0].experts_UK.tolist() == [[0, 1], [1, 2], [2, NO_EXPERT]]
    assert affinity.sets[0].count_U.tolist() == [2, 1, 1]
    assert affinity.sets[1].experts_UK.tolist() == [[0, 2], [1, 2], [NO_EXPERT, NO_EXPERT]]
    assert affinity.sets[1].count_U.tolist() == [2, 1, 1]
    assert affinity.load_LE.tolist() == [[2, 3, 2], [2, 1, 3]]
    assert affinity.coactivation_LEE[0].tolist() == [[2, 2, 0], [2, 3, 1], [0, 1, 2]]
    assert affinity.transitions_LEE[0].tolist() == [[0, 0, 1], [1, 0, 1], [0, 0, 0]]
    assert affinity.sequence_counts is not None
    assert affinity.sequence_counts.toarray().tolist() == [[1, 2, 1, 2, 0, 2], [1, 1, 1, 0, 1, 1]]
    assert affinity.trace_digest == BY_HAND.digest


def test_one_layer_has_no_transitions() -> None:
    affinity = Affinity.from_trace(random_trace(num_layers=1))
    assert affinity.transitions_LEE.shape == (0, 8, 8)
    assert affinity.sequence_counts is None


def test_transitions_follow_the_largest_weight() -> None:
    weights_TLK = np.array([[[0.1, 0.9], [0.9, 0.1]]])
    affinity = Affinity.from_trace(Trace(np.array([[[0, 1], [2, 0]]]), 3, weights_TLK))
    assert np.argwhere(affinity.transitions_LEE).tolist() == [[0, 1, 2]]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([(8, 2), (300, 12), (65535, 5)]), st.floats(0, 0.5))
def test_against_plain_loops(seed: int, size: tuple[int, int], drop: float) -> None:
    """(300, 12) needs two numbers to pack a set, and (65535, 5) two as well."""
    num_experts, top_k = size
    rng = np.random.default_rng(seed)
    trace = random_trace(seed, num_tokens=30, num_layers=1, num_experts=min(num_experts, 300), top_k=top_k, drop=drop)
    if num_experts == 65535:  # spread the few experts over the whole range
        spread_TLK = np.where(
            trace.experts_TLK == NO_EXPERT, NO_EXPERT, trace.experts_TLK.astype(np.int64) * 200 + int(rng.integers(0, 200))
        )
        sets = _sets_only(Trace(spread_TLK, num_experts))
        expected = _loop_sets(spread_TLK[:, 0])
    else:
        affinity = Affinity.from_trace(trace)
        sets = {
            tuple(row): count for row, count in zip(affinity.sets[0].experts_UK.tolist(), affinity.sets[0].count_U.tolist(), strict=True)
        }
        expected = _loop_sets(trace.experts_TLK[:, 0])
        together_EE = np.zeros((num_experts, num_experts), dtype=int)
        for chosen in trace.experts_TLK[:, 0].tolist():
            for a in chosen:
                for b in chosen:
                    if NO_EXPERT not in (a, b):
                        together_EE[a, b] += 1
        np.testing.assert_array_equal(affinity.coactivation_LEE[0], together_EE)
    assert sets == expected
    assert list(sets) == sorted(sets)


def _sets_only(trace: Trace) -> dict[tuple[int, ...], int]:
    """The sets alone: a co-activation matrix of 65535 experts would not fit."""
    from crossdock.placement.records.affinity import _expert_sets

    sets = _expert_sets(trace.experts_TLK[:, 0], trace.num_experts)
    return {tuple(row): count for row, count in zip(sets.experts_UK.tolist(), sets.count_U.tolist(), strict=True)}


def _loop_sets(experts_TK: np.ndarray) -> dict[tuple[int, ...], int]:
    counts: dict[tuple[int, ...], int] = {}
    for chosen in experts_TK.tolist():
        key = tuple(sorted(chosen))
        counts[key] = counts.get(key, 0) + 1
    return counts


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 2))
def test_sum_is_the_affinity_of_both_traces(seed: int, other_top_k: int) -> None:
    one = random_trace(seed, num_tokens=20, num_sequences=4, drop=0.2)
    two = random_trace(seed + 1, num_tokens=11, top_k=other_top_k, num_sequences=3)
    total, whole = Affinity.from_trace(one) + Affinity.from_trace(two), Affinity.from_trace(concatenate([one, two]))
    assert (total.num_tokens, total.top_k) == (whole.num_tokens, whole.top_k)
    for ours, theirs in zip(total.sets, whole.sets, strict=True):
        np.testing.assert_array_equal(ours.experts_UK, theirs.experts_UK)
        np.testing.assert_array_equal(ours.count_U, theirs.count_U)
    for name in ("load_LE", "coactivation_LEE", "transitions_LEE"):
        np.testing.assert_array_equal(getattr(total, name), getattr(whole, name))
    assert total.sequence_counts is not None
    assert whole.sequence_counts is not None
    np.testing.assert_array_equal(total.sequence_counts.toarray(), whole.sequence_counts.toarray())


def test_sum_drops_sequences_that_one_side_lacks() -> None:
    total = Affinity.from_trace(random_trace(num_sequences=3)) + Affinity.from_trace(random_trace(1))
    assert total.sequence_counts is None


def test_sum_of_different_models_is_refused() -> None:
    with pytest.raises(BadData, match=r"\(3, 8\) and \(2, 8\)"):
        Affinity.from_trace(random_trace()) + Affinity.from_trace(random_trace(num_layers=2))


def test_real_trace_adds_up(real_trace: Trace) -> None:
    affinity = Affinity.from_trace(real_trace)
    chosen = real_trace.num_tokens * real_trace.top_k
    assert (affinity.load_LE.sum(axis=1) == chosen).all()
    assert (affinity.coactivation_LEE.sum(axis=(1, 2)) == chosen * real_trace.top_k).all()
    assert (affinity.transitions_LEE.sum(axis=(1, 2)) == real_trace.num_tokens).all()
    assert all(sets.count_U.sum() == real_trace.num_tokens for sets in affinity.sets)
