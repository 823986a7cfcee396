"""SIGTERM outside the training loop, which has its own way to take it: before it a rank stops, and one that is failing is deaf.

Launchers send it to what is left of a start as soon as they see that a rank has gone (torchrun looks ten times a second). A rank that it
ended in that moment could not say who was lost. Only the main thread can take signals; elsewhere nothing changes.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from crossdock.errors import PeerLost, Preempted

_EARLY = "asked to stop before there was anything to save; start it again"
_AGAIN_S = 0.1


@contextlib.contextmanager
def sigterm_restored() -> Iterator[None]:
    """What is set within the block about SIGTERM ends with it."""
    previous = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if _is_main() and previous is not None:  # None: set by native code, which we did not touch
            signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def stopping_in_order() -> Iterator[None]:
    """From the beginning of the block SIGTERM raises `Preempted`, unless another exception is on its way already.

    It is raised wherever the program is, also where libraries try what they import and go on without it, whatever has failed. So within the
    block SIGTERM comes again, as long as the program computes and nobody else takes it.
    A rank that waits in a collective hears it only when that is over. Where it ends because another rank was asked too, and has gone, the
    loss of that one is raised as `Preempted` as well. Not before ranks have met: there such a wait may be long.
    """
    if not _is_main():
        yield
        return
    is_asked, is_within = False, True

    def take(number: int, frame: FrameType | None) -> None:
        nonlocal is_asked
        is_asked = True
        if is_within:
            signal.setitimer(signal.ITIMER_VIRTUAL, _AGAIN_S)
        if sys.exc_info()[1] is None:
            raise Preempted(_EARLY)

    previous = signal.signal(signal.SIGVTALRM, lambda _number, _frame: signal.raise_signal(signal.SIGTERM))
    signal.signal(signal.SIGTERM, take)
    try:
        yield
    except PeerLost as failure:
        if is_asked:
            raise Preempted(_EARLY) from failure
        raise
    finally:
        is_within = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.signal(signal.SIGVTALRM, previous)


def be_deaf() -> None:
    """From now on SIGTERM is ignored: there is nothing left to stop."""
    if _is_main():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()
