"""Windows: some steps of a live run recorded on all ranks: traces, counted bytes, medians, and profiles for calibration."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from crossdock.placement.records.topology import LINK_CLASSES
from crossdock.placement.records.trace import Trace, concatenate
from crossdock.runtime.adaptation.capture import Capture
from crossdock.runtime.transport import collectives
from crossdock.runtime.transport.ledger import Flight, LayerProfile, exposed_s, profile, standstill, window_s
from crossdock.runtime.transport.mesh import Mesh

EXPOSED_SHARE = 0.2
"""A transfer that was waited for at least this share of its time shows how long it took; of one that was hidden only a bound is known."""

Way = tuple[int, str, str]
"""(layer, stage, direction) of a transfer."""


@dataclass(frozen=True)
class Transfer:
    """Seconds from launch to arrival of one all-to-all on one rank, and how many of them the rank stood still, for it or for others."""

    flight_s: float
    wait_s: float


@dataclass(frozen=True)
class RankRecord:
    """What one rank saw in a window: profiles by layer, transfers of tokens by way in order, and exchanges of counts."""

    profile_of_layer: dict[int, LayerProfile]
    transfers: dict[Way, list[Transfer]]
    count_flights_s: list[float]
    rest_s: float | None = None
    """Seconds of a step in which the rank neither ran experts nor stood still: all other work, windows among it. None: steps untimed."""


@dataclass(frozen=True, eq=False)
class Measured:
    """A finished window, as rank 0 knows it. `traces` holds one trace per expert group; seconds are medians over the steps."""

    steps: int
    traces: tuple[Trace, ...]
    counted_bytes: tuple[int, int, int]
    step_s: float
    exposed_s: float
    ranks: tuple[RankRecord, ...]

    @property
    def trace(self) -> Trace:
        """All groups' tokens; homes are numbered in the group."""
        return concatenate(self.traces)

    @property
    def counted(self) -> dict[str, int]:
        return dict(zip(LINK_CLASSES, self.counted_bytes, strict=True))


class Window:
    """Records steps until `close`; mutable, one per rank and window."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self._flights: list[Flight] = []
        self._bytes = [0, 0, 0]
        self._step_s: list[float] = []
        self._exposed_s: list[float] = []

    def add(self, flights: Sequence[Flight], step_bytes: Iterable[int], step_s: float, exposed_s: float) -> None:
        """Note a step: this rank's flights, the bytes of all ranks by link class, and the step's seconds."""
        self._flights.extend(flights)
        self._bytes = [total + new for total, new in zip(self._bytes, step_bytes, strict=True)]
        self._step_s.append(step_s)
        self._exposed_s.append(exposed_s)

    def close(self, mesh: Mesh) -> Measured | None:
        """Gather the window on rank 0 (elsewhere None). All ranks call it."""
        traces = self.capture.gather(mesh)
        records = collectives.gather_objects(record_of(self._flights, self._step_s), mesh)
        if records is None:
            return None
        first, second, third = self._bytes
        medians = (statistics.median(self._step_s), statistics.median(self._exposed_s))
        return Measured(len(self._step_s), tuple(traces), (first, second, third), *medians, tuple(records))


def record_of(flights: Sequence[Flight], step_s: Sequence[float] = ()) -> RankRecord:
    """Sum up one rank's flights, in steps that took it `step_s`."""
    transfers: dict[Way, list[Transfer]] = defaultdict(list)
    stood_s = standstill(flights)
    for flight in flights:
        if flight.kind == "tokens":
            flight_s = flight.wait_end_s - flight.launched_s
            transfer = Transfer(flight_s, flight_s - window_s(flight, stood_s))
            transfers[flight.layer, flight.stage, flight.direction].append(transfer)
    count_flights_s = [flight.wait_end_s - flight.launched_s for flight in flights if flight.kind == "counts"]
    profiles = profile(flights)
    rest_s = None
    if step_s:
        experts_s = sum(
            len(transfers.get((layer, "dispatch", "forward"), ())) * found.expert_forward_s
            + len(transfers.get((layer, "combine", "backward"), ())) * found.expert_backward_s
            for layer, found in profiles.items()
        )
        rest_s = max(0.0, sum(step_s) - exposed_s(flights) - experts_s) / len(step_s)
    return RankRecord(profiles, dict(transfers), count_flights_s, rest_s)


def transfer_seconds_of(ranks: Sequence[RankRecord]) -> dict[Way, tuple[float, bool]]:
    """How long each way's all-to-all took, in the median over the window: (seconds, whether that is more than an upper bound).

    `ranks` are those of one expert group. The rank that comes last to a collective waits for nobody: the shortest flight of all ranks is
    the transfer itself, without the time that ranks waited for one another.
    """
    found = {}
    for way in ranks[0].transfers:
        last = [
            min(flights, key=lambda transfer: transfer.flight_s) for flights in zip(*(rank.transfers[way] for rank in ranks), strict=True)
        ]
        exposed = [transfer.flight_s for transfer in last if transfer.wait_s > EXPOSED_SHARE * transfer.flight_s]
        is_known = 2 * len(exposed) >= len(last)  # of two turns one may be hidden and the other not
        found[way] = (statistics.median(exposed if is_known else [transfer.flight_s for transfer in last]), is_known)
    return found
