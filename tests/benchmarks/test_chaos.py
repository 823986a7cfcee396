"""Scripted disasters: the table is made of all trials so far, a call that was cut off goes on, and what events say of a blow."""

import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.chaos import __main__ as chaos
from benchmarks.chaos import saving_faults
from benchmarks.chaos.__main__ import Kind, main, portions
from benchmarks.chaos.runs import Aftermath, Row, Trial, Workshop


class Blows:
    """A fault that notes what was asked of it, and can be made to break."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.breaks_at: int | None = None
        self.interrupted_at: int | None = None

    def __call__(self, workshop: Workshop, trials: int, seed: int) -> list[Row]:
        self.asked.append((trials, seed))
        if seed == self.interrupted_at:
            raise KeyboardInterrupt
        if seed == self.breaks_at:
            raise TimeoutError("it made no steps")
        return [Row("blow", "nothing is lost", [Trial(True, True, True, detection_s=float(seed + number)) for number in range(trials)])]


@pytest.fixture
def blows(monkeypatch: pytest.MonkeyPatch) -> Blows:
    found = Blows()
    monkeypatch.setattr(chaos, "FAULTS", {"blow": Kind(found, long=200, short=3, portion=10)})
    return found


def test_portions_are_all_trials_once() -> None:
    assert portions(25, 10) == [(0, 10), (10, 10), (20, 5)]
    assert portions(3, 10) == [(0, 3)]


def test_a_call_that_is_cut_off_keeps_its_trials_and_goes_on_where_it_was(blows: Blows, tmp_path: Path) -> None:
    out = tmp_path / "faults.json"
    blows.interrupted_at = 20
    assert main(["--trials", "45", "--out", str(out)]) == 130
    assert json.loads(out.read_text())["rows"][0]["trials"] == 20
    with (tmp_path / "faults.jsonl").open("a") as journal:
        journal.write('{"name": "bl')  # the process was killed while it wrote
    blows.interrupted_at, blows.asked = None, []
    assert main(["--trials", "45", "--out", str(out), "--resume"]) == 0
    assert blows.asked == [(10, 20), (10, 30), (5, 40)]
    [row] = json.loads(out.read_text())["rows"]
    assert (row["trials"], row["survived"], row["detection_s"], row["detection_s_max"]) == (45, "45/45", 22.0, 44.0)


def test_without_resume_a_fault_begins_anew_and_others_stay(blows: Blows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "faults.json"
    assert main(["--trials", "20", "--out", str(out)]) == 0
    other = Kind(lambda workshop, trials, seed: [Row("other", "none", [Trial(True)])], 1, 1, 1)
    monkeypatch.setitem(chaos.FAULTS, "other", other)
    assert main(["--only", "other", "--out", str(out)]) == 0
    assert main(["--only", "blow", "--short", "--out", str(out)]) == 0
    assert {row["fault"]: row["trials"] for row in json.loads(out.read_text())["rows"]} == {"other": 1, "blow": 3}
    page = out.with_suffix(".md").read_text()
    assert "    python -m benchmarks.chaos --only blow --short --out faults.json\n" in page
    assert "    python -m benchmarks.chaos --only other --out faults.json\n" in page
    assert "--trials 20" not in page


def test_trials_that_cannot_be_carried_through_are_told_and_cost_no_others(
    blows: Blows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blows.breaks_at = 10
    out = tmp_path / "faults.json"
    assert main(["--trials", "30", "--out", str(out)]) == 1
    rows = {row["fault"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows["blow"]["trials"] == 20
    assert rows["blow: trials that could not be carried through"]["notes"] == ["TimeoutError: it made no steps"]
    assert "it made no steps" in out.with_suffix(".md").read_text()
    assert "it made no steps" in capsys.readouterr().err


def test_resume_needs_a_place(blows: Blows, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--resume"])
    assert "name it" in capsys.readouterr().err


def test_the_aftermath_of_a_blow_is_read_from_what_came_after_it(tmp_path: Path) -> None:
    now_s, to_wall_s = time.monotonic(), time.time() - time.monotonic()
    events = [
        {"time": now_s - 9 + to_wall_s, "event": "rank_lost", "rank": 0, "message": "an earlier blow"},
        {"time": now_s - 8 + to_wall_s, "event": "resumed"},
        {"time": now_s - 4 + to_wall_s, "event": "rank_lost", "rank": 1, "message": "rank 1 (process 7 on a) was killed"},
        {"time": now_s - 3 + to_wall_s, "event": "rank_lost", "rank": 0, "message": "by one who knew less"},
        {"time": now_s - 1 + to_wall_s, "event": "resumed"},
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    after = Aftermath.of(tmp_path, now_s - 5)
    assert after.blame == "rank 1 (process 7 on a) was killed"
    assert after.detection_s == pytest.approx(1.0, abs=0.1)
    assert after.recovery_s == pytest.approx(4.0, abs=0.1)
    assert Aftermath.of(tmp_path, now_s - 5, back_s=now_s - 2).recovery_s == pytest.approx(1.0, abs=0.1)
    assert Aftermath.of(tmp_path, now_s) == Aftermath()


def test_the_page_has_every_promise_in_one_table_says_which_was_broken_and_no_place_of_this_machine(
    blows: Blows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    note = f"cannot write {tmp_path}/run-0001/result.json: on {platform.node()}, see https://host/a/b"
    late = Row("late", "named in 2 s", [Trial(True, True, detection_s=2.5), Trial(True, True, detection_s=1.0)], 2.0)
    lost = Row("lost", "bitwise", [Trial(True, None, False, note=note)])
    mute = Row("mute", "goes on in 15 s", [Trial(True, stacks=False)], None, 15.0)
    monkeypatch.setattr(
        chaos, "FAULTS", {"blow": chaos.FAULTS["blow"], "all": Kind(lambda *_: [late, lost, mute], 2, 2, 2), "none": chaos.FAULTS["blow"]}
    )
    monkeypatch.setattr(chaos, "impossible", lambda name: "there is no root" if name == "none" else None)
    out = tmp_path / "faults.json"
    assert main(["--trials", "2", "--only", "blow,all,none", "--out", str(out)]) == 1
    page = out.with_suffix(".md").read_text()
    table = [line for line in page.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in table] == ["| fault", "| blow", "| late", "| lost", "| mute"]
    assert all(
        promise in line for promise, line in zip(("nothing is lost", "named in 2 s", "bitwise", "goes on in 15 s"), table[1:], strict=True)
    )
    told = page.partition("## Where a promise was broken")[2].split("\n## Left out")
    assert [line.split(":")[0] for line in told[0].strip().splitlines()] == ["- late", "- lost", "- mute"]
    assert "- late: in_time 1/2 (promised: named in 2 s)" in told[0]
    assert "- mute: stacks 0/1, in_time 0/1" in told[0]
    assert "cannot write result.json: on HOST, see https://host/a/b" in told[0]
    assert "- none: there is no root" in told[1]
    for path in (out, out.with_suffix(".md"), out.with_suffix(".jsonl")):
        assert str(tmp_path) not in path.read_text()
        assert platform.node() not in path.read_text()
    assert "Nowhere." not in page
    assert "about 0 minutes on four idle cores: blow 2 in 0 s" in capsys.readouterr().err


def test_the_long_form_has_the_counts_that_are_promised_and_takes_less_than_an_hour() -> None:
    assert chaos.FAULTS["kill"].long >= 200
    assert chaos.FAULTS["corrupt"].long >= 1000
    assert all(kind.long >= 4 and kind.trial_s > 0 for kind in chaos.FAULTS.values())
    assert sum(kind.long * kind.trial_s for kind in chaos.FAULTS.values()) <= 55 * 60
    assert {"stop", "terminate", "partition", "slow", "disk", "write", "poison", "memory", "plan", "clock", "loop", "node", "ray"} <= set(
        chaos.FAULTS
    )


def test_runs_that_end_before_there_is_a_save_to_strike_are_failed_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(workshop: Workshop, directory: Path, *overrides: str) -> "subprocess.Popen[str]":
        return workshop.start_command([sys.executable, "-c", "import sys; sys.exit('no module')"], directory)

    monkeypatch.setattr(Workshop, "start", start)
    (row,) = saving_faults.kills_while_saving(Workshop(tmp_path), 2, seed=1)
    assert [trial.survived for trial in row.trials] == [False, False]
    assert "ended with 1 before there was a save to strike: no module" in row.trials[0].note
