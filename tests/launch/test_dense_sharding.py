"""Dense parameters in parts, as a user asks for them: a run equal to one with whole ones, also over a checkpoint, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from crossdock.launch import cli
from crossdock.launch.config import read_config
from crossdock.launch.ranks.jobs import build_for_training
from crossdock.runtime.optimization.fsdp import is_part
from tests.pool import Pool, mesh_for

TRAIN = ["train", "tiny", "capture.steps=0", "train.steps=4", "checkpoint.every=2", "parallel.ranks=2"]


def losses(directory: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_run_in_parts_equals_a_whole_one_and_goes_on_whole(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli.run([*TRAIN, f"run.dir={whole}"]) == 0
    assert cli.run([*TRAIN, "parallel.dense_sharding=fsdp2", f"run.dir={parts}"]) == 0
    np.testing.assert_allclose(losses(parts), losses(whole), rtol=2e-5)
    (parts / "result.json").unlink()  # as if it had been killed after step 2, whose checkpoint is the last
    assert cli.run([*TRAIN, f"run.dir={parts}"]) == 0
    capfd.readouterr()
    np.testing.assert_allclose(losses(parts), losses(whole), rtol=2e-5)


def are_parts(rank: int, world_size: int, how: str) -> bool:
    config = read_config(Path("tiny"), [f"parallel.dense_sharding={how}"])
    return any(map(is_part, build_for_training(config, mesh_for(rank, world_size, 2), None).parameters()))


def test_the_key_decides(ranks: Pool) -> None:
    assert ranks.run(2, are_parts, "none") == [False, False]
    assert ranks.run(2, are_parts, "fsdp2") == [True, True]


@pytest.mark.parametrize(
    ("overrides", "pieces"),
    [
        (["engine=deepspeed"], ["engine deepspeed cannot divide what is divided already", "set none"]),
        (["model.traffic=coherent", "model.block=top_k", "model.top_k=1"], ["model.traffic coherent runs parts of several at once"]),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: list[str], pieces: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*TRAIN, "parallel.dense_sharding=fsdp2", *overrides]) == 78
    (line,) = capfd.readouterr().err.splitlines()
    for piece in pieces:
        assert piece in line
