"""Sums and profiles of flights, worked by hand."""

import pytest

from crossdock.runtime.transport.ledger import CAPACITY, Flight, Ledger, bytes_by_class, bytes_by_way, exposed_s, profile, standstill


def flight(
    stage: str, direction: str, times: tuple[float, float, float], layer: int = 0, movement: int = 1, kind: str = "tokens"
) -> Flight:
    return Flight(layer, stage, direction, kind, (1, 20, 300), *times, movement)  # type: ignore[arg-type]


STEP = (
    flight("dispatch", "forward", (0.0, 0.0, 0.5), kind="counts"),
    flight("dispatch", "forward", (1.0, 3.0, 4.0)),  # window 2, exposed 1
    flight("combine", "forward", (9.0, 12.0, 12.0)),  # experts 5, window 3
    flight("combine", "backward", (20.0, 21.0, 23.0)),  # window 1, exposed 2
    flight("dispatch", "backward", (33.0, 37.0, 37.0)),  # experts 10, window 4
)


def test_bytes_are_summed_by_class_kind_and_way() -> None:
    assert bytes_by_class(STEP) == (4, 80, 1200)
    assert bytes_by_class(STEP, "counts") == (1, 20, 300)
    assert bytes_by_class(STEP, "metadata") == (0, 0, 0)
    assert bytes_by_way(STEP) == {
        (stage, direction): (1, 20, 300) for stage in ("dispatch", "combine") for direction in ("forward", "backward")
    }


def test_exposed_is_the_time_between_wait_begin_and_wait_end() -> None:
    assert exposed_s(STEP) == 3.5
    assert exposed_s(()) == 0


def test_profile_of_one_movement() -> None:
    found = profile(STEP)
    assert list(found) == [0]
    layer = found[0]
    assert (layer.dispatch_forward_s, layer.combine_forward_s) == (2.0, 3.0)
    assert (layer.combine_backward_s, layer.dispatch_backward_s) == (1.0, 4.0)
    assert (layer.expert_forward_s, layer.expert_backward_s) == (5.0, 10.0)
    assert layer.exposed_s == 3.5


def test_profile_pairs_chunks_by_movement_and_averages_them() -> None:
    flights = (
        flight("dispatch", "forward", (0.0, 1.0, 2.0), movement=1),
        flight("dispatch", "forward", (0.5, 3.5, 4.0), movement=2),
        flight("combine", "forward", (8.0, 8.0, 9.0), movement=2),  # experts 4
        flight("combine", "forward", (10.0, 10.0, 11.0), movement=1),  # experts 8
        flight("dispatch", "forward", (50.0, 51.0, 52.0), movement=3, layer=5),
    )
    found = profile(flights)
    assert found[0].expert_forward_s == 6.0
    assert found[0].dispatch_forward_s == 1.5  # 1 of the first chunk; 3 of the second, 1 of which the rank waited for the first
    assert found[0].expert_backward_s == 0.0
    assert found[0].exposed_s == pytest.approx((1 + 0.5 + 1 + 1) / 2)
    assert found[5].expert_forward_s == 0.0


def test_no_work_runs_while_the_rank_waits_for_the_metadata() -> None:
    flights = (
        flight("dispatch", "forward", (0.0, 1.0, 5.0), kind="metadata"),
        flight("dispatch", "forward", (0.5, 5.5, 6.0)),  # between 0.5 and 5.5 only 0.5 to 1 and 5 to 5.5 were work
    )
    assert profile(flights)[0].dispatch_forward_s == pytest.approx(1.0)


def test_standstill_counts_each_moment_once() -> None:
    flights = [flight("dispatch", "forward", times) for times in ((0.0, 1.0, 3.0), (0.0, 2.0, 4.0), (0.0, 6.0, 7.0))]
    stood_s = standstill(flights)
    assert [stood_s(moment) for moment in (0.0, 1.0, 2.5, 4.0, 5.0, 9.0)] == [0.0, 0.0, 1.5, 3.0, 3.0, 4.0]


def test_take_forgets() -> None:
    ledger = Ledger()
    now = ledger.now()
    ledger.record(2, "combine", "backward", "metadata", (1, 2, 3), now, now, ledger.now(), 9)
    (taken,) = ledger.take()
    assert (taken.layer, taken.stage, taken.direction, taken.kind, taken.bytes_by_class, taken.movement) == (
        2,
        "combine",
        "backward",
        "metadata",
        (1, 2, 3),
        9,
    )
    assert taken.launched_s == taken.wait_begin_s <= taken.wait_end_s
    assert ledger.take() == ()


def test_movements_are_numbered() -> None:
    ledger = Ledger()
    assert ledger.next_movement() != ledger.next_movement()


def test_a_ledger_that_is_off_costs_no_clock_and_keeps_nothing() -> None:
    ledger = Ledger(enabled=False)
    assert ledger.now() == 0.0
    ledger.record(0, "dispatch", "forward", "tokens", (0, 0, 0), 0.0, 0.0, 0.0)
    assert ledger.take() == ()


def test_a_ledger_that_nobody_reads_does_not_grow_for_ever() -> None:
    ledger = Ledger()
    for number in range(CAPACITY + 10):
        ledger.record(number, "dispatch", "forward", "tokens", (0, 0, 0), 0.0, 0.0, 0.0)
    taken = ledger.take()
    assert len(taken) == CAPACITY
    assert taken[-1].layer == CAPACITY + 9
