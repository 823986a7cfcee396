"""The same checkpoint in another number of files: any world reads any, but even shards are read and copied faster."""

from collections.abc import Iterator
from pathlib import Path

import torch

from crossdock import atomic
from crossdock.errors import BadCheckpoint, UsageError
from crossdock.runtime.checkpoints.manifest import Manifest, checked
from crossdock.runtime.checkpoints.shards import Entry, Place, Reader, Shard, write_shard


def reshard(folder: Path, manifest: Manifest, out: Path, num_shards: int) -> Manifest:
    """Write a checked checkpoint to the new folder `out` in `num_shards` files of even size, and compare every bit of both.

    Raises `UsageError` where there are fewer tensors than shards, `BadCheckpoint` where what was written does not read back equal.
    """
    if not 1 <= num_shards <= len(manifest.tensors):
        raise UsageError(
            f"{len(manifest.tensors)} tensors do not fill {num_shards} shards; choose --shards from 1 to {len(manifest.tensors)}"
        )
    with atomic.new_folder(out) as aside:
        shards: list[Shard] = []
        places: dict[str, Place] = {}
        for number, part in enumerate(_even_parts(folder, manifest, num_shards)):
            shard, written = write_shard(aside / f"shard-{number:05d}.safetensors", part)
            shards.append(shard)
            places |= written
        manifest = manifest.model_copy(update={"shards": shards, "tensors": places})
        manifest.write(aside)
        _compare(folder, aside, manifest)
    return manifest


def _even_parts(folder: Path, manifest: Manifest, num_shards: int) -> Iterator[list[Entry]]:
    """The largest tensor first, each into the part that is smallest so far; no part is ever empty."""
    reader = Reader(folder, manifest.tensors)
    entries = [reader.entry(key) for key in sorted(manifest.tensors)]
    parts: list[list[Entry]] = [[] for _ in range(num_shards)]
    sizes = [(0, 0)] * num_shards  # bytes, then tensors, so that empty tensors spread as well
    for entry in sorted(entries, key=lambda entry: -entry.num_bytes):
        smallest = sizes.index(min(sizes))
        parts[smallest].append(entry)
        sizes[smallest] = (sizes[smallest][0] + entry.num_bytes, len(parts[smallest]))
    yield from parts


def _compare(folder: Path, written: Path, manifest: Manifest) -> None:
    """Read back what was written: its checksums, and every tensor against the original."""
    problem, _ = checked(written)
    if problem is not None:
        raise BadCheckpoint(f"what was written does not read back: {problem}; nothing was kept, try another disk")
    ours, theirs = Reader(written, manifest.tensors), Reader(folder, Manifest.read(folder).tensors)
    for key in manifest.tensors:
        if not torch.equal(*(values.reshape(-1).view(torch.uint8) for values in (ours.read(key), theirs.read(key)))):
            raise BadCheckpoint(f"{key} does not read back equal; nothing was kept, try another disk")
