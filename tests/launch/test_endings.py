"""Every ending of `crossdock train` leaves result.json, also one before its ranks have begun."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from crossdock.errors import IoFailure, Unavailable
from crossdock.launch import cli, start
from crossdock.launch.config import read_config
from crossdock.launch.ranks import worker
from crossdock.launch.ranks.worker_env import Meeting, WorkerEnv
from crossdock.launch.request import Request, prepare_directory


def raising(error: BaseException) -> Any:
    def act(*arguments: object, **options: object) -> object:
        raise error

    return act


def ended(folder: Path, *overrides: str) -> tuple[int, dict[str, Any]]:
    code = cli.run(["train", "tiny", f"run.dir={folder}", *overrides])
    path = folder / "result.json"
    return code, json.loads(path.read_text()) if path.exists() else {}


@pytest.mark.parametrize(
    ("place", "name", "error", "exit_code", "piece"),
    [
        (start, "run_ranks", Unavailable("cannot start a rank"), 69, "cannot start a rank"),
        (Request, "save", IoFailure("disk full"), 74, "disk full"),
        (tempfile, "TemporaryDirectory", FileNotFoundError(2, "No usable temporary directory found"), 74, "set TMPDIR"),
        (start, "check_inputs", KeyboardInterrupt(), 130, "interrupted"),
        (start, "run_ranks", MemoryError(), 80, "out of memory"),
        (start, "run_ranks", RuntimeError("never seen"), 1, "RuntimeError: never seen"),
    ],
)
def test_failures_before_the_ranks(
    place: object, name: str, error: BaseException, exit_code: int, piece: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, name, raising(error))
    code, result = ended(tmp_path / "run")
    assert (code, result["exit_code"]) == (exit_code, exit_code)
    assert result["status"] == ("interrupted" if exit_code == 130 else "failed")
    assert piece in result["message"]
    assert result["target_step"] == 60
    assert result["reached_step"] == 0


def test_a_run_that_has_nothing_to_resume(tmp_path: Path) -> None:
    code, result = ended(tmp_path / "run", "run.resume=always")
    assert (code, result["exit_code"]) == (66, 66)
    assert "holds no checkpoint" in result["message"]


def test_a_failure_between_two_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from crossdock.launch.local.children import Outcome

    monkeypatch.setattr(start, "run_ranks", lambda *arguments: Outcome(1, 76, "rank 1 was lost"))
    prepared = start.prepare_directory
    calls: list[object] = []

    def fails_later(config: Any) -> bool:
        calls.append(config)
        return prepared(config) if len(calls) == 1 else raising(IoFailure("disk full"))()

    monkeypatch.setattr(start, "prepare_directory", fails_later)
    code, result = ended(tmp_path / "run", "fault.max_restarts=2")
    assert (code, result["exit_code"], result["message"]) == (74, 74, "disk full")


def test_an_earlier_run_that_cannot_be_moved_keeps_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = {"status": "done", "exit_code": 0, "reached_step": 7}
    (tmp_path / "config.resolved.yaml").write_text("")
    (tmp_path / "result.json").write_text(json.dumps(earlier))
    monkeypatch.setattr(Path, "rename", raising(PermissionError(13, "Permission denied")))
    assert ended(tmp_path) == (74, earlier)


# ---- the run directory of an earlier run -----------------------------------------------------------------------------

EARLIER = {"status": "done", "exit_code": 0, "reached_step": 7}


def finished_run(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.resolved.yaml").write_text("")
    (folder / "result.json").write_text(json.dumps(EARLIER))
    return folder


def under_torchrun(folder: Path, rank: int, *overrides: str) -> tuple[int, str]:
    env = WorkerEnv(rank, 2, rank, 2, 0, Meeting("listen", host="127.0.0.1", port=1), "torchrun")
    ended = worker.main(read_config(Path("tiny"), [f"run.dir={folder}", *overrides]), env)
    return ended.exit_code, ended.fields["message"]


def test_an_outside_launcher_leaves_the_result_of_an_earlier_run_that_cannot_be_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 makes the directory ready itself; one that it could not move aside is not its own to write to."""
    run = finished_run(tmp_path / "run")
    monkeypatch.setattr(Path, "rename", raising(PermissionError(13, "Permission denied")))
    code, message = under_torchrun(run, 0)
    assert code == 74
    assert "cannot move the earlier run" in message
    assert json.loads((run / "result.json").read_text()) == EARLIER
    assert not (tmp_path / "run.1").exists()


@pytest.mark.parametrize("error", [RuntimeError("never seen"), KeyboardInterrupt()])
def test_whatever_stops_rank_0_before_its_directory_is_ready(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished_run(tmp_path / "run")
    told: list[WorkerEnv] = []
    monkeypatch.setattr(worker, "prepare_directory", raising(error))
    monkeypatch.setattr(worker, "stay_away", told.append)
    assert under_torchrun(run, 0)[0] == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert json.loads((run / "result.json").read_text()) == EARLIER
    assert len(told) == 1  # ranks that would wait for rank 0


def test_an_outside_launcher_tells_how_its_own_run_failed(tmp_path: Path) -> None:
    """An unfinished run's result is the failing start's to write, and so is that of a run whose directory is ready."""
    run = finished_run(tmp_path / "run")
    assert under_torchrun(run, 0, "train.batch_sequences=3")[0] == 78
    assert json.loads((tmp_path / "run.1" / "result.json").read_text()) == EARLIER
    assert json.loads((run / "result.json").read_text())["exit_code"] == 78
    assert under_torchrun(run, 0, "run.resume=always")[0] == 66
    result = json.loads((run / "result.json").read_text())
    assert (result["exit_code"], result["status"]) == (66, "failed")
    assert "holds no checkpoint" in result["message"]


def test_never_moves_checkpoints_aside_that_stand_alone(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "step-3").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step-3" / "manifest.json").write_text("{}")
    config = read_config(Path("tiny"), [f"run.dir={tmp_path / 'run'}", "run.resume=never"])
    assert prepare_directory(config) is False
    assert (tmp_path / "run.1" / "checkpoints" / "step-3" / "manifest.json").exists()


def test_a_directory_that_cannot_be_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_config(Path("tiny"), [f"run.dir={tmp_path / 'run'}"])
    monkeypatch.setattr(Path, "unlink", raising(PermissionError(13, "Permission denied")))
    with pytest.raises(IoFailure, match=r"cannot change the run directory .*run: Permission denied; choose another run\.dir"):
        prepare_directory(config)
