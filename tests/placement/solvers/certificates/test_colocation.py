"""The bound on what co-location keeps is sound whatever its multipliers, its projections are right, and inequalities tighten it."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossdock.placement.solvers.certificates import blas_threads, claws, colocation
from crossdock.placement.solvers.certificates.claws import NONE, Claws
from crossdock.placement.solvers.search.layer_search import Deadline


def groupings(num_items: int, num_groups: int) -> Iterator[np.ndarray]:
    """All ways to put items into named groups of equal size."""
    for group_I in itertools.product(range(num_groups), repeat=num_items):
        if (np.bincount(group_I, minlength=num_groups) == num_items // num_groups).all():
            yield np.array(group_I)


def most_kept_of_all(flow_PII: np.ndarray, num_groups: int, load_LI: np.ndarray, cap_L: np.ndarray) -> float:
    """By dynamic programming over all groupings; -inf where none keeps to the cap."""
    everything = list(groupings(flow_PII.shape[1], num_groups))
    allowed = [
        [group_I for group_I in everything if np.bincount(group_I, load_I).max() <= cap + 1e-9]
        for load_I, cap in zip(load_LI, cap_L, strict=True)
    ]
    best = np.zeros(len(allowed[0]))
    for flow_II, before, after in zip(flow_PII, allowed, allowed[1:], strict=False):
        kept = [[(flow_II * (one[:, None] == other)).sum() for other in after] for one in before]
        best = (best[:, None] + np.array(kept).reshape(len(before), len(after))).max(axis=0, initial=-np.inf)
    return float(best.max(initial=-np.inf))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(4, 2), (6, 2), (6, 3)]), st.sampled_from([1.1, 1.4, 9.0]), st.integers(1, 60))
def test_no_grouping_keeps_more_than_the_bound(seed: int, shape: tuple[int, int], cap: float, iterations: int) -> None:
    rng = np.random.default_rng(seed)
    num_items, num_groups = shape
    flow_PII = rng.gamma(0.3, size=(2, num_items, num_items))
    load_LI = rng.gamma(2.0, size=(3, num_items))
    cap_L = cap * load_LI.sum(axis=1) / num_groups
    colocation.ITERATIONS, before = iterations, colocation.ITERATIONS
    try:
        bound = colocation.most_kept(flow_PII, num_groups, Deadline(10.0), load_LI, cap_L)
    finally:
        colocation.ITERATIONS = before
    assert most_kept_of_all(flow_PII, num_groups, load_LI, cap_L) <= bound * (1 + 1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_claws_hold_for_every_grouping(seed: int) -> None:
    rng = np.random.default_rng(seed)
    loose_JJ = rng.random((10, 10)).astype(np.float32)
    broken = Claws(10)
    assert broken.extend((loose_JJ + loose_JJ.T) / 2) > 0
    member_CM = broken.member_CM
    assert all(len(set(row[row != NONE])) == (row != NONE).sum() for row in member_CM)
    for _ in range(20):
        group_J = rng.integers(0, 4, 10)
        together_JJ = (group_J[:, None] == group_J).astype(np.float32)
        assert (broken._sign @ together_JJ.ravel() <= 1.0).all()


def test_a_claw_by_hand() -> None:
    """Item 0 shares half a group with each of 1, 2 and 3, which share nothing: 1.5 where 1 is allowed."""
    box_JJ = np.eye(4, dtype=np.float32)
    box_JJ[0, 1:] = box_JJ[1:, 0] = 0.5
    broken = Claws(4)
    assert broken.extend(box_JJ) == 1
    assert sorted(broken.member_CM[0][broken.member_CM[0] != NONE]) == [0, 1, 2, 3]
    broken.rise(box_JJ, 1.0)
    assert broken.price_C[0] == pytest.approx(0.5 / 6)  # six entries, each used once
    np.testing.assert_allclose(broken.pressure()[0, 1:], 0.5 / 6)
    np.testing.assert_allclose(broken.pressure()[1, 2:], -0.5 / 6)


def test_inequalities_tighten_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    flow_PII = np.random.default_rng(5).gamma(0.2, size=(2, 12, 12))
    with_claws = colocation.most_kept(flow_PII, 4, Deadline(20.0))
    monkeypatch.setattr(claws, "LEAST", np.inf)
    without = colocation.most_kept(flow_PII, 4, Deadline(20.0))
    assert with_claws < 0.99 * without


def test_the_projection_onto_a_sum_is_the_nearest_point() -> None:
    value = np.random.default_rng(4).normal(size=12)
    clipped = colocation._clipped_to_sum(value, 2.0, 6.0)
    assert clipped.sum() == pytest.approx(6.0)
    inside = (clipped > 1e-9) & (clipped < 2.0 - 1e-9)
    assert np.ptp((value - clipped)[inside]) < 1e-9  # all free entries were moved alike


def test_blas_has_one_thread_inside_and_as_many_as_before_outside() -> None:
    switches = blas_threads._switches()
    if not switches:
        pytest.skip("no OpenBLAS is loaded")
    before = [get() for get, _ in switches]
    with blas_threads.single_threaded_blas():
        assert {get() for get, _ in switches} == {1}
    assert [get() for get, _ in switches] == before
