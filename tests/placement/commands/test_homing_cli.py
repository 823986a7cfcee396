"""`crossdock plan solve` and `plan compare` with --homing: files, JSON, tables and refusals."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from crossdock.launch.cli import run
from crossdock.placement.homing.forecast import Forecast
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.trace import Trace
from tests.placement.solvers.test_homed import themed_trace

QUICK = ["--topology", "2x1-local", "--seconds", "1", "--bound-seconds", "0"]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    themed_trace(1, num_sequences=32).save(tmp_path / "trace.npz")
    return tmp_path / "trace.npz"


def asked(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_solve_writes_the_plan_and_its_forecast(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "p.json"
    options = ["--homing", "--objective", "devices", "--batch-sequences", "8", "--eval-trace", str(trace), "--out", str(out), "--json"]
    code, stdout, _ = asked(capsys, "plan", "solve", "--trace", str(trace), *QUICK, *options)
    assert code == 0
    value: dict[str, Any] = json.loads(stdout)
    plan, forecast = Plan.load(out), Forecast.load(value["forecast_out"])
    assert Path(value["forecast_out"]) == tmp_path / "p.forecast.npz"
    assert (forecast.plan_hash, plan.method) == (plan.digest, "auto+homing")
    assert [row["method"] for row in value["rows"]] == ["auto", "auto+homing"]
    homing = value["homing"]
    assert (homing["sequence_tokens"], homing["batch_sequences"], homing["forecast"]["bytes"]) == (10, 8, forecast.memory_bytes)
    for rows in (homing["rows"], homing["eval_rows"]):
        auto, joint = rows
        assert joint["forecast"]["remote_copies"] <= auto["forecast"]["remote_copies"] < auto["read"]["remote_copies"]
        assert joint["known"]["remote_copies"] <= joint["forecast"]["remote_copies"]
    assert plan.cost == pytest.approx(homing["rows"][1]["forecast"]["remote_copies"])


def test_compare_needs_no_tokens_and_fits_a_terminal(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Trace(Trace.load(trace).experts_TLK, 8).save(tmp_path / "bare.npz")
    options = ["--methods", "contiguous,auto", "--homing", "--sequence-tokens", "10"]
    code, stdout, _ = asked(capsys, "plan", "compare", "--trace", str(tmp_path / "bare.npz"), *QUICK, *options)
    assert code == 0
    about = stdout[stdout.index("homing: batches") :]
    assert re.search(r"auto\+homing +\d\.\d+ +- +\d\.\d+", about)
    assert max(map(len, about.splitlines())) <= 80
    code, stdout, _ = asked(capsys, "plan", "compare", "--trace", str(trace), *QUICK, "--methods", "contiguous", "--homing")
    assert code == 0
    assert "tokens known" in stdout
    assert max(map(len, stdout[stdout.index("homing: batches") :].splitlines())) <= 80


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--objective", "hops"], 2, "objective hops counts steps between experts"),
        (["--batch-sequences", "5"], 2, "do not divide over 2 devices"),
        (["--sequence-tokens", "4000"], 65, "no sequence of the trace has 4000 tokens"),
        (["--mode", "coherent"], 2, "coherent"),
    ],
)
def test_what_cannot_be_is_refused(
    trace: Path, tmp_path: Path, options: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "p.json"
    found, _, stderr = asked(capsys, "plan", "solve", "--trace", str(trace), *QUICK, "--homing", "--out", str(out), *options)
    assert found == code
    assert message in " ".join(stderr.split())
    assert not out.exists()


def test_homes_are_planned_beside_plans_from_files_where_no_method_gave_one(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "mine.json"
    shape = Trace.load(trace)
    Plan.contiguous(shape.num_layers, shape.num_experts, 2).save(plan)
    options = ["--methods", "columns", "--homing", "--plan", str(plan), "--json"]
    code, stdout, err = asked(capsys, "plan", "compare", "--trace", str(trace), *QUICK, *options)
    assert (code, "method columns gave no plan" in err) == (2, True)
    value = json.loads(stdout)
    assert [row["method"] for row in value["rows"]] == ["mine.json", "homing"]
    assert [row["method"] for row in value["homing"]["rows"]] == ["mine.json", "homing"]


def test_a_trace_without_tokens_makes_no_forecast(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Trace(Trace.load(trace).experts_TLK, 8).save(tmp_path / "bare.npz")
    options = ["--homing", "--sequence-tokens", "10", "--out", str(tmp_path / "p.json")]
    code, _, stderr = asked(capsys, "plan", "solve", "--trace", str(tmp_path / "bare.npz"), *QUICK, *options)
    assert code == 65
    assert "crossdock trace capture" in stderr
    assert not (tmp_path / "p.json").exists()
