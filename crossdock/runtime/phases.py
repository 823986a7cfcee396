"""Moments of a run that listeners may be told of, by name. Nobody listens in an ordinary run, and then a moment costs an empty loop.

A listener runs on the rank, in the thread and at the place that it is told of, so it can do there whatever could happen there: raise, stop,
or end the process. `launch/ranks/faults.py` is the one that comes with Crossdock.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

Phase = Literal[
    "step",  # before a step's first batch is read; what is there: how many steps have been made
    "dispatch",  # before an all-to-all starts
    "in_flight",  # it has started, and nobody has waited for it yet
    "combine",  # before tokens start on their way home
    "loss",  # between forward and backward pass; what is there: the loss of the micro-batch
    "backward",  # before an all-to-all of the backward pass starts
    "optimizer",  # gradients are reduced, nothing is updated yet
    "checkpoint_write",  # before a rank writes its shard
    "checkpoint_rename",  # everything is written, and the folder has not got its name yet
    "migration",  # some tensors of a layer have moved, others not
]
PHASES: tuple[Phase, ...] = get_args(Phase)

Listener = Callable[[Phase, Any], None]
_listeners: list[Listener] = []


def reached(phase: Phase, what: Any = None) -> None:
    """Tell all listeners."""
    for listener in _listeners:
        listener(phase, what)


def listen(listener: Listener) -> None:
    """Tell `listener` of every phase from now on, in this process."""
    _listeners.append(listener)


def forget(listener: Listener) -> None:
    """Tell it no more."""
    _listeners.remove(listener)
