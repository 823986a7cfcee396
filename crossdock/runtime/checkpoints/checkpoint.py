"""Checkpoints: safetensors shards and one JSON manifest with their checksums, keyed by logical expert; no pickle.

    checkpoints/step-00000200/manifest.json, shard-00000.safetensors, ...        one shard per rank that had something to write

Keys are `dense/<parameter>/<state>`, `expert/<layer>/<expert>/<tensor>/<state>` and `buffer/<name>`; a state is one of `optimizer.STATES`.
No key speaks of ranks or slots, so any world, any `parallel.expert` and any plan reads any checkpoint; the same world and plan continue
bitwise.

Written aside and renamed last (`saver.py`), so that a folder of that name is complete. Loading checks every checksum and takes the newest
checkpoint that is whole. All functions are called by every rank; ranks share the file system. `docs/checkpoints.md` is the guide.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pydantic
import torch
from torch import Tensor, nn

from crossdock.errors import BadCheckpoint, MissingInput
from crossdock.placement.records.plan import EMPTY, Plan
from crossdock.runtime.checkpoints.manifest import MANIFEST, STEP, Manifest, checked
from crossdock.runtime.checkpoints.shards import Reader
from crossdock.runtime.data import DataState
from crossdock.runtime.optimization.engines import AnyEngine, Piece
from crossdock.runtime.optimization.optimizer import STATES
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


def pieces(engine: AnyEngine) -> Iterator[tuple[str, Piece]]:
    """(key without the state's name, piece) of everything that an optimizer step updates on this rank, in the order of the model."""
    expert_names = {name for names in engine.expert_names.values() for name in names}
    for name, _ in engine.model.named_parameters():
        if name not in expert_names:
            yield f"dense/{name}", Piece(name, None)
    for bank_name, bank in engine.banks.items():
        for slot, expert in enumerate(bank.layout.local_experts):
            for tensor in bank.expert_tensors():
                yield f"expert/{bank.layout.layer}/{expert}/{tensor}", Piece(f"{bank_name}.{tensor}", slot)


def owned(engine: AnyEngine, mesh: Mesh) -> Iterator[tuple[str, Tensor]]:
    """The tensors that this rank writes: every key of the model belongs to exactly one rank."""
    everything = list(pieces(engine))
    dense = [name for name in everything if name[1].slot is None]
    mine = dense[mesh.rank :: mesh.world_size]
    for bank_name, bank in engine.banks.items():
        assert engine.plan is not None
        first_holder_E = (engine.plan.slot_LRE[bank.layout.layer] != EMPTY).argmax(axis=0)
        names = engine.expert_names[bank_name]
        for key, piece in everything:
            if piece.slot is None or piece.parameter not in names:
                continue
            first_holder = first_holder_E[bank.layout.local_experts[piece.slot]]
            if first_holder == mesh.expert_rank and piece.slot % mesh.num_replicas == mesh.replica:
                mine.append((key, piece))
    states = engine.collect([piece for _, piece in mine])
    for key, piece in mine:
        for state, values in states[piece].items():
            yield f"{key}/{state}", values
    if mesh.rank == 0:
        for name, values in persistent_buffers(engine.model).items():
            yield f"buffer/{name}", values


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that are part of the state (balance biases, say), by name; equal on all ranks."""
    saved = model.state_dict(keep_vars=True)
    return {name: values for name, values in model.named_buffers() if name in saved}


@dataclass(frozen=True, eq=False)
class _Wanted:
    """One key that this rank's model needs: its shape, and what takes its values."""

    shape: torch.Size
    take: Callable[[Tensor], object]
    is_here: bool
    """Whether this rank keeps any of it."""


def _wanted(engine: AnyEngine) -> Iterator[tuple[str, _Wanted]]:
    named = dict(engine.model.named_parameters())
    for key, piece in pieces(engine):
        shape = named[piece.parameter].shape[0 if piece.slot is None else 1 :]
        for state in STATES:
            yield f"{key}/{state}", _Wanted(shape, partial(engine.fill, piece, state), engine.wants(piece))
    for name, values in persistent_buffers(engine.model).items():
        yield f"buffer/{name}", _Wanted(values.shape, values.copy_, True)


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
def restore(folder: Path, manifest: Manifest, engine: AnyEngine, passed_over: tuple[str, ...] = ()) -> Loaded:
    """Fill `engine` (under whatever plan it has) and its model's buffers from a checked checkpoint.

    Where no update has been made, the optimizer's moments may be missing (an imported model has none): they are zeros.
    Raises `BadCheckpoint` on every rank where it is of another model, naming the first tensor that is missing or of another shape.
    """
    wanted, places = dict(_wanted(engine)), manifest.tensors
    # ranks hold different experts, and one that found nothing wrong would wait for the others for ever
    told = collectives.all_gather_objects(_misfit(folder, manifest, wanted, engine), engine.mesh)
    if problem := next(filter(None, told), None):
        raise BadCheckpoint(f"{problem}; resume with the config it was made with")
    reader = Reader(folder, places)
    for key, want in wanted.items():
        if want.is_here:
            want.take(reader.read(key) if key in places else torch.zeros(want.shape))
    engine.filled(manifest.num_updates)
    state = RunState(manifest.step, DataState(manifest.data.epoch, manifest.data.position), manifest.seed, manifest.corpus_digest)
    return Loaded(state, manifest.placement(), folder, passed_over)


def _misfit(folder: Path, manifest: Manifest, wanted: Mapping[str, _Wanted], engine: AnyEngine) -> str | None:
    """Why the checkpoint is not one of this rank's model: a tensor that is missing, of another shape, or asked for by no rank."""
    places = manifest.tensors
    for key, want in wanted.items():
        if key not in places:
            if manifest.num_updates or not key.endswith(("/exp_avg", "/exp_avg_sq")):
                return f"{folder} has no {key}: it is of another model"
        elif list(want.shape) != places[key].shape:
            return f"{folder} holds {key} of shape {places[key].shape}, the model has {list(want.shape)}"
    layers = {str(bank.layout.layer) for bank in engine.banks.values()}
    experts = set() if engine.plan is None else {str(expert) for expert in range(engine.plan.num_experts)}
    for key in places.keys() - wanted.keys():
        kind, *rest = key.split("/")
        if kind != "expert" or len(rest) != 4 or rest[0] not in layers or rest[1] not in experts:
            return f"{folder} holds {key}, which the model has not: it is of another model"
    return None


def finished(directory: Path) -> list[Path]:
    """Folders of complete checkpoints, newest first; whether their contents are whole, `latest` checks."""
    if not directory.is_dir():
        return []
    steps = [(int(match[1]), path) for path in directory.iterdir() if (match := STEP.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(steps, reverse=True)]
