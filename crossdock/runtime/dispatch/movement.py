"""What every dispatcher hands back: rows for the local experts, and a frozen handle by which their outputs find home."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from crossdock.runtime.dispatch.rows import RowMap, merge
from crossdock.runtime.transport.all_to_all import Path, all_to_all_start
from crossdock.runtime.transport.exchange import Pending


@dataclass(frozen=True, eq=False)
class Handle:
    """The way of one dispatch's rows, kept for the combine. Tokens fan out to copies at home, and copies to expert rows on arrival."""

    route: Path
    """The dispatch's; the combine goes it backwards."""
    home: RowMap
    """Narrow: this rank's T tokens; wide: the copies it sent."""
    arrival: RowMap
    """Narrow: the copies that arrived; wide: the M rows sorted by local slot."""
    home_weight: Tensor | None
    """Combine weights where they are applied at home, in `home.position_M` order."""
    arrival_weight: Tensor | None
    """Combine weights where they travelled along and are applied at the experts, in `arrival.position_M` order."""
    dtype: torch.dtype
    """Of the tokens, and of the result."""


class Dispatched(NamedTuple):
    """What a dispatch gives a rank."""

    rows_MD: Tensor
    """Token rows for the local experts, sorted by local slot, then source rank, then token."""
    count_S: Tensor
    """int64 [S] on the CPU: rows of each local slot."""
    handle: Handle


class Prepared(Protocol):
    """A dispatch whose counts are on their way; `start` may be called once."""

    def start(self, x_TD: Tensor) -> Pending[Dispatched]:
        """Gather the rows, wait for the counts, which blocks the host, and send the rows."""
        ...


class PendingTokens:
    """The way home under way."""

    def __init__(self, pending: Pending[Tensor], handle: Handle) -> None:
        self._pending, self._handle = pending, handle

    def wait(self) -> Tensor:
        """y_TD: the weighted sum of each token's expert outputs, in the tokens' dtype; zero for a token without experts."""
        handle = self._handle
        return merge(self._pending.wait(), handle.home, handle.dtype, handle.home_weight)


def combine_start(rows_MD: Tensor, handle: Handle) -> PendingTokens:
    """Send expert outputs (in the order in which the rows came) back to their tokens' ranks."""
    assert handle.route.wire is not None
    copies = merge(rows_MD, handle.arrival, handle.route.wire.row_dtype, handle.arrival_weight)
    return PendingTokens(all_to_all_start(copies, handle.route.back("combine")), handle)
