"""Checkpoints: safetensors shards and one JSON manifest with their checksums, keyed by logical expert; no pickle.

    checkpoints/step-00000200/manifest.json, shard-00000.safetensors, ...        one shard per rank that had something to write

Keys are `dense/<parameter>/<state>`, `expert/<layer>/<expert>/<tensor>/<state>` and `buffer/<name>`; a state is one of `optimizer.STATES`.
No key speaks of ranks or slots, so any world, any `parallel.expert` and any plan reads any checkpoint; the same world and plan continue
bitwise.

Written aside and renamed last (`saver.py`), so that a folder of that name is complete. Loading checks every checksum and takes the newest
checkpoint that is whole. All functions are called by every rank; ranks share the file system. `docs/checkpoints.md` is the guide.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pydantic
import torch
from torch import Tensor, nn

from crossdock.errors import BadCheckpoint, MissingInput
from crossdock.placement.plan import EMPTY, Plan
from crossdock.runtime.checkpoints.manifest import MANIFEST, STEP, Manifest, checked
from crossdock.runtime.checkpoints.shards import Place, Reader
from crossdock.runtime.data import DataState
from crossdock.runtime.optimization.engine import Engine
from crossdock.runtime.transport import collectives
from crossdock.runtime.transport.mesh import Mesh
from crossdock.strict_yaml import StrictModel


class CheckpointConfig(StrictModel):
    """When to save, and how many to keep."""

    every: int = pydantic.Field(default=0, ge=0)
    """Steps between checkpoints; 0 saves only when the run is asked to stop."""
    keep: int = pydantic.Field(default=2, ge=1)
    at_end: bool = False
    """Save after the last step as well."""
    asynchronous: bool = False
    """Copy the state to the host in a pause between two steps, and write it while training goes on. Holds the state twice on the host."""


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


# ---- keys ----------------------------------------------------------------------------------------------------------


def owned(engine: Engine, mesh: Mesh) -> Iterator[tuple[str, Tensor]]:
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


# ---- loading -----------------------------------------------------------------------------------------------------------


def latest(directory: Path, mesh: Mesh) -> tuple[Path, Manifest, tuple[str, ...]]:
    """(folder, manifest, what was wrong with newer ones) of the newest checkpoint whose every checksum holds; the same on every rank.

    `directory` may also be one checkpoint's folder. Raises `MissingInput` where there is none, `BadCheckpoint` where none is whole.
    """
    folders = collectives.broadcast_object([directory] if (directory / MANIFEST).exists() else finished(directory), mesh)
    if not folders:
        raise MissingInput(f"{directory} holds no checkpoint; start the run anew, or name another run.dir")
    passed_over: list[str] = []
    for folder in folders:
        problem, manifest = checked(folder, mesh.rank, mesh.world_size)
        problems = [told for told in collectives.all_gather_objects(problem, mesh) if told]
        if not problems:
            assert manifest is not None
            return folder, manifest, tuple(passed_over)
        passed_over.append(f"{folder}: {problems[0]}")
    raise BadCheckpoint(
        f"none of {len(folders)} checkpoints is valid: {'; '.join(passed_over[:4])}. Restore one from a copy, or start anew"
    )


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint's folder, or None; reads every byte."""
    return checked(folder)[0]


@torch.no_grad()
def restore(folder: Path, manifest: Manifest, engine: Engine, passed_over: tuple[str, ...] = ()) -> Loaded:
    """Fill `engine` (under whatever plan it has) and its model's buffers from a checked checkpoint.

    Where no update has been made, the optimizer's moments may be missing (an imported model has none): they are zeros.
    Raises `BadCheckpoint` where it is of another model, naming the first tensor that is missing or of another shape.
    """
    wanted, places = dict(_wanted(engine)), manifest.tensors
    fresh = [key for key in wanted if key not in places and manifest.num_updates == 0 and key.endswith(("/exp_avg", "/exp_avg_sq"))]
    for key, values in wanted.items():
        if key in fresh:
            continue
        if key not in places:
            raise BadCheckpoint(f"{folder} has no {key}: it is of another model; resume with the config it was made with")
        if list(values.shape) != places[key].shape:
            raise BadCheckpoint(
                f"{folder} holds {key} of shape {places[key].shape}, the model has {list(values.shape)}; "
                "resume with the config it was made with"
            )
    _check_nothing_is_left(folder, places, wanted, engine)
    reader = Reader(folder, places)
    for key, values in wanted.items():
        if key in places:
            values.copy_(reader.read(key))
        else:
            values.zero_()
    engine.optimizer.refresh()
    engine.optimizer.set_num_updates(manifest.num_updates)
    state = RunState(manifest.step, DataState(manifest.data.epoch, manifest.data.position), manifest.seed, manifest.corpus_digest)
    return Loaded(state, manifest.placement(), folder, passed_over)


def _check_nothing_is_left(folder: Path, places: Mapping[str, Place], wanted: Mapping[str, Tensor], engine: Engine) -> None:
    """Raise `BadCheckpoint` where the checkpoint holds a tensor that no rank asks for."""
    layers = {str(bank.layout.layer) for bank in engine.banks.values()}
    experts = set() if engine.plan is None else {str(expert) for expert in range(engine.plan.num_experts)}
    for key in places.keys() - wanted.keys():
        kind, *rest = key.split("/")
        if kind != "expert" or len(rest) != 4 or rest[0] not in layers or rest[1] not in experts:
            raise BadCheckpoint(
                f"{folder} holds {key}, which the model has not: it is of another model; resume with the config it was made with"
            )


def finished(directory: Path) -> list[Path]:
    """Folders of complete checkpoints, newest first; whether their contents are whole, `latest` checks."""
    if not directory.is_dir():
        return []
    steps = [(int(match[1]), path) for path in directory.iterdir() if (match := STEP.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(steps, reverse=True)]
