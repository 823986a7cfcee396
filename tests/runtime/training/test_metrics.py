"""Metrics: every written name has a unit, lines are whole, and a directory that cannot be written says so."""

import json
from pathlib import Path

import pytest

from crossdock.errors import IoFailure
from crossdock.runtime.training.metrics import RunDirectory, console_line, describe, finite, readable_bytes

ROW = {
    "step": 7,
    "loss": 2.5,
    "grad_norm": 1.25,
    "lr": 1e-3,
    "tokens_per_s": 12345.6,
    "step_s": 0.25,
    "exposed_s": 0.0125,
    "bytes_same_node": 1 << 20,
    "bytes_other_node": 3 << 20,
    "load_max_over_mean": 1.5,
}


def test_a_line_for_people() -> None:
    line = console_line(ROW, 100)
    for part in ("step   7/100", "loss 2.5000", "12,346 tokens/s", "4.0 MiB (3.0 MiB between nodes)", "load 1.50", "12.5 of 250 ms"):
        assert part in line
    assert "dropped" not in line
    assert "dropped 2.50%" in console_line({**ROW, "dropped": 0.025}, 100)
    assert "held-out loss 2.0000" in console_line({**ROW, "eval_loss": 2.0}, 100)


def test_names_without_a_unit_are_our_bug(tmp_path: Path) -> None:
    assert describe("loss_balance").unit == "nat"
    assert describe("bytes_other_node").unit == "B"
    with pytest.raises(KeyError):
        RunDirectory(tmp_path).write_metrics({"step": 1, "speed": 3.0})


def test_lines_are_json_and_appended(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "deep" / "run")
    for step in (1, 2, 3):
        directory.write_metrics({"step": step, "loss": float("nan") if step == 2 else 1.0})
    directory.write_event("finished", step=3)
    rows = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 1.0}]
    event = json.loads(directory.events.read_text())
    assert (event["event"], event["step"]) == ("finished", 3)
    assert event["time"] > 1e9


def test_a_resumed_run_writes_its_steps_anew(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.forget_after(0)  # nothing there yet
    for step in (1, 2, 3):
        directory.write_metrics({"step": step})
    with directory.metrics.open("a") as file:
        file.write('{"step": 4, "lo')
    directory.forget_after(2)
    assert [json.loads(line)["step"] for line in directory.metrics.read_text().splitlines()] == [1, 2]


def test_a_new_run_leaves_nothing_of_an_old_one(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    for path in (directory.result, directory.metrics, directory.events):
        path.write_text("old\n")
    directory.start_anew(keep_history=True)
    assert [path.exists() for path in (directory.result, directory.metrics, directory.events)] == [False, True, True]
    directory.start_anew(keep_history=False)
    assert list(tmp_path.iterdir()) == [directory.events]
    assert directory.events.read_text() == ""


def test_a_run_that_begins_again_remembers_why(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.write_event("rank_started", rank=0)
    directory.write_event("restart", incarnation=2, cause="rank 1 was killed by SIGKILL", rank=1, step=0)
    directory.start_anew(keep_history=False)
    (event,) = map(json.loads, directory.events.read_text().splitlines())
    assert (event["event"], event["rank"]) == ("restart", 1)


def test_results_hold_no_nan(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.write_result({"loss": float("inf"), "bytes": {"counted": [1, float("nan")]}})
    assert json.loads(directory.result.read_text()) == {"loss": None, "bytes": {"counted": [1, None]}}
    assert finite((1.0, {"a": float("nan")})) == [1.0, {"a": None}]


def test_what_cannot_be_written_is_an_io_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(IoFailure, match=r"cannot make the run directory .*set run.dir"):
        RunDirectory(tmp_path / "file" / "run")
    directory = RunDirectory(tmp_path / "run")
    directory.metrics.mkdir()
    with pytest.raises(IoFailure, match="cannot write"):
        directory.write_metrics({"step": 1})
    full = Path("/dev/full")
    if full.exists():
        directory.events.symlink_to(full)
        with pytest.raises(IoFailure, match="No space left on device"):
            directory.write_event("finished")


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB"), (2 << 40, "2048.0 GiB")]
)
def test_readable_bytes(number: int, text: str) -> None:
    assert readable_bytes(number) == text
