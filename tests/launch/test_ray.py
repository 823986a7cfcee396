"""Real Ray clusters of two nodes on this machine: the run equals that of local ranks, and goes on when ranks and nodes are lost.

What does not fit the nodes that are there is refused before ranks meet, and a run's figures can be scraped from Ray while it goes.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from crossdock.launch import cli
from crossdock.launch.ranks.faults import Fault, Script
from crossdock.launch.ray.metrics import GAUGES

pytest.importorskip("ray", reason="ray is not installed")
pytestmark = pytest.mark.timeout(300)
HOST = Path(__file__).with_name("ray_host.py")
TWO_BY_TWO = Path("configs/topologies/2x2-local.yaml")
ENVIRONMENT = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
RUN = ["tiny", "parallel.expert=4", "train.batch_sequences=8", "checkpoint.every=2"]


@contextlib.contextmanager
def cluster(num_nodes: int, cores: int) -> Iterator[tuple[str, Callable[[str], str]]]:
    """The address of a fresh cluster, and a way to tell it something and to hear what it answers."""
    command = [sys.executable, str(HOST), str(num_nodes), str(cores)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def tell(line: str) -> str:
        stdin.write(line + "\n")
        stdin.flush()
        return stdout.readline()

    try:
        yield stdout.readline().strip(), tell
        stdin.close()
        process.wait(timeout=60)
    finally:
        for child in [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []:
            child.kill()


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[tuple[str, Callable[[str], str]]]:
    """A cluster that the tests of this module share: what one of them leaves there is in the way of the next."""
    with cluster(2, 2) as found:
        yield found


def start(address: str, directory: Path, *arguments: str, main: Sequence[str] = ("-m", "crossdock")) -> "subprocess.Popen[str]":
    command = [sys.executable, *main, "launch", "ray", *RUN, f"run.dir={directory}", "--address", address, *arguments]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def rows_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def losses(directory: Path) -> list[float]:
    return [row["loss"] for row in rows_of(directory)]


def ranks_of(directory: Path) -> list[int]:
    """Process ids of the ranks of the newest incarnation, by rank."""
    rows = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    return [row["pid"] for row in rows if row["event"] == "rank_started"][-4:]


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def events(directory: Path) -> list[str]:
    return [json.loads(line)["event"] for line in (directory / "events.jsonl").read_text().splitlines()]


def gauges(scraped: Sequence[str], run: str) -> dict[str, float]:
    """Our gauges of that run as the nodes' Prometheus endpoints show them."""
    found = {}
    for place in scraped:
        with urllib.request.urlopen(f"http://{place}/metrics", timeout=10) as answer:
            for line in answer.read().decode().splitlines():
                shown = re.fullmatch(r"(ray_crossdock_\w+)\{(.*)\} (\S+)", line)
                if shown is not None and f'run="{run}"' in shown[2]:
                    found[shown[1]] = float(shown[3])
    return found


def monitors() -> list[int]:
    """Process ids of the monitors of the clusters that this test process has started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::Monitor"):
                found.append(process.pid)
    return found


@pytest.mark.parametrize(
    ("arguments", "main", "code", "told"),
    [
        (("--nodes", "2", "--ranks-per-node", "3", "parallel.expert=1", "train.batch_sequences=6"), (), 69, "need 3 cores a node"),
        (("--nodes", "2", "--ranks-per-node", "2", "topology={one_node}"), (), 78, "ranks 0 and 2 run on different hosts, and topology"),
        (("--nodes", "2", "--ranks-per-node", "2"), (str(HOST.with_name("ray_astray.py")),), 69, "4 of 4 ranks run on other nodes"),
        (("model.top_k=99",), (), 78, "top_k"),
    ],
    ids=["more ranks than cores", "another topology", "ranks astray", "bad configuration"],
)
def test_what_does_not_fit_is_refused_before_ranks_meet(
    two_nodes: tuple[str, Callable[[str], str]], tmp_path: Path, arguments: tuple[str, ...], main: tuple[str, ...], code: int, told: str
) -> None:
    one_node = tmp_path / "1x4.yaml"
    one_node.write_text(TWO_BY_TWO.read_text().replace("nodes: 2", "nodes: 1", 1).replace("devices_per_node: 2", "devices_per_node: 4"))
    given = [argument.format(one_node=one_node) for argument in arguments]
    address, tell = two_nodes
    out, err = (process := start(address, tmp_path / "run", *given, main=main or ("-m", "crossdock"))).communicate()
    assert process.returncode == code, err
    assert told in err
    assert "Traceback" not in err
    assert out == ""
    if told != "top_k":  # no configuration, no run directory
        assert json.loads((tmp_path / "run" / "result.json").read_text())["exit_code"] == code
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert json.loads(tell("state"))["groups"] == 0


def test_a_run_can_be_scraped_outlives_its_monitor_and_saves_when_stopped(
    two_nodes: tuple[str, Callable[[str], str]], tmp_path: Path
) -> None:
    address, tell = two_nodes
    directory = tmp_path / "scraped"
    process = start(address, directory, "train.steps=100000", "--nodes", "2", "--ranks-per-node", "2")
    wait_for(lambda: (directory / "checkpoints" / "step-00000004" / "manifest.json").exists(), process)
    scraped = json.loads(tell("state"))["scraped"]
    wait_for(lambda: "ray_crossdock_step" in gauges(scraped, "scraped"), process)

    def shows_the_run() -> bool:
        """A scrape may fall between two gauges of one step; the next one then does not."""
        shown = gauges(scraped, "scraped")
        row = next(row for row in rows_of(directory) if row["step"] == round(shown["ray_crossdock_step"]))
        return shown == pytest.approx({f"ray_crossdock_{name}": row[name] for name in GAUGES.keys() & row.keys()}, rel=1e-4)

    wait_for(shows_the_run, process)

    refused = start(address, tmp_path / "second", "--nodes", "2", "--ranks-per-node", "2", "--wait-s", "1")
    _, err = refused.communicate()
    assert refused.returncode == 69
    assert "2 of 2 nodes are busy" in err

    (monitor,) = monitors()
    os.kill(monitor, signal.SIGKILL)
    wait_for(lambda: [pid for pid in monitors() if pid != monitor] != [], process)
    done = len(losses(directory))
    wait_for(lambda: len(losses(directory)) > done + 2, process)
    process.send_signal(signal.SIGTERM)  # the ranks hear of it through the monitor that is there now
    out, err = process.communicate()
    assert process.returncode == 75, err
    assert json.loads(out.splitlines()[-1])["status"] == "preempted"
    assert "restart" not in events(directory)
    assert json.loads(tell("state"))["groups"] == 0


def test_a_killed_rank_costs_one_incarnation_and_no_loss(
    two_nodes: tuple[str, Callable[[str], str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Script((Fault("kill", 2, "backward", 7),)).save(tmp_path / "faults.json")
    assert cli.run(["train", *RUN, "train.steps=12", f"run.dir={tmp_path / 'local'}"]) == 0
    capfd.readouterr()
    directory = tmp_path / "ray"
    address, tell = two_nodes
    inject = f"fault.inject={tmp_path / 'faults.json'}"
    out, err = (process := start(address, directory, "train.steps=12", inject, "--nodes", "2", "--ranks-per-node", "2")).communicate()
    assert process.returncode == 0, err
    result = json.loads(out.splitlines()[-1])
    assert (result["status"], result["reached_step"], result["world_size"]) == ("done", 12, 4)
    assert "rank 2 on " in err
    assert "was killed" in err
    assert [event for event in events(directory) if event in ("restart", "resumed")] == ["restart", "resumed"]
    assert losses(directory) == pytest.approx(losses(tmp_path / "local"), rel=1e-5)
    assert json.loads(tell("state"))["groups"] == 0


def test_a_cluster_that_is_not_there_is_named_at_once(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        _, err = (process := start(address, tmp_path / "run")).communicate(timeout=60)
    assert process.returncode == 69
    assert f"no Ray cluster answers at {address}" in err
    assert json.loads((tmp_path / "run" / "result.json").read_text())["exit_code"] == 69


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


@pytest.mark.slow
def test_a_node_that_is_lost_in_the_start_is_done_without(tmp_path: Path) -> None:
    """Ray may not know yet that it is gone: its actors fail, and the next start finds out."""
    held, directory = tmp_path / "held", tmp_path / "run"
    with cluster(2, 2) as (address, tell):
        shape = ("--nodes", "2", "--ranks-per-node", "2", "--min-nodes", "1", "--wait-s", "3")
        process = start(address, directory, "train.steps=4", *shape, main=(str(HOST.with_name("ray_waiting.py")), str(held)))
        wait_for(held.exists, process)
        assert tell("remove") == "removed\n"
        held.unlink()
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert "the ranks could not be started" in err or "was lost before its ranks could start" in err
        assert "going on with 1 of 2 nodes, 2 ranks" in err
        result = json.loads(out.splitlines()[-1])
        assert (result["status"], result["reached_step"], result["world_size"]) == ("done", 4, 2)
        assert json.loads(tell("state"))["groups"] == 0


@pytest.mark.slow
def test_a_run_whose_head_dies_ends_and_goes_on_under_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself ends the driver and the ranks when the head has been away for a while: nothing of ours can outlive that."""
    monkeypatch.setitem(ENVIRONMENT, "RAY_gcs_rpc_server_reconnect_timeout_s", "5")  # Ray's own is a minute
    directory = tmp_path / "run"
    run = ("train.steps=100000", "--nodes", "2", "--ranks-per-node", "2")
    with cluster(2, 2) as (address, _):
        process = start(address, directory, *run)
        wait_for(lambda: (directory / "checkpoints" / "step-00000004" / "manifest.json").exists(), process)
        ranks = [psutil.Process(pid) for pid in ranks_of(directory)]
        (head,) = [child for child in psutil.Process().children(recursive=True) if child.name() == "gcs_server"]
        head.kill()
        out, err = process.communicate()
        assert (process.returncode, out) == (1, "")
        assert "Failed to connect to GCS within 5 seconds" in err
        assert psutil.wait_procs(ranks, timeout=60)[1] == []
    with cluster(2, 2) as (address, _):
        process = start(address, directory, *run)
        wait_for(lambda: "resumed" in events(directory), process)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate()
        assert process.returncode == 75, err
        assert json.loads(out.splitlines()[-1])["status"] == "preempted"
    steps = [row["step"] for row in rows_of(directory)]
    assert steps == list(range(1, len(steps) + 1))
