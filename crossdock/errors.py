"""Errors that are the user's to mend: each class carries the exit code that every launcher and `result.json` report.

Raise one of these for bad input; the message names what is wrong, the numbers, and the remedy. `assert` is for our own bugs (exit code 1).
"""

from typing import ClassVar

MAX_MESSAGE = 1200
"""Characters of an error's message; what the user wrote may be quoted in it, and may be of any length."""


class CrossdockError(ValueError):
    """Base of every error whose message is meant for the user; never shown with a traceback."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(presentable(message))


class UsageError(CrossdockError):
    """The command line is wrong."""

    exit_code = 2


class InfeasiblePlan(CrossdockError):
    """No plan satisfies the constraints."""

    exit_code = 3


class BadData(CrossdockError):
    """A trace, topology, plan or data file is malformed or does not fit."""

    exit_code = 65


class MissingInput(CrossdockError):
    """An input file or checkpoint does not exist or cannot be read."""

    exit_code = 66


class BadCheckpoint(CrossdockError):
    """Checkpoints are present, and none of them is valid."""

    exit_code = 67


class Unavailable(CrossdockError):
    """A device, a package or another resource is not there."""

    exit_code = 69


class Occupied(Unavailable):
    """Another run works in the same run directory: nothing there may be touched, `result.json` neither."""


class IoFailure(CrossdockError):
    """Writing failed: disk full, no permission, short write."""

    exit_code = 74


class Preempted(CrossdockError):
    """Asked to stop; the state is saved, and the run may be started again."""

    exit_code = 75


class PeerLost(CrossdockError):
    """Another rank died or stopped answering."""

    exit_code = 76


class BadConfig(CrossdockError):
    """The run configuration is malformed or contradicts itself."""

    exit_code = 78


class NonFiniteLoss(CrossdockError):
    """The loss or a gradient became NaN or infinite."""

    exit_code = 79


class OutOfMemory(CrossdockError):
    """A device or the host ran out of memory."""

    exit_code = 80


def presentable(message: str) -> str:
    """A message as one line that a terminal can show: characters that steer terminals are spelled out, and a long middle is left out."""
    if len(message) > MAX_MESSAGE:
        message = f"{message[: MAX_MESSAGE * 2 // 3]} [...] {message[-MAX_MESSAGE // 3 :]}"
    return "".join(letter if letter.isprintable() else " " if letter in "\n\r\t" else ascii(letter)[1:-1] for letter in message)
