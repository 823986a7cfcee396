"""The manifest of a checkpoint: one JSON object with the run's state, the plan, and the checksum, shape and type of all that was written.

It ends with the SHA-256 of itself. Nothing in it names a rank or a slot, but for the plan, which only says where experts were at the time.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Self

import numpy as np
import pydantic

from crossdock import atomic
from crossdock.bounded import is_plain_name, json_value, read_bytes
from crossdock.errors import BadCheckpoint, BadData, MissingInput
from crossdock.placement.records.plan import Plan
from crossdock.runtime.checkpoints.shards import Place, Shard, problem_of
from crossdock.strict_yaml import StrictModel

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MAX_BYTES = 1 << 28
"""The most that is read as a manifest: some millions of tensors."""
STEP = re.compile(r"step-(\d{8,})")
"""Name of a checkpoint's folder."""

Count = pydantic.Field(ge=0, lt=2**63)


class SavedData(StrictModel):
    """A `DataState`."""

    epoch: int = Count
    position: int = Count


class SavedPlan(StrictModel):
    """The slots of a plan, and who made it."""

    num_experts: int = pydantic.Field(ge=1, lt=2**31)
    method: str
    slots: list[list[list[int]]]


class Manifest(StrictModel):
    """What a checkpoint holds. Raises `ValueError` where its parts contradict one another."""

    format_version: int
    step: int = Count
    data: SavedData
    seed: int = pydantic.Field(ge=0)
    corpus_digest: str
    """Of the data that the run read; empty where it has read none yet."""
    num_updates: int = Count
    world_size: int = pydantic.Field(ge=1)
    expert_parallel: int = pydantic.Field(ge=1)
    plan_hash: str | None
    plan: SavedPlan | None
    shards: list[Shard]
    tensors: dict[str, Place]

    @pydantic.model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        files = [shard.file for shard in self.shards]
        if len(set(files)) != len(files) or not all(is_plain_name(file) and file != MANIFEST for file in files):
            raise ValueError("names of shards stand twice or are no plain names")
        if stray := {place.shard for place in self.tensors.values()} - set(files):
            raise ValueError(f"tensors lie in {sorted(stray)[0]!r}, which is not among its shards")
        plan = self.placement()
        if self.plan_hash != (None if plan is None else plan.digest):
            raise ValueError("the plan does not match plan_hash")
        return self

    def placement(self) -> Plan | None:
        """The plan under which it was saved; None for a model without experts."""
        if self.plan is None:
            return None
        num_slots = sum(map(len, self.plan.slots[0])) if self.plan.slots else 0
        if self.plan.num_experts > num_slots:  # said here, because the plan would first make a table of its experts
            raise ValueError(f"the plan has {num_slots} slots a layer for {self.plan.num_experts} experts")
        return Plan(np.array(self.plan.slots), self.plan.num_experts, method=self.plan.method)

    @property
    def num_bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    def write(self, folder: Path) -> None:
        """Write it into `folder`. Raises `IoFailure`."""
        value = self.model_dump(mode="json")
        atomic.write_json(folder / MANIFEST, {**value, "sha256": digest_of(value)})

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read and check the manifest of `folder`, its shards not. Raises `BadCheckpoint` whose message begins with the file's name."""
        try:
            value = json_value(read_bytes(folder / MANIFEST, MAX_BYTES, "a manifest", BadCheckpoint), MANIFEST, BadCheckpoint)
            claimed = value.pop("sha256")
            if digest_of(value) != claimed:
                raise BadCheckpoint(f"{MANIFEST} does not match its own checksum")
            if value["format_version"] != FORMAT_VERSION:
                raise BadCheckpoint(f"{MANIFEST} has format version {value['format_version']}, and {FORMAT_VERSION} is understood")
            manifest = cls.model_validate(value)
        except MissingInput as error:
            raise BadCheckpoint(f"{MANIFEST}: {error}") from error
        except pydantic.ValidationError as error:
            detail = error.errors()[0]
            raise BadCheckpoint(f"{MANIFEST} is malformed ({'.'.join(map(str, detail['loc']))[:80]}: {detail['msg']})") from error
        except BadCheckpoint:
            raise
        except (BadData, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadCheckpoint(f"{MANIFEST} is malformed ({type(error).__name__}: {error})") from error
        if (named := STEP.fullmatch(folder.name)) and int(named[1]) != manifest.step:
            raise BadCheckpoint(f"{MANIFEST} is that of step {manifest.step}")
        return manifest


def digest_of(value: dict[str, Any]) -> str:
    """SHA-256 of a manifest's object without its `sha256`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def checked(folder: Path, part: int = 0, num_parts: int = 1) -> tuple[str | None, Manifest | None]:
    """(what is wrong with a checkpoint or None, its manifest); of the shards, every byte of each `num_parts`th is read."""
    try:
        manifest = Manifest.read(folder)
        places: dict[str, dict[str, Place]] = {shard.file: {} for shard in manifest.shards}
        for key, place in manifest.tensors.items():
            places[place.shard][key] = place
        for shard in manifest.shards[part::num_parts]:
            if problem := problem_of(folder, shard, places[shard.file]):
                return problem, None
    except BadCheckpoint as error:
        return str(error), None
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}", None
    return None, manifest
