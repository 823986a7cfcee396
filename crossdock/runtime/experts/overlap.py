"""Schedules: what runs while tokens travel.

A block with routed experts is a list of stages on the shared stream (attention, MLP, shared expert) and one routed strand: dispatch,
experts, combine. The strand begins where its input is known, before the first stage, and its result is needed after the last. What is free
is where among the stages the experts run, the *expert slot* k (experts run before stage k, or after the last where k is their number):

    overlapped    dispatch | stage 0 .. stage k-1 | experts | combine | stage k .. stage n-1 | result
                  starts   |   tokens travel      |         | starts  |   tokens travel      | waited for

Where tokens travel for longer than the stages take, the strand is cut into chunks of tokens (`Chunked`). All dispatches start at the
beginning and queue on the link; from then on the experts compute one chunk while later ones arrive and earlier ones go home. Backward has
a number of chunks of its own (`strand`):

    chunked       dispatch 0, 1, 2 start | stage 0 .. stage k-1 | experts 0, combine 0 starts, experts 1, .. | stage k .. | results

`Sequential` makes the same starts in the same order and waits for each at once. Nothing else differs, so outputs and gradients are
bitwise equal. The backward pass needs no code of its own: autograd runs nodes in the reverse order of their creation, so the wait's node
launches the gradient's all-to-all, the stages' backward follows, and the start's node joins it; of chunks, the last comes first. ScMoE
(arXiv 2404.05019) gives the forward schedule.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from crossdock.errors import BadConfig
from crossdock.placement.strategies.pipeline import BlockTimes, best_pipeline
from crossdock.runtime.dispatch.assignment import Assignment
from crossdock.runtime.experts.chunks import cut
from crossdock.runtime.experts.strand import RoutedExperts, Strand, begun

Stream = TypeVar("Stream")


@dataclass(frozen=True)
class Sequential:
    """Every movement is waited for as soon as it has started: the baseline, and the oracle of `Overlapped`."""

    expert_slot: int
    forward_chunks: ClassVar[int] = 1
    backward_chunks: ClassVar[int] = 1
    overlap: ClassVar[bool] = False


@dataclass(frozen=True)
class Overlapped:
    """Every movement is waited for only where its result is needed."""

    expert_slot: int
    forward_chunks: ClassVar[int] = 1
    backward_chunks: ClassVar[int] = 1
    overlap: ClassVar[bool] = True


@dataclass(frozen=True)
class Chunked:
    """The routed strand in chunks of tokens, as many forward as `forward_chunks` says and backward as `backward_chunks` does.

    overlap: wait for a movement only where its result is needed; else at once. Raises `BadConfig` for less than one chunk.
    """

    expert_slot: int
    forward_chunks: int = 1
    backward_chunks: int = 1
    overlap: bool = True

    def __post_init__(self) -> None:
        for name in ("forward_chunks", "backward_chunks"):
            if getattr(self, name) < 1:
                raise BadConfig(f"{name} is {getattr(self, name)}; choose 1 (tokens travel in one piece) or more")


Schedule = Sequential | Overlapped | Chunked


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
    before, after = stages[: schedule.expert_slot], stages[schedule.expert_slot :]
    if torch.is_grad_enabled() and max(schedule.forward_chunks, schedule.backward_chunks) > 1:
        strand = Strand(routed, schedule.forward_chunks, schedule.backward_chunks, schedule.overlap)
        token = strand.depart(x_TD, assignment)
        stream = _through(before, stream)
        token = strand.compute(token)
        stream = _through(after, stream)
        return stream, strand.result(token)
    parts = cut(x_TD, assignment, schedule.forward_chunks)
    prepared = routed.prepare([part for _, part in parts])
    travelling = [begun(routed.start(ready, x), schedule.overlap) for ready, (x, _) in zip(prepared, parts, strict=True)]
    stream = _through(before, stream)
    returning = [begun(routed.combine_start(routed.compute(pending.wait())), schedule.overlap) for pending in travelling]
    stream = _through(after, stream)
    home = [pending.wait() for pending in returning]
    return stream, home[0] if len(home) == 1 else torch.cat(home)


def _through(stages: Sequence[Callable[[Stream], Stream]], stream: Stream) -> Stream:
    for stage in stages:
        stream = stage(stream)
    return stream


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
    same bytes travel. ScMoE's own rule minimises a mismatch of sums; the makespan is what a step waits for
    (`placement.strategies.pipeline`, which also chooses chunks).
    """
    times = BlockTimes(tuple(stage_s), dispatch_s, expert_s, combine_s, backward_over_forward=backward_over_forward)
    return best_pipeline(times, (1,), (1,)).expert_slot


def balanced_expert_slot(stage_flop: Sequence[float]) -> int:
    """The slot where nothing has been measured: windows as even as the stages allow, since dispatch and combine move equal bytes."""
    return choose_expert_slot(stage_flop, sum(stage_flop) / 2, 0.0, sum(stage_flop) / 2, backward_over_forward=1.0)
