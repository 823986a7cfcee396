"""What signs the control records of one start, so that a rank believes only what ranks of its job have told, in this start and this call.

gloo's connections have no authentication of their own, and their ports can be reached by whoever reaches the host.
"""

from dataclasses import dataclass

from crossdock.authentication import MAC_BYTES, Secret, opened, sealed
from crossdock.errors import BadData

FIRST_BYTES = 1024
"""Size of every rank's first message of a call; a record that fits into it needs no second."""
MAX_RECORD_BYTES = 1 << 36
_LENGTH_BYTES = 8
_HEAD_BYTES = MAC_BYTES + _LENGTH_BYTES


@dataclass
class Control:
    """The secret of the job (None: nothing is signed), a name that no other start has, and the calls made so far.

    Every rank makes the same calls in the same order, so that the number of a call needs no sending: a record of another call, of another
    start or of another rank is refused.
    """

    secret: Secret | None = None
    start: str = ""
    calls: int = 0

    def next_call(self) -> "Call":
        """The next exchange of records among all ranks."""
        self.calls += 1
        return Call(self.secret, f"{self.start} record {self.calls}".strip())


@dataclass(frozen=True)
class Call:
    """One exchange of records: at most two messages from each rank that has something to say."""

    secret: Secret | None
    name: str

    def first(self, rank: int, record: bytes) -> bytes:
        """The first message, FIRST_BYTES long: the record, or only its length where it does not fit."""
        length = len(record).to_bytes(_LENGTH_BYTES, "little")
        said = sealed(self.secret, self._purpose(rank, "first"), length + record if _fits(len(record)) else length)
        return said.ljust(FIRST_BYTES, b"\0")

    def second(self, rank: int, record: bytes) -> bytes:
        """The message of a record that did not fit into the first."""
        return sealed(self.secret, self._purpose(rank, "second"), record)

    def read_first(self, rank: int, message: bytes) -> tuple[int, bytes | None]:
        """(bytes of the second message, 0 where none comes; the record, None where it comes with the second).

        Raises `BadConfig` where rank `rank` of this job has not said so, `BadData` where the record is too long to be one.
        """
        length = int.from_bytes(message[MAC_BYTES:_HEAD_BYTES], "little")
        end = _HEAD_BYTES + (length if _fits(length) else 0)
        record = opened(self.secret, self._purpose(rank, "first"), message[:end])[_LENGTH_BYTES:]
        if length > MAX_RECORD_BYTES:
            raise BadData(f"rank {rank} announces a record of {length} bytes, and at most {MAX_RECORD_BYTES} are read; capture fewer steps")
        return (0, record) if _fits(length) else (MAC_BYTES + length, None)

    def read_second(self, rank: int, message: bytes) -> bytes:
        """The record. Raises `BadConfig` where rank `rank` of this job has not said so."""
        return opened(self.secret, self._purpose(rank, "second"), message)

    def _purpose(self, rank: int, part: str) -> str:
        return f"{self.name} of rank {rank}, {part} message"


def _fits(length: int) -> bool:
    return length <= FIRST_BYTES - _HEAD_BYTES
