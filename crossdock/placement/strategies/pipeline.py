"""Makespan of a block whose tokens travel in chunks, and the expert slot and degrees of chunking that make it shortest. Pure functions.

Two queues, each serving one piece of work at a time in the order of its arrival: computing, and the link. With expert slot k and n chunks
a direction runs as `runtime.overlap` does:

    link       out 0  out 1  out 2 ..                back 0     back 1  back 2 ..
    compute    stages before k     experts 0  experts 1  experts 2 ..  stages from k on

All outward transfers are queued at the beginning; a chunk's experts wait for its transfer, its way back for its experts. Forward, outward
is the dispatch; backward it is the gradient of the combine, and the stages change sides. Tokens travel in pieces, as many as the least
common multiple of both degrees (`runtime.strand`), one message each: the coarser direction pays for the finer one's start-ups as well.

ScMoE (arXiv 2404.05019, section 3.3) places the experts where the sums of computing before and after them match dispatch and combine best.
`mismatch_slot` is that rule; `best_pipeline` minimises what a step waits for instead.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from crossdock.errors import BadConfig

CHUNK_COUNTS = (1, 2, 4, 8)
"""Degrees that are tried where nobody says otherwise."""


def chunked_makespan(
    before_s: float, out_s: float, expert_s: float, after_s: float, back_s: float, chunks: int = 1, link_busy_s: float = 0.0
) -> float:
    """Seconds of one direction of a block.

    before_s, after_s: computing before the first chunk's experts and after the last one's. out_s, expert_s, back_s: of ONE of `chunks`
    equal chunks, start-up of its messages and kernels included. link_busy_s: what the link must finish before the first chunk leaves.
    With one chunk it is `cost.makespan`.
    """
    link_s, compute_s = link_busy_s + chunks * out_s, before_s
    for chunk in range(chunks):
        compute_s = max(compute_s, link_busy_s + (chunk + 1) * out_s) + expert_s
        link_s = max(link_s, compute_s) + back_s
    return max(compute_s + after_s, link_s)


@dataclass(frozen=True)
class BlockTimes:
    """Measured seconds of one block with routed experts.

    stage_s                forward seconds of the stages that may run while tokens travel, in order
    dispatch_s, combine_s  transfer of all tokens in one piece: homes to experts, experts to homes
    expert_s               all rows through the experts, forward
    message_s              start-up of each message: latency, synchronisation
    chunk_s                what each call of the experts costs beside their rows, in each direction
    backward_over_forward  how much longer computing takes backward; transfers carry the same bytes
    """

    stage_s: tuple[float, ...]
    dispatch_s: float
    expert_s: float
    combine_s: float
    message_s: float = 0.0
    chunk_s: float = 0.0
    backward_over_forward: float = 2.0

    def forward_s(self, expert_slot: int, chunks: int = 1, pieces: int | None = None) -> float:
        """Makespan of the forward pass; pieces: messages in which all tokens travel, a multiple of `chunks`, which it is where left out."""
        before_s, after_s = sum(self.stage_s[:expert_slot]), sum(self.stage_s[expert_slot:])
        return self._direction_s(before_s, after_s, 1.0, chunks, pieces or chunks)

    def backward_s(self, expert_slot: int, chunks: int = 1, pieces: int | None = None) -> float:
        """Makespan of the backward pass: the stages from the slot on come first."""
        before_s, after_s = sum(self.stage_s[expert_slot:]), sum(self.stage_s[:expert_slot])
        return self._direction_s(before_s, after_s, self.backward_over_forward, chunks, pieces or chunks)

    def _direction_s(self, before_s: float, after_s: float, factor: float, chunks: int, pieces: int) -> float:
        start_up_s = self.message_s * pieces / chunks
        return chunked_makespan(
            factor * before_s,
            start_up_s + self.dispatch_s / chunks,
            self.chunk_s + factor * self.expert_s / chunks,
            factor * after_s,
            start_up_s + self.combine_s / chunks,
            chunks,
        )


@dataclass(frozen=True)
class Pipeline:
    """A schedule with its predicted seconds."""

    expert_slot: int
    forward_chunks: int
    backward_chunks: int
    forward_s: float
    backward_s: float

    @property
    def total_s(self) -> float:
        return self.forward_s + self.backward_s


def best_pipeline(
    times: BlockTimes, forward_counts: Sequence[int] = CHUNK_COUNTS, backward_counts: Sequence[int] = CHUNK_COUNTS
) -> Pipeline:
    """The slot and degrees with the shortest makespan, forward plus backward; of equals the fewest chunks, then the earliest slot.

    Raises `BadConfig` where a degree is below 1 or there is none to choose from.
    """
    for name, counts in (("forward", forward_counts), ("backward", backward_counts)):
        if not counts or min(counts) < 1:
            raise BadConfig(f"{name} degrees of chunking {list(counts)}: give at least one, each 1 or more")
    candidates = []
    for slot, forward_chunks, backward_chunks in itertools.product(range(len(times.stage_s) + 1), forward_counts, backward_counts):
        pieces = math.lcm(forward_chunks, backward_chunks)
        forward_s, backward_s = times.forward_s(slot, forward_chunks, pieces), times.backward_s(slot, backward_chunks, pieces)
        candidates.append(Pipeline(slot, forward_chunks, backward_chunks, forward_s, backward_s))
    return min(candidates, key=lambda found: (found.total_s, found.forward_chunks + found.backward_chunks, found.expert_slot))


def mismatch_s(times: BlockTimes, expert_slot: int) -> float:
    """ScMoE's cost of a slot: |computing before - dispatch| + |computing after - combine| (arXiv 2404.05019, section 3.3)."""
    before_s, after_s = sum(times.stage_s[:expert_slot]), sum(times.stage_s[expert_slot:])
    return abs(before_s - times.dispatch_s) + abs(after_s - times.combine_s)


def mismatch_slot(times: BlockTimes) -> int:
    """The slot that ScMoE's rule takes; the earliest of equal ones."""
    return min(range(len(times.stage_s) + 1), key=lambda slot: (mismatch_s(times, slot), slot))
