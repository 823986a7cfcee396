"""One HTML page, whole in itself: what plans do to a trace, and for a run, what was predicted beside what was counted and measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from crossdock import __version__
from crossdock.errors import BadData
from crossdock.placement.analysis.compare import Candidate, Row, row_of
from crossdock.placement.costs.cost import NUM_DIRECTIONS, Workload
from crossdock.placement.costs.evaluate import Evaluation
from crossdock.placement.records.affinity import Affinity
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.topology import LINK_CLASSES, Topology
from crossdock.placement.records.trace import Trace
from crossdock.placement.reports.charts import bar_chart, heat_map, readable
from crossdock.placement.solvers.certificates.bounds import lower_bound
from crossdock.placement.solvers.certificates.certificate import certified
from crossdock.placement.solvers.problem import Problem

MIB = 2.0**20
_UNMEASURED = (
    " Steps are predicted from declared speeds, not from this machine's, and hold what the workload names: they compare plans with one "
    "another, not with the clock."
)


@dataclass(frozen=True)
class Figure:
    """A chart with its heading and a line below."""

    title: str
    svg: str
    caption: str = ""


@dataclass(frozen=True)
class Table:
    """Cells as text; `chosen` is the row in bold, -1 for none."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    chosen: int = -1


@dataclass(frozen=True)
class Section:
    """A heading with, in this order, text, a table, a note, figures and facts; each may be absent."""

    title: str
    text: str = ""
    table: Table | None = None
    note: str = ""
    figures: Sequence[Figure] = ()
    facts: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Tile:
    """A number that stands out; kind is "", "good" or "bad"."""

    label: str
    value: str
    kind: str = ""


def render_plan_report(
    trace: Trace, topology: Topology, workload: Workload, plans: Mapping[str, Plan], *, title: str = "Plans", bound_seconds: float = 0.0
) -> str:
    """A page on `plans` by name, held against consecutive experts on consecutive devices; the last one is shown in full.

    `bound_seconds` go to a certificate of how far from the best plan they are; without them the quick bound is shown.
    Raises `BadData` where a plan, the trace and the topology do not fit one another.
    """
    rows, before, after, chosen = _scored(trace, topology, workload, plans, bound_seconds)
    first, last = rows[0], rows[-1]
    saved = 1.0 - last.cost_s / first.cost_s if first.cost_s > 0 else 0.0
    tiles = [
        Tile(f"predicted step with {chosen}", seconds(last.cost_s)),
        Tile("against contiguous", f"{-saved:+.1%}", "good" if saved > 0 else "bad" if saved < 0 else ""),
        Tile("copies that leave their device", f"{first.moved:.1%} \N{RIGHTWARDS ARROW} {last.moved:.1%}"),
        Tile("busiest device over mean", f"{first.load_max_over_mean:.2f} \N{RIGHTWARDS ARROW} {last.load_max_over_mean:.2f}"),
    ]
    lead = (
        f"{trace.num_tokens:,} tokens through {trace.num_layers} MoE layers, top {trace.top_k} of {trace.num_experts} experts, "
        f"on {topology.name}: {topology.num_devices} devices, {topology.num_nodes} nodes."
    )
    return page(title, lead, tiles, [*plan_sections(rows, before, after, topology, workload, chosen), inputs(trace, topology, workload)])


def render_run_report(run_dir: Path, *, bound_seconds: float = 0.0) -> str:
    """A page on a finished, stopped or running run, from the files of its directory; parts whose files are absent are left out.

    `bound_seconds` as for `render_plan_report`.
    Raises `MissingInput` where there is neither a result nor a metrics file, `BadData` for damaged ones.
    """
    from crossdock.placement.reports.run_report import read_run, run_sections, run_tiles

    run = read_run(Path(run_dir))
    sections = run_sections(run)
    if run.trace is not None and run.topology is not None and run.plan is not None:
        try:
            plans = {run.plan.method or "plan": run.plan}
            rows, before, after, chosen = _scored(run.trace, run.topology, run.workload, plans, bound_seconds)
        except BadData as error:
            sections.append(Section("Plan", text=f"The plan cannot be replayed on the run's trace: {error}"))
        else:
            sections += plan_sections(rows, before, after, run.topology, run.workload, chosen)
            sections.append(inputs(run.trace, run.topology, run.workload))
    return page(f"Run {run.name}", run.lead, run_tiles(run), sections)


def plan_sections(
    rows: Sequence[Row], before: Evaluation, after: Evaluation, topology: Topology, workload: Workload, chosen: str
) -> list[Section]:
    """The methods' table, traffic and load before and after."""
    micro_batches = NUM_DIRECTIONS * workload.copy_bytes * workload.micro_batches * workload.tokens_per_rank * topology.num_devices / MIB
    traffic = [evaluation.hops_HLRR.sum(axis=(0, 1)) * (micro_batches / evaluation.num_tokens) for evaluation in (before, after)]
    load = [evaluation.rows_LR / np.maximum(evaluation.rows_LR.mean(axis=1, keepdims=True), 1e-300) for evaluation in (before, after)]
    most_mib = max(float(matrix.max()) for matrix in traffic)
    most_load = max(0.25, *(float(np.abs(matrix - 1.0).max()) for matrix in load))
    names = ("contiguous", chosen)
    homes = "as recorded" if after.exact else "spread evenly over the devices"
    return [
        Section(
            "Plans",
            table=methods_table(rows),
            note="Moved: copies that leave their device, per (token, expert). Devices and nodes: distinct ones of a token's experts in one "
            "layer. Load: the busiest device over the mean, mean over layers. Hops: first choices that change device from layer to layer. "
            "Gap: proven distance of the step to that of the best plan." + ("" if topology.measured else _UNMEASURED),
        ),
        *distance_section(rows),
        Section(
            "Traffic from device to device",
            text=f"MiB of one step, all layers and all four transfers, from the tokens' home (row) to the device of their expert (column). "
            f"Homes are {homes}. The diagonal stays where it is. Both maps have one scale.",
            figures=[
                Figure(
                    name,
                    heat_map(matrix, title=f"Traffic, {name}", rows="home", columns="device", most=most_mib),
                    _by_class(matrix, topology),
                )
                for name, matrix in zip(names, traffic, strict=True)
            ],
        ),
        Section(
            "Load of every layer and device",
            text="Rows that a device computes over the mean device of the layer: 1 is even, the largest sets the pace.",
            figures=[
                Figure(
                    name,
                    heat_map(matrix, title=f"Load, {name}", rows="layer", columns="device", most=most_load, centre=1.0),
                    f"worst layer {matrix.max(axis=1).max():.2f}, mean of the layers' busiest {matrix.max(axis=1).mean():.2f}",
                )
                for name, matrix in zip(names, load, strict=True)
            ],
        ),
    ]


def distance_section(rows: Sequence[Row]) -> list[Section]:
    """Every plan's step beside what no plan can be faster than, and the gaps; nothing where no bound is known."""
    bound = next((row.bound for row in rows if row.bound is not None), None)
    if bound is None or any(row.gap_cost is None for row in rows):
        return []
    bars = [(row.method, row.cost * 1e3) for row in rows if row.cost is not None] + [("no plan below", bound * 1e3)]
    cells = [[row.method, *("-" if gap is None else f"{gap:.1%}" for gap in (row.gap_cost, row.gap_moved, row.gap_kept))] for row in rows]
    return [
        Section(
            "Distance to the best plan",
            text=f"With tokens at home on every device alike, no plan with one copy of each expert has a step below {seconds(bound)}: that "
            "is proven. Whether anything between it and the best one here is possible is not known.",
            table=Table(["plan", "of the step", "of moved", "of kept"], cells, chosen=len(rows) - 1),
            note="Gaps, at most: of the step's time, of the copies that move, and of those that could be kept.",
            figures=[Figure("predicted step, ms", bar_chart([("", bars)], title="Predicted step of every plan, and the bound", unit="ms"))],
        )
    ]


def methods_table(rows: Sequence[Row]) -> Table:
    """One line for each plan; the last is the chosen one."""
    head = ["plan", "step", "moved", "devices", "nodes", "load", "hops", "gap"]
    cells = [
        [
            row.method,
            seconds(row.cost_s),
            f"{row.moved:.1%}",
            f"{row.devices_per_token:.2f}",
            f"{row.nodes_per_token:.2f}",
            f"{row.load_max_over_mean:.2f}",
            f"{row.cross_device_hops:.2f}",
            "-" if row.gap_cost is None else f"{row.gap_cost:.1%}",
        ]
        for row in rows
    ]
    return Table(head, cells, chosen=len(rows) - 1)


def inputs(trace: Trace, topology: Topology, workload: Workload) -> Section:
    """What the predictions rest on."""
    window = workload.window
    return Section(
        "What the predictions rest on",
        facts={
            "trace": f"{trace.source or 'unnamed'}, {trace.num_tokens:,} tokens, {trace.digest[:12]}",
            "topology": f"{topology.name}, {'measured' if topology.measured else 'declared, not measured'}, {topology.digest[:12]}",
            "tokens per device": f"{workload.tokens_per_rank:,} x {workload.micro_batches} micro-batches",
            "sizes": f"width {workload.model_width}, experts {workload.expert_matrices} x {workload.expert_width}, "
            f"{workload.wire} on the wire, {workload.dispatch}",
            "windows": f"forward {seconds(window.dispatch_forward_s)} and {seconds(window.combine_forward_s)}, "
            f"backward {seconds(window.combine_backward_s)} and {seconds(window.dispatch_backward_s)}",
            "rest of the step": seconds(workload.other_s),
        },
    )


def page(title: str, lead: str, tiles: Sequence[Tile], sections: Sequence[Section]) -> str:
    """Fill the template."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined)
    template = environment.get_template("report.html")
    return template.render(title=title, lead=lead, tiles=tiles, sections=sections, version=__version__)


def seconds(value: float | None) -> str:
    """A duration for people: 1.23 s, 45.6 ms, 789 us."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    for limit, unit in ((1.0, "s"), (1e-3, "ms")):
        if abs(value) >= limit:
            return f"{value / limit:.3g} {unit}" if abs(value) < 1000 * limit else f"{value / limit:,.0f} {unit}"
    return f"{value * 1e6:.3g} us"


def _scored(
    trace: Trace, topology: Topology, workload: Workload, plans: Mapping[str, Plan], bound_seconds: float
) -> tuple[list[Row], Evaluation, Evaluation, str]:
    """Rows of contiguous and of every plan, the evaluations of the first and the last, and the last one's name."""
    problem = Problem(Affinity.from_trace(trace), topology, workload)
    contiguous = Plan.contiguous(trace.num_layers, trace.num_experts, topology.num_devices)
    candidates = [Candidate("contiguous", contiguous), *(Candidate(name, plan) for name, plan in plans.items())]
    bound = certified(problem, bound_seconds) if bound_seconds > 0 else lower_bound(problem)
    scored = [row_of(candidate, problem, trace, fitted=False, bound=bound) for candidate in candidates]
    return [row for row, _ in scored], scored[0][1], scored[-1][1], candidates[-1].label


def _by_class(traffic_RR: Any, topology: Topology) -> str:
    """MiB by link class, in words."""
    sums = [float(traffic_RR[topology.link_class_RR == link_class].sum()) for link_class in range(len(LINK_CLASSES))]
    total = max(sum(sums), 1e-300)
    words = ("stays", "inside nodes", "between nodes")
    return ", ".join(f"{word} {readable(size)} MiB ({size / total:.0%})" for word, size in zip(words, sums, strict=True))
