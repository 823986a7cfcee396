"""ZeRO by DeepSpeed: the same losses, norms and states as the native engine, on any world; checkpoints go from one to the other."""

from typing import Any

import numpy as np
import pytest
import torch

from crossdock.runtime.optimization.deepspeed_engine import DeepSpeedConfig, DeepSpeedEngine
from crossdock.runtime.optimization.engine import Engine
from crossdock.runtime.training.steps import Stepper, TrainConfig
from tests.pool import Pool, mesh_for
from tests.runtime import tiny

pytest.importorskip("deepspeed", reason="the extra crossdock[deepspeed] is not installed")

WORLDS = [(2, 1), (2, 2), (4, 2), (4, 4)]
FP32_TOLERANCE = 2e-5
"""Relative, of losses and norms of the first steps: DeepSpeed divides by the world before it sums, and updates flat parts."""


def stepper(
    rank: int, world_size: int, folder: str, expert_parallel: int, stage: int, config: TrainConfig, dtype: torch.dtype = torch.float32
) -> Stepper:
    """Steps of this rank; stage 0 is the native engine."""
    mesh = mesh_for(rank, world_size, expert_parallel)
    plan = tiny.random_plan(expert_parallel, seed=3)
    model = tiny.build(mesh, plan, dtype)
    engine: Any = Engine(model, mesh, plan, config.optimizer)
    if stage:
        engine.reducer.close()
        engine = DeepSpeedEngine(model, mesh, plan, config.optimizer, DeepSpeedConfig(stage=stage, bucket_elements=4096))
    return Stepper(model, engine, tiny.corpus(folder), tiny.SEQ_LEN, config, mesh)


def train_some(
    rank: int, world_size: int, folder: str, expert_parallel: int, stage: int, config: TrainConfig, dtype: torch.dtype = torch.float32
) -> tuple[list[Any], dict[str, np.ndarray]]:
    steps = stepper(rank, world_size, folder, expert_parallel, stage, config, dtype)
    return tiny.run_steps(steps, 0, 5), tiny.census(steps.engine)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("world_size", "expert_parallel"), WORLDS)
def test_it_trains_as_the_native_engine(ranks: Pool, folder: str, world_size: int, expert_parallel: int, stage: int) -> None:
    wanted = ranks.run(world_size, train_some, folder, expert_parallel, 0, tiny.TRAIN)
    found = ranks.run(world_size, train_some, folder, expert_parallel, stage, tiny.TRAIN)
    assert min(norm for _, norm in wanted[0][0]) > tiny.OPTIMIZER.clip_norm  # every step is clipped, so a wrong norm would show
    for (mine, _), (native, _) in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine, native, rtol=FP32_TOLERANCE)
    tiny.assert_close(tiny.merged([census for _, census in found]), tiny.merged([census for _, census in wanted]), 2e-4)
