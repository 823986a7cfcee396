"""Control records are believed only from ranks of the same job, start and call."""

import os
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist

from crossdock.authentication import MAC_BYTES, Secret
from crossdock.errors import BadConfig, BadData
from crossdock.runtime.transport import collectives
from crossdock.runtime.transport.control import FIRST_BYTES, MAX_RECORD_BYTES, Control
from crossdock.runtime.transport.mesh import Mesh
from tests.pool import Pool, mesh_for

SECRET, OTHER = Secret(b"s" * 32), Secret(b"o" * 32)
LARGE = bytes(range(256)) * 100


@pytest.mark.parametrize("record", [b"", b"small", LARGE])
@pytest.mark.parametrize("secret", [None, SECRET])
def test_what_a_rank_says_is_read(record: bytes, secret: Secret | None) -> None:
    ours, theirs = Control(secret, "start"), Control(secret, "start")
    for _ in range(3):
        said, heard = ours.next_call(), theirs.next_call()
        first = said.first(2, record)
        assert len(first) == FIRST_BYTES
        second_bytes, found = heard.read_first(2, first)
        if found is None:
            second = said.second(2, record)
            assert len(second) == second_bytes
            found = heard.read_second(2, second)
        assert found == record


@pytest.mark.parametrize("record", [b"small", LARGE])
def test_what_nobody_of_the_job_said_in_this_call_is_refused(record: bytes) -> None:
    said = Control(SECRET, "start").next_call()
    first, second = said.first(2, record), said.second(2, record)

    def refuses(control: Control, rank: int, message: bytes, read: str, skipped: int = 0) -> None:
        for _ in range(skipped):
            control.next_call()
        with pytest.raises(BadConfig, match="refused"):
            getattr(control.next_call(), read)(rank, message)

    for message, read in ((first, "read_first"), (second, "read_second")):
        refuses(Control(OTHER, "start"), 2, message, read)
        refuses(Control(None, "start"), 2, message, read)
        refuses(Control(SECRET, "another start"), 2, message, read)
        refuses(Control(SECRET, "start"), 1, message, read)  # another rank's words
        refuses(Control(SECRET, "start"), 2, message, read, skipped=1)  # said before
        refuses(Control(SECRET, "start"), 2, bytes(MAC_BYTES) + message[MAC_BYTES:], read)  # unsigned
        for place in (0, MAC_BYTES, MAC_BYTES + 4):
            refuses(Control(SECRET, "start"), 2, message[:place] + bytes([message[place] ^ 1]) + message[place + 1 :], read)
    refuses(Control(SECRET, "start"), 2, first, "read_second")
    refuses(Control(SECRET, "start"), 2, second.ljust(FIRST_BYTES, b"\0"), "read_first")


def test_a_length_beyond_reason_is_refused_before_memory_is_taken() -> None:
    control = Control(None, "start")
    message = bytes(MAC_BYTES) + (MAX_RECORD_BYTES + 1).to_bytes(8, "little")
    with pytest.raises(BadData, match=f"rank 1 announces a record of {MAX_RECORD_BYTES + 1} bytes"):
        control.next_call().read_first(1, message.ljust(FIRST_BYTES, b"\0"))


def signed_mesh(rank: int, world_size: int, secret: Secret | None, start: str = "start") -> Mesh:
    import dataclasses

    return dataclasses.replace(mesh_for(rank, world_size, world_size, None), control=Control(secret, start))


def talk(rank: int, world_size: int) -> list[Any]:
    mesh = signed_mesh(rank, world_size, SECRET)
    large = [LARGE, rank] if rank == world_size - 1 else rank  # only some need a second message
    return [
        collectives.broadcast_object({"of": rank}, mesh, source_rank=1),
        collectives.broadcast_object([LARGE, rank], mesh),
        collectives.all_gather_objects(large, mesh),
        collectives.gather_objects(large, mesh),
        collectives.all_gather_numbers([rank, 0.5], mesh).tolist(),
        collectives.all_gather_objects(float("nan"), mesh)[0] != 0,
    ]


def test_signed_records_travel(ranks: Pool) -> None:
    told = [0, 1, [LARGE, 2]]
    for rank, answer in enumerate(ranks.run(3, talk)):
        numbers = [[0.0, 0.5], [1.0, 0.5], [2.0, 0.5]]
        assert answer == [{"of": 1}, [LARGE, 0], told, told if rank == 0 else None, numbers, True]


def pretend(rank: int, world_size: int, call: str) -> str:
    """Rank 1 knows how to talk, and not the secret."""
    mesh = signed_mesh(rank, world_size, SECRET if rank == 0 else OTHER)
    source = {"source_rank": 1} if call == "broadcast_object" else {}
    value = [1.0] if call == "all_gather_numbers" else "go to plan x"
    try:
        getattr(collectives, call)(value, mesh, **source)
    except BadConfig as refusal:
        return str(refusal)
    return "believed"


@pytest.mark.parametrize("call", ["broadcast_object", "all_gather_objects", "gather_objects", "all_gather_numbers"])
def test_a_rank_without_the_secret_steers_nobody(ranks: Pool, call: str) -> None:
    honest = ranks.run(2, pretend, call)[0]
    assert "of rank 1, first message` is signed with another secret" in honest


class Trap:
    """What an unpickler would run."""

    def __reduce__(self) -> Any:
        return os.putenv, ("CROSSDOCK_SPRUNG", "1")


def inject(rank: int, world_size: int) -> str:
    """Rank 1 sends what a pickled broadcast would look like to torch."""
    mesh = signed_mesh(rank, world_size, None)
    if rank == 1:
        poison = bytes(MAC_BYTES) + len(pickle.dumps(Trap())).to_bytes(8, "little") + pickle.dumps(Trap())
        dist.broadcast(torch.frombuffer(bytearray(poison.ljust(FIRST_BYTES, b"\0")), dtype=torch.uint8), 1, group=mesh.control_group)
        return ""
    try:
        collectives.broadcast_object(None, mesh, source_rank=1)
    except BadData as refusal:
        return str(refusal)
    return "believed"


def test_nothing_is_unpickled_even_without_a_secret(ranks: Pool) -> None:
    assert "cannot be read" in ranks.run(2, inject)[0]
