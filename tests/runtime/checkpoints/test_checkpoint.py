"""Checkpoints: bitwise across worlds and plans, every kind of damage noticed, the newest whole one used."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crossdock.errors import BadCheckpoint, IoFailure, MissingInput
from crossdock.models.gates.deepseek_v3 import DeepSeekV3Config
from crossdock.placement.records.plan import Plan
from crossdock.runtime.checkpoints import checkpoint, saver
from crossdock.runtime.checkpoints.checkpoint import CheckpointConfig, RunState
from crossdock.runtime.checkpoints.saver import Saved, Saver
from crossdock.runtime.checkpoints.shards import write_shard
from crossdock.runtime.data import DataState
from crossdock.runtime.training.steps import Stepper
from tests.pool import Pool
from tests.runtime import tiny

Census = dict[str, np.ndarray]
STATE = RunState(step=3, data=DataState(0, 24), seed=0, corpus_digest="d")
BIASED = tiny.MODEL.model_copy(update={"gate": DeepSeekV3Config(), "tied_head": True})
"""A model with buffers that are part of the state."""


def save_after(rank: int, world_size: int, folder: str, plan: Plan, dtype: str = "float64", steps: int = 3) -> Census:
    run = tiny.stepper(rank, world_size, folder, plan, model=BIASED, dtype=getattr(torch, dtype))
    tiny.run_steps(run, 0, steps)
    state = RunState(steps, DataState(0, 8 * steps), STATE.seed, STATE.corpus_digest)
    save(folder, run, state, keep=3)
    return tiny.census(run.engine)


def save(folder: str, run: Stepper, state: RunState, **options: Any) -> Saved:
    saved = Saver(Path(folder) / "checkpoints", run.engine, run.mesh, CheckpointConfig(**options)).save(state)
    assert saved is not None
    return saved


def load_into(
    rank: int, world_size: int, folder: str, plan: Plan, dtype: str = "float64", more_steps: int = 0
) -> tuple[Any, Census, list[Any]]:
    run = tiny.stepper(rank, world_size, folder, plan, model=BIASED, dtype=getattr(torch, dtype))
    tiny.run_steps(run, 0, 1)  # so that nothing is right by chance
    found, manifest, passed_over = checkpoint.latest(Path(folder) / "checkpoints", run.mesh)
    loaded = checkpoint.restore(found, manifest, run.engine, passed_over)
    census = tiny.census(run.engine)
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, run.engine.states()[name]["weight"].to(parameter.dtype)), name
    assert run.engine.optimizer.num_updates == loaded.state.step
    seen = tiny.run_steps(run, loaded.state.step, loaded.state.step + more_steps)
    return (loaded.state, loaded.plan and loaded.plan.digest, loaded.folder.name, passed_over), census, seen


@pytest.mark.parametrize(
    ("saved_by", "read_by"),
    [((2, 2, 0), (2, 2, 0)), ((2, 2, 3), (1, 1, 0)), ((1, 1, 0), (4, 2, 2)), ((4, 4, 3), (2, 1, 0)), ((4, 2, 0), (4, 4, 0))],
)
def test_any_world_and_plan_reads_what_any_other_wrote(
    ranks: Pool, folder: str, saved_by: tuple[int, int, int], read_by: tuple[int, int, int]
) -> None:
    (world, devices, extra), (other_world, other_devices, other_extra) = saved_by, read_by
    plan, other_plan = tiny.random_plan(devices, 1, extra), tiny.random_plan(other_devices, 2, other_extra)
    wanted = tiny.merged(ranks.run(world, save_after, folder, plan))
    assert any(key.startswith("buffer/") and np.any(values) for key, values in wanted.items())
    results = ranks.run(other_world, load_into, folder, other_plan)
    tiny.assert_close(tiny.merged([census for _, census, _ in results]), wanted, 0.0)
    state, digest, name, passed_over = results[0][0]
    assert (state, digest, name, passed_over) == (STATE, plan.digest, "step-00000003", ())


def test_bf16_runs_keep_their_masters(ranks: Pool, folder: str) -> None:
    plan = tiny.random_plan(2, 1)
    wanted = tiny.merged(ranks.run(2, save_after, folder, plan, "bfloat16"))
    results = ranks.run(1, load_into, folder, tiny.random_plan(1, 2), "bfloat16")
    tiny.assert_close(results[0][1], wanted, 0.0)
    assert {str(values.dtype) for key, values in wanted.items() if not key.startswith("buffer/")} == {"float32"}


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_same_world_and_plan_continues_bitwise(ranks: Pool, folder: str, world_size: int) -> None:
    plan = tiny.random_plan(2, 1)
    ranks.run(world_size, save_after, folder, plan, "float32")
    resumed = ranks.run(world_size, load_into, folder, plan, "float32", 3)
    straight = ranks.run(world_size, run_through, folder, plan)
    assert resumed[0][2] == straight[0]


def run_through(rank: int, world_size: int, folder: str, plan: Plan) -> list[Any]:
    run = tiny.stepper(rank, world_size, folder, plan, model=BIASED, dtype=torch.float32)
    return tiny.run_steps(run, 0, 6)[3:]


# ---- damage --------------------------------------------------------------------------------------------------


@pytest.fixture
def two_checkpoints(ranks: Pool, folder: str) -> tuple[str, Path, Path]:
    """(folder, older, newer), written by two ranks."""
    plan = tiny.random_plan(2, 1)
    for steps in (2, 3):
        ranks.run(2, save_after, folder, plan, "float32", steps)
    root = Path(folder) / "checkpoints"
    return folder, root / "step-00000002", root / "step-00000003"


def flip_a_bit(path: Path, at: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 0x10
    path.write_bytes(content)


def drop_a_key(path: Path) -> None:
    manifest = json.loads(path.read_text())
    del manifest["shards"]
    path.write_text(json.dumps(manifest))


DAMAGE = {
    "a bit in a shard's tensors": (
        lambda folder: flip_a_bit(folder / "shard-00001.safetensors", 0.9),
        "shard-00001.safetensors does not match",
    ),
    "a bit in a shard's header": (
        lambda folder: flip_a_bit(folder / "shard-00000.safetensors", 0.001),
        "shard-00000.safetensors does not match",
    ),
    "a bit in the manifest": (lambda folder: flip_a_bit(folder / "manifest.json", 0.5), "manifest.json"),
    "a shard cut short": (lambda folder: (folder / "shard-00000.safetensors").write_bytes(b"123"), "has 3 bytes where"),
    "a shard that is gone": (lambda folder: (folder / "shard-00001.safetensors").unlink(), "No such file"),
    "a manifest that is gone": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json does not exist; give"),
    "a manifest cut short": (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json: not JSON"),
    "a manifest that is a list": (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json is malformed"),
    "a manifest without shards": (lambda folder: drop_a_key(folder / "manifest.json"), "manifest.json does not match"),
    "a shard of another checkpoint": (
        lambda folder: shutil.copy(folder.with_name("step-00000002") / "shard-00000.safetensors", folder),
        "shard-00000.safetensors does not match",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_noticed_and_the_one_before_is_used(ranks: Pool, two_checkpoints: tuple[str, Path, Path], damage: str) -> None:
    folder, _older, newer = two_checkpoints
    spoil, message = DAMAGE[damage]
    spoil(newer)
    for (state, _, name, passed_over), _, _ in ranks.run(2, load_into, folder, tiny.random_plan(2, 1), "float32"):
        assert (state.step, name) == (2, "step-00000002")
        assert len(passed_over) == 1
        assert message in passed_over[0]


def fail_to_load(rank: int, world_size: int, folder: str, model: Any, error: type[Exception]) -> str:
    run = tiny.stepper(rank, world_size, folder, tiny.random_plan(2, 1), model=model, dtype=torch.float32)
    with pytest.raises(error) as caught:
        checkpoint.restore(*checkpoint.latest(Path(folder) / "checkpoints", run.mesh)[:2], run.engine)
    return str(caught.value)


def test_none_valid_none_there_and_one_of_another_model(ranks: Pool, two_checkpoints: tuple[str, Path, Path]) -> None:
    folder, older, newer = two_checkpoints
    other = BIASED.model_copy(update={"expert_width": 24})
    for message in ranks.run(2, fail_to_load, folder, other, BadCheckpoint):
        assert "the model has" in message
    deeper = BIASED.model_copy(update={"tied_head": False})
    for message in ranks.run(2, fail_to_load, folder, deeper, BadCheckpoint):
        assert "has no dense/head.weight/weight" in message
    for path in (older, newer):
        flip_a_bit(path / "shard-00000.safetensors", 0.5)
    assert checkpoint.verify(newer) == "shard-00000.safetensors does not match its checksum"
    for message in ranks.run(2, fail_to_load, folder, BIASED, BadCheckpoint):
        assert "none of 2 checkpoints is valid" in message
    shutil.rmtree(Path(folder) / "checkpoints")
    for message in ranks.run(2, fail_to_load, folder, BIASED, MissingInput):
        assert "holds no checkpoint" in message


def fail_to_load_without(rank: int, world_size: int, folder: str, key: str) -> str:
    run = tiny.stepper(rank, world_size, folder, tiny.random_plan(2, 1), model=BIASED, dtype=torch.float32)
    found, manifest, _ = checkpoint.latest(Path(folder) / "checkpoints", run.mesh)
    tensors = {name: place for name, place in manifest.tensors.items() if name != key}
    with pytest.raises(BadCheckpoint) as caught:
        checkpoint.restore(found, manifest.model_copy(update={"tensors": tensors}), run.engine)
    return str(caught.value)


def test_an_expert_that_one_rank_misses_fails_them_all(ranks: Pool, two_checkpoints: tuple[str, Path, Path]) -> None:
    for expert in range(tiny.NUM_EXPERTS):
        key = f"expert/0/{expert}/inner/weight"
        for message in ranks.run(2, fail_to_load_without, two_checkpoints[0], key):
            assert f"has no {key}: it is of another model" in message


def test_only_the_newest_are_kept_and_leftovers_do_not_count(ranks: Pool, folder: str) -> None:
    root = Path(folder) / "checkpoints"
    for name in (".step-00000009.tmp", "step-x", "notes"):
        (root / name).mkdir(parents=True)
    for steps in (1, 2, 3, 4):
        save_after(0, 1, folder, tiny.random_plan(1, 1), "float32", steps)
    assert [path.name for path in checkpoint.finished(root)] == ["step-00000004", "step-00000003", "step-00000002"]
    assert checkpoint.verify(root / "step-00000004") is None


def fail_to_save(rank: int, world_size: int, folder: str, where: str) -> str:
    run = tiny.stepper(rank, world_size, folder, tiny.random_plan(2, 1), dtype=torch.float32)
    if where == "one rank's shard" and rank == 1:
        saver.write_shard = _no_space  # type: ignore[assignment]
    try:
        with pytest.raises(IoFailure) as caught:
            save(folder, run, STATE)
    finally:
        saver.write_shard = write_shard
    return str(caught.value)


def _no_space(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_rank_that_cannot_write_fails_all_and_harms_nothing(ranks: Pool, two_checkpoints: tuple[str, Path, Path]) -> None:
    folder, _, newer = two_checkpoints
    for message in ranks.run(2, fail_to_save, folder, "one rank's shard"):
        assert "older ones are untouched (rank 1: [Errno 28] No space left on device)" in message
    assert checkpoint.verify(newer) is None
    shutil.rmtree(Path(folder) / "checkpoints")
    (Path(folder) / "checkpoints").write_text("a file in the way")
    for message in ranks.run(2, fail_to_save, folder, "the directory"):
        assert "rank 0" in message
