"""What every dispatcher is and hands back: rows for the local experts, and a frozen handle by which their outputs find home."""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from crossdock.runtime.dispatch.assignment import Assignment
from crossdock.runtime.dispatch.layout import ExpertLayout
from crossdock.runtime.dispatch.rows import RowMap, merge
from crossdock.runtime.transport.all_to_all import Path, all_to_all_start
from crossdock.runtime.transport.exchange import Pending
from crossdock.runtime.transport.mesh import Mesh
from crossdock.runtime.transport.wire import Wire


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
    """int64 on the CPU: rows of each of this rank's slots, of which it may have none."""
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


@dataclass(frozen=True, eq=False)
class Dispatcher(abc.ABC):
    """Moves tokens to their experts and the experts' outputs back: the contract that `dispatcher.py` describes.

    `wire` is the format of rows between ranks, gradients included; None: that of the tokens.
    """

    name: ClassVar[str]
    """What the cost model calls this way of moving tokens."""
    mesh: Mesh
    layout: ExpertLayout
    wire: Wire | None = None

    @abc.abstractmethod
    def prepare(self, pieces: Sequence[Assignment]) -> Sequence[Prepared]:
        """Tell the other ranks what will come of each piece, in one exchange; returns at once. Every rank brings as many pieces."""

    def dispatch_start(self, x_TD: Tensor, assignment: Assignment) -> Pending[Dispatched]:
        """Prepare and start one piece: send `x_TD` [T, D] to the experts of `assignment`; the tokens travel in the background."""
        (prepared,) = self.prepare([assignment])
        return prepared.start(x_TD)

    def combine_start(self, rows_MD: Tensor, handle: Handle) -> PendingTokens:
        """Send the experts' outputs [M, D], in the order of the dispatched rows, back; the wait gives y_TD in the dtype of `x_TD`.

        They are weighted and summed on the device of the experts where the weights travelled with the tokens, and at home where not.
        """
        assert handle.route.wire is not None
        copies = merge(rows_MD, handle.arrival, handle.route.wire.row_dtype, handle.arrival_weight)
        return PendingTokens(all_to_all_start(copies, handle.route.back("combine")), handle)
