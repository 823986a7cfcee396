"""Ranks on one host talk over loopback alone: no socket listens beyond it, and none is opened to anywhere else."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

RUN = ["train", "tiny", "train.steps=100000", "capture.steps=0"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "crossdock"]
ALONE = [sys.executable, "-m", "crossdock"]
HOOK = """
import json, os, sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        where = arguments[0] if event in ("socket.getaddrinfo", "socket.gethostbyname") else arguments[1]
        with open(os.environ["SOCKETS_SEEN"], "a") as file:
            file.write(json.dumps([event, str(where)]) + "\\n")
sys.addaudithook(watch)
"""


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address in ("::1", "::ffff:127.0.0.1")


@pytest.mark.parametrize("command", [ALONE, TORCHRUN], ids=["alone", "torchrun"])
def test_no_rank_listens_or_connects_beyond_loopback(command: list[str], tmp_path: Path) -> None:
    started = subprocess.Popen(
        [*command, *RUN, f"run.dir={tmp_path / 'run'}"], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        metrics, deadline_s = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size):
            assert started.poll() is None, started.communicate()
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
        everyone = psutil.Process(started.pid).children(recursive=True)
        ranks = [process for process in everyone if "crossdock" in " ".join(process.cmdline())]
        sockets = [entry for process in ranks for entry in process.net_connections("inet")]
        assert len(ranks) == (3 if command is ALONE else 2), "local ranks are forks of one more process"
        assert any(entry.status == psutil.CONN_LISTEN for entry in sockets)
        beyond = [entry for entry in sockets for end in (entry.laddr, entry.raddr) if end and not is_loopback(end.ip)]
        assert beyond == []
    finally:
        for process in [*psutil.Process(started.pid).children(recursive=True), started]:
            process.kill()
        started.communicate()


def test_nobody_is_told_about_a_run(tmp_path: Path) -> None:
    """No telemetry: Python looks up no host and opens no socket beyond loopback, in the launcher and in every rank."""
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    seen = tmp_path / "sockets.jsonl"
    command = [*ALONE, "train", "tiny", "train.steps=3", f"run.dir={tmp_path / 'run'}"]
    path = os.pathsep.join([str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]).rstrip(os.pathsep)
    ended = subprocess.run(command, env=environment(PYTHONPATH=path, SOCKETS_SEEN=str(seen)), capture_output=True, timeout=150, check=False)
    assert ended.returncode == 0, ended.stderr
    control = "import socket; socket.create_server(('127.0.0.1', 0))"
    subprocess.run([sys.executable, "-c", control], env=environment(PYTHONPATH=path, SOCKETS_SEEN=str(seen)), check=True)
    rows = [json.loads(line) for line in seen.read_text().splitlines()]
    assert ["socket.bind", "('127.0.0.1', 0)"] in rows, "the hook saw nothing at all"
    assert [row for row in rows if not any(name in row[1] for name in ("127.0.0.1", "localhost", "::1"))] == []
