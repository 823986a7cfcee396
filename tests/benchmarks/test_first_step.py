"""Time to the first step: the short form from a shell, and what its page says."""

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

from benchmarks import first_step
from benchmarks.first_step import KINDS, main
from crossdock.errors import PeerLost


def test_the_short_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A first step comes after an empty script: the kinds really are what they are called."""
    page = tmp_path / "x.md"
    assert main(["--short", "--json", "--launchers", "alone,torchrun", "--page", str(page)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["launcher"] for row in document["rows"]] == ["alone", "torchrun"]
    for row in document["rows"]:
        assert 0 < row["empty"] < row["first_step"]
        assert row["above_meeting"] == pytest.approx(row["first_step"] - row["meeting"])
    text = page.read_text()
    assert f"Load when it began: {document['load_at_start']:g}" in text
    assert text.count("| torchrun |") == 1


def test_a_start_that_fails_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["sh", "-c", "echo out of luck; exit 5"]
    with pytest.raises(PeerLost, match="ended with code 5: out of luck"):
        first_step.seconds(lambda kind, folder: command, "empty", {"PATH": "/usr/bin:/bin"})


def test_a_start_that_hangs_leaves_no_rank_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks lead sessions of their own, and neither they nor the command listen to SIGTERM."""
    monkeypatch.setattr(first_step, "GRACE_S", 0.2)
    pids = tmp_path / "pids"
    script = f"trap '' TERM; setsid sh -c 'trap \"\" TERM; echo $$ >> {pids}; sleep 60; true' & echo $$ >> {pids}; wait; sleep 60; true"
    with pytest.raises(PeerLost, match="did not end within 1 s"):
        first_step.seconds(lambda kind, folder: ["sh", "-c", script], "empty", {"PATH": "/usr/bin:/bin"}, timeout_s=1.0)
    left = [int(line) for line in pids.read_text().split()]
    assert len(left) == 2
    deadline_s = time.monotonic() + 20.0  # a process that has been killed is there for a moment more
    while (alive := [pid for pid in left if lives(pid)]) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert alive == []


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_driver_on_a_running_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    assert main(["--launchers", "launch ray", "--repeats", "1", "--warmup", "0", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert 0 < row["empty"] < row["first_step"]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    """In the middle of a start that has led away a session of its own."""
    script, told = tmp_path / "stopped.py", tmp_path / "told"
    script.write_text(STOPPED)
    environment = {**os.environ, "PYTHONPATH": str(first_step.ROOT)}
    process = subprocess.Popen([sys.executable, str(script), str(told)], env=environment)
    while not told.exists():
        assert process.poll() is None
        time.sleep(0.05)
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) == 2
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number
    _, alive = psutil.wait_procs(started, timeout=10)
    assert alive == []


STOPPED = """
import sys
from benchmarks import first_step

first_step.PLAIN["alone"] = lambda kind, folder: ["sh", "-c", f"setsid sleep 600 & sleep 0.2; echo > {sys.argv[1]}; wait"]
sys.exit(first_step.main(["--launchers", "alone"]))
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_signal_ends_the_ray_head() -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    command = [sys.executable, "-m", "benchmarks.first_step", "--launchers", "launch ray", "--repeats", "9"]
    process = subprocess.Popen(command, cwd=first_step.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def started() -> list[psutil.Process]:
        return psutil.Process(process.pid).children(recursive=True)

    while not any(child.name() == "raylet" for child in started()):
        assert process.poll() is None
        time.sleep(0.2)
    before = started()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 128 + signal.SIGTERM
    _, alive = psutil.wait_procs(before, timeout=30)
    assert alive == []


def test_rows_are_medians_over_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"empty": iter([1.0, 3.0, 2.0]), "meeting": iter([4.0, 5.0, 6.0]), "first_step": iter([9.0, 7.0, 8.0])}

    def seconds(start: Any, kind: str, environment: Any) -> float:
        return next(told[kind])

    monkeypatch.setattr(first_step, "seconds", seconds)
    (row,) = first_step.measure(["alone"], repeats=3, warmup=0)
    assert [row[kind] for kind in KINDS] == [2.0, 5.0, 8.0]
    assert (row["first_step_low"], row["first_step_high"], row["above_meeting"]) == (7.0, 9.0, 2.0)  # of 5, 2 and 2


def test_an_unknown_launcher_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--launchers", "carrier-pigeon"])
    assert "no launcher carrier-pigeon here; choose from alone, torchrun" in capsys.readouterr().err
