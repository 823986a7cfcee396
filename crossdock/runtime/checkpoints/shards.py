"""Shard files: safetensors written tensor by tensor, with the SHA-256 of what was meant to be written; read with shape and type checked.

The writer is ours because the checksum must be that of the bytes in memory (one taken from the file afterwards would bless what the disk
made of them), because hashing then costs no second pass, and because both release the interpreter while a training step runs beside them.
"""

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pydantic
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from crossdock.errors import BadCheckpoint
from crossdock.strict_yaml import StrictModel

HEADER_ALIGNMENT = 8
CODE_OF_DTYPE = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPE_OF_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in CODE_OF_DTYPE}


class Shard(StrictModel):
    """A file of a checkpoint as it was written."""

    file: str
    bytes: int = pydantic.Field(ge=0)
    sha256: str


class Place(StrictModel):
    """Where a tensor lies, and what it must look like."""

    shard: str
    shape: list[Annotated[int, pydantic.Field(ge=0, lt=2**48)]]
    dtype: str

    @pydantic.field_validator("dtype")
    @classmethod
    def _is_known(cls, dtype: str) -> str:
        if dtype not in DTYPE_OF_NAME:
            raise ValueError(f"no tensor is of type {dtype!r}")
        return dtype


@dataclass(frozen=True, eq=False)
class Entry:
    """A tensor to be written: its values are asked for when their turn comes, so that no more than one need be in memory."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, key: str, values: Tensor) -> "Entry":
        """An entry of a tensor that is there."""
        return cls(key, tuple(values.shape), values.dtype, lambda: values)

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_shard(path: Path, entries: Iterable[Entry], metadata: Mapping[str, str] | None = None) -> tuple[Shard, dict[str, Place]]:
    """Write and fsync a safetensors file; raises `OSError`. Wide types come first, so that every tensor is aligned."""
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.key))
    digest, offset = hashlib.sha256(), 0
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    for entry in ordered:
        offsets = [offset, offset + entry.num_bytes]
        header[entry.key] = {"dtype": CODE_OF_DTYPE[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
        offset += entry.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    with path.open("wb") as file:
        for part in _parts(text, ordered):
            digest.update(part)
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    places = {entry.key: Place(shard=path.name, shape=list(entry.shape), dtype=dtype_name(entry.dtype)) for entry in ordered}
    return Shard(file=path.name, bytes=HEADER_ALIGNMENT + len(text) + offset, sha256=digest.hexdigest()), places


def _parts(header: bytes, entries: Sequence[Entry]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little")
    yield header
    for entry in entries:
        values = entry.read().detach().cpu().contiguous()
        assert (tuple(values.shape), values.dtype) == (entry.shape, entry.dtype), entry.key
        yield values.reshape(-1).view(torch.uint8).numpy().data


def parts_of(entries: Iterable[Entry], max_bytes: int) -> Iterator[list[Entry]]:
    """Consecutive entries in parts of at most `max_bytes`, a larger entry in a part of its own."""
    part: list[Entry] = []
    size = 0
    for entry in entries:
        if part and size + entry.num_bytes > max_bytes:
            yield part
            part, size = [], 0
        part.append(entry)
        size += entry.num_bytes
    if part:
        yield part


class Reader:
    """Tensors of a checkpoint's folder, by key; files stay open. Raises `BadCheckpoint` where one does not hold what its place promises."""

    def __init__(self, folder: Path, places: Mapping[str, Place]) -> None:
        self.folder, self.places = folder, places
        self._open: dict[str, Any] = {}

    def read(self, key: str) -> Tensor:
        """A tensor of its own memory."""
        place = self.places[key]
        path = self.folder / place.shard
        try:
            if place.shard not in self._open:
                self._open[place.shard] = safe_open(path, framework="pt")
            values: Tensor = self._open[place.shard].get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise BadCheckpoint(f"{path} cannot be read ({error}); restore the checkpoint from a copy") from error
        if list(values.shape) != place.shape or dtype_name(values.dtype) != place.dtype:
            raise BadCheckpoint(
                f"{path} holds {key} as {dtype_name(values.dtype)} {list(values.shape)} where {place.dtype} {place.shape} is promised; "
                "restore the checkpoint from a copy"
            )
        return values

    def entry(self, key: str) -> Entry:
        """The tensor as something to be written again."""
        place = self.places[key]
        return Entry(key, tuple(place.shape), DTYPE_OF_NAME[place.dtype], lambda: self.read(key))


def problem_of(folder: Path, shard: Shard, places: Mapping[str, Place]) -> str | None:
    """What is wrong with a file that shall hold the tensors of `places`, or None; reads every byte. Raises `OSError`."""
    path = folder / shard.file
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # a device has no size, and may have no end
        return f"{path.name} is not a regular file"
    if found.st_size != shard.bytes:
        return f"{path.name} has {found.st_size} bytes where {shard.bytes} were written"
    return _contradiction(path, places) if sha256_of(path) == shard.sha256 else f"{path.name} does not match its checksum"


def _contradiction(path: Path, places: Mapping[str, Place]) -> str | None:
    """Where a file's own header says something else than the manifest, or None."""
    try:
        with safe_open(path, framework="pt") as file:
            if stray := set(file.keys()) ^ places.keys():
                return f"{path.name} and the manifest do not agree on whether it holds {min(stray)[:200]}"
            for key, place in places.items():
                found = file.get_slice(key)
                if found.get_shape() != place.shape or found.get_dtype() != CODE_OF_DTYPE[DTYPE_OF_NAME[place.dtype]]:
                    held = f"{found.get_dtype()} {found.get_shape()}"
                    return f"{path.name} holds {key[:200]} as {held} where {place.dtype} {place.shape} is promised"
    except SafetensorError as error:
        return f"{path.name} cannot be read ({error})"
    return None


def sha256_of(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` of `torch.float32`."""
    return str(dtype).removeprefix("torch.")
