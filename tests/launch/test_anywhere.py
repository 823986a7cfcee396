"""One run under every launcher, transport and engine: equal loss curves, bit for bit where the arithmetic is the same."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks import netlab
from benchmarks.ray_head import ray_head
from tests.launch import starts

REASON = netlab.unavailable_reason()
RUN = ("train", "configs/tiny.yaml", "capture.steps=0", "train.eval_batches=1")
DEEPSPEED_TOLERANCE = 1e-4
"""Relative, of the losses of 50 steps: it divides by the world before it sums, and each step starts from the last one's rounding."""

needs_mpirun = pytest.mark.skipif(not starts.MPIRUN.exists(), reason="no mpirun beside this Python: install the package mpich")


def curve(directory: Path) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss"], row["grad_norm"]) for row in rows]


def env_of(directory: Path, name: str) -> object:
    return json.loads((directory / "env.json").read_text())[name]


def check(folder: Path, runs: dict[str, Callable[[list[str]], None]], steps: int, ranks: int) -> dict[str, list[tuple[float, float]]]:
    """Start every run; all reach their target, and the curve of each."""
    for name, start in runs.items():
        start([*RUN, f"parallel.expert={ranks}", f"train.steps={steps}", f"run.dir={folder / name}"])
        result = json.loads((folder / name / "result.json").read_text())
        assert (result["status"], result["reached_step"], result["world_size"]) == ("done", steps, ranks), name
    return {name: curve(folder / name) for name in runs}


@needs_mpirun
def test_ten_steps_on_this_host(tmp_path: Path) -> None:
    curves = check(
        tmp_path,
        {
            "alone": starts.alone,
            "torchrun": lambda run: starts.torchrun(run, 2),
            "mpirun": lambda run: starts.mpirun([*run, "parallel.transport=mpi"], 2),
        },
        steps=10,
        ranks=2,
    )
    assert curves["torchrun"] == curves["alone"]
    assert curves["mpirun"] == curves["alone"]
    assert [env_of(tmp_path / name, "launcher") for name in curves] == ["local", "torchrun", "mpi"]
    assert [env_of(tmp_path / name, "transport") for name in curves] == ["torch", "torch", "mpi"]


@needs_mpirun
@pytest.mark.slow
@pytest.mark.netns
@pytest.mark.timeout(1200)
@pytest.mark.skipif(REASON is not None, reason=f"no emulated hosts: {REASON}")
def test_fifty_steps_anywhere(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    pytest.importorskip("deepspeed", reason="the extra crossdock[deepspeed] is not installed")

    def ray_job(run: list[str]) -> None:
        with ray_head(4, with_token=False) as head:
            ended = head.submit(starts.ROOT, "crossdock", *run)
            assert ended.returncode == 0, ended.stdout + ended.stderr

    curves = check(
        tmp_path,
        {
            "alone": starts.alone,
            "two nodes": lambda run: starts.torchrun_on_two_nodes(run, 4),
            "ray job": ray_job,
            "mpirun": lambda run: starts.mpirun(run, 4),
            "mpirun, over MPI": lambda run: starts.mpirun([*run, "parallel.transport=mpi"], 4),
            "mpirun, measured": lambda run: starts.mpirun([*run, "parallel.transport=auto"], 4),
            "deepspeed's launcher": lambda run: starts.deepspeed_on_two_nodes(run, 4, tmp_path / "hosts"),
            "deepspeed's launcher and engine": lambda run: starts.deepspeed_on_two_nodes([*run, "engine=deepspeed"], 4, tmp_path / "hosts"),
        },
        steps=50,
        ranks=4,
    )
    ours = curves.pop("alone")
    assert len(set(ours)) == 50, "a run that learns nothing would be equal to any other"
    np.testing.assert_allclose(curves.pop("deepspeed's launcher and engine"), ours, rtol=DEEPSPEED_TOLERANCE)
    for name, found in curves.items():
        assert found == ours, name
    for name in ("two nodes", "deepspeed's launcher", "deepspeed's launcher and engine"):
        assert env_of(tmp_path / name, "node_of_rank") == [0, 0, 1, 1], name
    launchers = {name: env_of(tmp_path / name, "launcher") for name in curves}
    assert launchers == {
        "two nodes": "torchrun",
        "ray job": "ray",
        "mpirun": "mpi",
        "mpirun, over MPI": "mpi",
        "mpirun, measured": "mpi",
        "deepspeed's launcher": "deepspeed",
    }
    assert env_of(tmp_path / "deepspeed's launcher and engine", "launcher") == "deepspeed"
    events = [json.loads(line) for line in (tmp_path / "mpirun, measured" / "events.jsonl").read_text().splitlines()]
    (chosen,) = [event for event in events if event["event"] == "transport_chosen"]
    assert set(chosen["measured"]) == {"torch", "mpi"}
    assert chosen["transport"] == env_of(tmp_path / "mpirun, measured", "transport")
