"""torchrun on two emulated hosts that meet by c10d: a killed rank costs a restart of all, which resumes and ends as if nothing had been."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import netlab
from benchmarks.netlab import Lab
from benchmarks.netlab.lab import PORT
from crossdock.authentication import Secret
from tests.launch import starts

REASON = netlab.unavailable_reason()
pytestmark = [
    pytest.mark.netns,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(REASON is not None, reason=f"no emulated hosts: {REASON}"),
]
RUN = ("train", "configs/tiny.yaml", "parallel.expert=4", "train.steps=120", "capture.steps=0", "checkpoint.every=20")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def events(directory: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in lines(directory / "events.jsonl") if event["event"] == name]


def wait_for(condition: Callable[[], bool], agents: "list[subprocess.Popen[str]]") -> None:
    while not condition():
        assert all(agent.poll() is None for agent in agents), [agent.communicate() for agent in agents if agent.poll() is not None]
        time.sleep(0.02)


@pytest.mark.parametrize("lost", [1, 3])
def test_a_killed_rank_on_either_node_is_recovered_from(lost: int, tmp_path: Path) -> None:
    starts.alone([*RUN, f"run.dir={tmp_path / 'alone'}"])
    directory = tmp_path / "nodes"
    printed = starts.printed(
        ["launch", "torchrun", *RUN[1:], f"run.dir={directory}", "--nodes", "2", "--ranks-per-node", "2", "--head", "HEAD"]
    )
    with Lab(2, 1e9) as lab:
        command = printed.replace(f"HEAD:{29_400}", f"{lab.address(0)}:{PORT}").split()
        start = command.index("torchrun")
        assert command[:start] == ["env", f"CROSSDOCK_SECRET_FILE={directory}.secret", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"]
        Secret.fresh().write(Path(f"{directory}.secret"))
        assert "--max-restarts=3" in command
        agents = []
        for node in range(2):
            launcher = [*command[:start], sys.executable, "-m", "torch.distributed.run", "--local-addr", lab.address(node)]
            line = [*launcher, *command[start + 1 :]]
            place = {**starts.environment(), "TP_SOCKET_IFNAME": "eth0"}
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": starts.ROOT}
            agents.append(subprocess.Popen(lab.command(node, line), env=place, **pipes))  # type: ignore[call-overload]
        try:
            wait_for(lambda: bool(events(directory, "checkpoint_saved")), agents)
            os.kill(next(event["pid"] for event in events(directory, "rank_started") if event["rank"] == lost), signal.SIGKILL)
            said = [agent.communicate(timeout=300) for agent in agents]
        finally:
            for agent in agents:
                agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert len(events(directory, "rank_started")) == 8
    assert len(events(directory, "resumed")) == 1
    result = json.loads((directory / "result.json").read_text())
    assert (result["status"], result["reached_step"], result["world_size"]) == ("done", 120, 4)
    assert re.search(rf"rank\s*:\s*{lost} |local_rank: {lost % 2}", "".join(err for _, err in said))
    resumed, whole = lines(directory / "metrics.jsonl"), lines(tmp_path / "alone" / "metrics.jsonl")
    assert [(row["step"], row["loss"], row["grad_norm"]) for row in resumed] == [
        (row["step"], row["loss"], row["grad_norm"]) for row in whole
    ]
