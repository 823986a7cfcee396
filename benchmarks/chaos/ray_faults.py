"""Loss of whole nodes under `crossdock launch ray`: a Ray cluster of three nodes on this machine, of which a run needs two."""

import contextlib
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from benchmarks.chaos.runs import (
    EVERY,
    NUM_RANKS,
    STEPS,
    Aftermath,
    Row,
    Trial,
    Workshop,
    end_session,
    ended,
    judged,
    lines,
    wait_for_steps,
)
from crossdock.launch.ranks.faults import Fault

CLUSTER_NODES = 3
# without Ray's memory monitor, which would add losses of its own where other programs fill the machine
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "RAY_memory_monitor_refresh_ms": "0"}
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", **QUIET}
ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def cluster() -> Iterator[str]:
    """The address of a fresh cluster; its head holds no ranks. It ends with the block, whatever became of it."""
    command = [sys.executable, "-m", "tests.launch.ray_host", str(CLUSTER_NODES), "1"]
    environment = {**os.environ, **ENVIRONMENT}
    host = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert host.stdin is not None
    assert host.stdout is not None
    try:
        yield host.stdout.readline().strip()
        host.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            host.wait(timeout=60)
    finally:
        if host.poll() is None:
            _kill_tree(psutil.Process(host.pid))
        host.wait()


def node_losses(workshop: Workshop, trials: int, seed: int) -> list[Row]:
    """SIGKILL of all that runs on a node, by turns that of rank 0, with the ranks' store, and another; an idle node comes in its place."""
    draw, rows = random.Random(seed), []
    for number in range(trials):
        rank = (seed + number) % NUM_RANKS
        row = Row(
            f"SIGKILL of the node of {'rank 0, with the store' if rank == 0 else 'another rank'} (Ray)",
            "named in 2 s, goes on on another node in 15 s, bitwise",
            [],
            2.0,
            15.0,
        )
        row.trials.append(_trial(workshop, rank, draw.randint(EVERY + 1, STEPS - 1)))
        rows.append(row)
    return rows


def _trial(workshop: Workshop, rank: int, step: int) -> Trial:
    directory = workshop.directory()
    pause = workshop.script(directory, [Fault("sleep", 0, "backward", step, seconds=1.0)])
    with cluster() as address:
        launcher = (
            sys.executable,
            "-m",
            "crossdock",
            "launch",
            "ray",
            "--nodes",
            str(NUM_RANKS),
            "--ranks-per-node",
            "1",
            "--address",
            address,
        )
        arguments = workshop.arguments(directory, pause, "parallel.timeout_s=4.0")[1:]
        process = workshop.start_command([*launcher, *arguments], directory, ENVIRONMENT)
        try:
            wait_for_steps(directory, step - 1, [process])
            blow_s = time.monotonic()
            pids = [
                event["pid"] for event in lines(directory / "events.jsonl") if event["event"] == "rank_started" and event["rank"] == rank
            ]
            raylet = psutil.Process(pids[-1]).parent()
            assert raylet is not None
            assert raylet.name() == "raylet", f"rank {rank} is a child of {raylet.name()}"
            _kill_tree(raylet)
            code = ended(process)
        finally:
            end_session(process)
    after = Aftermath.of(directory, blow_s)
    return judged(workshop, directory, code == 0, re.search(rf"rank {rank}\b", after.blame) is not None, after)


def _kill_tree(root: psutil.Process) -> None:
    """SIGKILL, at once, for a process and all below it."""
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
