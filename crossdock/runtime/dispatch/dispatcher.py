"""The dispatcher contract: tokens to experts and back in four explicit steps, so that a schedule can put work between any two of them.

    pending = dispatcher.dispatch_start(x_TD, assignment)      tokens leave
    rows_MD, count_S, handle = pending.wait()                  rows are here, sorted by local slot
    pending = dispatcher.combine_start(bank(rows_MD, count_S), handle)
    y_TD = pending.wait()                                      weighted sums are home

`dispatch_start` is `prepare([assignment])`, by which the ranks begin to tell each other how many rows will come, and `start(x_TD)` of what
that returns. Several chunks are prepared together, in one exchange. Rows are gathered while the counts travel.

All of it is differentiable; the backward pass runs them mirrored. Handles are frozen, and several dispatches may be in flight. Every rank
of the expert group makes the same calls in the same order, also with no tokens at all. `reference.py` says in a few slow lines what must
come out.
"""

from collections.abc import Callable

from crossdock.runtime.dispatch.deduplicated import Deduplicated
from crossdock.runtime.dispatch.flat import Flat
from crossdock.runtime.dispatch.hierarchical import hierarchical
from crossdock.runtime.dispatch.layout import ExpertLayout
from crossdock.runtime.dispatch.movement import Dispatched, Dispatcher, Handle, Prepared
from crossdock.runtime.transport.exchange import Pending
from crossdock.runtime.transport.mesh import Mesh
from crossdock.runtime.transport.wire import Wire

__all__ = ["DISPATCHERS", "Dispatched", "Dispatcher", "Handle", "Pending", "Prepared"]


DISPATCHERS: dict[str, Callable[[Mesh, ExpertLayout, Wire | None], Dispatcher]] = {
    "flat": Flat,
    "deduplicated": Deduplicated,
    "hierarchical": hierarchical,
}
"""Dispatchers by the name they have in a configuration."""
