"""Every ending of `crossdock train` leaves result.json, also one before its ranks have begun."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from crossdock.errors import IoFailure, Unavailable
from crossdock.launch import cli, start
from crossdock.launch.request import Request


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
