"""Checkpoints: safetensors shards and one JSON manifest with their checksums, keyed by logical expert; no pickle.

    checkpoints/step-00000200/manifest.json, shard-00000.safetensors, ...        one shard per rank that had something to write

Keys are `dense/<parameter>/<state>`, `expert/<layer>/<expert>/<tensor>/<state>` and `buffer/<name>`; a state is one of `optimizer.STATES`.
No key speaks of ranks or slots, so any world, any `parallel.expert` and any plan reads any checkpoint; the same world and plan continue
bitwise.

Written aside and renamed last, so that a folder of that name is complete. Loading checks every checksum and takes the newest checkpoint
that is whole. All functions are called by every rank; ranks share the file system.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pydantic
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from crossdock import atomic
from crossdock.errors import BadCheckpoint, IoFailure, MissingInput
from crossdock.placement.plan import EMPTY, Plan
from crossdock.runtime import collectives
from crossdock.runtime.data import DataState
from crossdock.runtime.engine import Engine
from crossdock.runtime.mesh import Mesh
from crossdock.strict_yaml import StrictModel

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d{8,})")


class CheckpointConfig(StrictModel):
    """When to save, and how many to keep."""

    every: int = pydantic.Field(default=0, ge=0)
    """Steps between checkpoints; 0 saves only when the run is asked to stop."""
    keep: int = pydantic.Field(default=2, ge=1)
    at_end: bool = False
    """Save after the last step as well."""


@dataclass(frozen=True)
class RunState:
    """What a run needs besides tensors to continue where it was: `step` updates are done, and `data` is where the next batch begins."""

    step: int
    data: DataState
    seed: int
    corpus_digest: str


@dataclass(frozen=True, eq=False)
class Loaded:
    """What was restored: the run's state, the plan it was saved under, the folder, and a message for each newer one that was not whole."""

    state: RunState
    plan: Plan | None
    folder: Path
    passed_over: tuple[str, ...]


# ---- saving ------------------------------------------------------------------------------------------------------------


def save(directory: Path, engine: Engine, state: RunState, mesh: Mesh, keep: int = 2) -> Path:
    """Write `directory`/step-N and delete all but the `keep` newest. Raises `IoFailure` on every rank where any rank could not write."""
    final = directory / f"step-{state.step:08d}"
    aside = directory / f".{final.name}.tmp"
    _together(mesh, lambda: _make_empty(aside), only_rank=0)
    shard = aside / f"shard-{mesh.rank:05d}.safetensors"
    written = _together(mesh, lambda: _write_shard(shard, dict(_owned(engine, mesh))))

    def commit() -> None:
        shards = [record["shard"] for record in written if record["tensors"]]
        tensors = {key: place for record in written for key, place in record["tensors"].items()}
        _write_manifest(aside, _manifest(engine, state, mesh, shards, tensors))
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)
        _fsync(directory)
        for old in finished(directory)[keep:]:
            shutil.rmtree(old)

    _together(mesh, commit, only_rank=0)
    return final


def _owned(engine: Engine, mesh: Mesh) -> Iterator[tuple[str, Tensor]]:
    """The tensors that this rank writes: every key of the model belongs to exactly one rank."""
    states, expert_names = engine.states(), {name for names in engine.expert_names.values() for name in names}
    dense = [name for name in states if name not in expert_names]
    for name in dense[mesh.rank :: mesh.world_size]:
        for key, values in states[name].items():
            yield f"dense/{name}/{key}", values
    for bank_name, bank in engine.banks.items():
        assert engine.plan is not None
        first_holder_E = (engine.plan.slot_LRE[bank.layout.layer] != EMPTY).argmax(axis=0)
        for slot, expert in enumerate(bank.layout.local_experts):
            if expert == EMPTY or first_holder_E[expert] != mesh.expert_rank or slot % mesh.num_replicas != mesh.replica:
                continue
            for tensor in bank.expert_tensors():
                for key, values in states[f"{bank_name}.{tensor}"].items():
                    yield f"expert/{bank.layout.layer}/{expert}/{tensor}/{key}", values[slot]
    if mesh.rank == 0:
        for name, values in persistent_buffers(engine.model).items():
            yield f"buffer/{name}", values


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that are part of the state (balance biases, say), by name; equal on all ranks."""
    saved = model.state_dict(keep_vars=True)
    return {name: values for name, values in model.named_buffers() if name in saved}


def _write_shard(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    places = {key: {"shard": path.name, "shape": list(values.shape), "dtype": _name(values.dtype)} for key, values in tensors.items()}
    if not tensors:
        return {"tensors": {}}
    save_file({key: values.detach().cpu().contiguous() for key, values in tensors.items()}, path)
    _fsync(path)
    return {"tensors": places, "shard": {"file": path.name, "bytes": path.stat().st_size, "sha256": _sha256(path)}}


def _manifest(engine: Engine, state: RunState, mesh: Mesh, shards: list[Any], tensors: dict[str, Any]) -> dict[str, Any]:
    plan = engine.plan
    return {
        "format_version": FORMAT_VERSION,
        "step": state.step,
        "data": asdict(state.data),
        "seed": state.seed,
        "corpus_digest": state.corpus_digest,
        "num_updates": engine.optimizer.num_updates,
        "world_size": mesh.world_size,
        "expert_parallel": mesh.expert_parallel,
        "plan_hash": None if plan is None else plan.digest,
        "plan": None if plan is None else {"num_experts": plan.num_experts, "method": plan.method, "slots": plan.slots_LRS.tolist()},
        "shards": shards,
        "tensors": tensors,
    }


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    atomic.write_json(folder / MANIFEST, {**manifest, "sha256": _digest_of(manifest)})


def _digest_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _together(mesh: Mesh, work: Callable[[], Any], only_rank: int | None = None) -> list[Any]:
    """Do `work` on every rank (or on one) and return all results; where it fails to write on any rank, raise `IoFailure` on all."""
    result, problem = None, None
    if only_rank is None or mesh.rank == only_rank:
        try:
            result = work()
        except (OSError, SafetensorError, IoFailure) as error:
            problem = f"rank {mesh.rank}: {error}"
    results = collectives.all_gather_objects((result, problem), mesh)
    problems = [told for _, told in results if told]
    if problems:
        raise IoFailure(f"the checkpoint was not written, older ones are untouched ({problems[0]}); free space or choose another run.dir")
    return [value for value, _ in results]


# ---- loading -----------------------------------------------------------------------------------------------------------


def latest(directory: Path, mesh: Mesh) -> tuple[Path, dict[str, Any], tuple[str, ...]]:
    """(folder, manifest, what was wrong with newer ones) of the newest checkpoint whose every checksum holds; the same on every rank.

    `directory` may also be one checkpoint's folder. Raises `MissingInput` where there is none, `BadCheckpoint` where none is whole.
    """
    folders = collectives.broadcast_object([directory] if (directory / MANIFEST).exists() else finished(directory), mesh)
    if not folders:
        raise MissingInput(f"{directory} holds no checkpoint; start the run anew, or name another run.dir")
    passed_over: list[str] = []
    for folder in folders:
        problem, manifest = _checked(folder, mesh)
        problems = [told for told in collectives.all_gather_objects(problem, mesh) if told]
        if not problems:
            return folder, manifest, tuple(passed_over)
        passed_over.append(f"{folder}: {problems[0]}")
    raise BadCheckpoint(
        f"none of {len(folders)} checkpoints is valid: {'; '.join(passed_over[:4])}. Restore one from a copy, or start anew"
    )


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint's folder, or None; reads every byte."""
    return _checked(folder, Mesh.single())[0]


def _checked(folder: Path, mesh: Mesh) -> tuple[str | None, dict[str, Any]]:
    """(problem, manifest); of the shards each rank reads its part."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        claimed = manifest.pop("sha256")
        if _digest_of(manifest) != claimed:
            return f"{MANIFEST} does not match its own checksum", {}
        if manifest["format_version"] != FORMAT_VERSION:
            return f"format version {manifest['format_version']}, and {FORMAT_VERSION} is understood", {}
        for shard in manifest["shards"][mesh.rank :: mesh.world_size]:
            path = folder / Path(shard["file"]).name
            if path.stat().st_size != shard["bytes"]:
                return f"{path.name} has {path.stat().st_size} bytes where {shard['bytes']} were written", {}
            if _sha256(path) != shard["sha256"]:
                return f"{path.name} does not match its checksum", {}
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}", {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} is malformed ({type(error).__name__}: {error})", {}
    return None, manifest


def plan_of(manifest: Mapping[str, Any]) -> Plan | None:
    """The plan under which a checkpoint was saved; None for a model without experts."""
    import numpy as np

    plan = manifest["plan"]
    return None if plan is None else Plan(np.array(plan["slots"]), plan["num_experts"], method=plan["method"])


@torch.no_grad()
def restore(folder: Path, manifest: Mapping[str, Any], engine: Engine, passed_over: tuple[str, ...] = ()) -> Loaded:
    """Fill `engine` (under whatever plan it has) and its model's buffers from a checked checkpoint.

    Raises `BadCheckpoint` where it is of another model, naming the first tensor that is missing or of another shape.
    """
    wanted = dict(_wanted(engine))
    places = manifest["tensors"]
    for key, values in wanted.items():
        if key not in places:
            raise BadCheckpoint(f"{folder} has no {key}: it is of another model; resume with the config it was made with")
        if list(values.shape) != places[key]["shape"]:
            raise BadCheckpoint(
                f"{folder} holds {key} of shape {places[key]['shape']}, the model has {list(values.shape)}; "
                "resume with the config it was made with"
            )
    by_shard: dict[str, list[str]] = {}
    for key in wanted:
        by_shard.setdefault(places[key]["shard"], []).append(key)
    for name, keys in sorted(by_shard.items()):
        with safe_open(folder / Path(name).name, framework="pt") as shard:
            for key in keys:
                wanted[key].copy_(shard.get_tensor(key))
    engine.optimizer.refresh()
    engine.optimizer.set_num_updates(manifest["num_updates"])
    state = RunState(manifest["step"], DataState(**manifest["data"]), manifest["seed"], manifest["corpus_digest"])
    return Loaded(state, plan_of(manifest), folder, passed_over)


def _wanted(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Every key that this rank needs, with the live tensor that takes its values."""
    states, expert_names = engine.states(), {name for names in engine.expert_names.values() for name in names}
    for name in states:
        if name not in expert_names:
            for key, values in states[name].items():
                yield f"dense/{name}/{key}", values
    for bank_name, bank in engine.banks.items():
        for slot, expert in enumerate(bank.layout.local_experts):
            if expert != EMPTY:
                for tensor in bank.expert_tensors():
                    for key, values in states[f"{bank_name}.{tensor}"].items():
                        yield f"expert/{bank.layout.layer}/{expert}/{tensor}/{key}", values[slot]
    for name, values in persistent_buffers(engine.model).items():
        yield f"buffer/{name}", values


def finished(directory: Path) -> list[Path]:
    """Folders of complete checkpoints, newest first; whether their contents are whole, `latest` checks."""
    if not directory.is_dir():
        return []
    steps = [(int(match[1]), path) for path in directory.iterdir() if (match := _STEP.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(steps, reverse=True)]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
