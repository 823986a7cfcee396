"""Makespans of chunked blocks against a clock that ticks, the chosen schedule against all others, and ScMoE's own rule."""

import itertools
from collections import deque
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossdock.errors import BadConfig
from crossdock.placement.costs.cost import makespan
from crossdock.placement.strategies.pipeline import BlockTimes, best_pipeline, chunked_makespan, mismatch_s, mismatch_slot


def ticked(before: int, out: int, expert: int, after: int, back: int, chunks: int, link_busy: int = 0) -> int:
    """The same by brute force: two queues, one tick of work each per tick of time, a chunk handed on when its work is done."""
    link: deque[list[int]] = deque([[link_busy, -1], *([out, chunk] for chunk in range(chunks))])  # [ticks left, chunk that comes out]
    compute: deque[list[int]] = deque([[before, -1], *([expert, chunk] for chunk in range(chunks)), [after, -1]])
    arrived: set[int] = set()
    returning = 0
    for now in itertools.count():
        moved = True
        while moved:  # work of zero ticks takes no time
            moved = False
            while link and link[0][0] == 0:
                chunk = link.popleft()[1]
                arrived |= {chunk} if chunk >= 0 else set()
                moved = True
            while compute and compute[0][0] == 0 and (compute[0][1] < 0 or compute[0][1] in arrived):
                if compute.popleft()[1] >= 0:
                    link.append([back, -1])
                    returning += 1
                moved = True
        if not link and not compute:
            assert returning == chunks
            return now
        if link:
            link[0][0] -= 1
        if compute and (compute[0][1] < 0 or compute[0][1] in arrived):
            compute[0][0] -= 1
    raise AssertionError


ticks = st.integers(0, 12)


@given(ticks, ticks, ticks, ticks, ticks, st.integers(1, 5), ticks)
def test_makespan_equals_a_ticking_clock(before: int, out: int, expert: int, after: int, back: int, chunks: int, busy: int) -> None:
    assert chunked_makespan(before, out, expert, after, back, chunks, busy) == ticked(before, out, expert, after, back, chunks, busy)


@given(ticks, ticks, ticks, ticks, ticks)
def test_one_chunk_is_the_makespan_of_the_cost_model(before: int, out: int, expert: int, after: int, back: int) -> None:
    assert chunked_makespan(before, out, expert, after, back) == makespan(before, out, expert, after, back)


def test_by_hand() -> None:
    # Nothing beside it: 12 out, 12 experts, 12 back. In three chunks of 4 the experts follow the link, and the link the experts:
    # out ends at 4, 8, 12; experts at 8, 12, 16; back at 16 (waits for the outward ones until 12), 20, 24.
    assert chunked_makespan(0, 4, 4, 0, 4, chunks=3) == 24
    # Stages of 12 hide the way out whole: experts from 12 on end at 16, 20, 24, back at 20, 24, 28.
    assert chunked_makespan(12, 4, 4, 0, 4, chunks=3) == 28
    # And 6 more after the experts hide the last way back, 28 against 24 + 6.
    assert chunked_makespan(12, 4, 4, 6, 4, chunks=3) == 30


def total_s(times: BlockTimes, slot: int, forward: int, backward: int) -> float:
    """Forward and backward of a block in ticks, of the brute force; sixteenths of a second."""

    pieces = max(forward, backward)  # one divides the other here

    def direction(stages: Sequence[float], others: Sequence[float], factor: float, chunks: int) -> int:
        parts = (
            factor * sum(stages),
            times.message_s * pieces / chunks + times.dispatch_s / chunks,
            times.chunk_s + factor * times.expert_s / chunks,
            factor * sum(others),
            times.message_s * pieces / chunks + times.combine_s / chunks,
        )
        before, out, expert, after, back = (round(16 * seconds) for seconds in parts)
        return ticked(before, out, expert, after, back, chunks)

    before, after = times.stage_s[:slot], times.stage_s[slot:]
    return (direction(before, after, 1.0, forward) + direction(after, before, times.backward_over_forward, backward)) / 16


seconds = st.integers(0, 4)


@given(st.lists(seconds, max_size=3), seconds, seconds, seconds, st.integers(0, 3), st.integers(0, 3))
def test_no_other_schedule_is_shorter(stages: list[int], dispatch: int, expert: int, combine: int, message: int, chunk: int) -> None:
    times = BlockTimes(tuple(stages), dispatch, expert, combine, message / 16, chunk / 16)
    found = best_pipeline(times, (1, 2, 4), (1, 4))
    assert found.total_s == total_s(times, found.expert_slot, found.forward_chunks, found.backward_chunks)
    assert found.total_s == min(total_s(times, *each) for each in itertools.product(range(len(stages) + 1), (1, 2, 4), (1, 4)))


def test_degrees_differ_forward_and_backward() -> None:
    # Forward the transfers are longer than everything else and chunks pay; backward the stages hide them, and a chunk costs its overhead.
    times = BlockTimes((4.0, 4.0), dispatch_s=6.0, expert_s=4.0, combine_s=6.0, chunk_s=0.1)
    found = best_pipeline(times)
    assert (found.expert_slot, found.backward_chunks) == (1, 1)
    assert found.forward_chunks > 1


def test_start_up_costs_keep_the_block_in_one_piece() -> None:
    free = BlockTimes((), 8.0, 8.0, 8.0)
    assert best_pipeline(free).forward_chunks == 2  # the link is busy throughout already
    assert best_pipeline(free).backward_chunks == 8
    assert best_pipeline(BlockTimes((), 8.0, 8.0, 8.0, message_s=10.0)).forward_chunks == 1
    assert best_pipeline(BlockTimes((), 8.0, 8.0, 8.0, chunk_s=10.0)).backward_chunks == 1


def test_the_coarser_direction_pays_for_the_messages_of_the_finer_one() -> None:
    times = BlockTimes((), 8.0, 8.0, 8.0, message_s=1.0)
    assert times.forward_s(0, 1, 4) == times.forward_s(0) + 2 * 3.0
    assert times.forward_s(0, 2, 4) > times.forward_s(0, 2)


def test_equal_schedules_go_to_fewer_chunks_and_the_earlier_slot() -> None:
    found = best_pipeline(BlockTimes((1.0, 1.0), 0.0, 1.0, 0.0))
    assert (found.expert_slot, found.forward_chunks, found.backward_chunks) == (0, 1, 1)


def test_the_papers_rule_by_hand_and_where_it_errs() -> None:
    # Stages 3, 3, 3; dispatch 4, combine 4. Mismatch: slot 0 4 + 5, slot 1 1 + 2, slot 2 2 + 1, slot 3 5 + 4.
    times = BlockTimes((3.0, 3.0, 3.0), 4.0, 1.0, 4.0)
    assert [mismatch_s(times, slot) for slot in range(4)] == [9.0, 3.0, 3.0, 9.0]
    assert mismatch_slot(times) == 1
    # Stages 1, 10; dispatch 3, combine 1. The rule takes slot 2: 8 + 1 against 2 + 9. It sees the forward pass alone, 11 + 1 + 1 there; the
    # backward pass is then 3 + 1 + 11, and slot 1 with 3 + 1 + 10 and 10 + 1 + 1 is shorter.
    times = BlockTimes((1.0, 10.0), 3.0, 1.0, 1.0, backward_over_forward=1.0)
    assert (mismatch_slot(times), best_pipeline(times, (1,), (1,)).expert_slot) == (2, 1)
    assert best_pipeline(times, (1,), (1,)).total_s == 26.0


@pytest.mark.parametrize("counts", [(), (0, 1)])
def test_degrees_must_be_some(counts: tuple[int, ...]) -> None:
    with pytest.raises(BadConfig, match="backward degrees of chunking"):
        best_pipeline(BlockTimes((), 1.0, 1.0, 1.0), (1,), counts)
