"""The rows of `plan solve` and `plan compare`: what each plan does to a trace, and how far it may be from the best plan there is."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from crossdock.errors import CrossdockError, InfeasiblePlan, UsageError
from crossdock.placement.costs.coherent import CoherentEvaluation, evaluate_coherent
from crossdock.placement.costs.cost import Workload
from crossdock.placement.costs.evaluate import Evaluation, evaluate
from crossdock.placement.records.affinity import Affinity
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import Trace
from crossdock.placement.solvers import SOLVERS, auto, check_mode, check_seconds
from crossdock.placement.solvers.certificates.bounds import copies_to_devices, lower_bound
from crossdock.placement.solvers.certificates.certificate import certified
from crossdock.placement.solvers.problem import Constraints, Problem, Solution
from crossdock.placement.solvers.solution import cost_of, device_loads


@dataclass(frozen=True)
class Row:
    """One plan on one trace; the JSON keys of DESIGN's `plan solve|compare`, and `cost`, `load_max`, `plan`.

    cost_s       predicted seconds of a step, by the evaluator
    cost         the objective's value, tokens at home on every device alike; None for a plan with replicas
    bound        proven lower bound on `cost` for this trace over plans without replicas; None where it does not apply
    gap_cost     (cost - bound) / cost; gap_moved and gap_kept: how far moved is above, and kept below, what the bound on copies allows,
                 as a fraction of moved and of the most that could be kept; under objective hops of hops and of steps without one
    load_max     the busiest device over the mean, in the worst layer; load_max_over_mean is the mean over layers
    solve_s, stopped_by   None for a plan that was read from a file, and on a trace that was not solved for
    """

    method: str
    cost_s: float
    moved: float
    kept: float
    devices_per_token: float
    nodes_per_token: float
    cross_device_hops: float
    cross_node_hops: float
    load_max_over_mean: float
    bound: float | None
    gap_cost: float | None
    gap_moved: float | None
    gap_kept: float | None
    solve_s: float | None
    stopped_by: str | None
    cost: float | None
    load_max: float
    plan: str

    def as_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A plan under comparison: solved here (`solution`), or read from a file."""

    label: str
    plan: Plan
    solution: Solution | None = None
    solve_s: float | None = None


@dataclass(frozen=True, eq=False)
class Refusal:
    """A method that gave no plan, and why: it is not for problems of this size or kind, or found none that keeps to the constraints."""

    method: str
    error: CrossdockError

    def as_json(self) -> dict[str, object]:
        return {"method": self.method, "exit_code": self.error.exit_code, "reason": str(self.error)}


def solved(problem: Problem, methods: Sequence[str], seconds: float, seed: int) -> tuple[list[Candidate], list[Refusal]]:
    """Each method's plan, in this order, and the methods that gave none; auto starts from those before it. A load cap and pins bind the
    searches; the baselines and the published methods are shown for what they are."""
    check_seconds(seconds)
    candidates: list[Candidate] = []
    refusals: list[Refusal] = []
    for method in methods:
        started_s = time.perf_counter()
        others = [candidate.solution for candidate in candidates if candidate.solution is not None]
        try:
            check_mode(problem, method)
            solution = auto.improved(problem, seconds, seed, others) if method == "auto" else SOLVERS[method](problem, seconds, seed)
        except (UsageError, InfeasiblePlan) as error:
            refusals.append(Refusal(method, error))
            continue
        candidates.append(Candidate(method, solution.plan, solution, time.perf_counter() - started_s))
    return candidates, refusals


@dataclass(frozen=True)
class Proven:
    """Lower bounds over all plans with one copy of each expert: on the problem's objective, and on distinct devices per token and layer."""

    objective: float
    devices: float = 0.0


def proven(problem: Problem, seconds: float) -> Proven:
    """What `seconds` can prove; 0 for the quick bounds. Half of the time goes to devices where the objective is another one.

    Raises `InfeasiblePlan` where no plan keeps to the constraints.
    """
    if seconds <= 0:
        return Proven(lower_bound(problem))
    try:
        return _certified(problem, seconds)
    except InfeasiblePlan:
        if not problem.wants_replicas:
            raise
        return Proven(lower_bound(problem))  # certificates are about one copy of each expert, and copies may do what these cannot


def _certified(problem: Problem, seconds: float) -> Proven:
    if problem.objective == "devices":
        return Proven(*[certified(problem, seconds)] * 2)
    if problem.mode == "coherent" or problem.objective == "hops" or problem.workload.dispatch == "flat":
        return Proven(certified(problem, seconds))  # moved traffic follows from the objective, or is the same for all plans
    return Proven(certified(problem, seconds / 2), certified(replace(problem, objective="devices"), seconds / 2))


def row_of(
    candidate: Candidate, problem: Problem, trace: Trace, *, fitted: bool, bound: float, least_devices: float = 0.0
) -> tuple[Row, Evaluation]:
    """Evaluate a candidate on `trace`, which `problem` counts; `fitted` where the candidate was solved for this very problem.

    `bound` is a lower bound on the problem's objective over plans with one copy of each expert, `least_devices` one on distinct devices.
    """
    plan, solution = candidate.plan, candidate.solution if fitted else None
    evaluation = evaluate(trace, plan, problem.topology, problem.workload)
    fits = bool((np.count_nonzero(plan.slots_LRS >= 0, axis=2) <= problem.slots_R).all())
    cost = _cost(problem, plan, solution)
    least_cost = gap_cost = gap_moved = gap_kept = None
    if fits and cost is not None and _keeps_to(problem, plan):
        least_cost = min(max(bound, solution.bound if solution and solution.bound is not None else -np.inf), cost)
        gap_cost = (cost - least_cost) / cost if cost > 0 else 0.0
        if problem.objective == "hops":
            most = float(problem.hop_cost_RR.max())
            gap_moved, gap_kept = gap_cost, (cost - least_cost) / (most - least_cost) if least_cost < most else 0.0
        elif not evaluation.exact:
            least = _least_moved(problem, least_cost if problem.objective == "devices" else least_devices)
            gap_moved = max(0.0, evaluation.moved - least) / evaluation.moved if evaluation.moved > 0 else 0.0
            gap_kept = max(0.0, evaluation.moved - least) / (1.0 - least) if least < 1 else 0.0
    rows_LR = evaluation.rows_LR
    row = Row(
        method=candidate.label,
        cost_s=evaluation.step_s,
        moved=evaluation.moved,
        kept=evaluation.kept,
        devices_per_token=evaluation.devices_per_token,
        nodes_per_token=evaluation.nodes_per_token,
        cross_device_hops=evaluation.cross_device_hops,
        cross_node_hops=evaluation.cross_node_hops,
        load_max_over_mean=evaluation.load_max_over_mean,
        bound=least_cost,
        gap_cost=gap_cost,
        gap_moved=gap_moved,
        gap_kept=gap_kept,
        solve_s=candidate.solve_s if fitted else None,
        stopped_by=solution.stopped_by if solution else None,
        cost=cost,
        load_max=float((rows_LR.max(axis=1) / np.maximum(rows_LR.mean(axis=1), 1e-300)).max()),
        plan=plan.digest,
    )
    return row, evaluation


def coherent_row_of(candidate: Candidate, problem: Problem, trace: Trace, *, fitted: bool, bound: float) -> tuple[Row, CoherentEvaluation]:
    """The same for tokens that stay with their experts: moved are those that change device at a layer, by distance devices and nodes.

    A trace without homes has its tokens at home on every device in turn.
    """
    plan, solution = candidate.plan, candidate.solution if fitted else None
    found = evaluate_coherent(with_homes_in_turn(trace, problem.num_devices), plan, problem.topology, problem.workload, problem.context)
    cost = _cost(problem, plan, solution)
    least_cost = gap_cost = None
    if cost is not None and _keeps_to(problem, plan):
        least_cost = min(max(bound, solution.bound if solution and solution.bound is not None else -np.inf), cost)
        gap_cost = (cost - least_cost) / cost if cost > 0 else 0.0
    peak_L = found.rows_LR.max(axis=1) / np.maximum(found.rows_LR.mean(axis=1), 1e-300)
    other_device_RR, other_node_RR = (problem.topology.link_class_RR >= link_class for link_class in (1, 2))
    hops = max(int(found.hops_LRR.sum()), 1)
    row = Row(
        method=candidate.label,
        cost_s=found.step_s,
        moved=found.moved,
        kept=1.0 - found.moved,
        devices_per_token=1.0,
        nodes_per_token=1.0,
        cross_device_hops=float(found.hops_LRR[:, other_device_RR].sum() / hops),
        cross_node_hops=float(found.hops_LRR[:, other_node_RR].sum() / hops),
        load_max_over_mean=float(peak_L.mean()),
        bound=least_cost,
        gap_cost=gap_cost,
        gap_moved=None,
        gap_kept=None,
        solve_s=candidate.solve_s if fitted else None,
        stopped_by=solution.stopped_by if solution else None,
        cost=cost,
        load_max=float(peak_L.max()),
        plan=plan.digest,
    )
    return row, found


def _cost(problem: Problem, plan: Plan, solution: Solution | None) -> float | None:
    """The objective's value, which a solution of this very problem has already; None for a plan with replicas."""
    if plan.has_replicas:
        return None
    return cost_of(problem, plan.device_of_LE().astype(np.int64)) if solution is None else solution.cost


def with_homes_in_turn(trace: Trace, num_devices: int) -> Trace:
    """The trace as it is where it knows homes, else with its tokens at home on every device in turn."""
    if trace.home_T is not None:
        return trace
    return replace(trace, home_T=np.arange(trace.num_tokens, dtype=np.int32) % np.int32(num_devices))


def problem_for(affinity: Affinity, like: Problem) -> Problem:
    """The same question about other routing, without a load cap or pins: for scoring plans, not for solving."""
    asked = like.constraints
    room = Constraints(slots=asked.slots, spare_slots=asked.spare_slots, spare_bytes=asked.spare_bytes, replicas=asked.replicas)
    return replace(like, affinity=affinity, constraints=room, also=())


def describe(trace: Trace, path: str, topology: Topology, workload: Workload, problem: Problem) -> dict[str, object]:
    """The head of the JSON: what was compared, and under which assumptions."""
    return {
        "trace": {
            "path": path,
            "digest": trace.digest,
            "tokens": trace.num_tokens,
            "layers": trace.num_layers,
            "experts": trace.num_experts,
            "top_k": trace.top_k,
            "homes": trace.home_T is not None,
        },
        "topology": {"name": topology.name, "digest": topology.digest, "devices": topology.num_devices, "nodes": topology.num_nodes},
        "mode": problem.mode,
        "objective": problem.objective,
        "workload": workload.to_mapping(),
    }


def _keeps_to(problem: Problem, plan: Plan) -> bool:
    """Whether the plan is one of those that a bound under the problem's load cap and pins is about."""
    cap = problem.constraints.load_cap
    if any(plan.slot_LRE[pin.layer, pin.device, pin.expert] < 0 for pin in problem.constraints.pins):
        return False
    load_LR = device_loads(problem, plan)
    return cap is None or bool((load_LR.max(axis=1) <= cap * load_LR.mean(axis=1) * (1 + 1e-9)).all())


def _least_moved(problem: Problem, bound: float) -> float:
    """A lower bound on the evaluator's `moved` for homes anywhere alike; `bound` is one on distinct devices per token and layer."""
    R, rows = problem.num_devices, float(problem.affinity.load_LE.sum())
    if problem.workload.dispatch == "flat" or rows == 0:
        return (R - 1) / R
    copies = max(float(copies_to_devices(problem).sum()), bound * problem.affinity.num_tokens * problem.num_layers)
    return copies * (R - 1) / R / rows
