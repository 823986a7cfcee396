"""Models whose hot experts' weights travel: n ranks equal one rank, and what a migration or a new choice of experts leaves standing."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from crossdock.models.config import ModelConfig
from crossdock.models.moe import MoELayer
from crossdock.runtime.transport.ledger import bytes_by_class
from tests.models.step import Case, check_equal, run_step
from tests.pool import Pool, mesh_for

BLOCKS: dict[str, dict[str, Any]] = {
    "top2": {"block": "top_k", "top_k": 2},
    "scmoe": {"block": "scmoe", "top_k": 1, "moe_every": 1},
    "switch": {"block": "shared_expert", "top_k": 1, "gate": {"kind": "switch", "jitter": 0.2}},
}


@pytest.mark.parametrize(
    ("block", "world", "plan"), [("top2", (4, 4), "copies"), ("scmoe", (4, 2), "uneven"), ("switch", (2, 2), "contiguous")]
)
def test_n_ranks_equal_one(ranks: Pool, block: str, world: tuple[int, int], plan: str) -> None:
    alone = run_step(0, 1, Case(BLOCKS[block], micro_batches=2))
    gathered = Case({**BLOCKS[block], "gathered_experts": [0, 3, 6]}, world[1], plan, micro_batches=2)
    check_equal(ranks.run(world[0], run_step, gathered), alone, world[1])
    check_equal([run_step(0, 1, replace(gathered, plan="contiguous"))], alone, 1)


def one_layer(rank: int, world_size: int) -> list[tuple[Tensor, int]]:
    """y and the bytes of weights that this rank sent, with nothing gathered, two experts, another one, and nothing again."""
    mesh = mesh_for(rank, world_size, world_size)
    layer = MoELayer(8, 12, 6, 2, mesh=mesh, dtype=torch.float64, initial_std=0.5).eval()
    x = torch.randn(2 * world_size, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).chunk(world_size)[rank]
    results = []
    for experts in ((), (0, 4), (3,), ()):
        layer.set_gathered(experts)
        mesh.ledger.take()
        y = layer(x).detach()
        results.append((y, sum(bytes_by_class(mesh.ledger.take(), "weights"))))
    return results


def test_the_choice_may_change_between_two_steps(ranks: Pool) -> None:
    expert_bytes = 3 * 8 * 12 * 8
    first, second = ranks.run(2, one_layer)
    assert [size for _, size in first] == [0, expert_bytes, 0, 0]
    assert [size for _, size in second] == [0, expert_bytes, expert_bytes, 0]
    for results in (first, second):
        for y, _ in results[1:]:
            torch.testing.assert_close(y, results[0][0], rtol=1e-12, atol=1e-12)


def test_the_configuration_names_experts_of_the_model() -> None:
    with pytest.raises(ValueError, match=r"gathered experts are \[2, 8\].* from 0 to 7"):
        ModelConfig(gathered_experts=[2, 8])
