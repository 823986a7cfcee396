"""The optimizer step: n ranks equal one rank over many clipped steps, whatever the plan; and what must never happen does not."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from crossdock.errors import NonFiniteLoss
from crossdock.models.gates.noisy_topk import NoisyTopKConfig
from crossdock.placement.records.plan import Plan
from crossdock.runtime.data import DataState
from crossdock.runtime.optimization.engine import Engine
from crossdock.runtime.optimization.optimizer import MasterAdamW, OptimizerConfig, learning_rate
from crossdock.runtime.optimization.reduction import GradientReducer, Summed
from crossdock.runtime.training.steps import TrainConfig
from crossdock.runtime.transport.mesh import Mesh
from tests.pool import Pool, mesh_for
from tests.runtime import tiny


def train_some(
    rank: int, world_size: int, folder: str, plan: Plan, config: TrainConfig = tiny.TRAIN
) -> tuple[list[Any], dict[str, np.ndarray]]:
    steps = tiny.stepper(rank, world_size, folder, plan, config)
    return tiny.run_steps(steps, 0, 5), tiny.census(steps.engine)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("one")
    (folder / "text").write_bytes(tiny.text())
    return train_some(0, 1, str(folder), tiny.random_plan(1, seed=0))


@pytest.mark.parametrize(
    ("world_size", "expert_parallel", "extra_slots"),
    [(1, 1, 1), (2, 1, 0), (2, 2, 0), (2, 2, 3), (4, 1, 0), (4, 2, 0), (4, 4, 0), (4, 2, 2), (4, 4, 3)],
)
def test_any_world_and_plan_trains_as_one_rank(
    ranks: Pool, folder: str, one_rank: tuple[list[Any], dict[str, np.ndarray]], world_size: int, expert_parallel: int, extra_slots: int
) -> None:
    plan = tiny.random_plan(expert_parallel, seed=world_size + extra_slots, extra_slots=extra_slots)
    assert plan.has_replicas == (extra_slots > 1)
    results = ranks.run(world_size, train_some, folder, plan)
    wanted_steps, wanted = one_rank
    assert min(norm for _, norm in wanted_steps) > tiny.OPTIMIZER.clip_norm  # every step is clipped
    for seen, _ in results:
        np.testing.assert_allclose(seen, wanted_steps, rtol=1e-10)
    tiny.assert_close(tiny.merged([census for _, census in results]), wanted, 1e-9)


def test_micro_batches_add_up_to_the_batch(ranks: Pool, folder: str) -> None:
    gate = NoisyTopKConfig(
        z_loss=0.0, importance_loss=0.0, load_loss=0.0
    )  # balance is of each micro-batch; without it they must add up exactly
    model = tiny.MODEL.model_copy(update={"gate": gate})
    results = {}
    for accumulate in (1, 2, 4):
        config = tiny.TRAIN.model_copy(update={"accumulate": accumulate})
        results[accumulate] = ranks.run(2, train_quiet, folder, model, config)
    for accumulate in (2, 4):
        for one, many in zip(results[1], results[accumulate], strict=True):
            tiny.assert_close(many, one, 1e-11)


def train_quiet(rank: int, world_size: int, folder: str, model: Any, config: TrainConfig) -> dict[str, np.ndarray]:
    steps = tiny.stepper(rank, world_size, folder, tiny.random_plan(2, seed=1), config, model=model)
    tiny.run_steps(steps, 0, 3)
    return tiny.census(steps.engine)


# ---- failures ------------------------------------------------------------------------------------------------


def poisoned(rank: int, world_size: int, folder: str) -> tuple[str, bool]:
    steps = tiny.stepper(rank, world_size, folder, tiny.random_plan(2, seed=1))
    before = tiny.census(steps.engine)
    bank = next(iter(steps.engine.banks.values()))
    bank.inner.register_hook(lambda gradient: gradient * (float("nan") if rank == 1 else 1.0))
    with pytest.raises(NonFiniteLoss) as caught:
        steps.run(0, DataState(), (), stop_asked=False)
    after = tiny.census(steps.engine)
    moments_untouched = all(np.array_equal(before[key], after[key]) for key in before)
    return str(caught.value), moments_untouched


def test_a_gradient_that_is_not_finite_on_one_rank_stops_all_before_the_update(ranks: Pool, folder: str) -> None:
    for message, untouched in ranks.run(2, poisoned, folder):
        assert "step 1: loss or gradient is not finite on rank 1 of 2" in message
        assert untouched


# ---- the update ----------------------------------------------------------------------------------------------


def test_the_update_is_torchs_adamw() -> None:
    config = OptimizerConfig(lr=1e-2, weight_decay=0.1)
    ours, theirs = (nn.Linear(5, 3, dtype=torch.float64) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimizer = MasterAdamW(config)
    gradients = {name: torch.zeros_like(parameter) for name, parameter in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        optimizer.add(name, parameter, gradients[name], decays=parameter.ndim == 2)
    groups = [{"params": [theirs.weight], "weight_decay": 0.1}, {"params": [theirs.bias], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(config.beta1, config.beta2), eps=config.epsilon)
    for step in range(4):
        for name, parameter in theirs.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            gradients[name].copy_(parameter.grad)
        for group in reference.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        reference.step()
        optimizer.update(1e-2 / (step + 1))
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_matrices_decay_and_nothing_else(folder: str) -> None:
    engine = tiny.stepper(0, 1, folder, tiny.random_plan(1, seed=0)).engine
    decays = {name: engine.optimizer._entry_of[name].decays for name, _ in engine.model.named_parameters()}
    assert all(decays[name] for names in engine.expert_names.values() for name in names)
    assert {name for name, decaying in decays.items() if not decaying} == {
        name for name, parameter in engine.model.named_parameters() if parameter.ndim < 2
    }
    assert not all(decays.values())


def test_bf16_parameters_follow_fp32_masters() -> None:
    model = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    engine = Engine(model, Mesh.single(), None, OptimizerConfig(lr=1e-5, weight_decay=0.0, warmup_steps=0))
    start = model.weight.detach().clone()
    for step in range(300):  # each update is far below bf16's resolution; only the master can add them up
        engine.backward(model(torch.ones(1, 4, dtype=torch.bfloat16)).float().sum(), last=True)
        engine.reduce()
        engine.step(step, 1e-5, {"loss": 0.0})
    master = engine.states()["weight"]["weight"]
    assert master.dtype == torch.float32
    torch.testing.assert_close(master, start.float() - 300e-5, rtol=0, atol=1e-5)
    assert torch.equal(model.weight, master.to(torch.bfloat16))
    assert not torch.equal(model.weight, start)


def test_bf16_gradients_add_up_in_fp32() -> None:
    weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    reducer = GradientReducer([Summed(weight, None, weight.numel())])
    for _ in range(1000):
        (weight * 1.0).sum().backward()  # bf16 would stop counting at 256
    assert reducer.gradient_of[weight].item() == 1000.0


def test_warm_up_and_cosine() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=4, final_lr_share=0.2)
    rates = [learning_rate(config, step, 14) for step in range(15)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[9] == pytest.approx(0.6)
    assert rates[14] == pytest.approx(0.2)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[4:]))


# ---- reduction while backward runs ---------------------------------------------------------------------------


def reduce_in_buckets(rank: int, world_size: int, bucket_bytes: int) -> list[np.ndarray]:
    mesh = mesh_for(rank, world_size, 1)
    torch.manual_seed(0)
    network = nn.Sequential(*(nn.Linear(8, 8, dtype=torch.float64) for _ in range(6)))
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    reducer = GradientReducer(
        [Summed(parameter, mesh.dense_group, parameter.numel()) for parameter in [*network.parameters(), unused]], bucket_bytes
    )
    x = torch.full((2, 8), 1.0 + rank, dtype=torch.float64, requires_grad=True)
    reducer.arm()
    network(x).sum().backward()
    reducer.finish()
    return [reducer.gradient_of[parameter].numpy().copy() for parameter in [*network.parameters(), unused]]


def test_sums_do_not_depend_on_buckets_and_an_unused_parameter_holds_nobody_up(ranks: Pool) -> None:
    one_bucket = ranks.run(2, reduce_in_buckets, 1 << 20)
    many_buckets = ranks.run(2, reduce_in_buckets, 600)
    for whole, parts in zip(one_bucket, many_buckets, strict=True):
        for wanted, found in zip(whole, parts, strict=True):
            np.testing.assert_array_equal(found, wanted)
        assert np.all(parts[-1] == 0.0)


def test_every_bucket_leaves_before_backward_ends(ranks: Pool) -> None:
    for under_way, total in ranks.run(2, launches_without_unused):
        assert total > 3
        assert under_way == total


def launches_without_unused(rank: int, world_size: int) -> tuple[int, int]:
    mesh = mesh_for(rank, world_size, 1)
    network = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
    reducer = GradientReducer([Summed(parameter, mesh.dense_group, parameter.numel()) for parameter in network.parameters()], 300)
    reducer.arm()
    network(torch.ones(1, 8)).sum().backward()
    under_way = sum(bucket.work is not None for bucket in reducer.buckets)
    reducer.finish()
    return under_way, len(reducer.buckets)
