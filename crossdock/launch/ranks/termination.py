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

from crossdock.errors import Preempted


@contextlib.contextmanager
def sigterm_restored() -> Iterator[None]:
    """What is set within the block about SIGTERM ends with it."""
    previous = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if _is_main() and previous is not None:  # None: set by native code, which we did not touch
            signal.signal(signal.SIGTERM, previous)


def stop_in_order() -> None:
    """From now on SIGTERM raises `Preempted`, unless another exception is on its way already.

    Not before ranks have met: one that waits for others in native code would hear it only when that is over.
    """
    if _is_main():
        signal.signal(signal.SIGTERM, _take)


def be_deaf() -> None:
    """From now on SIGTERM is ignored: there is nothing left to stop."""
    if _is_main():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _take(number: int, frame: FrameType | None) -> None:
    if sys.exc_info()[1] is None:
        raise Preempted("asked to stop before there was anything to save; start it again")


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()
