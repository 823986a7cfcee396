"""The rule that says when overlap loses: by hand, at its limits, and against a simulation of two jobs that slow each other down."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossdock.errors import BadConfig
from crossdock.placement.strategies.overlap_rule import Interference, beside_s, overlap_saving_s
from crossdock.placement.strategies.pipeline import BlockTimes

seconds = st.floats(0.001, 10)


def simulated_s(compute_s: float, transfer_s: float, slowdown: float) -> float:
    """Two jobs in small steps: while both have work left, each advances at 1 / slowdown of its own pace."""
    left, now, step = [compute_s, transfer_s], 0.0, min(compute_s, transfer_s) / 1000
    while max(left) > step / 2:
        pace = 1 / slowdown if min(left) > step / 2 else 1.0
        left = [remaining - step * pace if remaining > step / 2 else 0.0 for remaining in left]
        now += step
    return now


@pytest.mark.parametrize("slowdown", [1.0, 1.4, 2.0, 3.0])
@pytest.mark.parametrize(("compute_s", "transfer_s"), [(3.0, 1.0), (1.0, 3.0), (2.0, 2.0)])
def test_two_jobs_side_by_side(compute_s: float, transfer_s: float, slowdown: float) -> None:
    found = beside_s(compute_s, transfer_s, Interference(0.0, slowdown))
    assert found == pytest.approx(simulated_s(compute_s, transfer_s, slowdown), rel=0.01)


def test_by_hand() -> None:
    # Stages 4 + 2, dispatch 3, combine 1, slot 1: forward hides 3 and 1; backward, twice the compute, 3 beside 4 and 1 beside 8.
    times = BlockTimes((4.0, 2.0), dispatch_s=3.0, expert_s=5.0, combine_s=1.0)
    assert overlap_saving_s(times, 1, Interference()) == 8.0
    assert overlap_saving_s(times, 1, Interference(handle_s=0.5, slowdown=1.5)) == 8.0 * 0.5 - 4 * 0.5
    assert overlap_saving_s(times, 2, Interference()) == 4.0  # each dispatch way 3 forward and 1 backward; nothing beside the others
    assert overlap_saving_s(times, 1, Interference(slowdown=2.0)) <= 0.0
    assert overlap_saving_s(times, 1, Interference(slowdown=1.99)) > 0.0


@given(st.lists(seconds, max_size=3), seconds, seconds, st.floats(0.0001, 1.0), st.floats(1, 4), st.integers(0, 3))
def test_limits(stage_s: list[float], dispatch_s: float, combine_s: float, handle_s: float, slowdown: float, slot: int) -> None:
    slot = min(slot, len(stage_s))
    times = BlockTimes(tuple(stage_s), dispatch_s, 1.0, combine_s)
    assert overlap_saving_s(times, slot, Interference()) >= 0.0
    if not stage_s or slowdown >= 2.0:
        assert overlap_saving_s(times, slot, Interference(handle_s, slowdown)) <= 0.0
    if stage_s:
        sequential_s = 2 * (dispatch_s + combine_s) + 3 * sum(stage_s) + 3.0
        saving_s = overlap_saving_s(times, slot, Interference())
        assert sequential_s - saving_s == pytest.approx(times.forward_s(slot) + times.backward_s(slot))  # the makespan of pipeline.py


@given(seconds, seconds, st.floats(0, 1), st.floats(1, 4))
def test_measuring_gives_back_what_was_put_in(compute_s: float, transfer_s: float, handle_s: float, slowdown: float) -> None:
    both_s = beside_s(compute_s, transfer_s, Interference(handle_s, slowdown))
    assert Interference.measured(compute_s, transfer_s, both_s, handle_s).slowdown == pytest.approx(slowdown, rel=1e-6)


def test_noise_is_not_taken_for_speed() -> None:
    assert Interference.measured(2.0, 1.0, 1.9, 0.0) == Interference(0.0, 1.0)
    with pytest.raises(BadConfig, match=r"slowdown is 0\.5; give a finite number of at least 1"):
        Interference(slowdown=0.5)
    with pytest.raises(BadConfig, match=r"handle_s is nan"):
        Interference(handle_s=float("nan"))
