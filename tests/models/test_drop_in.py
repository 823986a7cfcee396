"""The example of a foreign training loop: it learns, and two ranks see the losses of one."""

import runpy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from crossdock.models.gates.softmax_topk import SoftmaxTopKConfig
from crossdock.models.moe import MoELayer
from tests.pool import Pool, mesh_for

EXAMPLE = Path(__file__).parents[2] / "examples" / "drop_in.py"


def run_example(rank: int, world_size: int) -> list[float]:
    return runpy.run_path(str(EXAMPLE))["train"](rank, world_size)


def test_the_example_learns_alone_and_the_same_on_two_ranks(ranks: Pool) -> None:
    alone = run_example(0, 1)
    assert alone[-1] < 0.4 * alone[0]
    for together in ranks.run(2, run_example):
        assert together == pytest.approx(alone, rel=1e-4)


def train_in_ddp(rank: int, world_size: int) -> tuple[list[float], Tensor]:
    """Losses of this rank, and its experts after the last step; two micro-batches a step."""
    mesh = mesh_for(rank, world_size, world_size)
    torch.manual_seed(rank)  # the dense weights come from rank 0
    gate = SoftmaxTopKConfig()
    moe = MoELayer(8, 12, 4, 2, mesh=mesh, gate=gate, dtype=torch.float64, initial_std=0.5)
    model: nn.Module = nn.Sequential(nn.Linear(8, 8, bias=False, dtype=torch.float64), moe)
    if rank == 0:
        nn.init.eye_(model[0].weight)
    if world_size > 1:
        experts = [name for name, _ in model.named_parameters() if ".bank." in f".{name}"]
        assert len(experts) == 2
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, experts)
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(3):
        optimizer.zero_grad()
        for _ in range(2):
            x = torch.randn(4, 5, 8, dtype=torch.float64, generator=generator).chunk(world_size)[rank]
            loss = (model(x) - x.flip(-1)).square().mean()
            ((loss + sum(moe.losses.values())) / 2).backward()
            losses.append(loss.item())
        moe.finish_gradients()
        optimizer.step()
    return losses, moe.bank.inner.detach()


def test_inside_distributed_data_parallel_two_ranks_train_as_one(ranks: Pool) -> None:
    losses, experts = train_in_ddp(0, 1)
    (first, upper), (second, lower) = ranks.run(2, train_in_ddp)
    assert [(a + b) / 2 for a, b in zip(first, second, strict=True)] == pytest.approx(losses, rel=1e-9)
    torch.testing.assert_close(torch.cat([upper, lower]), experts)
