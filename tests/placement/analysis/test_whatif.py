"""What if, moves and their price on the command line, and the figures behind them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from crossdock.errors import UsageError
from crossdock.launch.commands.maps import plan_app
from crossdock.placement.analysis.relabel import renamed
from crossdock.placement.analysis.whatif import answer, refusals, table, variants
from crossdock.placement.costs.cost import Workload
from crossdock.placement.costs.evaluate import evaluate
from crossdock.placement.costs.moving import price_of_move, steps_to_pay_back
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import Trace
from tests.placement.conftest import random_trace
from tests.placement.solvers.test_replicas import hot_trace

WORKLOAD = Workload(tokens_per_rank=64, model_width=8, expert_width=8)
SLOW = Topology.uniform(2, 2, flop_per_s=1e9, same_node_bytes_per_s=1e9, other_node_bytes_per_s=1e8, name="slow")


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    path = tmp_path / "trace.npz"
    hot_trace(num_layers=3).save(path)
    return path


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(plan_app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def test_every_row_is_the_evaluators(trace_file: Path) -> None:
    trace = Trace.load(trace_file)
    eight = Topology.uniform(2, 4, flop_per_s=1e9, name="eight")
    asked = variants([SLOW, eight], ("flat", "deduplicated", "hierarchical"), [1], "balance")
    assert len(asked) == 1 + 2 * 3 * 2
    rows = [answer(dataclasses.replace(one), trace, WORKLOAD, None, 1.0, 0) for one in asked]
    first = evaluate(trace, Plan.contiguous(3, 8, 4), SLOW, dataclasses.replace(WORKLOAD, dispatch="flat"))
    assert (rows[0].method, rows[0].step_s, rows[0].moved) == ("contiguous", first.step_s, first.moved)
    assert rows[0].memory_bytes == 3 * 2 * WORKLOAD.expert_state_bytes
    assert rows[0].tokens_per_s == pytest.approx(4 * 64 / first.step_s)
    assert all(row.moved + row.kept == pytest.approx(1.0) for row in rows)  # type: ignore[operator]
    assert {row.devices for row in rows} == {4, 8}
    assert all(len(line) <= 80 for line in table(rows))
    (one_level,) = variants([Topology.uniform(1, 4)], ("hierarchical", "flat"), [], "auto")[1:]
    assert one_level.dispatch == "flat"  # on one node hierarchical is nothing of its own


def test_copies_help_a_hot_expert_and_what_cannot_be_is_said(trace_file: Path) -> None:
    trace = Trace.load(trace_file)
    plain, copied = (answer(one, trace, WORKLOAD, None, 1.0, 0) for one in variants([SLOW], ("flat",), [1], "auto")[1:])
    assert copied.step_s < 0.8 * plain.step_s  # type: ignore[operator]
    assert (plain.copies, copied.copies) == (0, 9)  # a copy of the hot expert on each of the three other devices
    assert copied.gradient_s > 0 == plain.gradient_s  # type: ignore[operator]
    refused = [answer(one, trace, WORKLOAD, 1.1, 0.5, 0) for one in variants([SLOW], ("flat",), [], "auto")]
    assert refused[0].refused is None  # the unplanned row knows no cap
    assert "load cap 1.1" in str(refused[1].refused)
    assert "no plan: see below" in table(refused)[2]
    assert "no plan: " in refusals(refused)[1]
    assert "load cap 1.1" in " ".join(refusals(refused))
    assert all(len(line) <= 80 for line in refusals(refused))
    assert refusals(refused[1:] * 2) == refusals(refused)


def test_whatif_on_the_command_line(trace_file: Path) -> None:
    arguments = (
        "whatif",
        "--trace",
        trace_file,
        "--topology",
        "2x2-ethernet",
        "--topology",
        "1x2-local",
        "--spare-slots",
        "1",
        "--seconds",
        "0.2",
    )
    code, text = run(*arguments)
    assert code == 0
    assert max(map(len, text.splitlines())) <= 80
    code, text = run(*arguments, "--dispatch", "flat", "--json")
    value = json.loads(text)
    assert [row["method"] for row in value["rows"]] == ["contiguous", "auto", "auto", "auto", "auto"]
    assert {row["dispatch"] for row in value["rows"]} == {"flat"}


def test_a_move_worked_by_hand() -> None:
    before, after = (Plan(np.array([[[0], [1]], [[0], [1]]])[:, order], 2) for order in ([0, 1], [1, 0]))
    after = Plan(np.stack([before.slots_LRS[0], after.slots_LRS[1]]), 2)
    topology = Topology.uniform(2, 1, other_node_bytes_per_s=1e6, other_node_latency_s=1e-3)
    found = price_of_move(before, after, topology, WORKLOAD)
    expert_bytes = 3 * 8 * 8 * 3 * 4  # matrices, D, F; weight and two moments; fp32
    assert (found.moves, found.bytes_by_class, found.bytes) == (2, (0, 0, 2 * expert_bytes), 2 * expert_bytes)
    assert found.seconds == pytest.approx(expert_bytes / 1e6 + 2 * 6 * 1e-3)  # both ways at once; 6 exchanges in each of 2 layers
    assert price_of_move(before, before, topology, WORKLOAD).seconds == 0.0
    assert [steps_to_pay_back(1.0, 0.5, after_s) for after_s in (0.25, 0.375, 0.5, 0.6)] == [4, 8, None, None]
    assert steps_to_pay_back(0.0, 0.5, 0.6) == 0


def test_solve_from_and_diff_on_the_command_line(trace_file: Path, tmp_path: Path) -> None:
    solved, old, again = tmp_path / "solved.json", tmp_path / "old.json", tmp_path / "again.json"
    options = ("--trace", trace_file, "--topology", "2x2-ethernet", "--method", "balance", "--bound-seconds", "0")
    assert run("solve", *options, "--out", solved)[0] == 0
    renamed(Plan.load(solved), np.tile([3, 2, 1, 0], (3, 1))).save(old)
    code, text = run("solve", *options, "--out", again, "--from", old, "--json")
    assert (code, json.loads(text)["moves"]) == (0, 0)
    assert json.loads(text)["moves_unrenamed"] == len(Plan.load(old).moves_to(Plan.load(solved))) > 0
    assert Plan.load(old).moves_to(Plan.load(again)) == ()
    Plan.contiguous(3, 8, 4).save(old)
    code, text = run("diff", old, solved, "--trace", trace_file, "--topology", "2x2-ethernet", "--json")
    value = json.loads(text)
    assert code == 0
    assert value["payback_steps"] == steps_to_pay_back(value["move_s"], value["step_before_s"], value["step_after_s"])
    assert sum(value["move_bytes"].values()) == value["state_bytes"] == len(value["moves"]) * Workload().expert_moved_bytes
    code, text = run("diff", old, solved, "--trace", trace_file, "--topology", "2x2-ethernet")
    assert "ms to move; step" in text
    assert max(map(len, text.splitlines())) <= 80


def test_solve_with_copies_on_the_command_line(trace_file: Path, tmp_path: Path) -> None:
    sizes = tmp_path / "sizes.yaml"
    sizes.write_text("tokens_per_rank: 100000\nmodel_width: 32\nexpert_width: 8\n")
    out = tmp_path / "plan.json"
    options = (
        "--trace",
        trace_file,
        "--topology",
        "2x2-ethernet",
        "--workload",
        sizes,
        "--out",
        out,
        "--bound-seconds",
        "0",
        "--seconds",
        "1",
    )
    assert run("solve", *options, "--replicas", "3")[0] == 0
    plan = Plan.load(out)
    assert plan.has_replicas
    assert ((plan.slots_LRS >= 0).sum(axis=(1, 2)) <= 8 + 3).all()


def test_one_method_for_all_rows(tmp_path: Path) -> None:
    random_trace(0).save(tmp_path / "trace.npz")
    arguments = ["whatif", "--trace", str(tmp_path / "trace.npz"), "--topology", "2x2-local"]
    result = CliRunner().invoke(plan_app, [*arguments, "--method", "auto,dp"])
    assert isinstance(result.exception, UsageError)
    assert "give one method" in str(result.exception)
    copies = CliRunner().invoke(plan_app, [*arguments, "--method", "replicas", "--spare-slots", "1", "--seconds", "0.2", "--json"])
    assert [row["spare_slots"] for row in json.loads(copies.stdout)["rows"][1:]] == [1] * (len(json.loads(copies.stdout)["rows"]) - 1)
