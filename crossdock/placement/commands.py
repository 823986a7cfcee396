"""What the `crossdock plan` commands do behind their options: read and check the inputs, score plans, lay out tables."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossdock.errors import BadData, InfeasiblePlan, UsageError
from crossdock.placement.affinity import Affinity
from crossdock.placement.compare import Candidate, describe, problem_for, row_of
from crossdock.placement.cost import Workload
from crossdock.placement.evaluate import evaluate
from crossdock.placement.plan import Plan
from crossdock.placement.problem import Constraints, Problem, check_mode
from crossdock.placement.solvers import SOLVERS
from crossdock.placement.topology import Topology
from crossdock.placement.trace import Trace
from crossdock.placement.workload_file import load_shape, load_workload


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
        mode: str,
        objective: str,
        workload_path: Path | None,
        load_cap: float | None,
        slots: int | None,
        num_experts: int | None,
        eval_path: Path | None,
    ) -> "Asked":
        """Load everything and build the problem. Raises the errors of its parts."""
        check_mode(mode)
        constraints = Constraints(load_cap=load_cap, slots=slots)
        topology, workload = Topology.load(topology_name), read_workload(workload_path)
        trace = Trace.load(trace_path, num_experts)
        eval_trace = Trace.load(eval_path, num_experts or trace.num_experts) if eval_path else None
        if eval_trace and (eval_trace.num_layers, eval_trace.num_experts) != (trace.num_layers, trace.num_experts):
            raise BadData(
                f"{eval_path}: {eval_trace.num_layers} layers x {eval_trace.num_experts} experts, and {trace_path} has "
                f"{trace.num_layers} x {trace.num_experts}; give traces of one model"
            )
        problem = Problem(Affinity.from_trace(trace), topology, workload, "home", objective, constraints)  # type: ignore[arg-type]
        return cls(trace_path, trace, topology, workload, problem, eval_trace)

    def heading(self, search: str) -> list[str]:
        """What is asked, with every default."""
        trace, topology, workload, constraints = self.trace, self.topology, self.workload, self.problem.constraints
        cap = "none" if constraints.load_cap is None else f"{constraints.load_cap:g}"
        known = "" if trace.num_experts_known else " (the largest in the trace; --num-experts sets it)"
        lines = [
            f"trace      {self.trace_path}: {trace.num_tokens:,} tokens, {trace.num_layers} layers, "
            f"top {trace.top_k} of {trace.num_experts}{known}",
            f"topology   {topology.name}: {topology.num_devices} devices on {topology.num_nodes} nodes",
            f"workload   {workload.tokens_per_rank:,} tokens per rank, D {workload.model_width}, F {workload.expert_width}, "
            f"{workload.wire} on the wire, {workload.dispatch}",
            f"problem    mode {self.problem.mode}, objective {self.problem.objective}, load cap {cap}, slots {self.problem.slots_R.max()}",
            f"search     {search}",
        ]
        return [part for line in lines for part in textwrap.wrap(line, 80, subsequent_indent=" " * 11, break_on_hyphens=False)]

    def score(self, candidates: Sequence[Candidate]) -> dict[str, Any]:
        """The JSON object of solve and compare."""
        value = describe(self.trace, str(self.trace_path), self.topology, self.workload, self.problem)
        rows = [row_of(candidate, self.problem, self.trace, fitted=True)[0].as_json() for candidate in candidates]
        eval_rows: list[dict[str, object]] = []
        if self.eval_trace is not None:
            held_out = problem_for(self.eval_trace, self.problem)
            eval_rows = [row_of(candidate, held_out, self.eval_trace, fitted=False)[0].as_json() for candidate in candidates]
        return {**value, "rows": rows, "eval_rows": eval_rows}


def method_names(methods: str) -> list[str]:
    """The methods of a comma-separated list, each once. Raises `UsageError` for unknown ones."""
    names = list(dict.fromkeys(name.strip() for name in methods.split(",") if name.strip()))
    for name in names:
        if name not in SOLVERS:
            raise UsageError(f"method is {name!r}; choose from {', '.join(SOLVERS)}")
    if not names:
        raise UsageError(f"--methods is empty; choose from {', '.join(SOLVERS)}")
    return names


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
    """Rows of solve or compare as lines of at most 80 columns."""
    lines = [f"{'method':<14}{'step ms':>10}{'moved':>8}{'dev/tok':>9}{'node/tok':>9}{'load':>7}{'hops':>7}{'gap':>8}{'solve s':>8}"]
    for row in rows:
        gap = "-" if row["gap_cost"] is None else f"{row['gap_cost']:.1%}"
        solve_s = "-" if row["solve_s"] is None else f"{row['solve_s']:.1f}"
        lines.append(
            f"{row['method'][:13]:<14}{row['cost_s'] * 1e3:>10.3f}{row['moved']:>8.1%}{row['devices_per_token']:>9.3f}"
            f"{row['nodes_per_token']:>9.3f}{row['load_max_over_mean']:>7.2f}{row['cross_device_hops']:>7.3f}{gap:>8}{solve_s:>8}"
        )
    return lines


def read_workload(path: Path | None) -> Workload:

    return Workload() if path is None else load_workload(path)


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
        evaluation = evaluate(trace, plan, topology or Topology.uniform(1, plan.num_devices), Workload())
        peak_L = evaluation.rows_LR.max(axis=1) / evaluation.rows_LR.mean(axis=1).clip(min=1e-300)
        if peak_L.max() > load_cap + 1e-9:
            raise InfeasiblePlan(
                f"layer {int(peak_L.argmax())} loads a device with {peak_L.max():.3f} of the mean, above load cap {load_cap:g}; "
                f"solve with --load-cap {load_cap:g}"
            )
        notes.append(f"the busiest device of any layer has {peak_L.max():.3f} of the mean load")
    return notes


def wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(text, 80, initial_indent=head + " ", subsequent_indent=" " * (len(head) + 1)) or [head]
