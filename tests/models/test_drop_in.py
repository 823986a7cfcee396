"""The example of a foreign training loop: it learns, and two ranks see the losses of one."""

import runpy
from pathlib import Path

import pytest

from tests.pool import Pool

EXAMPLE = Path(__file__).parents[2] / "examples" / "drop_in.py"


def run_example(rank: int, world_size: int) -> list[float]:
    return runpy.run_path(str(EXAMPLE))["train"](rank, world_size)


def test_the_example_learns_alone_and_the_same_on_two_ranks(ranks: Pool) -> None:
    alone = run_example(0, 1)
    assert alone[-1] < 0.4 * alone[0]
    for together in ranks.run(2, run_example):
        assert together == pytest.approx(alone, rel=1e-4)
