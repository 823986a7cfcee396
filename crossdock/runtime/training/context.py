"""StepContext: what a layer may know about the step it is part of, passed down by value."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from crossdock.runtime.dispatch.assignment import Assignment

Listener = Callable[[int, Assignment], None]
"""Called by every MoE layer with (layer, the routed assignment after drops); capture is one."""


@dataclass(frozen=True, eq=False)
class StepContext:
    """The step as seen from one rank.

    Everything random in a layer is keyed by (seed, step, layer, first_token + position), never by the rank, so that the same global batch
    gives the same numbers on any number of ranks.
    """

    seed: int
    step: int
    training: bool
    token_T: Tensor
    """Token ids of this rank's tokens, int64 [T]."""
    first_token: int
    """Number of this rank's first token in the global batch."""
    listeners: tuple[Listener, ...] = ()
    number_T: Tensor | None = None
    """int64 [T]: the number of each token in the global batch, where they are not consecutive from `first_token` on."""
