"""The example of a foreign training loop: it learns, and two ranks see the losses of one."""

import runpy
from pathlib import Path

import pytest
import torch

from crossdock.errors import BadConfig
from crossdock.models.moe import MoELayer
from crossdock.placement.plan import Plan
from tests.pool import Pool

EXAMPLE = Path(__file__).parents[2] / "examples" / "drop_in.py"


def run_example(rank: int, world_size: int) -> list[float]:
    return runpy.run_path(str(EXAMPLE))["train"](rank, world_size)


def test_the_example_learns_alone_and_the_same_on_two_ranks(ranks: Pool) -> None:
    alone = run_example(0, 1)
    assert alone[-1] < 0.4 * alone[0]
    for together in ranks.run(2, run_example):
        assert together == pytest.approx(alone, rel=1e-4)


def test_a_layer_counts_its_steps_in_training_only() -> None:
    torch.manual_seed(0)
    layer, x = MoELayer(8, 8, 4, 2), torch.randn(2, 5, 8)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)  # other noise in another step
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert set(layer.losses) == {"importance", "load", "z"}


def test_an_unknown_dispatcher_and_copies_without_an_engine_are_refused() -> None:
    with pytest.raises(BadConfig, match=r"flatt.*choose from flat, deduplicated"):
        MoELayer(8, 8, 4, 2, dispatch="flatt")
    copied = Plan(slots_LRS=torch.tensor([[[0, 1], [1, 0]]]).int().numpy(), num_experts=2)
    layer = MoELayer(8, 8, 2, 1)
    layer.plan_has_copies = copied.has_replicas
    with pytest.raises(BadConfig, match="copies"):
        layer.finish_gradients()
