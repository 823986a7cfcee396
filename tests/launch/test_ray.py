"""Real Ray clusters of two nodes on this machine: the run equals that of local ranks, and goes on when ranks and nodes are lost."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from crossdock.launch import cli

pytest.importorskip("ray", reason="ray is not installed")
pytestmark = pytest.mark.timeout(300)
HOST = Path(__file__).with_name("ray_host.py")
ENVIRONMENT = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
RUN = ["tiny", "parallel.expert=4", "train.batch_sequences=8", "checkpoint.every=2"]


@contextlib.contextmanager
def cluster(num_nodes: int, cores: int) -> Iterator[tuple[str, Callable[[str], None]]]:
    """The address of a fresh cluster, and a way to tell it something."""
    command = [sys.executable, str(HOST), str(num_nodes), str(cores)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def tell(line: str) -> None:
        stdin.write(line + "\n")
        stdin.flush()
        stdout.readline()

    try:
        yield stdout.readline().strip(), tell
        stdin.close()
        process.wait(timeout=60)
    finally:
        for child in [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []:
            child.kill()


def start(address: str, directory: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "crossdock", "launch", "ray", *RUN, f"run.dir={directory}", "--address", address, *arguments]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def losses(directory: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def ranks_of(directory: Path) -> list[int]:
    """Process ids of the ranks of the newest incarnation, by rank."""
    rows = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    return [row["pid"] for row in rows if row["event"] == "rank_started"][-4:]


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def test_a_killed_rank_costs_one_incarnation_and_no_loss(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", *RUN, "train.steps=60", f"run.dir={tmp_path / 'local'}"]) == 0
    capfd.readouterr()
    directory = tmp_path / "ray"
    with cluster(2, 2) as (address, _):
        process = start(address, directory, "train.steps=60", "--nodes", "2", "--ranks-per-node", "2")
        wait_for(lambda: (directory / "checkpoints" / "step-00000004" / "manifest.json").exists(), process)
        os.kill(ranks_of(directory)[2], signal.SIGKILL)
        out, err = process.communicate()
        assert process.returncode == 0, err
        result = json.loads(out.splitlines()[-1])
        assert (result["status"], result["reached_step"], result["world_size"]) == ("done", 60, 4)
        assert "rank 2 on " in err
        assert "was killed" in err
        assert losses(directory) == pytest.approx(losses(tmp_path / "local"), rel=1e-5)

        refused = start(address, tmp_path / "large", "--nodes", "2", "--ranks-per-node", "2", "--cores-per-rank", "2")
        out, err = refused.communicate()
        assert refused.returncode == 69
        assert "need 4 cores a node" in err
        assert json.loads((tmp_path / "large" / "result.json").read_text())["exit_code"] == 69


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_a_lost_node_is_done_without(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with cluster(2, 2) as (address, tell):
        shape = ("--nodes", "2", "--ranks-per-node", "2", "--min-nodes", "1", "--wait-s", "3", "--silence-s", "6")
        process = start(address, directory, "train.steps=4000", *shape)
        wait_for(lambda: (directory / "checkpoints" / "step-00000004" / "manifest.json").exists(), process)
        os.kill(ranks_of(directory)[1], signal.SIGSTOP)
        started = len((directory / "events.jsonl").read_text().splitlines())
        wait_for(lambda: '"resumed"' in "".join((directory / "events.jsonl").read_text().splitlines()[started:]), process)
        tell("remove")
        wait_for(lambda: json.loads((directory / "env.json").read_text())["world_size"] == 2, process)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate()
        assert process.returncode == 75, err
        assert json.loads(out.splitlines()[-1])["status"] == "preempted"
        assert "rank 1 on " in err
        assert "has not been heard of for 6 s" in err
        assert "going on with 1 of 2 nodes, 2 ranks" in err
