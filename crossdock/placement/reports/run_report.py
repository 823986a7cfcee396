"""A run directory as data, and the parts of its report: loss, step time, exposed communication, predictions beside counts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossdock import strict_yaml
from crossdock.errors import MissingInput
from crossdock.placement.costs.coherent import Context
from crossdock.placement.costs.cost import Workload
from crossdock.placement.costs.workload_file import load_context, load_workload
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.run_files import is_number, read_lines, read_result
from crossdock.placement.records.topology import LINK_CLASSES, Topology
from crossdock.placement.records.trace import Trace
from crossdock.placement.reports.charts import Marker, Series, bar_chart, line_chart
from crossdock.placement.reports.report import Figure, Section, Table, Tile, seconds

WORDS = {"same_device": "same device", "same_node": "same node", "other_node": "other node"}


@dataclass(frozen=True, eq=False)
class Run:
    """What the files of a run directory say; None or empty where a file is absent."""

    name: str
    result: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]
    trace: Trace | None
    topology: Topology | None
    plan: Plan | None
    workload: Workload
    context: Context

    @property
    def lead(self) -> str:
        """One sentence on how far the run came."""
        reached, target = self.result.get("reached_step"), self.result.get("target_step")
        if reached is None:
            last = self.metrics[-1].get("step", 0) if self.metrics else 0
            return f"Unfinished: step {last} so far."
        ranks = f", {self.result['world_size']} ranks" if self.result.get("world_size") else ""
        message = f" {self.result['message']}" if self.result.get("message") else ""
        return f"{str(self.result.get('status', '')).capitalize()}: step {reached} of {target}{ranks}.{message}"

    @property
    def markers(self) -> list[Marker]:
        """The steps at which a plan took effect, but for the one that the run began with."""
        applied = [
            event for event in self.events if event.get("event") == "plan_applied" and event.get("step") and is_number(event["step"])
        ]
        return [Marker(float(event["step"]), f"{event.get('method') or 'plan'}, {event.get('moves', 0)} moves") for event in applied]

    def series(self, key: str, name: str, *, points: bool = False) -> Series:
        """One metric over the steps that have it."""
        pairs = [(row["step"], row[key]) for row in self.metrics if is_number(row.get(key)) and is_number(row.get("step"))]
        return Series(name, [float(x) for x, _ in pairs], [float(y) for _, y in pairs], points)


def read_run(path: Path) -> Run:
    """Read a run directory. Raises `MissingInput` where it is none, `BadData` where a file of it is damaged."""
    if not path.is_dir():
        raise MissingInput(f"{path}: no such run directory; give the run.dir of a training run")
    result = read_result(path / "result.json")
    metrics, events = read_lines(path / "metrics.jsonl"), read_lines(path / "events.jsonl")
    if not result and not metrics:
        raise MissingInput(f"{path}: holds neither result.json nor metrics.jsonl; give the run.dir of a training run")
    config_path = path / "config.resolved.yaml"
    plan = Plan.load(path / "plan.json") if (path / "plan.json").exists() else None
    return Run(
        name=path.resolve().name,
        result=result,
        metrics=metrics,
        events=events,
        trace=Trace.load(path / "trace.npz") if (path / "trace.npz").exists() else None,
        topology=_topology(path, config_path, plan),
        plan=plan,
        workload=load_workload(config_path) if config_path.exists() else Workload(),
        context=load_context(config_path) if config_path.exists() else Context(),
    )


def run_tiles(run: Run) -> list[Tile]:
    """The numbers that a reader looks for first."""
    result = run.result
    tiles = []
    for label, key, form in (
        ("loss", "loss", "{:.4f}"),
        ("held-out loss", "eval_loss", "{:.4f}"),
        ("tokens/s, median", "tokens_per_s", "{:,.0f}"),
    ):
        if is_number(result.get(key)):
            tiles.append(Tile(label, form.format(result[key])))
    if is_number(result.get("step_s")):
        tiles.append(Tile("step, median", seconds(result["step_s"])))
    if is_number(result.get("exposed_s")):
        share = f" ({result['exposed_s'] / result['step_s']:.0%})" if result.get("step_s") else ""
        tiles.append(Tile("exposed communication", f"{seconds(result['exposed_s'])}{share}"))
    counted, predicted = _bytes(result, "counted"), _bytes(result, "predicted")
    if counted and predicted:
        equal = counted == predicted
        tiles.append(Tile("counted bytes against replay", "equal" if equal else "NOT EQUAL", "good" if equal else "bad"))
    return tiles


def run_sections(run: Run) -> list[Section]:
    """What happened over the steps, then predictions beside what came true."""
    sections = []
    if run.metrics:
        sections.append(_steps(run))
    if _bytes(run.result, "counted"):
        sections.append(_predictions(run))
    return sections


def _steps(run: Run) -> Section:
    figures = []
    losses = [run.series("loss", "training"), run.series("eval_loss", "held out", points=True)]
    loads = [run.series("load_max_over_mean", "device"), run.series("expert_load_max_over_mean", "expert")]
    charts = [
        ("Loss", "nat per token", losses, False),
        ("Time", "seconds per step", [run.series("step_s", "step"), run.series("exposed_s", "exposed communication")], True),
        ("Load", "busiest over mean", loads, False),
        ("Traffic", "bytes per step, all ranks", [run.series(f"bytes_{name}", WORDS[name]) for name in LINK_CLASSES], True),
    ]
    for title, unit, series, from_zero in charts:
        if any(one.x for one in series):
            svg = line_chart(series, title=title, x_label="step", markers=run.markers, from_zero=from_zero)
            figures.append(Figure(f"{title}, {unit}", svg))
    text = "Dashed lines mark the steps at which a new plan took effect." if run.markers else ""
    return Section("Over the steps", text=text, figures=figures)


def _predictions(run: Run) -> Section:
    result = run.result
    windows = [("after" if result.get("before") else "", result)]
    if isinstance(result.get("before"), Mapping):
        windows.insert(0, ("before", result["before"]))
    rows, groups = [], []
    for name, window in windows:
        counted, predicted, forecast = (_bytes(window, kind) for kind in ("counted", "predicted", "forecast"))
        method = (window.get("plan") or {}).get("method") or "plan"
        label = f"{name}, {method}" if name else method
        for link_class in LINK_CLASSES:
            found = [counted.get(link_class), predicted.get(link_class), forecast.get(link_class)]
            if any(found):
                sizes = ["-" if size is None else f"{size:,} B" for size in found]
                rows.append([f"{label}: {WORDS[link_class]}", *sizes, _off(found[2], found[0])])
        times = window.get("step_time") or {}
        measured_s, predicted_s = times.get("measured_s"), times.get("predicted_s")
        rows.append([f"{label}: step", seconds(measured_s), "-", seconds(predicted_s), _off(predicted_s, measured_s)])
        load = window.get("load_max_over_mean")
        rows.append([f"{label}: load", "-" if load is None else f"{load:.3f}", "-", "-", "-"])
        bars = [("counted", counted), ("replayed", predicted), ("forecast", forecast)]
        for link_class in LINK_CLASSES[1:]:
            of_class = [(kind, float(sizes[link_class]) / 2**20) for kind, sizes in bars if sizes.get(link_class)]
            if of_class:
                groups.append((f"{label}: {WORDS[link_class]}", of_class))
    figures = [Figure("Bytes that left their device", bar_chart(groups, title="Bytes by link class", unit="MiB"))] if groups else []
    time_groups = _times(windows)
    if time_groups:
        figures.append(Figure("Step time", bar_chart(time_groups, title="Step time", unit="ms")))
    steps = (result.get("bytes") or {}).get("steps")
    return Section(
        "Predicted, and what came true",
        text=f"Over {steps} recorded steps. Counted: by the runtime. Replayed: the evaluator on exactly those tokens, equal to the byte. "
        "Forecast: what the plan promised, for as many tokens, from the trace that it was solved on.",
        table=Table(["", "counted, measured", "replayed", "forecast, predicted", "forecast off by"], rows),
        figures=figures,
    )


def _times(windows: Sequence[tuple[str, Mapping[str, Any]]]) -> list[tuple[str, list[tuple[str, float]]]]:
    groups = []
    for name, window in windows:
        times = window.get("step_time") or {}
        kinds = (("measured", "measured_s"), ("predicted", "predicted_s"))
        bars = [(label, times[key] * 1e3) for label, key in kinds if is_number(times.get(key))]
        if bars:
            method = (window.get("plan") or {}).get("method") or "plan"
            groups.append((f"{name}, {method}" if name else method, bars))
    return groups


def _off(forecast: Any, counted: Any) -> str:
    return f"{forecast / counted - 1.0:+.1%}" if is_number(forecast) and is_number(counted) and counted else "-"


def _bytes(window: Mapping[str, Any], kind: str) -> Mapping[str, int]:
    value = (window.get("bytes") or {}).get(kind)
    return value if isinstance(value, Mapping) else {}


def _topology(path: Path, config_path: Path, plan: Plan | None) -> Topology | None:
    """The topology that the run measured or was told, else as many local devices as its plan has."""
    if (path / "topology.yaml").exists():
        return Topology.load(path / "topology.yaml")
    named = strict_yaml.load(config_path).value.get("topology") if config_path.exists() else None
    if isinstance(named, str):
        try:
            return Topology.load(named)
        except MissingInput:  # a file that stood elsewhere when the run began
            pass
    return Topology.local(plan.num_devices) if plan is not None else None
