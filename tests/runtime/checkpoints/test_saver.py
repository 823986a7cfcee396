"""Saving while training goes on: the same bytes as saving at once, one decision on all ranks, and nothing half done after a kill."""

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crossdock.errors import IoFailure
from crossdock.models.gates.deepseek_v3 import DeepSeekV3Config
from crossdock.placement.records.plan import Plan
from crossdock.runtime.checkpoints import checkpoint, saver
from crossdock.runtime.checkpoints.checkpoint import CheckpointConfig, RunState
from crossdock.runtime.checkpoints.manifest import Manifest
from crossdock.runtime.checkpoints.saver import Saver
from crossdock.runtime.checkpoints.shards import Entry, Reader, sha256_of, write_shard
from crossdock.runtime.data import DataState
from crossdock.runtime.training.steps import Stepper
from tests.pool import Pool
from tests.runtime import tiny
from tests.runtime.training.test_train import files, run, run_with

BIASED = tiny.MODEL.model_copy(update={"gate": DeepSeekV3Config()})
"""A model with buffers that are part of the state."""
BEHIND = CheckpointConfig(asynchronous=True)


def state_of(step: int) -> RunState:
    return RunState(step, DataState(0, 8 * step), 0, "d")


def saver_of(folder: str, name: str, run: Stepper, config: CheckpointConfig) -> Saver:
    return Saver(Path(folder) / name, run.engine, run.mesh, config)


def save_both_ways(rank: int, world_size: int, folder: str, plan: Plan, dtype: str) -> tuple[bool, tuple[float, float, float]]:
    run = tiny.stepper(rank, world_size, folder, plan, model=BIASED, dtype=getattr(torch, dtype))
    behind = saver_of(folder, "behind", run, BEHIND)
    for step in (1, 2):  # the second copies into the memory of the first
        tiny.run_steps(run, step - 1, step)
        saver_of(folder, "at_once", run, CheckpointConfig()).save(state_of(step))
        is_begun = behind.save(state_of(step)) is None
        tiny.run_steps(run, step, step + 1)  # a step that must not show in what is being written
        saved = behind.finish()
    assert saved is not None
    return is_begun, (saved.stall_s, saved.write_s, saved.seconds)


@pytest.mark.parametrize(("world_size", "dtype"), [(1, "bfloat16"), (2, "float32"), (4, "float32")])
def test_both_ways_write_the_same_bytes(ranks: Pool, folder: str, world_size: int, dtype: str) -> None:
    for is_begun, (stall_s, write_s, seconds) in ranks.run(
        world_size, save_both_ways, folder, tiny.random_plan(min(2, world_size), 1), dtype
    ):
        assert is_begun
        assert 0 < stall_s <= seconds
        assert write_s > 0
    for step in (1, 2):
        behind, at_once = (Path(folder) / name / f"step-{step:08d}" for name in ("behind", "at_once"))
        assert checkpoint.verify(behind) is None
        assert sorted(path.name for path in behind.iterdir()) == sorted(path.name for path in at_once.iterdir())
        for path in at_once.iterdir():
            assert (behind / path.name).read_bytes() == path.read_bytes(), path.name
    assert not list((Path(folder) / "behind").glob(".*"))


def slow_on_one_rank(rank: int, world_size: int, folder: str) -> tuple[list[bool], str]:
    run = tiny.stepper(rank, world_size, folder, tiny.random_plan(2, 1), dtype=torch.float32)
    behind, may_write = saver_of(folder, "behind", run, BEHIND), threading.Event()

    def write_late(*args: Any) -> Any:
        may_write.wait()
        return write_shard(*args)

    saver.write_shard = write_late if rank == 1 else write_shard  # type: ignore[assignment]
    try:
        behind.save(state_of(1))
        while rank == 0 and behind._writing is not None and behind._writing.is_alive():
            time.sleep(0.001)
        committed = [behind.poll() is not None for _ in range(3)]
        may_write.set()
        while behind._writing is not None and behind._writing.is_alive():
            time.sleep(0.001)
        while (saved := behind.poll()) is None:
            committed.append(False)
    finally:
        saver.write_shard = write_shard
    return committed[:3], saved.folder.name


def test_a_checkpoint_is_committed_when_the_last_rank_has_written(ranks: Pool, folder: str) -> None:
    for committed, name in ranks.run(2, slow_on_one_rank, folder):
        assert committed == [False, False, False]
        assert name == "step-00000001"


def fail_behind(rank: int, world_size: int, folder: str) -> tuple[str, str | None]:
    run = tiny.stepper(rank, world_size, folder, tiny.random_plan(2, 1), dtype=torch.float32)
    behind = saver_of(folder, "behind", run, BEHIND)
    behind.save(state_of(1))
    first = behind.finish()
    assert first is not None

    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    saver.write_shard = no_space if rank == 1 else write_shard  # type: ignore[assignment]
    try:
        behind.save(state_of(2))
        with pytest.raises(IoFailure) as caught:
            behind.finish()
    finally:
        saver.write_shard = write_shard
    behind.save(state_of(3))  # and there is room again
    third = behind.finish()
    assert third is not None
    return str(caught.value), checkpoint.verify(third.folder)


def test_a_write_that_fails_behind_fails_all_ranks_and_harms_nothing(ranks: Pool, folder: str) -> None:
    for message, problem in ranks.run(2, fail_behind, folder):
        assert "older ones are untouched (rank 1: [Errno 28] No space left on device)" in message
        assert problem is None
    assert [path.name for path in checkpoint.finished(Path(folder) / "behind")] == ["step-00000003", "step-00000001"]
    assert not list((Path(folder) / "behind").glob(".*"))


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from crossdock.runtime.checkpoints import saver
from crossdock.runtime.checkpoints import shards
from tests.runtime import tiny
from tests.runtime.checkpoints.test_saver import BEHIND, saver_of, state_of
folder, moment = sys.argv[1:]
run = tiny.stepper(0, 1, folder, tiny.random_plan(1, 1), dtype=torch.float32)
behind = saver_of(folder, "behind", run, BEHIND)
behind.save(state_of(1)); behind.finish()
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if moment == "in a shard":
    whole = shards._parts
    def some(header, entries):
        yield from list(whole(header, entries))[:9]
        die()
    shards._parts = some
elif moment == "after the shards":
    saver.Manifest.write = die
else:
    Path.rename = die
behind.save(state_of(2)); behind.finish()
"""


@pytest.mark.parametrize("moment", ["in a shard", "after the shards", "before the rename"])
def test_a_kill_in_the_middle_leaves_the_one_before(folder: str, moment: str) -> None:
    process = subprocess.run([sys.executable, "-c", KILLED, folder, moment], timeout=120, check=False, capture_output=True, text=True)
    assert process.returncode == -9, process.stderr
    root = Path(folder) / "behind"
    assert [path.name for path in checkpoint.finished(root)] == ["step-00000001"]
    assert checkpoint.verify(root / "step-00000001") is None
    assert (root / ".step-00000002.tmp").is_dir()
    run = tiny.stepper(0, 1, folder, tiny.random_plan(1, 1), dtype=torch.float32)
    saver_of(folder, "behind", run, BEHIND).save(state_of(5))
    assert not (root / ".step-00000002.tmp").exists()


def test_a_run_that_saves_behind_continues_bitwise_after_a_stop(ranks: Pool, folder: str) -> None:
    plan, options = tiny.random_plan(2, 1), {"checkpoint": CheckpointConfig(every=3, asynchronous=True)}
    straight = ranks.run(2, run_with, folder, plan, options, {"name": "straight"})
    stopped = ranks.run(2, run_with, folder, plan, options, {"actions": {7: "SIGTERM"}})
    assert {result["error"] for result, _ in stopped} == {"Preempted"}
    saved = [event for event in files(folder)[2] if event["event"] == "checkpoint_saved"]
    assert [event["step"] for event in saved] == [3, 6, 8]
    assert all(0 < event["stall_s"] <= event["seconds"] and event["write_s"] > 0 for event in saved)
    resumed = ranks.run(2, run_with, folder, plan, {**options, "resume": True}, {})
    for (result, states), (other, wanted) in zip(resumed, straight, strict=True):
        assert (result["status"], result["loss"]) == ("done", other["loss"])
        assert all(np.array_equal(states[name], values) for name, values in wanted.items())
    assert not list((Path(folder) / "run" / "checkpoints").glob(".*"))


def test_the_end_of_a_run_waits_for_what_is_being_written(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_slowly(*args: Any) -> Any:
        time.sleep(1.0)
        return write_shard(*args)

    monkeypatch.setattr(saver, "write_shard", write_slowly)
    result, _ = run(0, 1, folder, tiny.random_plan(1, 1), {"checkpoint": CheckpointConfig(every=11, asynchronous=True)})
    assert result["status"] == "done"
    events = [event["event"] for event in files(folder)[2]]
    assert events.index("checkpoint_saved") < events.index("finished")
    assert checkpoint.verify(Path(folder) / "run" / "checkpoints" / "step-00000011") is None


def test_a_run_that_resumes_at_its_end_leaves_the_checkpoint_of_it_alone(folder: str) -> None:
    plan, options = tiny.random_plan(1, 1), {"checkpoint": CheckpointConfig(at_end=True, keep=1)}
    run(0, 1, folder, plan, options)
    path = Path(folder) / "run" / "checkpoints" / "step-00000012"
    before = path.stat().st_ino
    again, _ = run(0, 1, folder, plan, {**options, "resume": True})
    assert (again["status"], again["reached_step"]) == ("done", 12)
    assert path.stat().st_ino == before


KILLED_WHILE_IT_REMOVES = """
import os, shutil, signal, sys, torch
from pathlib import Path
from crossdock.runtime.checkpoints.checkpoint import CheckpointConfig
from tests.runtime import tiny
from tests.runtime.checkpoints.test_saver import saver_of, state_of
folder, again = sys.argv[1:]
run = tiny.stepper(0, 1, folder, tiny.random_plan(1, 1), dtype=torch.float32)
one = saver_of(folder, "one", run, CheckpointConfig(keep=1))
one.save(state_of(1))
def some(path):
    next(Path(path).glob("shard-*")).unlink()
    os.kill(os.getpid(), signal.SIGKILL)
shutil.rmtree = some
one.save(state_of(int(again)))
"""


@pytest.mark.parametrize("again", [1, 2], ids=["that of the same step", "the oldest"])
def test_a_kill_while_an_old_one_is_removed_leaves_no_half_with_a_name(folder: str, again: int) -> None:
    command = [sys.executable, "-c", KILLED_WHILE_IT_REMOVES, folder, str(again)]
    process = subprocess.run(command, timeout=120, check=False, capture_output=True, text=True)
    assert process.returncode == -9, process.stderr
    root = Path(folder) / "one"
    assert {path.name: checkpoint.verify(path) for path in checkpoint.finished(root)} == ({"step-00000002": None} if again == 2 else {})
    run = tiny.stepper(0, 1, folder, tiny.random_plan(1, 1), dtype=torch.float32)
    saver_of(folder, "one", run, BEHIND).save(state_of(5))
    assert not list(root.glob(".*.old.tmp"))


# ---- shards ----------------------------------------------------------------------------------------------------


VALUES = {
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "transposed": torch.randn(3, 5).T,
    "int8": torch.arange(7, dtype=torch.int8),
    "bf16": torch.randn(3).bfloat16(),
    "bool": torch.tensor([True]),
}


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_what_is_written_is_read(tmp_path: Path, values: torch.Tensor) -> None:
    wide = torch.randn(3, dtype=torch.float64)
    shard, places = write_shard(tmp_path / "s.safetensors", [Entry.of("a", values), Entry.of("b", wide)])
    read = {key: Reader(tmp_path, places).read(key) for key in ("a", "b")}
    assert torch.equal(read["a"], values)
    assert read["a"].dtype == values.dtype
    assert torch.equal(read["b"], wide)
    assert (shard.bytes, shard.sha256) == ((tmp_path / "s.safetensors").stat().st_size, sha256_of(tmp_path / "s.safetensors"))


def test_a_damaged_newer_one_costs_no_whole_one_its_place(folder: str) -> None:
    run = tiny.stepper(0, 1, folder, tiny.random_plan(1, 1), dtype=torch.float32)
    one = saver_of(folder, "one", run, CheckpointConfig(keep=1))
    for step in (1, 9, 5):  # 9 is of a future that was abandoned
        one.save(state_of(step))
    assert [path.name for path in checkpoint.finished(Path(folder) / "one")] == ["step-00000009", "step-00000005"]
    assert Manifest.read(Path(folder) / "one" / "step-00000005").step == 5


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_copy_from_a_device_is_pinned_and_done(folder: str) -> None:
    run = tiny.stepper(0, 1, folder, tiny.random_plan(1, 1), dtype=torch.float32)
    behind = saver_of(folder, "behind", run, BEHIND)
    values = torch.randn(4_000_000, device="cuda")
    wanted = values.cpu()
    copied = behind._copied({"a": values})["a"]
    values.zero_()  # training goes on
    assert copied.is_pinned()
    assert torch.equal(copied, wanted)
    assert behind._copied({"a": values})["a"].data_ptr() == copied.data_ptr()
