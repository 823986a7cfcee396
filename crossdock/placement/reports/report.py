"""One HTML page, whole in itself: what plans do to a trace, and for a run, what was predicted beside what was counted and measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray

from crossdock import __version__
from crossdock.errors import BadData, UsageError
from crossdock.placement.analysis.compare import Candidate, Proven, Row, coherent_row_of, proven, row_of
from crossdock.placement.costs.coherent import Context
from crossdock.placement.costs.cost import NUM_DIRECTIONS, Workload
from crossdock.placement.records.affinity import Affinity
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.topology import LINK_CLASSES, Topology
from crossdock.placement.records.trace import Trace
from crossdock.placement.reports.charts import bar_chart, heat_map, readable
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


@dataclass(frozen=True, eq=False)
class Replayed:
    """What a plan does to a trace, for the maps: bytes of one step from device to device, and rows of each layer's experts."""

    bytes_RR: NDArray[np.float64]
    rows_LR: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Scored:
    """The plans of a page: a row for each, the first and the last replayed, and under which traffic."""

    rows: Sequence[Row]
    before: Replayed
    after: Replayed
    chosen: str
    coherent: bool
    homes_known: bool


def render_plan_report(
    trace: Trace,
    topology: Topology,
    workload: Workload,
    plans: Mapping[str, Plan],
    *,
    context: Context | None = None,
    title: str = "Plans",
    bound_seconds: float = 0.0,
) -> str:
    """A page on `plans` by name, held against consecutive experts on consecutive devices; the last one is shown in full.

    `bound_seconds` go to a certificate of how far from the best plan they are; without them the quick bound is shown. `context` is what
    attention asks where plans are of mode coherent.
    Raises `BadData` where a plan, the trace and the topology do not fit one another, `UsageError` where plans are of different modes.
    """
    scored = _scored(trace, topology, workload, plans, context or Context(), bound_seconds)
    first, last, chosen = scored.rows[0], scored.rows[-1], scored.chosen
    saved = 1.0 - last.cost_s / first.cost_s if first.cost_s > 0 else 0.0
    tiles = [
        Tile(f"predicted step with {chosen}", seconds(last.cost_s)),
        Tile("against contiguous", f"{-saved:+.1%}", "good" if saved > 0 else "bad" if saved < 0 else ""),
        Tile(
            "tokens that change device" if scored.coherent else "copies that leave their device",
            f"{first.moved:.1%} \N{RIGHTWARDS ARROW} {last.moved:.1%}",
        ),
        Tile("busiest device over mean", f"{first.load_max_over_mean:.2f} \N{RIGHTWARDS ARROW} {last.load_max_over_mean:.2f}"),
    ]
    lead = (
        f"{trace.num_tokens:,} tokens through {trace.num_layers} MoE layers, top {trace.top_k} of {trace.num_experts} experts, "
        f"on {topology.name}: {topology.num_devices} devices, {topology.num_nodes} nodes."
    )
    return page(title, lead, tiles, [*plan_sections(scored, topology), inputs(trace, topology, workload)])


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
            scored = _scored(run.trace, run.topology, run.workload, plans, run.context, bound_seconds)
        except (BadData, UsageError) as error:  # such as a plan of a restart on fewer devices, or one that this traffic does not know
            sections.append(Section("Plan", text=f"The plan cannot be replayed on the run's trace: {error}"))
        else:
            sections += plan_sections(scored, run.topology)
            sections.append(inputs(run.trace, run.topology, run.workload))
    return page(f"Run {run.name}", run.lead, run_tiles(run), sections)


def plan_sections(scored: Scored, topology: Topology) -> list[Section]:
    """The methods' table, traffic and load before and after."""
    both = (scored.before, scored.after)
    traffic = [replayed.bytes_RR / MIB for replayed in both]
    load = [replayed.rows_LR / np.maximum(replayed.rows_LR.mean(axis=1, keepdims=True), 1e-300) for replayed in both]
    most_mib = max(float(matrix.max()) for matrix in traffic)
    most_load = max(0.25, *(float(np.abs(matrix - 1.0).max()) for matrix in load))
    names = ["contiguous", scored.chosen][-len(scored.rows) :]  # one where the plan is the contiguous one
    homes = f"Homes are {'as recorded' if scored.homes_known else 'spread evenly over the devices'}."
    if scored.coherent:
        moved = "Tokens stay with their experts. Moved: tokens that change device at a layer. Devices and nodes: a token is on one."
        about = (
            "MiB of one step, all layers and both passes, from where a token is (row) to where its next expert lives (column), and home "
            "from the last one. Keys and values, which go from every device to every other, are in the step and not on the map."
        )
    else:
        moved = (
            "Moved: copies that leave their device, per (token, expert). Devices and nodes: distinct ones of a token's experts in one "
            "layer."
        )
        about = "MiB of one step, all layers and all four transfers, from the tokens' home (row) to the device of their expert (column)."
    return [
        Section(
            "Plans",
            table=methods_table(scored.rows),
            note=f"{moved} Load: the busiest device over the mean, mean over layers. Hops: first choices that change device from layer to "
            "layer. Gap: proven distance of the step to that of the best plan." + ("" if topology.measured else _UNMEASURED),
        ),
        *distance_section(scored.rows),
        Section(
            "Traffic from device to device",
            text=f"{about} {homes} The diagonal stays where it is. " + ("Both maps have one scale." if len(names) > 1 else ""),
            figures=[
                Figure(
                    name,
                    heat_map(matrix, title=f"Traffic, {name}", rows="from" if scored.coherent else "home", columns="device", most=most_mib),
                    _by_class(matrix, topology),
                )
                for name, matrix in zip(names, traffic[-len(names) :], strict=True)
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
                for name, matrix in zip(names, load[-len(names) :], strict=True)
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
            note="Gaps, at most: of the step's time, of what moves, and of what could be kept.",
            figures=[
                Figure(
                    "Predicted step, homes alike", bar_chart([("", bars)], title="Predicted step of every plan, and the bound", unit="ms")
                )
            ],
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
    trace: Trace, topology: Topology, workload: Workload, plans: Mapping[str, Plan], context: Context, bound_seconds: float
) -> Scored:
    """Contiguous and every plan, in the traffic that the plans are for."""
    modes = sorted({plan.mode for plan in plans.values()})
    if len(modes) > 1:
        raise UsageError(f"the plans are of modes {' and '.join(modes)}, whose traffic is not the same; give plans of one mode")
    for name, plan in plans.items():
        plan.check_model(trace.num_layers, trace.num_experts, topology.num_devices, name)
    problem = Problem(Affinity.from_trace(trace), topology, workload, mode=modes[0], context=context)
    contiguous = Plan.contiguous(trace.num_layers, trace.num_experts, topology.num_devices)
    candidates = [Candidate("contiguous", contiguous), *(Candidate(name, plan) for name, plan in plans.items())]
    if len(plans) == 1 and np.array_equal(candidates[1].plan.slots_LRS, contiguous.slots_LRS):
        candidates = [Candidate(candidates[1].label, contiguous)]  # nothing to hold it against
    least = proven(problem, bound_seconds)
    score = _score_coherent if modes == ["coherent"] else _score_home
    scored = [score(candidate, problem, trace, least) for candidate in candidates]
    rows, shown = [row for row, _ in scored], [replayed for _, replayed in scored]
    return Scored(rows, shown[0], shown[-1], candidates[-1].label, modes == ["coherent"], trace.home_T is not None)


def _score_home(candidate: Candidate, problem: Problem, trace: Trace, least: Proven) -> tuple[Row, Replayed]:
    row, found = row_of(candidate, problem, trace, fitted=False, bound=least.objective, least_devices=least.devices)
    bytes_RR = found.hops_HLRR.sum(axis=(0, 1)) * (NUM_DIRECTIONS * _row_bytes(problem, trace))
    return row, Replayed(bytes_RR, np.asarray(found.rows_LR, dtype=np.float64))


def _score_coherent(candidate: Candidate, problem: Problem, trace: Trace, least: Proven) -> tuple[Row, Replayed]:
    row, found = coherent_row_of(candidate, problem, trace, fitted=False, bound=least.objective)
    return row, Replayed(found.moves_LRR.sum(axis=0) * (2 * _row_bytes(problem, trace)), found.rows_LR.astype(np.float64))


def _row_bytes(problem: Problem, trace: Trace) -> float:
    """Bytes that a row of the trace stands for in one direction of a whole step."""
    workload = problem.workload
    return workload.copy_bytes * workload.micro_batches * workload.tokens_per_rank * problem.num_devices / trace.num_tokens


def _by_class(traffic_RR: Any, topology: Topology) -> str:
    """MiB by link class, in words."""
    sums = [float(traffic_RR[topology.link_class_RR == link_class].sum()) for link_class in range(len(LINK_CLASSES))]
    total = max(sum(sums), 1e-300)
    words = ("stays", "inside nodes", "between nodes")
    return ", ".join(f"{word} {readable(size)} MiB ({size / total:.0%})" for word, size in zip(words, sums, strict=True))
