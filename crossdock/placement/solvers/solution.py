"""From an assignment of experts to devices to a `Solution`: the plan, its cost on the affinity, and a proven bound."""

import numpy as np
from numpy.typing import NDArray

from crossdock.placement.cost import step_cost
from crossdock.placement.plan import Plan
from crossdock.placement.problem import Problem, Solution
from crossdock.placement.solvers.bounds import lower_bound
from crossdock.placement.trace import NO_EXPERT

IntArray = NDArray[np.int64]
OPTIMAL_GAP = 1e-9  # relative; below it cost and bound are equal but for rounding


def solution_of(
    problem: Problem,
    device_LE: IntArray,
    *,
    method: str,
    seed: int,
    seconds: float,
    stopped_by: str,
    bound: float | None = None,
    proven: bool = False,
) -> Solution:
    """Wrap an assignment. `bound` is a bound that the method has; the cheap one of `bounds.py` stands in where it is higher, and the cost
    itself where the method has `proven` the plan to be the best there is."""
    cost = cost_of(problem, device_LE)
    best_bound = cost if proven else min(max(lower_bound(problem), bound if bound is not None else -np.inf), cost)
    plan = Plan.from_devices(
        device_LE,
        problem.num_devices,
        problem.constraints.slots,
        mode=problem.mode,
        objective=problem.objective,
        method=method,
        seed=seed,
        topology_hash=problem.topology.digest,
        trace_hash=problem.affinity.trace_digest,
        cost=cost,
        bound=best_bound,
    )
    optimal = cost - best_bound <= OPTIMAL_GAP * abs(cost)
    return Solution(plan, cost, best_bound, seconds, "optimal" if optimal else stopped_by)


def cost_of(problem: Problem, device_LE: IntArray) -> float:
    """The objective under `device_LE`, straight from the affinity: the slow and obvious counterpart of `price.py`."""
    affinity, topology, R = problem.affinity, problem.topology, problem.num_devices
    if problem.objective == "hops":
        return hops_of(problem, device_LE)
    if problem.objective == "nodes":
        copies_LN = copies_to(problem, np.array(topology.node_of_R)[device_LE], topology.num_nodes)
        return float(copies_LN.sum() / (affinity.num_tokens * affinity.num_layers))
    copies_LR = copies_to(problem, device_LE, R)
    if problem.objective == "devices":
        return float(copies_LR.sum() / (affinity.num_tokens * affinity.num_layers))
    rows_LR = np.stack([np.bincount(device_E, load_E, R) for device_E, load_E in zip(device_LE, affinity.load_LE, strict=True)])
    sent_LR = copies_LR if problem.workload.dispatch == "deduplicated" else rows_LR
    scale = problem.tokens_per_trace_token
    copies_LRR = np.repeat(sent_LR[:, None, :], R, axis=1) * (scale / R)
    return step_cost(copies_LRR, rows_LR * scale, topology, problem.workload)


def copies_to(problem: Problem, place_LE: IntArray, num_places: int) -> IntArray:
    """[L, places]: copies of the whole trace to each place, one for every token and distinct place of its experts."""
    copies = []
    for sets, place_E in zip(problem.affinity.sets, place_LE, strict=True):
        place_UK = np.append(place_E, num_places)[np.where(sets.experts_UK == NO_EXPERT, problem.num_experts, sets.experts_UK)]
        copies.append([int(sets.count_U[(place_UK == place).any(axis=1)].sum()) for place in range(num_places)])
    return np.array(copies, dtype=np.int64)


def hops_of(problem: Problem, device_LE: IntArray) -> float:
    """Mean over consecutive layers of what the step from the first choice's device to the next costs; 0 where there is one layer."""
    transitions_LEE, hop_cost_RR = problem.affinity.transitions_LEE, problem.hop_cost_RR
    cost = 0.0
    for transitions_EE, before_E, after_E in zip(transitions_LEE, device_LE, device_LE[1:], strict=False):
        cost += float((transitions_EE * hop_cost_RR[np.ix_(before_E, after_E)]).sum())
    return cost / max(int(transitions_LEE.sum()), 1)
