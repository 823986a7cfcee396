"""Carrier: which library the all-to-alls of a run go through, and what was measured when it was chosen."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

CarrierName = Literal["torch", "mpi"]
Asked = Literal["torch", "mpi", "auto"]


@dataclass(frozen=True)
class CarrierTimes:
    """Seconds of one layer's dispatch (its counts, then its rows), on the slowest rank, medians over repeats."""

    alone_s: float
    """Started and waited for at once."""
    beside_compute_s: float
    """Started, then matrix products that take about as long as torch's exchange, then waited for: as a schedule with overlap does it."""

    @property
    def score_s(self) -> float:
        """What carriers are compared by: a step has exchanges of both kinds."""
        return self.alone_s + self.beside_compute_s


@dataclass(frozen=True)
class Carrier:
    """The library that carries all-to-alls; sums, records and checkpoints go through torch whatever it is."""

    name: CarrierName = "torch"
    asked: Asked = "torch"
    why: str = ""
    """Why it was torch without a measurement."""
    message_bytes: int = 0
    """What each rank sent in the measurement; 0 where nothing was measured."""
    times: Mapping[CarrierName, CarrierTimes] = field(default_factory=dict)

    def as_event(self) -> dict[str, Any]:
        """The details of the event `transport_chosen`."""
        measured = {name: asdict(times) for name, times in self.times.items()}
        return {"transport": self.name, "asked": self.asked, "why": self.why, "message_bytes": self.message_bytes, "measured": measured}
