"""Local ranks: their outcome is the root cause, and no process outlives the call, whatever ends it."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from crossdock.launch.local import children as local
from crossdock.launch.local.children import Outcome, root_cause, run_ranks


def play(folder: Path, *acts: str) -> Outcome:
    return run_ranks(["-m", "tests.launch.scripted_rank", str(folder), ",".join(acts)], len(acts))


def pids(folder: Path) -> list[int]:
    return [int(path.read_text().split()[0]) for path in sorted(folder.glob("rank-*"))]


def when(condition: Callable[[], bool], act: Callable[[], None]) -> threading.Thread:
    def watch() -> None:
        while not condition():
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("acts", "exit_code", "message"),
    [
        (("ok", "ok", "ok"), 0, ""),
        (("ok", "79"), 79, "rank 1 reports 79"),
        (("76", "-9", "76"), 76, "rank 1 was killed by SIGKILL"),
        (("wait", "79"), 79, "rank 1 reports 79"),
        (("hang", "-11"), 76, "rank 1 was killed by SIGSEGV"),
        (("76", "78"), 78, "rank 1 reports 78"),
        (("74!", "74!"), 74, "rank 0 reports 74"),
        (("ok", "ok!"), 0, ""),
    ],
)
def test_the_outcome_is_the_root_cause_and_nobody_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, acts: tuple[str, ...], exit_code: int, message: str
) -> None:
    monkeypatch.setattr(local, "_PEERS_S", 1.5)
    monkeypatch.setattr(local, "_LEAVE_S", 0.5)
    outcome = play(tmp_path, *acts)
    assert outcome.exit_code == exit_code
    assert outcome.message.startswith(message)
    assert len(pids(tmp_path)) == len(acts)
    assert not any(psutil.pid_exists(pid) for pid in pids(tmp_path))


@pytest.mark.parametrize(
    ("sent", "acts", "exit_code"),
    [
        (signal.SIGINT, ("wait", "wait"), 130),
        (signal.SIGINT, ("wait", "hang"), 130),
        (signal.SIGTERM, ("save", "save"), 75),
        (signal.SIGTERM, ("wait", "wait"), 75),
        (signal.SIGTERM, ("wait", "save"), 75),
    ],
)
def test_a_signal_ends_the_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: signal.Signals, acts: tuple[str, ...], exit_code: int
) -> None:
    monkeypatch.setattr(local, "_INTERRUPT_S", 0.5)
    when(lambda: len(list(tmp_path.glob("rank-*"))) == len(acts), lambda: os.kill(os.getpid(), sent))
    before = signal.getsignal(sent)
    assert play(tmp_path, *acts).exit_code == exit_code
    assert signal.getsignal(sent) is before
    assert not any(psutil.pid_exists(pid) for pid in pids(tmp_path))


def test_the_ranks_die_with_their_parent(tmp_path: Path) -> None:
    ranks = ["-m", "tests.launch.scripted_rank", str(tmp_path), "hang,wait"]
    program = f"from crossdock.launch.local.children import run_ranks; run_ranks({ranks!r}, 2)"
    parent = subprocess.Popen([sys.executable, "-c", program])
    while len(list(tmp_path.glob("rank-*"))) < 2 or not all(path.read_text() for path in tmp_path.glob("rank-*")):
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids(tmp_path) if psutil.pid_exists(pid)], timeout=20)
    assert not alive


def test_each_rank_gets_its_share_of_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(local, "available_cores", lambda: 6)
    play(tmp_path, "ok", "ok")
    assert [path.read_text().split()[1] for path in sorted(tmp_path.glob("rank-*"))] == ["3", "3"]


def test_the_root_cause_prefers_the_killed_then_the_knowing_then_the_first() -> None:
    lost, other, killed = Outcome(0, 76, "lost"), Outcome(1, 79, "nan"), Outcome(2, 76, "killed", signalled=True)
    assert root_cause([lost, other, killed], first_dead=0) is killed
    assert root_cause([lost, other], first_dead=0) is other
    assert root_cause([lost, Outcome(1, 76)], first_dead=1).rank == 1
    assert root_cause([Outcome(0, 0), Outcome(1, 0)], first_dead=None).exit_code == 0
