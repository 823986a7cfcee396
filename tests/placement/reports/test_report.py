"""The report: whole in itself, faithful to its numbers, readable from incomplete and damaged run directories."""

import dataclasses
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from crossdock.errors import BadData, MissingInput, UsageError
from crossdock.placement.costs.coherent import Context, evaluate_coherent
from crossdock.placement.costs.cost import Workload
from crossdock.placement.costs.evaluate import evaluate
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import Trace
from crossdock.placement.reports.charts import Marker, Series, bar_chart, heat_map, labelled, line_chart, readable, ticks
from crossdock.placement.reports.report import render_plan_report, render_run_report, seconds
from tests.placement.commands.test_cli import run, run_json
from tests.placement.conftest import random_plan, random_trace

TOPOLOGY = Topology.uniform(2, 2)
VOID = {"meta", "link", "br", "img"}


class Reader(HTMLParser):
    """Checks that tags nest, and collects text, addresses and tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    """A small run of 40 steps on four devices, with a new plan at step 20."""
    path = tmp_path / "my run"
    path.mkdir()
    random_trace(1, num_homes=4).save(path / "trace.npz")
    random_plan(2).save(path / "plan.json")
    (path / "config.resolved.yaml").write_text("model: {model_width: 64}\nparallel: {expert: 4}\ntopology: 2x2-local\n")
    rows = [
        {"step": step, "loss": 5 - step / 20, "step_s": 0.2, "exposed_s": 0.02, "load_max_over_mean": 1.1, "expert_load_max_over_mean": 1.4,
         "bytes_same_device": 10, "bytes_same_node": 20, "bytes_other_node": 30} | ({"eval_loss": 3.2} if step == 40 else {})
        for step in range(1, 41)
    ]  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    events = [
        {"time": 0, "event": "plan_applied", "step": 0, "method": "contiguous", "plan_hash": "a", "moves": 0},
        {"time": 1, "event": "plan_applied", "step": 20, "method": "anneal", "plan_hash": "b", "moves": 17},
    ]
    (path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    sizes = {"same_device": 1000, "same_node": 2000, "other_node": 4000}
    after = {
        "bytes": {"steps": 12, "counted": sizes, "predicted": sizes, "forecast": {**sizes, "other_node": 4100}},
        "step_time": {"measured_s": 0.2, "predicted_s": 0.21},
        "load_max_over_mean": 1.05,
        "plan": {"hash": "b", "method": "anneal"},
    }
    before = {**after, "plan": {"hash": "a", "method": "contiguous"}, "bytes": {**after["bytes"], "forecast": None}}  # type: ignore[dict-item]
    result = {"status": "done", "exit_code": 0, "reached_step": 40, "target_step": 40, "loss": 3.0, "eval_loss": 3.2,
              "tokens_per_s": 1234.5,
              "step_s": 0.2, "exposed_s": 0.02, "world_size": 4, "before": before, "moves": 17, **after}  # fmt: skip
    (path / "result.json").write_text(json.dumps(result))
    return path


def check_whole_in_itself(page: str) -> Reader:
    reader = Reader(page)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)
    assert reader.addresses == []
    assert not {"script", "link", "img", "iframe", "object"} & set(reader.tags)
    assert "@import" not in page
    assert "url(" not in page
    for chart in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(chart)
    return reader


def coherent_trace() -> Trace:
    return random_trace(3, num_homes=4, top_k=1, drop=0.1)


def test_plans_of_tokens_that_stay_are_shown_in_their_own_traffic() -> None:
    trace, plan = coherent_trace(), dataclasses.replace(random_plan(4), mode="coherent")
    page = render_plan_report(trace, TOPOLOGY, Workload(), {"stay": plan}, context=Context(key_value_bytes=64))
    found = evaluate_coherent(trace, plan, TOPOLOGY, Workload(), Context(key_value_bytes=64))
    text = Reader(page).text
    assert f"{seconds(found.step_s)} predicted step with stay" in text
    assert f"\N{RIGHTWARDS ARROW} {found.moved:.1%}" in text
    assert "tokens that change device" in text
    assert "copies" not in text.split("Traffic from device")[0].replace("copy of each expert", "")
    scale = Workload().tokens_per_rank * 4 / trace.num_tokens * Workload().copy_bytes * 2 / 2**20
    stays = np.trace(found.moves_LRR.sum(axis=0)) * scale
    assert f"stays {readable(stays)} MiB" in text
    with pytest.raises(UsageError, match="modes coherent and home"):
        render_plan_report(trace, TOPOLOGY, Workload(), {"stay": plan, "return": random_plan(4)})


def test_a_run_under_contiguous_experts_is_not_held_against_itself(run_directory: Path) -> None:
    Plan.contiguous(3, 8, 4).save(run_directory / "plan.json")
    page = render_run_report(run_directory)
    assert page.count('aria-label="Traffic, contiguous"') == page.count('aria-label="Load, contiguous"') == 1
    assert "Both maps" not in page


def test_a_run_whose_tokens_stay_is_reported(run_directory: Path) -> None:
    coherent_trace().save(run_directory / "trace.npz")
    dataclasses.replace(random_plan(2), mode="coherent").save(run_directory / "plan.json")
    text = Reader(render_run_report(run_directory)).text
    assert "Tokens stay with their experts" in text
    assert "Predicted, and what came true" in text
    random_trace(1, num_homes=4).save(run_directory / "trace.npz")  # two experts per token, which the plan's traffic does not know
    assert "The plan cannot be replayed on the run's trace: mode coherent keeps a token" in Reader(render_run_report(run_directory)).text


def test_plan_report_shows_the_evaluators_numbers() -> None:
    trace, plan = random_trace(1, num_tokens=300), random_plan(2)
    page = render_plan_report(trace, TOPOLOGY, Workload(), {"mine": plan}, title="A <b>title</b> & more")
    reader = check_whole_in_itself(page)
    assert "A <b>title</b> & more" in reader.text
    evaluation = evaluate(trace, plan, TOPOLOGY, Workload())
    assert f"{evaluation.moved:.1%}" in reader.text
    assert seconds(evaluation.step_s) in reader.text
    load = evaluation.rows_LR / evaluation.rows_LR.mean(axis=1, keepdims=True)
    for layer, device in np.ndindex(load.shape):
        assert f"layer {layer}, device {device}: {load[layer, device]:.2f}" in page
    assert page.count("<svg") == 5
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_a_plan_for_another_model_is_refused() -> None:
    with pytest.raises(BadData, match="4 MoE layers x 8 experts"):
        render_plan_report(random_trace(), TOPOLOGY, Workload(), {"other": Plan.contiguous(4, 8, 4)})


def test_run_report_holds_predictions_against_counts(run_directory: Path) -> None:
    reader = check_whole_in_itself(render_run_report(run_directory))
    for phrase in (
        "Run my run",
        "step 40 of 40, 4 ranks",
        "anneal, 17 moves",
        "equal",
        "+2.5%",
        "+5.0%",
        "4,000 B",
        "4,100 B",
        "3.2000",
        "1,234",
    ):
        assert phrase in reader.text
    assert reader.text.count("17 moves") == 4
    assert "NOT EQUAL" not in reader.text


def test_bytes_that_differ_are_shouted_about(run_directory: Path) -> None:
    result = json.loads((run_directory / "result.json").read_text())
    result["bytes"]["counted"]["same_node"] += 1
    (run_directory / "result.json").write_text(json.dumps(result))
    assert "NOT EQUAL" in check_whole_in_itself(render_run_report(run_directory)).text


@pytest.mark.parametrize("absent", ["result.json", "metrics.jsonl", "events.jsonl", "plan.json", "trace.npz", "config.resolved.yaml"])
def test_a_run_without_some_file_is_still_reported(run_directory: Path, absent: str) -> None:
    (run_directory / absent).unlink()
    text = check_whole_in_itself(render_run_report(run_directory)).text
    assert ("Unfinished: step 40 so far." in text) == (absent == "result.json")


def test_a_torn_last_line_is_passed_over_and_other_damage_is_named(run_directory: Path) -> None:
    metrics = run_directory / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"step": 41, "lo')
    check_whole_in_itself(render_run_report(run_directory))
    metrics.write_text("oops\n" + whole)
    with pytest.raises(BadData, match=r"metrics\.jsonl:1: not JSON"):
        render_run_report(run_directory)
    (run_directory / "result.json").write_text("[]")
    with pytest.raises(BadData, match=r"result\.json"):
        render_run_report(run_directory)


def test_what_is_no_run_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="no such run directory"):
        render_run_report(tmp_path / "absent")
    with pytest.raises(MissingInput, match=r"neither result\.json nor metrics\.jsonl"):
        render_run_report(tmp_path)


def test_the_command_writes_either_page(run_directory: Path, tmp_path: Path) -> None:
    assert run_json("report", str(run_directory))["out"] == str(run_directory / "report.html")
    assert "Predicted, and what came true" in (run_directory / "report.html").read_text()
    trace, plan, out = run_directory / "trace.npz", run_directory / "plan.json", tmp_path / "page.html"
    run("report", "--trace", str(trace), "--topology", "2x2-local", "--plan", str(plan), "--out", str(out))
    assert "Plans for trace.npz" in out.read_text()


def test_heat_map_shades_by_value() -> None:
    cells = ElementTree.fromstring(heat_map([[0.0, 1.0], [2.0, 4.0]], title="t", rows="r", columns="c", most=4.0))
    name = "{http://www.w3.org/2000/svg}rect"
    assert [cell.get("fill-opacity") for cell in cells.iter(name)] == ["0.000", "0.250", "0.500", "1.000"]
    centred = ElementTree.fromstring(heat_map([[0.5, 1.5]], title="t", rows="r", columns="c", most=0.5, centre=1.0))
    assert [cell.get("class") for cell in centred.iter(name)] == ["cool", "hot"]


def test_lines_survive_gaps_constants_and_long_runs() -> None:
    steps = list(range(5000))
    chart = line_chart(
        [Series("a", steps, [float("nan") if step % 7 == 0 else 1.0 for step in steps])],
        title="t",
        x_label="step",
        markers=[Marker(9999, "no")],
    )
    (line,) = ElementTree.fromstring(chart).iter("{http://www.w3.org/2000/svg}polyline")
    points = (line.get("points") or "").split()
    assert 300 <= len(points) <= 400
    assert "no<" not in chart
    ElementTree.fromstring(bar_chart([], title="t", unit="B"))


def test_numbers_for_people() -> None:
    assert [readable(value) for value in (0, 3, 0.0213, 1.25, 123.4, 12345, 3.2e6, 5e9, -2e13)] == [
        "0", "3", "0.021", "1.2", "123", "12.3k", "3.2M", "5.0G", "-20.0T",
    ]  # fmt: skip
    assert ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert [seconds(value) for value in (None, 0, 2.5e-7, 1.5e-3, 0.2117, 75.0, 4321.0)] == [
        "-", "0", "0.25 us", "1.5 ms", "212 ms", "75 s", "4,321 s",
    ]  # fmt: skip


def test_the_distance_to_the_bound_stands_in_words_a_table_and_bars() -> None:
    trace, plan = random_trace(6, num_tokens=400, top_k=3), random_plan(1)
    quick, proven = (render_plan_report(trace, TOPOLOGY, Workload(), {"mine": plan}, bound_seconds=asked) for asked in (0.0, 2.0))
    for page in (quick, proven):
        text = Reader(page).text
        assert "Distance to the best plan" in text
        assert "no plan below" in text
        assert "of the step of moved of kept" in text
    limits = [float(re.search(r"no plan below.*?>([0-9.]+) ms<", page, re.S)[1]) for page in (quick, proven)]  # type: ignore[index]
    assert limits[0] <= limits[1]


def test_a_plan_with_replicas_has_no_distance_to_a_bound_that_does_not_hold_for_it() -> None:
    trace, plan = random_trace(6, num_tokens=400), random_plan(1, num_slots=4)
    assert plan.has_replicas
    assert "Distance to the best plan" not in render_plan_report(trace, TOPOLOGY, Workload(), {"copies": plan})


@pytest.mark.parametrize(
    ("values", "labels"), [((1.0, 1.05, 1.1, 1.15), ["1", "1.05", "1.10", "1.15"]), ((3.0, 4.0, 5.0), ["3", "4", "5"]), ((), [])]
)
def test_numbers_of_an_axis_differ(values: tuple[float, ...], labels: list[str]) -> None:
    assert [label for _, label in labelled(values)] == labels
