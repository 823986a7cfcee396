"""SIGTERM before training, while a rank is failing, and when it is done."""

import contextlib
import os
import signal
import threading

import pytest

from crossdock.errors import PeerLost, Preempted
from crossdock.launch.ranks.termination import be_deaf, sigterm_restored, stopping_in_order


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_before_training_it_stops_the_rank_in_order() -> None:
    with sigterm_restored(), pytest.raises(Preempted, match="before there was anything to save"), stopping_in_order():
        terminate()


def test_a_library_that_goes_on_whatever_has_failed_does_not_keep_a_rank_from_stopping() -> None:
    swallowed = []

    def go_on() -> None:
        try:
            terminate()
        except Exception as failure:
            swallowed.append(failure)
            terminate()  # and one that comes meanwhile raises nothing
        while True:
            pass

    with sigterm_restored(), pytest.raises(Preempted, match="before there was anything to save"), stopping_in_order():
        go_on()
    assert len(swallowed) == 1
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGVTALRM) == signal.SIG_DFL


def test_a_signal_that_was_swallowed_reaches_who_takes_it_next() -> None:
    heard: list[int] = []
    with sigterm_restored(), stopping_in_order():
        with contextlib.suppress(Preempted):
            terminate()
        signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
        while not heard:
            pass
    assert heard == [signal.SIGTERM]


def test_a_rank_that_waited_for_one_that_was_asked_too_has_lost_nobody() -> None:
    def wait() -> None:
        try:
            raise RuntimeError("Connection closed by peer")
        except RuntimeError as failure:
            terminate()  # a signal that came while native code waited is heard when that has failed
            raise PeerLost("a collective failed") from failure

    with sigterm_restored(), pytest.raises(Preempted, match="before there was anything to save"), stopping_in_order():
        wait()


def test_a_rank_that_is_failing_says_first_who_was_lost() -> None:
    said = []

    def fail() -> None:
        try:
            with stopping_in_order():
                raise PeerLost("a collective failed")
        except PeerLost:
            terminate()
            said.append("rank 1 was killed")
            raise
        finally:
            terminate()
            said.append("left")

    with sigterm_restored(), pytest.raises(PeerLost):
        fail()
    assert said == ["rank 1 was killed", "left"]


def test_when_all_is_done_nothing_is_left_to_stop() -> None:
    with sigterm_restored():
        be_deaf()
        terminate()


def test_what_was_set_before_comes_back_and_other_threads_set_nothing() -> None:
    heard: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with sigterm_restored(), stopping_in_order():
            pass
        terminate()
        thread = threading.Thread(target=stopping_in_order().__enter__)
        thread.start()
        thread.join()
        terminate()
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert heard == [signal.SIGTERM, signal.SIGTERM]
