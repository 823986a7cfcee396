"""Schedules: what runs while tokens travel.

A block with routed experts is a list of stages on the shared stream (attention, MLP, shared expert) and one routed strand: dispatch,
experts, combine. The strand begins where its input is known, before the first stage, and its result is needed after the last. What is free
is where among the stages the experts run, the *expert slot* k (experts run before stage k, or after the last where k is their number):

    overlapped    dispatch | stage 0 .. stage k-1 | experts | combine | stage k .. stage n-1 | result
                  starts   |   tokens travel      |         | starts  |   tokens travel      | waited for

`Sequential` makes the same starts in the same order and waits for each at once. Nothing else differs, so outputs and gradients are
bitwise equal. The backward pass needs no code of its own: autograd runs nodes in the reverse order of their creation, so the wait's node
launches the gradient's all-to-all, the stages' backward follows, and the start's node joins it. ScMoE (arXiv 2404.05019) gives the forward
schedule.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor

from crossdock.errors import BadConfig
from crossdock.placement.cost import makespan
from crossdock.runtime.assignment import Assignment
from crossdock.runtime.dispatch import Pending

Stream = TypeVar("Stream")


class RoutedExperts(Protocol):
    """The routed strand, in three steps of which two are movements."""

    def dispatch_start(self, x_TD: Tensor, assignment: Assignment) -> Pending[Any]:
        """Send the tokens on their way to their experts."""

    def compute(self, received: Any) -> Any:
        """Run the local experts on what arrived."""

    def combine_start(self, computed: Any) -> Pending[Tensor]:
        """Send the results on their way home."""


@dataclass(frozen=True)
class Sequential:
    """Every movement is waited for as soon as it has started: the baseline, and the oracle of `Overlapped`."""

    expert_slot: int
    overlap: ClassVar[bool] = False


@dataclass(frozen=True)
class Overlapped:
    """Every movement is waited for only where its result is needed."""

    expert_slot: int
    overlap: ClassVar[bool] = True


Schedule = Sequential | Overlapped


@dataclass(frozen=True)
class _Arrived:
    """A movement that has been waited for already."""

    value: Any

    def wait(self) -> Any:
        return self.value


def run(
    schedule: Schedule,
    routed: RoutedExperts,
    x_TD: Tensor,
    assignment: Assignment,
    stages: Sequence[Callable[[Stream], Stream]],
    stream: Stream,
) -> tuple[Stream, Tensor]:
    """Run the stages over `stream` and the routed strand over `x_TD` [T, D]: (stream after the last stage, combined y [T, D]).

    Raises `BadConfig` where the expert slot lies outside the stages.
    """
    check_expert_slot(schedule.expert_slot, len(stages))
    travelling = _begin(schedule, routed.dispatch_start(x_TD, assignment))
    for stage in stages[: schedule.expert_slot]:
        stream = stage(stream)
    computed = routed.compute(travelling.wait())
    returning = _begin(schedule, routed.combine_start(computed))
    for stage in stages[schedule.expert_slot :]:
        stream = stage(stream)
    return stream, returning.wait()


def _begin(schedule: Schedule, pending: Pending[Any]) -> Pending[Any]:
    return pending if schedule.overlap else _Arrived(pending.wait())


def check_expert_slot(expert_slot: int, num_stages: int) -> None:
    """Raise `BadConfig` where there is no such slot among `num_stages` stages."""
    if not 0 <= expert_slot <= num_stages:
        raise BadConfig(
            f"expert_slot {expert_slot} is not among the slots of a block with {num_stages} stages; choose 0 to {num_stages}, or auto"
        )


def choose_expert_slot(
    stage_s: Sequence[float],
    dispatch_s: float,
    expert_s: float,
    combine_s: float,
    backward_over_forward: float = 2.0,
) -> int:
    """The expert slot with the shortest makespan, forward plus backward; the earliest of equal ones.

    `stage_s` are the stages' forward seconds in order. In the backward pass computing takes `backward_over_forward` times as long and the
    same bytes travel. ScMoE's own rule minimises a mismatch of sums; the makespan, `placement.cost.makespan`, is what a step waits for.
    """

    def seconds(slot: int) -> float:
        before, after = sum(stage_s[:slot]), sum(stage_s[slot:])
        return sum(
            makespan(before * factor, dispatch_s, expert_s * factor, after * factor, combine_s) for factor in (1.0, backward_over_forward)
        )

    return min(range(len(stage_s) + 1), key=lambda slot: (seconds(slot), slot))


def balanced_expert_slot(stage_flop: Sequence[float]) -> int:
    """The slot where nothing has been measured: windows as even as the stages allow, since dispatch and combine move equal bytes."""
    return choose_expert_slot(stage_flop, sum(stage_flop) / 2, 0.0, sum(stage_flop) / 2, backward_over_forward=1.0)
