"""Dense parameters in parts: the same losses, norms and states as with whole ones, checkpoints keyed as ever, parts as small as said."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crossdock.placement.records.plan import Plan
from crossdock.runtime.adaptation.migrate import migrate
from crossdock.runtime.checkpoints import checkpoint
from crossdock.runtime.checkpoints.checkpoint import CheckpointConfig, RunState
from crossdock.runtime.checkpoints.saver import Saver
from crossdock.runtime.data import DataState
from crossdock.runtime.optimization.engine import Engine
from crossdock.runtime.optimization.fsdp import is_part, rows_before, shard_dense
from crossdock.runtime.training.steps import Stepper, TrainConfig
from tests.pool import Pool, mesh_for
from tests.runtime import tiny


def stepper(
    rank: int, world_size: int, folder: str, plan: Plan, in_parts: bool, dtype: torch.dtype, config: TrainConfig = tiny.TRAIN
) -> Stepper:
    mesh = mesh_for(rank, world_size, plan.num_devices)
    model = tiny.build(mesh, plan, dtype)
    if in_parts:
        shard_dense(model, model.blocks, {parameter for moe in model.moe_layers for parameter in moe.parameters()}, mesh)
    return Stepper(model, Engine(model, mesh, plan, config.optimizer), tiny.corpus(folder), tiny.SEQ_LEN, config, mesh)


def train_some(
    rank: int, world_size: int, folder: str, plan: Plan, in_parts: bool, dtype: torch.dtype, config: TrainConfig = tiny.TRAIN
) -> tuple[list[Any], float, dict[str, np.ndarray]]:
    """Losses and norms, the loss on held-out text between them, and all states."""
    steps = stepper(rank, world_size, folder, plan, in_parts, dtype, config)
    seen = tiny.run_steps(steps, 0, 3)
    held_out = steps.evaluate()
    return [*seen, *tiny.run_steps(steps, 3, 5)], held_out, tiny.census(steps.engine)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5), (torch.bfloat16, 2e-3)], ids=["fp64", "fp32", "bf16"]
)
@pytest.mark.parametrize(("world_size", "expert_parallel"), [(2, 2), (4, 2)])
def test_it_trains_as_with_whole_parameters(
    ranks: Pool, folder: str, world_size: int, expert_parallel: int, dtype: torch.dtype, tolerance: float
) -> None:
    plan = tiny.random_plan(expert_parallel, seed=3, extra_slots=2)
    wanted = ranks.run(world_size, train_some, folder, plan, False, dtype)
    found = ranks.run(world_size, train_some, folder, plan, True, dtype)
    assert min(norm for _, norm in wanted[0][0]) > tiny.OPTIMIZER.clip_norm
    for (mine, held_out, _), (whole, wanted_held_out, _) in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine, whole, rtol=tolerance)
        np.testing.assert_allclose(held_out, wanted_held_out, rtol=tolerance)
    if dtype == torch.float64:
        tiny.assert_close(tiny.merged([census for *_, census in found]), tiny.merged([census for *_, census in wanted]), 1e-9)


def test_micro_batches_add_up(ranks: Pool, folder: str) -> None:
    plan, config = tiny.random_plan(2, seed=3), tiny.TRAIN.model_copy(update={"accumulate": 2})
    wanted = ranks.run(2, train_some, folder, plan, False, torch.float64, config)
    found = ranks.run(2, train_some, folder, plan, True, torch.float64, config)
    np.testing.assert_allclose(found[0][0], wanted[0][0], rtol=1e-11)


def parts_of(rank: int, world_size: int, folder: str) -> list[tuple[str, int, int, int]]:
    """(name, rows here, rows in all, rows of the ranks before) of every parameter in parts; others are gates' and experts'."""
    steps = stepper(rank, world_size, folder, tiny.random_plan(2, seed=3), True, torch.float32)
    found = []
    for name, parameter in steps.model.named_parameters():
        assert is_part(parameter) != (".moe." in name), name
        if is_part(parameter):
            state = steps.engine.optimizer.state_of(name)  # type: ignore[attr-defined]
            assert {len(values) for values in state.values()} == {len(parameter.to_local())}
            found.append((name, len(parameter.to_local()), len(parameter), rows_before(len(parameter), rank, world_size)))
    return found


def test_every_rank_keeps_its_rows(ranks: Pool, folder: str) -> None:
    results = ranks.run(4, parts_of, folder)
    for of_ranks in zip(*results, strict=True):
        before = 0
        for _, here, _, said in of_ranks:
            assert said == before
            before += here
        assert before == of_ranks[0][2]
    kept = sum(here for _, here, _, _ in results[0])
    assert kept == pytest.approx(sum(total for _, _, total, _ in results[0]) / 4, rel=0.05)


# ---- checkpoints and migration -----------------------------------------------------------------------------------


def save_after(rank: int, world_size: int, folder: str, expert_parallel: int, in_parts: bool) -> list[Any]:
    steps = stepper(rank, world_size, folder, tiny.random_plan(expert_parallel, seed=3), in_parts, torch.float64)
    tiny.run_steps(steps, 0, 3)
    Saver(Path(folder) / "checkpoints", steps.engine, steps.mesh, CheckpointConfig()).save(RunState(3, DataState(), 0, "d"))
    return tiny.run_steps(steps, 3, 5)


def go_on(rank: int, world_size: int, folder: str, expert_parallel: int, in_parts: bool) -> list[Any]:
    steps = stepper(rank, world_size, folder, tiny.random_plan(expert_parallel, seed=4), in_parts, torch.float64)
    found, manifest, _ = checkpoint.latest(Path(folder) / "checkpoints", steps.mesh)
    checkpoint.restore(found, manifest, steps.engine)
    return tiny.run_steps(steps, 3, 5)


@pytest.mark.parametrize(
    ("saved", "resumed"), [((4, 2, True), (4, 2, True)), ((4, 2, True), (2, 1, False)), ((2, 2, False), (4, 2, True))], ids=str
)
def test_a_checkpoint_says_nothing_of_parts(ranks: Pool, folder: str, saved: tuple[int, int, bool], resumed: tuple[int, int, bool]) -> None:
    """Each is (world, expert-parallel ranks, in parts)."""
    losses = ranks.run(saved[0], save_after, folder, *saved[1:])[0]
    for mine in ranks.run(resumed[0], go_on, folder, *resumed[1:]):
        np.testing.assert_allclose(mine, losses, rtol=1e-10)


def train_and_migrate(rank: int, world_size: int, folder: str, after: Plan | None) -> list[Any]:
    steps = stepper(rank, world_size, folder, tiny.random_plan(2, seed=3), True, torch.float64)
    seen = tiny.run_steps(steps, 0, 2)
    if after is not None:
        migrate(steps.engine, steps.model.moe_layers, after, steps.mesh)  # type: ignore[arg-type]
    return [*seen, *tiny.run_steps(steps, 2, 4)]


def test_experts_still_move(ranks: Pool, folder: str) -> None:
    stayed = ranks.run(4, train_and_migrate, folder, None)
    moved = ranks.run(4, train_and_migrate, folder, tiny.random_plan(2, seed=9, extra_slots=2))
    np.testing.assert_allclose(moved[0], stayed[0], rtol=1e-10)
