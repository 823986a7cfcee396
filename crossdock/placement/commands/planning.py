"""What the `crossdock plan` commands do behind their options: read and check the inputs, score plans, lay out tables."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from crossdock.errors import BadData, InfeasiblePlan, UsageError
from crossdock.placement.analysis.compare import (
    Candidate,
    Proven,
    coherent_row_of,
    describe,
    problem_for,
    proven,
    row_of,
    with_homes_in_turn,
)
from crossdock.placement.analysis.homing_score import PlansWithHomes
from crossdock.placement.analysis.relabel import relabelled
from crossdock.placement.analysis.statistics import drift, error_bars
from crossdock.placement.costs.coherent import Context, evaluate_coherent
from crossdock.placement.costs.cost import Workload
from crossdock.placement.costs.evaluate import evaluate
from crossdock.placement.costs.moving import price_of_move, steps_to_pay_back
from crossdock.placement.costs.workload_file import load_context, load_shape, load_workload
from crossdock.placement.records.affinity import Affinity
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.topology import LINK_CLASSES, Topology
from crossdock.placement.records.trace import Trace, concatenate, in_pieces
from crossdock.placement.solvers import HOME_ALONE, SOLVERS, check_known
from crossdock.placement.solvers.problem import Constraints, Pin, Problem, Solution

UNITS = {
    "seconds": "s a step",
    "devices": "devices per token and layer",
    "nodes": "nodes per token and layer",
    "hops": "hops per token and step between layers",
}
"""Of a plan's cost and bound, by its objective."""


@dataclass(frozen=True, eq=False)
class Asked:
    """The inputs of solve and compare, read and held against one another."""

    trace_path: Path
    trace: Trace
    topology: Topology
    workload: Workload
    problem: Problem
    eval_trace: Trace | None

    @classmethod
    def read(
        cls,
        trace_path: Path,
        topology_name: str,
        *,
        mode: str = "home",
        objective: str = "seconds",
        workload_path: Path | None = None,
        constraints: Constraints | None = None,
        node_weight: float = 1.0,
        also_paths: Sequence[Path] = (),
        load_pieces: int = 1,
        num_experts: int | None = None,
        eval_path: Path | None = None,
    ) -> "Asked":
        """Load everything and build the problem. Raises the errors of its parts."""
        if load_pieces > 1 and (constraints is None or constraints.load_cap is None):
            raise UsageError("--load-pieces says on what the load cap must hold; give --load-cap as well, or leave it out")
        topology, workload = Topology.load(topology_name), read_workload(workload_path)
        trace = Trace.load(trace_path, num_experts)
        eval_trace = Trace.load(eval_path, num_experts or trace.num_experts) if eval_path else None
        if eval_trace and (eval_trace.num_layers, eval_trace.num_experts) != (trace.num_layers, trace.num_experts):
            raise BadData(
                f"{eval_path}: {eval_trace.num_layers} layers x {eval_trace.num_experts} experts, and {trace_path} has "
                f"{trace.num_layers} x {trace.num_experts}; give traces of one model"
            )
        asked = constraints or Constraints()
        apart = [trace, *(Trace.load(path, num_experts or trace.num_experts) for path in also_paths)]
        pieces = [piece for part in apart for piece in in_pieces(part, load_pieces)]
        also = tuple(Affinity.from_trace(piece) for piece in pieces) if len(pieces) > 1 else ()
        trace = concatenate(apart) if also_paths else trace
        context = read_context(workload_path)
        problem = Problem(Affinity.from_trace(trace), topology, workload, mode, objective, asked, node_weight, also, context)  # type: ignore[arg-type]
        return cls(trace_path, trace, topology, workload, problem, eval_trace)

    def heading(self, search: str) -> list[str]:
        """What is asked, with every default."""
        trace, topology, workload, constraints = self.trace, self.topology, self.workload, self.problem.constraints
        cap = "none" if constraints.load_cap is None else f"{constraints.load_cap:g}"
        known = "" if trace.num_experts_known else " (the largest in the trace; --num-experts sets it)"
        lines = [
            f"trace      {self.trace_path}: {trace.num_tokens:,} tokens, {trace.num_layers} layers, "
            f"top {trace.top_k} of {trace.num_experts}{known}",
            f"topology   {topology.name}: {counted(topology.num_devices, 'device')} on {counted(topology.num_nodes, 'node')}",
            f"workload   {workload.tokens_per_rank:,} tokens per rank, D {workload.model_width}, F {workload.expert_width}, "
            f"{workload.wire} on the wire, {workload.dispatch}",
            f"problem    mode {self.problem.mode}, objective {self.problem.objective}, load cap {cap}, slots {self.problem.slots_R.max()}"
            + (f", {self.problem.context.key_value_bytes:,} bytes of keys and values a token" if self.problem.mode == "coherent" else "")
            + (f", {counted(len(constraints.pins), 'pin')}" if constraints.pins else "")
            + (f", {constraints.memory_fraction:.0%} of memory" if constraints.memory_fraction is not None else "")
            + (f", a hop between nodes counts {self.problem.node_weight:g}" if self.problem.node_weight != 1.0 else ""),
            f"search     {search}",
        ]
        return [part for line in lines for part in textwrap.wrap(line, 80, subsequent_indent=" " * 11, break_on_hyphens=False)]

    def moving_least(self, solution: Solution, old: Plan) -> tuple[Solution, dict[str, int]]:
        """The solution with devices renamed so that fewest experts move from `old`, and how many those are, and were before."""
        plan = relabelled(solution.plan, old, self.topology, pins=self.problem.constraints.pins)
        moves = {"moves": len(old.moves_to(plan)), "moves_unrenamed": len(old.moves_to(solution.plan))}
        return replace(solution, plan=plan), moves

    def score(self, candidates: Sequence[Candidate], bound_seconds: float, *, with_error_bars: bool = False) -> dict[str, Any]:
        """The JSON object of solve and compare; `bound_seconds` go to a bound for the trace that was solved for."""
        least = proven(self.problem, bound_seconds)
        met = [candidate.solution.bound for candidate in candidates if candidate.solution is not None]
        # one problem: what one method proved holds for all
        least = replace(least, objective=max([least.objective, *(value for value in met if value is not None)]))
        value = describe(self.trace, str(self.trace_path), self.topology, self.workload, self.problem)
        rows = [self._row(candidate, self.problem, self.trace, least, fitted=True) for candidate in candidates]
        eval_rows: list[dict[str, object]] = []
        if self.eval_trace is not None:
            held_out = problem_for(Affinity.from_trace(self.eval_trace), self.problem)
            quick = proven(held_out, 0.0)
            eval_rows = [self._row(candidate, held_out, self.eval_trace, quick, fitted=False) for candidate in candidates]
            apart = drift(self.problem.affinity, held_out.affinity)
            value["drift"] = {
                "load": float(apart.load_L.mean()),
                "transitions": float(apart.transitions_L.mean() if len(apart.transitions_L) else 0.0),
            }
        if with_error_bars and self.problem.mode != "home":
            raise UsageError("error bars are of tokens that return home; leave --error-bars out, or use mode home")
        if with_error_bars:
            trace, into = (self.trace, rows) if self.eval_trace is None else (self.eval_trace, eval_rows)
            for candidate, row in zip(candidates, into, strict=True):
                bars = error_bars(trace, candidate.plan, self.topology, self.workload)
                row["error_bars"] = {name: [bar.low, bar.high] for name, bar in bars.items()}
        return {**value, "rows": rows, "eval_rows": eval_rows}

    def with_homes(
        self, candidates: Sequence[Candidate], sequence_tokens: int | None, batch_sequences: int | None, seconds: float, seed: int
    ) -> PlansWithHomes:
        """The candidates and one more, planned with homes from those that were solved here; scored on the held-out trace as well."""
        return PlansWithHomes.of(self.problem, self.trace, self.eval_trace, candidates, sequence_tokens, batch_sequences, seconds, seed)

    @staticmethod
    def _row(candidate: Candidate, problem: Problem, trace: Trace, least: Proven, *, fitted: bool) -> dict[str, object]:
        if problem.mode == "coherent":
            return coherent_row_of(candidate, problem, trace, fitted=fitted, bound=least.objective)[0].as_json()
        row, _ = row_of(candidate, problem, trace, fitted=fitted, bound=least.objective, least_devices=least.devices)
        return row.as_json()


def payback(
    before: Plan, after: Plan, trace_path: Path, topology_name: str, workload_path: Path | None, num_experts: int | None
) -> dict[str, Any]:
    """What going from one plan to another takes and saves. Raises the errors of its parts, `UsageError` where their modes differ."""
    if before.mode != after.mode:
        raise UsageError(f"the plans are of modes {before.mode} and {after.mode}, whose traffic is not the same; give plans of one mode")
    workload = read_workload(workload_path)
    topology, trace = Topology.load(topology_name), Trace.load(trace_path, num_experts or before.num_experts)
    move = price_of_move(before, after, topology, workload)
    if before.mode == "coherent":
        context, at_home = read_context(workload_path), with_homes_in_turn(trace, topology.num_devices)
        before_s, after_s = (evaluate_coherent(at_home, plan, topology, workload, context).step_s for plan in (before, after))
    else:
        before_s, after_s = (evaluate(trace, plan, topology, workload).step_s for plan in (before, after))
    return {
        "move_s": move.seconds,
        "move_bytes": dict(zip(LINK_CLASSES, move.bytes_by_class, strict=True)),
        "step_before_s": before_s,
        "step_after_s": after_s,
        "payback_steps": steps_to_pay_back(move.seconds, before_s, after_s),
    }


def constraints_of(
    load_cap: float | None,
    slots: int | None,
    memory_fraction: float | None,
    pins: Sequence[str],
    *,
    spare_slots: int | None = None,
    spare_bytes: float | None = None,
    replicas: int | None = None,
) -> Constraints:
    """Constraints from options; a pin is LAYER:EXPERT:DEVICE. Raises `UsageError`."""
    parsed = []
    for pin in pins:
        parts = pin.split(":")
        if len(parts) != 3 or not all(part.strip().isdigit() for part in parts):
            raise UsageError(f"--pin is {pin!r}; give LAYER:EXPERT:DEVICE, three numbers from 0, such as 0:17:3")
        parsed.append(Pin(*map(int, parts)))
    room = {"slots": slots, "spare_slots": spare_slots, "spare_bytes": spare_bytes, "replicas": replicas}
    return Constraints(load_cap=load_cap, memory_fraction=memory_fraction, pins=tuple(parsed), **room)  # type: ignore[arg-type]


def method_names(methods: str) -> list[str]:
    """The methods of a comma-separated list, each once. Raises `UsageError` for unknown ones."""
    names = list(dict.fromkeys(name.strip() for name in methods.split(",") if name.strip()))
    for name in names:
        check_known(name)
    if not names:
        raise UsageError(f"--methods is empty; choose from {', '.join(SOLVERS)}")
    return names


def default_methods(methods: str, mode: str, objective: str) -> list[str]:
    """Those of a comma-separated list that price the mode and the objective."""
    names = method_names(methods)
    return [name for name in names if name not in HOME_ALONE] if (mode, objective) == ("coherent", "seconds") else names


def plans_in(paths: Sequence[Path]) -> dict[str, Plan]:
    """The plans by the names of their files, and by their paths where two files have one name."""
    names = [path.name for path in paths]
    return {path.name if names.count(path.name) == 1 else str(path): Plan.load(path) for path in paths}


def plan_facts(plan: Plan) -> dict[str, Any]:
    """A plan's sizes and provenance, by name."""
    return {
        "num_layers": plan.num_layers,
        "num_experts": plan.num_experts,
        "num_devices": plan.num_devices,
        "slots_per_device": plan.slots_per_device,
        "replicas": plan.has_replicas,
        "digest": plan.digest,
        "mode": plan.mode,
        "objective": plan.objective or None,
        "method": plan.method or None,
        "seed": plan.seed,
        "topology_hash": plan.topology_hash or None,
        "trace_hash": plan.trace_hash or None,
        "cost": plan.cost,
        "bound": plan.bound,
    }


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Rows of solve or compare as lines of at most 80 columns; the gaps of cost, moved and kept traffic in per cent."""
    head = f"{'method':<11}{'step ms':>9}{'moved':>7}{'dev/tok':>8}{'node/tok':>9}{'load':>6}{'hops':>6}"
    lines = [f"{head}{'gap: cost':>10}{'moved':>6}{'kept':>5}{'':1}s"]
    for row in rows:
        gaps = ["-" if row[key] is None else f"{100 * row[key]:.1f}" for key in ("gap_cost", "gap_moved", "gap_kept")]
        solve_s = "-" if row["solve_s"] is None else f"{row['solve_s']:.0f}"
        lines.append(
            f"{row['method'][:11]:<11}{row['cost_s'] * 1e3:>9.2f}{row['moved']:>7.1%}{row['devices_per_token']:>8.3f}"
            f"{row['nodes_per_token']:>9.3f}{row['load_max_over_mean']:>6.2f}{row['cross_device_hops']:>6.3f}"
            f"{gaps[0]:>10}{gaps[1]:>6}{gaps[2]:>5}{solve_s:>3}"
        )
    return lines


def error_bar_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The bootstrap's 90 % intervals as lines of at most 80 columns."""
    keys = {"dev/tok": "devices_per_token", "moved": "moved", "hops": "cross_device_hops", "load": "load_max_over_mean"}
    lines = [f"{'90 % interval':<15}" + "".join(f"{name:>16}" for name in keys)]
    for row in rows:
        bars = [row["error_bars"][key] for key in keys.values()]
        lines.append(f"{row['method'][:14]:<15}" + "".join(f"{f'{low:.3f}-{high:.3f}':>16}" for low, high in bars))
    return lines


def counted(number: int, word: str) -> str:
    """1 node, 2 nodes."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def read_workload(path: Path | None) -> Workload:
    """The workload of a file; without one the default, a model of DeepSeek-V2-Lite's size."""
    return Workload() if path is None else load_workload(path)


def read_context(path: Path | None) -> Context:
    """What attention asks where tokens stay, from the configuration of a run; nothing without one."""
    return Context() if path is None else load_context(path)


def check_plan(
    plan: Plan, config: Path | None, trace_path: Path | None, topology_name: str | None, load_cap: float | None, num_experts: int | None
) -> list[str]:
    """Raise where the plan does not fit; return what is worth knowing and no error."""
    if config is not None:
        shape = load_shape(config)
        plan.check_model(shape.num_layers, shape.num_experts, shape.num_devices)
    topology = Topology.load(topology_name) if topology_name else None
    trace = Trace.load(trace_path, num_experts or plan.num_experts) if trace_path else None
    if trace is not None or topology is not None:
        num_layers, num_devices = trace.num_layers if trace else plan.num_layers, topology.num_devices if topology else plan.num_devices
        plan.check_model(num_layers, trace.num_experts if trace else plan.num_experts, num_devices)
    notes = []
    if topology is not None and plan.topology_hash and plan.topology_hash != topology.digest:
        notes.append(
            f"the plan was solved for topology {plan.topology_hash[:12]}, and this is {topology.digest[:12]}; it runs, not at its best"
        )
    if trace is not None and plan.trace_hash and plan.trace_hash != trace.digest:
        notes.append(f"the plan was solved on another trace ({plan.trace_hash[:12]}, this is {trace.digest[:12]})")
    if load_cap is not None:
        if trace is None:
            raise UsageError("--load-cap needs the load, which is in a trace; give --trace")
        # what an expert computes is the same wherever its tokens go next
        evaluation = evaluate(trace, replace(plan, mode="home"), topology or Topology.uniform(1, plan.num_devices), Workload())
        peak_L = evaluation.rows_LR.max(axis=1) / evaluation.rows_LR.mean(axis=1).clip(min=1e-300)
        if peak_L.max() > load_cap + 1e-9:
            raise InfeasiblePlan(
                f"layer {int(peak_L.argmax())} loads a device with {peak_L.max():.3f} of the mean, above load cap {load_cap:g}; "
                f"solve with --load-cap {load_cap:g}"
            )
        notes.append(f"the busiest device of any layer has {peak_L.max():.3f} of the mean load")
    return notes


def wrapped(head: str, text: str) -> list[str]:
    """`text` behind `head` in lines of at most 80 columns, indented alike."""
    return textwrap.wrap(text, 80, initial_indent=head + " ", subsequent_indent=" " * (len(head) + 1)) or [head]
