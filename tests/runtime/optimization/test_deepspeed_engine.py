"""ZeRO by DeepSpeed: the same losses, norms and states as the native engine, on any world; checkpoints go from one to the other."""

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from crossdock.errors import BadConfig, NonFiniteLoss, Unavailable
from crossdock.placement.records.plan import Plan
from crossdock.runtime.checkpoints import checkpoint
from crossdock.runtime.checkpoints.checkpoint import CheckpointConfig, RunState, pieces
from crossdock.runtime.checkpoints.saver import Saver
from crossdock.runtime.data import DataState
from crossdock.runtime.optimization.deepspeed_engine import DeepSpeedConfig, DeepSpeedEngine
from crossdock.runtime.optimization.engine import Engine
from crossdock.runtime.training.steps import Stepper, TrainConfig
from tests.pool import Pool, mesh_for
from tests.runtime import tiny

pytest.importorskip("deepspeed", reason="the extra crossdock[deepspeed] is not installed")

BF16_TOLERANCE = 2e-3
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


@pytest.mark.parametrize("stage", [1, 2])
def test_micro_batches_add_up(ranks: Pool, folder: str, stage: int) -> None:
    config = tiny.TRAIN.model_copy(update={"accumulate": 2})
    wanted = ranks.run(2, train_some, folder, 1, 0, config)
    found = ranks.run(2, train_some, folder, 1, stage, config)
    np.testing.assert_allclose(found[0][0], wanted[0][0], rtol=FP32_TOLERANCE)


def train_lopsided(rank: int, world_size: int, folder: str, expert_parallel: int, stage: int) -> tuple[list[Any], dict[str, np.ndarray]]:
    with mock.patch.object(tiny, "random_plan", lambda num_devices, seed: tiny.lopsided_plan(num_devices)):
        return train_some(rank, world_size, folder, expert_parallel, stage, tiny.TRAIN)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("world_size", "expert_parallel"), [(4, 2), (4, 4)])
def test_ranks_with_different_numbers_of_experts(ranks: Pool, folder: str, world_size: int, expert_parallel: int, stage: int) -> None:
    wanted, found = (ranks.run(world_size, train_lopsided, folder, expert_parallel, kind) for kind in (0, stage))
    np.testing.assert_allclose(found[0][0], wanted[0][0], rtol=FP32_TOLERANCE)
    tiny.assert_close(tiny.merged([census for _, census in found]), tiny.merged([census for _, census in wanted]), 2e-4)


def train_in_bf16(rank: int, world_size: int, folder: str, stage: int) -> tuple[list[Any], set[torch.dtype], set[torch.dtype], bool]:
    """(losses and norms, formats of gates, of all else, whether every parameter is its master in its format)."""
    steps = stepper(rank, world_size, folder, 2, stage, tiny.TRAIN, torch.bfloat16)
    seen = tiny.run_steps(steps, 0, 5)
    gates = {parameter for moe in steps.model.moe_layers for parameter in moe.gate.parameters()}
    rest = set(steps.model.parameters()) - gates
    named = [(piece, key) for key, piece in pieces(steps.engine)]
    masters = steps.engine.collect([piece for piece, _ in named])
    parameters = dict(steps.model.named_parameters())
    follows = all(
        torch.equal(parameters[name] if slot is None else parameters[name][slot], state["weight"].to(parameters[name].dtype))
        for (name, slot), state in masters.items()
    )
    return seen, {gate.dtype for gate in gates}, {parameter.dtype for parameter in rest}, follows


@pytest.mark.parametrize("stage", [1, 2])
def test_bf16_follows_fp32_masters_and_leaves_gates_wide(ranks: Pool, folder: str, stage: int) -> None:
    wanted = ranks.run(4, train_in_bf16, folder, 0)
    for (mine, gates, rest, follows), (native, *_) in zip(ranks.run(4, train_in_bf16, folder, stage), wanted, strict=True):
        np.testing.assert_allclose(mine, native, rtol=BF16_TOLERANCE)
        assert gates == {torch.float32}
        assert rest == {torch.bfloat16}
        assert follows


# ---- checkpoints -------------------------------------------------------------------------------------------------


def save_after(rank: int, world_size: int, folder: str, expert_parallel: int, stage: int, asynchronous: bool) -> list[Any]:
    """Three steps, a checkpoint, three more: the losses of the latter."""
    steps = stepper(rank, world_size, folder, expert_parallel, stage, tiny.TRAIN)
    tiny.run_steps(steps, 0, 3)
    saver = Saver(Path(folder) / "checkpoints", steps.engine, steps.mesh, CheckpointConfig(asynchronous=asynchronous))
    saver.save(RunState(3, DataState(), 0, "d"))
    saver.finish()
    return tiny.run_steps(steps, 3, 6)


def go_on(rank: int, world_size: int, folder: str, expert_parallel: int, stage: int) -> tuple[list[Any], int]:
    steps = stepper(rank, world_size, folder, expert_parallel, stage, tiny.TRAIN)
    found, manifest, _ = checkpoint.latest(Path(folder) / "checkpoints", steps.mesh)
    checkpoint.restore(found, manifest, steps.engine)
    return tiny.run_steps(steps, 3, 6), steps.engine.num_updates


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [((2, 1, 1), (2, 1, 0)), ((2, 1, 0), (2, 1, 2)), ((4, 2, 2), (2, 2, 1)), ((2, 2, 1), (4, 2, 2)), ((4, 2, 1), (4, 2, 1))],
    ids=lambda run: "x".join(map(str, run)),
)
def test_a_checkpoint_goes_on_under_any_engine_and_world(
    ranks: Pool, folder: str, saved: tuple[int, int, int], resumed: tuple[int, int, int]
) -> None:
    """Each is (world, expert-parallel ranks, stage), stage 0 the native engine."""
    losses = ranks.run(saved[0], save_after, folder, *saved[1:], saved[2] == 2)[0]
    for mine, updates in ranks.run(resumed[0], go_on, folder, *resumed[1:]):
        assert updates == 6
        if saved == resumed:
            assert mine == losses
        np.testing.assert_allclose(mine, losses, rtol=FP32_TOLERANCE)


# ---- failures ----------------------------------------------------------------------------------------------------


def poisoned(rank: int, world_size: int, folder: str, stage: int) -> tuple[str, bool]:
    steps = stepper(rank, world_size, folder, 2, stage, tiny.TRAIN)
    before = tiny.census(steps.engine)
    bank = next(iter(steps.engine.banks.values()))
    bank.inner.register_hook(lambda gradient: gradient * (float("nan") if rank == 1 else 1.0))
    with pytest.raises(NonFiniteLoss) as caught:
        steps.run(0, DataState(), (), stop_asked=False)
    after = tiny.census(steps.engine)
    return str(caught.value), all(np.array_equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_gradient_that_is_not_finite_stops_all_before_the_update(ranks: Pool, folder: str, stage: int) -> None:
    for message, untouched in ranks.run(2, poisoned, folder, stage):
        assert "step 1: loss or gradient is not finite on rank 1 of 2" in message
        assert untouched


def refusals(rank: int, world_size: int) -> list[str]:
    mesh = mesh_for(rank, world_size, 2)
    said = []
    idle = Plan(np.array([[range(8), [-1] * 8]] * 2), 8)
    for plan, dtype in (
        (tiny.random_plan(2, 0, extra_slots=2), torch.float32),
        (tiny.random_plan(2, 0), torch.float64),
        (idle, torch.float32),
    ):
        with pytest.raises(BadConfig) as caught:
            DeepSpeedEngine(tiny.build(mesh, plan, dtype), mesh, plan, tiny.OPTIMIZER, DeepSpeedConfig())
        said.append(str(caught.value))
    return said


def test_copies_float64_and_ranks_without_experts_are_refused(ranks: Pool) -> None:
    for copies, wide, without in ranks.run(2, refusals):
        assert "copies of an expert" in copies
        assert "float64" in wide
        assert "gives expert rank 1 none in any of 2 layers" in without


def without_the_package(rank: int, world_size: int) -> str:
    mesh, plan = mesh_for(rank, world_size, 2), tiny.random_plan(2, 0)
    model = tiny.build(mesh, plan, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "deepspeed", None)
        with pytest.raises(Unavailable) as caught:
            DeepSpeedEngine(model, mesh, plan, tiny.OPTIMIZER, DeepSpeedConfig())
    return str(caught.value)


def test_without_the_package_it_says_what_to_install(ranks: Pool) -> None:
    for message in ranks.run(2, without_the_package):
        assert "pip install 'crossdock[deepspeed]'" in message


# ---- what it is for ----------------------------------------------------------------------------------------------


def state_elements(rank: int, world_size: int, expert_parallel: int, stage: int) -> tuple[int, int, int]:
    """(elements of optimizer state on this rank, of dense parameters, of experts')."""
    mesh, plan = mesh_for(rank, world_size, expert_parallel), tiny.random_plan(expert_parallel, seed=3)
    model = tiny.build(mesh, plan, torch.float32)
    experts = {id(parameter) for moe in model.moe_layers for parameter in moe.bank.parameters()}
    engine = DeepSpeedEngine(model, mesh, plan, tiny.OPTIMIZER, DeepSpeedConfig(stage=stage))
    kept = sum(values.numel() for zero, _ in engine._zeros for state in zero.optimizer.state.values() for values in state.values())
    sizes = [(parameter.numel(), id(parameter) in experts) for parameter in model.parameters()]
    return kept, sum(size for size, expert in sizes if not expert), sum(size for size, expert in sizes if expert)


def test_every_rank_keeps_its_share_of_the_state(ranks: Pool) -> None:
    for kept, dense, experts in ranks.run(4, state_elements, 2, 1):
        assert kept == pytest.approx(2 * (dense / 4 + experts / 2), rel=0.01)  # two moments; the ranks that hold the same experts are 2
