"""`crossdock train` from a shell: alone and under torchrun, to its end, to Ctrl-C, to SIGTERM and on again, to a killed rank."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

TINY = [
    "tiny",
    "model.model_width=32",
    "model.num_heads=2",
    "model.expert_width=32",
    "data.kind=text",
    "data.seq_len=16",
    "train.batch_sequences=4",
    "train.eval_batches=1",
    "capture.steps=1",
]
ENDLESS = ["train.steps=1000000", "train.eval_batches=0"]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    return tmp_path / "run"


def command(run_dir: Path, *overrides: str) -> list[str]:
    return ["train", *TINY, f"data.path={run_dir.parent / 'text.txt'}", f"run.dir={run_dir}", *overrides]


def alone(run_dir: Path, *overrides: str) -> "subprocess.Popen[str]":
    arguments = [sys.executable, "-m", "crossdock", *command(run_dir, *overrides)]
    # as a shell does it: a session of its own, so that the test can end it as a whole
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def finished(process: "subprocess.Popen[str]") -> tuple[dict[str, Any], str]:
    out, err = process.communicate(timeout=120)
    return json.loads(out.splitlines()[-1]), err


def ranks_of(run_dir: Path, num_ranks: int = 2) -> list[psutil.Process]:
    """The ranks' processes, once all have begun and a step is done."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        events = read_lines(run_dir / "events.jsonl")
        started = [event["pid"] for event in events if event["event"] == "rank_started"]
        if len(started) >= num_ranks and read_lines(run_dir / "metrics.jsonl"):
            return [psutil.Process(pid) for pid in started[-num_ranks:]]
        time.sleep(0.05)
    raise AssertionError("the ranks did not begin")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_two_ranks_reach_the_target_and_leave_the_files(run_dir: Path) -> None:
    process = alone(
        run_dir,
        "train.steps=6",
        "topology=2x1-local",
        "replan.at_step=3",
        "replan.seconds=0.5",
        "replan.pays_back_within=0",
        "checkpoint.at_end=true",
    )
    result, err = finished(process)
    assert process.returncode == 0, err
    assert result == json.loads((run_dir / "result.json").read_text())
    assert (result["status"], result["exit_code"], result["reached_step"], result["target_step"], result["world_size"]) == (
        "done",
        0,
        6,
        6,
        2,
    )
    assert result["bytes"]["counted"] == result["bytes"]["predicted"]
    assert result["bytes"]["counted"]["other_node"] > 0
    assert result["bytes"]["counted"]["same_node"] == 0
    assert [row["step"] for row in read_lines(run_dir / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    files = {path.name for path in run_dir.iterdir()}
    assert files >= {
        "config.resolved.yaml",
        "env.json",
        "plan.json",
        "metrics.jsonl",
        "events.jsonl",
        "result.json",
        "trace.npz",
        "report.html",
    }
    assert "step 6/6" in err
    environment = json.loads((run_dir / "env.json").read_text())
    assert (environment["launcher"], environment["node_of_rank"]) == ("local", [0, 1])


def test_the_demo_in_small(tmp_path: Path) -> None:
    small = [
        "train.steps=8",
        "replan={at_step: 4, seconds: 0.5, capture_steps: 3, pays_back_within: 0}",
        "data.seq_len=32",
        "model.model_width=64",
    ]
    arguments = [sys.executable, "-m", "crossdock", "demo", *small, "--out", str(tmp_path / "demo")]
    for _ in range(2):  # the second replaces the first
        ended = subprocess.run(arguments, capture_output=True, text=True, env=environment(), timeout=150, check=False)
        assert ended.returncode == 0, ended.stderr
        assert "counted bytes equal the replayed ones to the byte" in ended.stdout
        assert "What was predicted, and what came true" in ended.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    result = json.loads((tmp_path / "demo" / "result.json").read_text())
    assert result["moves"] is not None
    assert result["before"]["bytes"]["counted"] == result["before"]["bytes"]["predicted"]
    assert result["plan"]["method"] == "auto"


def test_the_demo_replaces_nothing_but_runs(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    ended = subprocess.run([sys.executable, "-m", "crossdock", "demo", "--out", str(tmp_path)], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "holds no run of Crossdock" in ended.stderr
    assert (tmp_path / "mine").read_text() == "precious"


def test_an_earlier_finished_run_is_moved_aside(run_dir: Path) -> None:
    for _ in range(2):
        process = alone(run_dir, "train.steps=2", "parallel.expert=1")
        result, err = finished(process)
        assert process.returncode == 0, err
        assert result["world_size"] == 1
    assert json.loads(run_dir.with_name("run.1").joinpath("result.json").read_text())["status"] == "done"
    assert len(read_lines(run_dir / "metrics.jsonl")) == 2


def test_ctrl_c_ends_all_ranks(run_dir: Path) -> None:
    process = alone(run_dir, *ENDLESS)
    ranks = ranks_of(run_dir)
    process.send_signal(signal.SIGINT)
    result, err = finished(process)
    assert process.returncode == 130
    assert (result["status"], result["exit_code"]) == ("interrupted", 130)
    assert "Traceback" not in err
    assert not psutil.wait_procs(ranks, timeout=10)[1]


def test_sigterm_saves_the_state_and_the_same_command_goes_on(run_dir: Path) -> None:
    process = alone(run_dir, *ENDLESS)
    ranks_of(run_dir)
    process.send_signal(signal.SIGTERM)
    result, err = finished(process)
    assert process.returncode == 75, err
    assert (result["status"], result["exit_code"]) == ("preempted", 75)
    assert "the state is saved" in result["message"]
    steps = result["reached_step"]
    assert steps == len(read_lines(run_dir / "metrics.jsonl"))

    process = alone(run_dir, *ENDLESS, f"train.steps={steps + 2}")
    result, err = finished(process)
    assert process.returncode == 0, err
    assert result["reached_step"] == steps + 2
    assert f"resumed after step {steps}" in err
    assert [row["step"] for row in read_lines(run_dir / "metrics.jsonl")] == list(range(1, steps + 3))


@pytest.mark.parametrize(
    ("launcher", "overrides"),
    [
        ([], ["parallel.expert=1"]),
        (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], ["parallel.dense_sharding=fsdp2"]),
    ],
    ids=["one rank", "torchrun, while rank 0 imports and rank 1 waits"],
)
def test_sigterm_before_the_first_step_ends_a_run_in_order(launcher: list[str], overrides: list[str], run_dir: Path) -> None:
    arguments = [sys.executable, *launcher, "-m", "crossdock", *command(run_dir, *ENDLESS, *overrides)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    while not (run_dir / "env.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    result = json.loads((run_dir / "result.json").read_text())
    assert (result["status"], result["exit_code"]) == ("preempted", 75), err
    assert "asked to stop" in result["message"]


def test_a_killed_rank_is_named_and_ends_the_others(run_dir: Path) -> None:
    process = alone(run_dir, *ENDLESS)
    ranks = ranks_of(run_dir)
    ranks[1].kill()
    result, err = finished(process)
    assert process.returncode == 76
    assert "rank 1 was killed by SIGKILL" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert json.loads((run_dir / "result.json").read_text()) == result
    assert (result["exit_code"], result["rank"]) == (76, 1)
    assert not psutil.wait_procs(ranks, timeout=10)[1]


def test_torchrun_on_one_node(run_dir: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "crossdock"]
    ended = subprocess.run(
        [*torchrun, *command(run_dir, "train.steps=3")], capture_output=True, text=True, env=environment(), timeout=150, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1])["reached_step"] == 3
    assert json.loads((run_dir / "env.json").read_text())["launcher"] == "torchrun"


def test_a_restart_under_torchrun_resumes(run_dir: Path) -> None:
    """torchrun's own store keeps the dead ranks' addresses, on which plain restarts of gloo fail (pytorch/pytorch#135712)."""
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "1",
        "-m",
        "crossdock",
    ]
    arguments = [*torchrun, *command(run_dir, "train.steps=300", "checkpoint.every=100")]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    ranks = ranks_of(run_dir)
    deadline = time.monotonic() + 60
    while not any(event["event"] == "checkpoint_saved" for event in read_lines(run_dir / "events.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    ranks[1].kill()
    result, err = finished(process)
    assert process.returncode == 0, err
    assert (result["status"], result["reached_step"]) == ("done", 300)
    assert any(event["event"] == "resumed" for event in read_lines(run_dir / "events.jsonl"))
    assert [row["step"] for row in read_lines(run_dir / "metrics.jsonl")] == list(range(1, 301))


def test_a_failure_under_torchrun_stands_in_the_result(run_dir: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "crossdock"]
    arguments = [*torchrun, *command(run_dir, "train.steps=3", "train.batch_sequences=3")]
    ended = subprocess.run(arguments, capture_output=True, text=True, env=environment(), timeout=150, check=False)
    assert ended.returncode == 1  # torchrun flattens exit codes
    result = json.loads((run_dir / "result.json").read_text())
    assert (result["status"], result["exit_code"]) == ("failed", 78)
    assert "3 sequences" in result["message"]
    assert (result["reached_step"], result["target_step"], result["loss"]) == (0, 3, None)
    assert "crossdock: error: rank 0: 3 sequences" in ended.stderr
