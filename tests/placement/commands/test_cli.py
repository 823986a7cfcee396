"""`crossdock plan`: JSON on stdout alone, tables of 80 columns, workloads from run configurations, errors by their exit codes."""

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from crossdock.errors import BadConfig, BadData, CrossdockError, InfeasiblePlan, MissingInput, UsageError
from crossdock.launch.config import RunConfig
from crossdock.placement.commands.cli import plan_app
from crossdock.placement.commands.options import DEFAULT_METHODS, METHODS
from crossdock.placement.commands.planning import UNITS
from crossdock.placement.costs.cost import Workload
from crossdock.placement.costs.workload_file import load_shape, load_workload
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.topology import MAX_DEVICES, Topology
from crossdock.placement.records.trace import Trace, in_pieces
from crossdock.placement.solvers import SOLVERS
from crossdock.placement.solvers.problem import OBJECTIVES, Problem, Solution
from tests.placement.conftest import random_plan, random_trace

ROW_KEYS = {
    "method", "cost_s", "moved", "kept", "devices_per_token", "nodes_per_token", "cross_device_hops", "cross_node_hops",
    "load_max_over_mean",
    "bound", "gap_cost", "gap_moved", "gap_kept", "solve_s", "stopped_by",
}  # fmt: skip


@pytest.fixture
def traces(tmp_path: Path) -> tuple[str, str]:
    random_trace(1, num_tokens=150, top_k=3).save(tmp_path / "trace.npz")
    random_trace(2, num_tokens=150, top_k=3).save(tmp_path / "held-out.npz")
    return str(tmp_path / "trace.npz"), str(tmp_path / "held-out.npz")


def run(*arguments: str) -> str:
    """stdout of a command; its error is raised."""
    result = CliRunner().invoke(plan_app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def run_json(*arguments: str) -> dict[str, Any]:
    value = json.loads(run(*arguments, "--json"))
    assert isinstance(value, dict)
    return value


def test_solve_writes_the_plan_and_one_row(traces: tuple[str, str], tmp_path: Path) -> None:
    out = str(tmp_path / "plan.json")
    value = run_json("solve", "--trace", traces[0], "--topology", "2x2-ethernet", "--seconds", "5", "--seed", "7", "--out", out)
    assert {"trace", "topology", "mode", "objective", "workload", "rows", "eval_rows"} <= set(value)
    (row,) = value["rows"]
    assert set(row) >= ROW_KEYS
    plan = Plan.load(out)
    assert (plan.method, plan.seed, plan.digest) == ("auto", 7, row["plan"])
    assert row["moved"] + row["kept"] == pytest.approx(1.0)
    assert 0.0 <= row["gap_cost"] < 1.0
    assert row["bound"] <= plan.cost
    assert value["eval_rows"] == []


def test_compare_scores_methods_and_files_on_both_traces(traces: tuple[str, str], tmp_path: Path) -> None:
    random_plan(3).save(tmp_path / "mine.json")
    value = run_json(
        "compare", "--trace", traces[0], "--topology", "2x2-ethernet", "--methods", "contiguous,balance,anneal,ilp",
        "--objective", "devices", "--eval-trace", traces[1], "--plan", str(tmp_path / "mine.json"), "--seconds", "60",
    )  # fmt: skip
    for rows in (value["rows"], value["eval_rows"]):
        assert [row["method"] for row in rows] == ["contiguous", "balance", "anneal", "ilp", "mine.json"]
        assert all(row["bound"] <= row["devices_per_token"] + 1e-12 for row in rows)
    fit = {row["method"]: row for row in value["rows"]}
    assert fit["ilp"]["devices_per_token"] <= fit["anneal"]["devices_per_token"] <= fit["balance"]["devices_per_token"]
    assert fit["ilp"]["gap_cost"] == pytest.approx(0.0, abs=1e-6)
    assert fit["ilp"]["gap_moved"] == pytest.approx(0.0, abs=1e-6)
    assert fit["mine.json"]["solve_s"] is None
    assert [row["solve_s"] for row in value["eval_rows"]] == [None] * 5
    assert value["rows"][0]["cost_s"] != value["eval_rows"][0]["cost_s"]


def test_pins_memory_and_node_weight_reach_the_solver(traces: tuple[str, str], tmp_path: Path) -> None:
    out = str(tmp_path / "plan.json")
    common = ("solve", "--trace", traces[0], "--topology", "2x2-ethernet", "--seconds", "2", "--out", out)
    run_json(*common, "--pin", "0:5:3", "--pin", "2:0:1", "--memory-fraction", "0.5")
    device_LE = Plan.load(out).device_of_LE()
    assert (device_LE[0, 5], device_LE[2, 0]) == (3, 1)
    plain, weighed = (run_json(*common, "--objective", "hops", "--node-weight", weight)["rows"][0] for weight in ("1", "4"))
    assert weighed["cost"] > plain["cost"]
    assert weighed["gap_cost"] == weighed["gap_moved"]
    both = run_json(*common, "--objective", "devices", "--load-cap", "1.6", "--also-trace", traces[1])
    assert both["trace"]["tokens"] == 300
    with pytest.raises(UsageError, match=r"--pin is '1:2'"):
        run(*common, "--pin", "1:2")
    with pytest.raises(InfeasiblePlan, match="do not fit into"):
        run(*common, "--memory-fraction", "0.00000001")


def test_a_cap_on_pieces_of_the_routing_holds_on_each(traces: tuple[str, str], tmp_path: Path) -> None:
    out = str(tmp_path / "plan.json")
    common = ("solve", "--trace", traces[0], "--topology", "1x4-local", "--seconds", "2", "--objective", "devices", "--out", out)
    trace = Trace.load(traces[0])

    def worst_piece() -> float:
        plan = Plan.load(out)
        loads = [np.bincount(plan.device_of_LE()[layer][piece.experts_TLK[:, layer]].ravel(), minlength=4)
                 for piece in in_pieces(trace, 3) for layer in range(trace.num_layers)]  # fmt: skip
        return max(float(load_R.max() / load_R.mean()) for load_R in loads)

    run_json(*common, "--load-cap", "1.35")
    on_the_whole = worst_piece()
    run_json(*common, "--load-cap", "1.35", "--load-pieces", "3")
    assert worst_piece() <= 1.35 + 1e-9 < on_the_whole
    with pytest.raises(UsageError, match="--load-pieces says on what the load cap must hold"):
        run(*common, "--load-pieces", "3")
    with pytest.raises(UsageError, match=f"1000000 pieces of a trace of {trace.num_tokens} tokens"):
        run(*common, "--load-cap", "1.35", "--load-pieces", "1000000")


def test_compare_gives_auto_the_other_plans_and_every_gap(traces: tuple[str, str]) -> None:
    rows = run_json(
        "compare", "--trace", traces[0], "--topology", "1x4-local", "--objective", "devices", "--methods", "random,moetuner,columns,auto",
        "--seconds", "2", "--bound-seconds", "2",
    )["rows"]  # fmt: skip
    cost = {row["method"]: row["cost"] for row in rows}
    assert cost["auto"] == min(cost.values())
    assert all(row["bound"] <= cost["auto"] + 1e-12 and row["gap_moved"] >= 0 and row["gap_kept"] >= 0 for row in rows)


def test_error_bars_and_drift_are_of_the_held_out_routing(tmp_path: Path) -> None:
    for seed in (1, 2):
        random_trace(seed, num_tokens=300, num_sequences=15).save(tmp_path / f"{seed}.npz")
    options = ("--topology", "2x2-ethernet", "--methods", "contiguous,balance", "--eval-trace", str(tmp_path / "2.npz"), "--error-bars")
    value = run_json("compare", "--trace", str(tmp_path / "1.npz"), *options)
    assert 0.0 < value["drift"]["load"] < 1.0
    for row in value["eval_rows"]:
        low, high = row["error_bars"]["devices_per_token"]
        assert low <= row["devices_per_token"] <= high
    printed = run("compare", "--trace", str(tmp_path / "1.npz"), *options)
    assert "90 % interval" in printed
    assert "drift from the fit" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_a_trace_with_homes_gets_no_gap_on_moved_copies(tmp_path: Path) -> None:
    random_trace(1, num_homes=4).save(tmp_path / "homes.npz")
    row = run_json("compare", "--trace", str(tmp_path / "homes.npz"), "--topology", "2x2-ethernet", "--methods", "contiguous")["rows"][0]
    assert (row["gap_moved"], row["gap_kept"]) == (None, None)
    assert row["gap_cost"] is not None


def test_a_plan_with_replicas_gets_no_bound(traces: tuple[str, str], tmp_path: Path) -> None:
    random_plan(3, num_slots=4).save(tmp_path / "replicas.json")
    value = run_json(
        "compare", "--trace", traces[0], "--topology", "2x2-ethernet", "--methods", "random", "--plan", str(tmp_path / "replicas.json")
    )
    assert value["rows"][1]["bound"] is None
    assert value["rows"][1]["gap_cost"] is None


def test_tables_fit_80_columns_and_defaults_are_printed(traces: tuple[str, str]) -> None:
    text = run("compare", "--trace", traces[0], "--topology", "2x2-ethernet", "--seconds", "2", "--eval-trace", traces[1])
    tables = text[text.index("\nmethod") :]
    assert max(len(line) for line in text.splitlines() if traces[0] not in line) <= 80
    said = " ".join(text.split())
    assert "objective seconds, load cap none, slots 2" in said
    assert "4,096 tokens per rank" in said
    assert all(name in tables for name in DEFAULT_METHODS.split(","))


def test_show_diff_and_check(tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    Plan.contiguous(2, 4, 2).save(old)
    Plan.from_devices(np.array([[0, 0, 1, 1], [0, 1, 0, 1]]), 2, method="mine").save(new)
    assert "device   0: 0 2" in run("show", str(new))
    assert "cost  -\n" in run("show", str(new))
    assert run_json("show", str(new))["slots"] == [[[0, 1], [2, 3]], [[0, 2], [1, 3]]]
    value = run_json("diff", str(old), str(new))
    assert value["moves"] == [{"layer": 1, "expert": 1, "source": 0, "target": 1}, {"layer": 1, "expert": 2, "source": 1, "target": 0}]
    assert value["state_bytes"] == 2 * Workload().expert_moved_bytes
    assert "1:0>1 2:1>0" in run("diff", str(old), str(new))
    assert "same devices" in run("diff", str(old), str(old))
    assert run_json("check", str(new), "--topology", "1x2-local")["ok"]


@pytest.mark.parametrize(("objective", "unit"), UNITS.items())
def test_a_shown_cost_has_its_unit(objective: str, unit: str, traces: tuple[str, str], tmp_path: Path) -> None:
    assert set(UNITS) == set(OBJECTIVES)
    plan = str(tmp_path / "plan.json")
    run("solve", "--trace", traces[0], "--topology", "2x2-local", "--method", "balance", "--objective", objective, "--out", plan)
    solved = Plan.load(plan)
    shown = run("show", plan)
    assert f"cost  {solved.cost} {unit}\n" in shown
    assert f"bound  {solved.bound} {unit}\n" in shown


def test_compare_and_report_name_the_file_of_a_plan_that_does_not_fit(traces: tuple[str, str], tmp_path: Path) -> None:
    good, wrong = tmp_path / "good.json", tmp_path / "wrong.json"
    Plan.contiguous(3, 8, 4).save(good)
    Plan.contiguous(3, 8, 2).save(wrong)
    asked = ["--trace", traces[0], "--topology", "2x2-local", "--plan", str(good), "--plan", str(wrong)]
    for command in ("compare", "report"):
        with pytest.raises(BadData, match=r"wrong\.json is for 3 MoE layers x 8 experts on 2 devices"):
            run(command, *asked)


def test_plans_of_one_name_in_two_folders_are_told_apart(traces: tuple[str, str], tmp_path: Path) -> None:
    paths = [tmp_path / folder / "plan.json" for folder in ("a", "b")]
    for number, path in enumerate(paths):
        path.parent.mkdir()
        random_plan(number).save(path)
    asked = ["--trace", traces[0], "--topology", "2x2-local", "--plan", str(paths[0]), "--plan", str(paths[1]), "--bound-seconds", "0"]
    rows = run_json("compare", *asked, "--methods", "balance")["rows"]
    assert [row["method"] for row in rows] == ["balance", *map(str, paths)]
    assert rows[1]["plan"] != rows[2]["plan"]
    run("report", *asked, "--out", str(tmp_path / "r.html"))
    assert all(str(path) in (tmp_path / "r.html").read_text() for path in paths)


def test_check_refuses_what_does_not_fit(traces: tuple[str, str], tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    Plan.contiguous(3, 8, 4).save(plan)
    config = tmp_path / "run.yaml"
    config.write_text("model: {num_layers: 8, num_experts: 8}\nparallel: {expert: 4}\n")
    with pytest.raises(BadData, match=r"3 MoE layers x 8 experts on 4 devices, and it is asked to serve 4 layers x 8 experts on 4"):
        run("check", str(plan), "--config", str(config))
    with pytest.raises(BadData, match="on 8 devices"):
        run("check", str(plan), "--topology", "1x8-nvlink")
    with pytest.raises(InfeasiblePlan, match=r"above load cap 1\.1"):
        run("check", str(plan), "--trace", traces[0], "--load-cap", "1.1")
    with pytest.raises(UsageError, match="give --trace"):
        run("check", str(plan), "--load-cap", "1.1")
    assert "of the mean load" in run_json("check", str(plan), "--trace", traces[0], "--load-cap", "4")["notes"][0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--mode", "coherent"], UsageError, "per token; use mode home"),
        (["--mode", "elsewhere"], UsageError, "choose from home, coherent"),
        (["--objective", "beauty"], UsageError, "choose from seconds, devices, nodes, hops"),
        (["--method", "magic"], UsageError, "choose from contiguous"),
        (["--load-cap", "0.5"], UsageError, "1.0 or more"),
        (["--load-cap", "1.0"], InfeasiblePlan, "load cap 1;"),
        (["--slots", "1"], InfeasiblePlan, "8 experts do not fit into 4 slots"),
        (["--num-experts", "2"], CrossdockError, "."),
        (["--seconds", "0"], UsageError, "more than 0"),
        (["--topology", "no-such"], MissingInput, "2x2-ethernet"),
        (["--trace", "absent.npz"], MissingInput, "absent.npz"),
        (["--workload", "absent.yaml"], MissingInput, "absent.yaml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_of_our_errors(
    traces: tuple[str, str], tmp_path: Path, arguments: list[str], error: type[CrossdockError], message: str
) -> None:
    given = ["--trace", traces[0], "--topology", "2x2-ethernet", "--seconds", "1", "--out", str(tmp_path / "plan.json")]
    with pytest.raises(error, match=message):
        run("solve", *given, *arguments)


def test_held_out_routing_of_another_model_is_refused(traces: tuple[str, str], tmp_path: Path) -> None:
    random_trace(num_layers=2).save(tmp_path / "other.npz")
    with pytest.raises(BadData, match=r"2 layers x 8 experts, and .* has 3 x 8"):
        run("compare", "--trace", traces[0], "--topology", "2x2-ethernet", "--eval-trace", str(tmp_path / "other.npz"))


def test_a_workload_comes_from_a_run_or_a_file(tmp_path: Path) -> None:
    run_file, own_file = tmp_path / "run.yaml", tmp_path / "workload.yaml"
    run_file.write_text(
        "train: {batch_sequences: 16, accumulate: 2}\nparallel: {expert: 2, ranks: 4}\nmodel: {model_width: 96, activation: gelu}\n"
        "data: {seq_len: 64}\nprecision: {wire: bf16}\ndispatch: flat\n"
    )
    own_file.write_text("tokens_per_rank: 10\nwindow: {dispatch_forward_s: 1e-3}\n")
    expected = Workload(128, 96, 256, wire="bf16", expert_matrices=2, dispatch="flat", micro_batches=2)
    assert load_workload(run_file) == expected
    assert load_workload(own_file).window.dispatch_forward_s == 1e-3
    own_file.write_text("tokens_per_rnak: 10\n")
    with pytest.raises(BadConfig, match="tokens_per_rank"):
        load_workload(own_file)
    run_file.write_text("model: {model_width: wide}\n")
    with pytest.raises(BadConfig, match=r"run\.yaml:1: `model\.model_width` is 'wide'"):
        load_workload(run_file)


def test_defaults_are_those_of_the_run_configuration(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {}\n")
    run_config, workload, shape = RunConfig(), load_workload(path), load_shape(path)
    assert workload.tokens_per_rank == run_config.train.batch_sequences * run_config.data.seq_len // run_config.parallel.local_ranks
    assert workload.model_width == run_config.model.model_width
    assert workload.expert_width == run_config.model.routed_width
    assert workload.wire == (run_config.precision.wire or run_config.precision.compute)
    assert workload.expert_matrices == {"swiglu": 3, "gelu": 2}[run_config.model.activation]
    assert workload.dispatch == run_config.dispatch
    assert workload.micro_batches == run_config.train.accumulate
    assert (shape.num_layers, shape.num_experts, shape.num_devices) == (
        run_config.model.num_moe_layers,
        run_config.model.num_experts,
        run_config.parallel.expert,
    )


def test_the_help_names_every_method() -> None:
    assert ", ".join(SOLVERS) == METHODS
    for command in ("solve", "compare", "show", "diff", "check", "report"):
        assert "Example: crossdock plan" in " ".join(run(command, "--help").split())


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from crossdock.placement.commands import cli; "
        "print([name for name in ('numpy', 'scipy', 'jinja2', 'pydantic', 'torch') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_solve_for_tokens_that_stay(tmp_path: Path) -> None:
    """One expert per token: the plan says its mode, held-out routing is scored the same way, and what was not priced is refused."""
    rng = np.random.default_rng(0)
    first_T = rng.integers(0, 8, 400)
    experts_TL = np.stack([first_T, (first_T + 3) % 8, first_T], axis=1)
    path, out = tmp_path / "top1.npy", tmp_path / "plan.json"
    np.save(path, experts_TL)
    arguments = ["--trace", str(path), "--topology", "2x2-local", "--mode", "coherent", "--seconds", "1"]
    value = run_json("solve", *arguments, "--eval-trace", str(path), "--out", str(out))
    (row,), (held_out,) = value["rows"], value["eval_rows"]
    assert Plan.load(out).mode == value["mode"] == "coherent"
    assert row["cross_device_hops"] == 0.0
    assert row["devices_per_token"] == 1.0
    assert held_out["cost_s"] == row["cost_s"]
    with pytest.raises(UsageError, match="error bars"):
        run("compare", *arguments, "--methods", "contiguous", "--error-bars")


def test_plans_of_tokens_that_stay_are_compared_and_checked(tmp_path: Path) -> None:
    trace, plan = str(tmp_path / "one.npz"), str(tmp_path / "plan.json")
    random_trace(4, num_tokens=200, top_k=1).save(trace)
    asked = ("--trace", trace, "--topology", "2x2-ethernet", "--mode", "coherent", "--seconds", "1", "--bound-seconds", "0")
    assert [row["method"] for row in run_json("compare", *asked)["rows"]] == ["contiguous", "random", "balance", "eplb", "auto"]
    row = run_json("solve", *asked, "--out", plan)["rows"][0]
    assert f"has {row['load_max']:.3f} of the mean load" in run("check", plan, "--trace", trace, "--load-cap", "4")
    other = str(tmp_path / "other.json")
    run("solve", *asked, "--method", "random", "--out", other)
    value = run_json("diff", other, plan, "--trace", trace, "--topology", "2x2-ethernet")
    assert value["step_after_s"] == pytest.approx(row["cost_s"], rel=1e-12)
    assert value["step_before_s"] > value["step_after_s"]
    random_plan(1).save(other)
    with pytest.raises(UsageError, match="modes home and coherent"):
        run("diff", other, plan, "--trace", trace, "--topology", "2x2-ethernet")
    with pytest.raises(InfeasiblePlan, match="above load cap 1;"):
        run("check", plan, "--trace", trace, "--load-cap", "1")


def test_what_is_shown_of_plans_and_error_bars_fits_80_columns(traces: tuple[str, str], tmp_path: Path) -> None:
    plan, long = str(tmp_path / "plan.json"), str(tmp_path / "long.npz")
    random_trace(3, num_tokens=2000).save(long)
    solved = run("solve", "--trace", traces[0], "--topology", "2x2-ethernet", "--seconds", "1", "--bound-seconds", "0", "--out", plan)
    barred = run(
        "compare", "--trace", long, "--topology", "2x2-ethernet", "--methods", "contiguous", "--bound-seconds", "0", "--error-bars"
    )  # fmt: skip
    for printed in (solved.rsplit("wrote", 1)[0], barred, run("show", plan)):
        assert max(map(len, printed.splitlines()[1:])) <= 80
    assert f"digest  {Plan.load(plan).digest[:12]}\n" in run("show", plan)


def test_a_method_that_gives_no_plan_leaves_the_others_their_rows(traces: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["compare", "--trace", traces[0], "--topology", "2x2-local", "--seconds", "0.2", "--bound-seconds", "0", "--json"]

    def refuses(error: CrossdockError) -> Callable[[Problem, float, int], Solution]:
        def solver(problem: Problem, seconds: float, seed: int) -> Solution:
            raise error

        return solver

    monkeypatch.setitem(SOLVERS, "ilp", refuses(UsageError("ilp takes 9 experts; use columns")))
    monkeypatch.setitem(SOLVERS, "dp", refuses(InfeasiblePlan("no plan; give a higher cap")))
    result = CliRunner().invoke(plan_app, [*arguments, "--methods", "contiguous,dp,ilp,balance"])
    assert isinstance(result.exception, InfeasiblePlan)
    assert str(result.exception) == (
        "method dp gave no plan: no plan; give a higher cap; method ilp gave no plan: ilp takes 9 experts; use columns"
    )
    value = json.loads(result.stdout)
    assert [row["method"] for row in value["rows"]] == ["contiguous", "balance"]
    assert [(refused["method"], refused["exit_code"]) for refused in value["refused"]] == [("dp", 3), ("ilp", 2)]
    alone = CliRunner().invoke(plan_app, [*arguments, "--methods", "ilp,dp"])
    assert isinstance(alone.exception, UsageError)
    assert not alone.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("dispatch", "per_node", "most_gib"), [("deduplicated", 1, 2), ("hierarchical", 8, 3)])
def test_as_many_devices_as_a_topology_may_have(
    dispatch: str, per_node: int, most_gib: int, traces: tuple[str, str], tmp_path: Path
) -> None:
    """A table of all links for every device would take 512 GiB, one of all ports several; the evaluator keeps one for every hop."""
    topology, workload = tmp_path / "many.yaml", tmp_path / "workload.yaml"
    Topology.uniform(MAX_DEVICES // per_node, per_node, shared_by_node=True).save(topology)
    workload.write_text(f"dispatch: {dispatch}\n")
    asked = ["--trace", traces[0], "--topology", str(topology), "--workload", str(workload)]
    tracemalloc.start()
    try:
        run("solve", *asked, "--method", "contiguous", "--out", str(tmp_path / "p.json"))
        assert tracemalloc.get_traced_memory()[1] < most_gib * 2**30
    finally:
        tracemalloc.stop()
