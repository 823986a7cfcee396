"""Saving checkpoints: shards written aside by all ranks, one manifest, one rename; at once, or while training goes on.

An asynchronous save stalls training for a copy of this rank's share to the host, then a thread writes. Between later steps all ranks ask
one another whether their threads are done; only when all are, is the checkpoint committed. Its files are those of a save at once.
"""

import shutil
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crossdock.errors import IoFailure
from crossdock.runtime.checkpoints.checkpoint import CheckpointConfig, RunState, finished, owned
from crossdock.runtime.checkpoints.manifest import FORMAT_VERSION, Manifest, SavedData, SavedPlan
from crossdock.runtime.checkpoints.shards import Entry, Place, Shard, fsync, write_shard
from crossdock.runtime.optimization.engines import AnyEngine
from crossdock.runtime.phases import reached
from crossdock.runtime.transport import collectives
from crossdock.runtime.transport.mesh import Mesh

Written = tuple[Shard, dict[str, Place]]


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint.

    stall_s: how long this rank's training stood still for it, in all. write_s: how long the slowest rank wrote. seconds: the whole of it.
    """

    step: int
    folder: Path
    stall_s: float
    write_s: float
    seconds: float


class Saver:
    """Saves the state of `engine` under `directory`/step-N and keeps the newest few; mutable, one per run.

    Every rank makes the same calls between the same steps. A rank that cannot write makes all ranks raise `IoFailure`; older checkpoints
    stay as they were, and a process that is killed at any moment leaves no folder that looks complete.
    """

    def __init__(self, directory: Path, engine: AnyEngine, mesh: Mesh, config: CheckpointConfig) -> None:
        self.directory, self.engine, self.mesh, self.config = directory, engine, mesh, config
        self._host: dict[str, Tensor] = {}  # taken again by the next save: new pages, and pinning them, cost more than the copy
        self._writing: _Writing | None = None

    def save(self, state: RunState) -> Saved | None:
        """Save, or begin to; None where writing goes on behind training. One save at a time: call `finish` before."""
        assert self._writing is None, "a checkpoint is still being written"
        begin_s = time.perf_counter()
        aside = self.directory / f".{_name(state.step)}.tmp"
        _together(self.mesh, lambda: self._clear(aside), only_rank=0)
        tensors = dict(owned(self.engine, self.mesh))
        if self.config.asynchronous:
            tensors = self._copied(tensors)
        path = aside / f"shard-{self.mesh.rank:05d}.safetensors"
        self._writing = _Writing(path, [Entry.of(key, values) for key, values in tensors.items()], self._frame(state), begin_s)
        if not self.config.asynchronous:
            self._writing.run()
            return self._commit(begin_s)
        self._writing.start()
        self._writing.stall_s += time.perf_counter() - begin_s
        return None

    def poll(self) -> Saved | None:
        """Commit what is under way, if all ranks have written their part; call it between steps."""
        if self._writing is None:
            return None
        begin_s = time.perf_counter()
        if all(collectives.all_gather_objects(not self._writing.is_alive(), self.mesh)):
            return self._commit(begin_s)
        self._writing.stall_s += time.perf_counter() - begin_s
        return None

    def finish(self) -> Saved | None:
        """Wait for what is under way and commit it."""
        if self._writing is None:
            return None
        begin_s = time.perf_counter()
        self._writing.join()
        return self._commit(begin_s)

    def _commit(self, begin_s: float) -> Saved:
        """Every rank's thread is done, or will be: gather what they wrote, and let rank 0 make it a checkpoint."""
        writing, self._writing = self._writing, None
        assert writing is not None
        records = _together(self.mesh, writing.outcome)
        final = self.directory / _name(writing.frame["step"])

        def commit() -> None:
            shards = [shard for (shard, places), _ in records if places]
            tensors = {key: place for (_, places), _ in records for key, place in places.items()}
            aside = writing.path.parent
            Manifest(**writing.frame, shards=shards, tensors=tensors).write(aside)
            reached("checkpoint_rename")
            if final.exists():  # one that is damaged: a run does not come to the step of a whole one again
                _discard(final)
            aside.rename(final)
            fsync(self.directory)
            folders = finished(self.directory)
            for old in folders[folders.index(final) + self.config.keep :]:  # newer ones, which `latest` passed over, do not count
                _discard(old)

        _together(self.mesh, commit, only_rank=0)
        end_s = time.perf_counter()
        write_s = max(seconds for _, seconds in records)
        return Saved(writing.frame["step"], final, writing.stall_s + end_s - begin_s, write_s, end_s - writing.begin_s)

    def _clear(self, aside: Path) -> None:
        """An empty folder; what killed processes left aside is taken away."""
        for leftover in self.directory.glob(".step-*.tmp"):
            shutil.rmtree(leftover)
        aside.mkdir(parents=True)

    def _copied(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same values on the host, in memory that training does not touch."""
        earlier, self._host = self._host, {}
        on_device = False
        for key, values in tensors.items():
            copy = earlier.get(key)
            if copy is None or copy.shape != values.shape or copy.dtype != values.dtype:
                copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            copy.copy_(values.detach(), non_blocking=True)
            self._host[key] = copy
            on_device = on_device or values.is_cuda
        if on_device:
            torch.cuda.current_stream(self.mesh.device).synchronize()
        return self._host

    def _frame(self, state: RunState) -> dict[str, Any]:
        """The manifest's fields but for what was written, as things stand now."""
        plan = self.engine.plan
        return {
            "format_version": FORMAT_VERSION,
            "step": state.step,
            "data": SavedData(**asdict(state.data)),
            "seed": state.seed,
            "corpus_digest": state.corpus_digest,
            "num_updates": self.engine.num_updates,
            "world_size": self.mesh.world_size,
            "expert_parallel": self.mesh.expert_parallel,
            "plan_hash": None if plan is None else plan.digest,
            "plan": None if plan is None else SavedPlan(num_experts=plan.num_experts, method=plan.method, slots=plan.slots_LRS.tolist()),
        }


class _Writing(threading.Thread):
    """This rank's shard on its way to disk; `run` may also be called at once."""

    def __init__(self, path: Path, entries: Iterable[Entry], frame: dict[str, Any], begin_s: float) -> None:
        super().__init__(name="checkpoint", daemon=True)  # a process that ends early leaves a folder aside, which the next one clears
        self.path, self.entries, self.frame, self.begin_s = path, list(entries), frame, begin_s
        self.stall_s = 0.0
        self._written: Written | None = None
        self._error: BaseException | None = None
        self._write_s = 0.0

    def run(self) -> None:
        begin_s = time.perf_counter()
        try:
            reached("checkpoint_write")
            self._written = write_shard(self.path, self.entries) if self.entries else (Shard(file=self.path.name, bytes=0, sha256=""), {})
            fsync(self.path.parent)
        except BaseException as error:
            self._error = error
        self._write_s = time.perf_counter() - begin_s

    def outcome(self) -> tuple[Written, float]:
        """(what was written, seconds); raises what went wrong."""
        if self._error is not None:
            raise self._error
        assert self._written is not None
        return self._written, self._write_s


def _together(mesh: Mesh, work: Callable[[], Any], only_rank: int | None = None) -> list[Any]:
    """Do `work` on every rank (or on one) and return all results; where it fails to write on any rank, raise `IoFailure` on all."""
    result, problem = None, None
    if only_rank is None or mesh.rank == only_rank:
        try:
            result = work()
        except (OSError, IoFailure) as error:
            problem = f"rank {mesh.rank}: {error}"
    results = collectives.all_gather_objects((result, problem), mesh)
    problems = [told for _, told in results if told]
    if problems:
        raise IoFailure(f"the checkpoint was not written, older ones are untouched ({problems[0]}); free space or choose another run.dir")
    return [value for value, _ in results]


def _discard(folder: Path) -> None:
    """Take a checkpoint away: first its name, so that a process that is killed meanwhile leaves no half of it that looks like a whole."""
    nameless = folder.with_name(f".{folder.name}.old.tmp")
    folder.rename(nameless)
    shutil.rmtree(nameless)


def _name(step: int) -> str:
    return f"step-{step:08d}"
