"""When computing beside a transfer loses: a rule with two measured numbers, for machines where both use the same processor.

On an accelerator a transfer needs hardly anything that computing needs. On a CPU the backend's threads copy and sum with the cores that
compute, so while both are under way each takes `slowdown` times as long as alone; and an asynchronous movement costs `handle_s` more than a
blocking one (a queue, a thread that wakes). With compute C and transfer T measured apart, m the smaller and M the larger of them:

    one after the other     C + T = M + m
    side by side            handle + M + (slowdown - 1) m

So overlap pays exactly where (2 - slowdown) m > handle: never at a slowdown of 2 or more, never for an empty window, and for every other
window where nothing interferes. docs/blocks.md has measured values; `benchmarks/overlap_rule.py` measures them.
"""

import math
from dataclasses import dataclass

from crossdock.errors import BadConfig
from crossdock.placement.strategies.pipeline import BlockTimes


@dataclass(frozen=True)
class Interference:
    """What computing and travelling cost each other. Raises `BadConfig` for numbers that cannot be times or ratios."""

    handle_s: float = 0.0
    """Seconds that a movement costs more where it is waited for later than at once."""
    slowdown: float = 1.0
    """How many times as long compute and transfer take while both are under way; 1 is no interference, 2 is taking turns."""

    def __post_init__(self) -> None:
        for name, least in (("handle_s", 0.0), ("slowdown", 1.0)):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= least):
                raise BadConfig(f"{name} is {value}; give a finite number of at least {least}")

    @classmethod
    def measured(cls, compute_s: float, transfer_s: float, both_s: float, handle_s: float) -> "Interference":
        """From one point: both apart, and `both_s` side by side. Less than no interference is noise and counts as none."""
        shorter_s, longer_s = sorted((compute_s, transfer_s))
        return cls(handle_s, max(1.0, 1.0 + (both_s - handle_s - longer_s) / shorter_s))


def beside_s(compute_s: float, transfer_s: float, interference: Interference) -> float:
    """Seconds of compute and transfer side by side, from their seconds apart."""
    shorter_s, longer_s = sorted((compute_s, transfer_s))
    return interference.handle_s + longer_s + (interference.slowdown - 1.0) * shorter_s


def overlap_saving_s(times: BlockTimes, expert_slot: int, interference: Interference) -> float:
    """Seconds that overlapping saves in one block, forward plus backward, against waiting at once; negative where it loses.

    The stages before the slot run beside the dispatch and those from it on beside the combine; backward the other way round, because the
    combine's gradient leaves first, along the dispatch's way.
    """
    before_s, after_s = sum(times.stage_s[:expert_slot]), sum(times.stage_s[expert_slot:])
    out_s, back_s = times.message_s + times.dispatch_s, times.message_s + times.combine_s
    factor = times.backward_over_forward
    pairs = ((before_s, out_s), (after_s, back_s), (factor * after_s, out_s), (factor * before_s, back_s))
    return sum(compute_s + transfer_s - beside_s(compute_s, transfer_s, interference) for compute_s, transfer_s in pairs)
