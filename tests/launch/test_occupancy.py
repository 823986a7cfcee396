"""Two runs in one directory: the second is refused before it touches anything; the lock goes with its holder, however that ends."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from crossdock import occupancy
from crossdock.errors import Occupied
from crossdock.launch import cli
from crossdock.launch.config import read_config
from crossdock.launch.request import record_failure_of_ranks
from crossdock.occupancy import occupied

HOLD = """
import sys, time
from pathlib import Path
from crossdock.occupancy import occupied
with occupied(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(occupancy, "PATIENCE_S", 0.1)
    monkeypatch.setattr(occupancy, "ELSEWHERE_S", 0.1)


def holder(folder: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_directory_in_use_is_refused_by_the_name_of_its_user_until_that_ends(tmp_path: Path) -> None:
    process = holder(tmp_path)
    with pytest.raises(Occupied, match=rf"is in use by process {process.pid} on .*; wait for its end") as caught, occupied(tmp_path):
        pass
    assert caught.value.exit_code == 69
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with occupied(tmp_path):
        pass


def test_a_start_waits_for_the_end_of_the_one_before_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    process = holder(tmp_path)

    def sleep(_seconds: float) -> None:
        process.kill()
        process.communicate()

    monkeypatch.setattr(occupancy, "PATIENCE_S", 600.0)
    monkeypatch.setattr(occupancy, "_TELL_S", -1.0)
    monkeypatch.setattr(occupancy, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
    with occupied(tmp_path):
        pass
    assert f"is in use by process {process.pid} on " in capsys.readouterr().err


def test_the_lock_of_another_host_which_may_have_died_is_no_hindrance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with occupied(tmp_path):
        (tmp_path / occupancy.LOCK).write_text("process 7 on elsewhere")
        with occupied(tmp_path):
            pass
    assert "locked by process 7 on elsewhere, which is taken for lost" in capsys.readouterr().err


def test_who_waited_while_the_run_was_moved_aside_takes_the_lock_of_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, waits, may_look, is_in = tmp_path / "run", threading.Event(), threading.Event(), threading.Event()

    def sleep(_seconds: float) -> None:
        waits.set()
        may_look.wait()

    def enter() -> None:
        with occupied(folder):
            is_in.set()

    monkeypatch.setattr(occupancy, "PATIENCE_S", 600.0)
    monkeypatch.setattr(occupancy, "ELSEWHERE_S", 600.0)
    monkeypatch.setattr(occupancy, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
    waiting = threading.Thread(target=enter)
    with contextlib.ExitStack() as next_run:
        with occupied(folder):
            waiting.start()
            waits.wait()
            folder.rename(tmp_path / "run.1")
            next_run.enter_context(occupied(folder))
        may_look.set()
        assert not is_in.wait(0.3)
    waiting.join(60)
    assert is_in.is_set()


def test_a_launcher_leaves_the_result_of_another_run_alone(tmp_path: Path) -> None:
    config = read_config(Path("configs/tiny.yaml"), [f"run.dir={tmp_path}"])
    process = holder(tmp_path)
    assert record_failure_of_ranks(config, 69, "is in use", 0, 2).exit_code == 69
    assert not (tmp_path / "result.json").exists()
    process.kill()
    process.communicate()
    record_failure_of_ranks(config, 69, "no GPU", 0, 2)
    assert json.loads((tmp_path / "result.json").read_text())["message"] == "no GPU"


def test_a_file_system_without_locks_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(occupancy.fcntl, "flock", none)
    with occupied(tmp_path), occupied(tmp_path):
        pass


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_run_in_the_directory_of_a_living_one_touches_nothing(
    ranks: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "crossdock", "train", "tiny", f"parallel.expert={ranks}", f"run.dir={folder}", "capture.steps=0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen([*command, "train.steps=100000"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        metrics = folder / "metrics.jsonl"
        while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
            assert first.poll() is None, first.communicate()
            time.sleep(0.05)
        seen = metrics.read_text()
        assert cli.run(["train", "tiny", f"parallel.expert={ranks}", "train.optimizer.lr=0.5", f"run.dir={folder}", "train.steps=5"]) == 69
        assert "is in use by process" in capfd.readouterr().err
        assert metrics.read_text().startswith(seen)
        assert not (folder / "result.json").exists()
        assert "lr: 0.5" not in (folder / "config.resolved.yaml").read_text()
        first.send_signal(signal.SIGTERM)
        first.communicate(timeout=100)
    finally:
        first.kill()
        first.communicate()
    assert first.returncode == 75
    assert json.loads((folder / "result.json").read_text())["status"] == "preempted"
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
