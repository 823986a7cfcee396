"""From an assignment of experts to devices to a `Solution`: the plan, its cost on the affinity, and a proven bound."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from crossdock.errors import UsageError
from crossdock.placement.costs.cost import BlockCost, block_cost, step_seconds
from crossdock.placement.costs.hops import two_hops
from crossdock.placement.costs.replication import gradient_bytes, gradient_seconds
from crossdock.placement.records.plan import EMPTY, Plan, choose_replica
from crossdock.placement.records.trace import NO_EXPERT
from crossdock.placement.solvers import coherent
from crossdock.placement.solvers.certificates.bounds import lower_bound
from crossdock.placement.solvers.problem import Problem, Solution
from crossdock.placement.solvers.search.price import has_two_hops
from crossdock.placement.solvers.search.swaps import copies_per_place

FloatArray = NDArray[np.float64]
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
        problem.plan_slots,
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


def solution_of_slots(problem: Problem, slots_LRS: IntArray, *, method: str, seed: int, seconds: float, stopped_by: str) -> Solution:
    """Wrap slots that may hold replicas; no bound is known for plans with replicas."""
    held_LRS = slots_LRS != EMPTY
    if np.count_nonzero(held_LRS) == problem.num_layers * problem.num_experts:
        layer_H, device_H, slot_H = np.nonzero(held_LRS)
        device_LE = np.empty((problem.num_layers, problem.num_experts), dtype=np.int64)
        device_LE[layer_H, slots_LRS[layer_H, device_H, slot_H]] = device_H
        return solution_of(problem, device_LE, method=method, seed=seed, seconds=seconds, stopped_by=stopped_by)
    fields = {"mode": problem.mode, "objective": problem.objective, "method": method, "seed": seed}
    hashes = {"topology_hash": problem.topology.digest, "trace_hash": problem.affinity.trace_digest}
    plan = Plan(slots_LRS.astype(np.int32), problem.num_experts, **fields, **hashes)  # type: ignore[arg-type]
    cost = cost_of_plan(problem, plan)
    return Solution(replace(plan, cost=cost), cost, None, seconds, stopped_by)


def cost_of_plan(problem: Problem, plan: Plan) -> float:
    """The objective under any plan: the mean over homes, each of which uses its copy of every expert (`choose_replica`)."""
    if not plan.has_replicas:
        return cost_of(problem, plan.device_of_LE().astype(np.int64))
    if problem.mode == "coherent":
        raise UsageError(f"method {plan.method} made replicas, which mode coherent has no price for; ask for fewer slots, or for mode home")
    device_LRE = (choose_replica(plan, problem.topology.node_of_R) // plan.slots_per_device).astype(np.int64)
    homes = [device_LRE[:, home] for home in range(problem.num_devices)]
    if problem.objective != "seconds":
        return float(np.mean([cost_of(problem, device_LE) for device_LE in homes]))
    R, load_LE, node_R = problem.num_devices, problem.affinity.load_LE, np.array(problem.topology.node_of_R)
    rows = [[np.bincount(device_E, load_E, R) for device_E, load_E in zip(device_LE, load_LE, strict=True)] for device_LE in homes]
    copies = [copies_to(problem, device_LE, R) for device_LE in homes]
    node_copies = [copies_to(problem, node_R[device_LE], problem.topology.num_nodes) for device_LE in homes]
    tokens_s = _step_s(problem, *(np.stack([np.asarray(count) for count in counts], axis=1) / R for counts in (rows, copies, node_copies)))
    return tokens_s + float(gradient_seconds(gradient_bytes(plan, problem.workload), problem.topology))


def device_loads(problem: Problem, plan: Plan) -> NDArray[np.float64]:
    """[L, R]: rows of the trace on each device, tokens at home on every device alike."""
    R, load_LE = problem.num_devices, problem.affinity.load_LE
    device_LRE = choose_replica(plan, problem.topology.node_of_R) // plan.slots_per_device
    loads = [
        [np.bincount(device_E, load_E, R) for device_E in (device_RE if plan.has_replicas else device_RE[:1])]
        for device_RE, load_E in zip(device_LRE, load_LE, strict=True)
    ]
    return np.asarray(np.array(loads).mean(axis=1))


def cost_of(problem: Problem, device_LE: IntArray) -> float:
    """The objective under `device_LE`, straight from the affinity: the slow and obvious counterpart of `price.py`."""
    affinity, topology, R = problem.affinity, problem.topology, problem.num_devices
    if problem.objective == "hops":
        return hops_of(problem, device_LE)
    if coherent.is_about(problem):
        return coherent.cost_of(problem, device_LE)
    if problem.objective == "nodes":
        copies_LN = copies_to(problem, np.array(topology.node_of_R)[device_LE], topology.num_nodes)
        return float(copies_LN.sum() / (affinity.num_tokens * affinity.num_layers))
    copies_LR = copies_to(problem, device_LE, R)
    if problem.objective == "devices":
        return float(copies_LR.sum() / (affinity.num_tokens * affinity.num_layers))
    rows_LR = np.stack([np.bincount(device_E, load_E, R) for device_E, load_E in zip(device_LE, affinity.load_LE, strict=True)])
    copies_LN = copies_to(problem, np.array(topology.node_of_R)[device_LE], topology.num_nodes)
    each = (counts / R for counts in (rows_LR, copies_LR, copies_LN))
    rows_LRR, copies_LRR, copies_LRN = (np.broadcast_to(counts[:, None, :], (len(counts), R, counts.shape[1])) for counts in each)
    return _step_s(problem, rows_LRR, copies_LRR, copies_LRN)


def _step_s(problem: Problem, rows_LRR: FloatArray, copies_LRR: FloatArray, copies_LRN: FloatArray) -> float:
    """Seconds of a step from counts of the whole trace, home by home: rows and copies to devices, and copies to nodes."""
    topology, workload, scale = problem.topology, problem.workload, problem.tokens_per_trace_token

    def block(rows_RR: FloatArray, copies_RR: FloatArray, copies_RN: FloatArray) -> BlockCost:
        sent_RR = rows_RR if workload.dispatch == "flat" else copies_RR
        hops = two_hops(sent_RR, copies_RN, topology.node_of_R) if has_two_hops(problem) else sent_RR[None]
        first, *then = (hop_RR * scale for hop_RR in hops)
        return block_cost(first, rows_RR.sum(axis=0) * scale, topology, workload, *then)

    return step_seconds(BlockCost.of_layers(map(block, rows_LRR, copies_LRR, copies_LRN)), workload)


def copies_to(problem: Problem, place_LE: IntArray, num_places: int) -> IntArray:
    """[L, places]: copies of the whole trace to each place, one for every token and distinct place of its experts."""
    copies = []
    for sets, place_E in zip(problem.affinity.sets, place_LE, strict=True):
        member_UK = np.where(sets.experts_UK == NO_EXPERT, problem.num_experts, sets.experts_UK)
        copies.append(copies_per_place(member_UK, sets.count_U, place_E, num_places))
    return np.array(copies).astype(np.int64)


def hops_of(problem: Problem, device_LE: IntArray) -> float:
    """Mean over consecutive layers of what the step from the first choice's device to the next costs; 0 where there is one layer."""
    transitions_LEE, hop_cost_RR = problem.affinity.transitions_LEE, problem.hop_cost_RR
    cost = 0.0
    for transitions_EE, before_E, after_E in zip(transitions_LEE, device_LE, device_LE[1:], strict=False):
        cost += float((transitions_EE * hop_cost_RR[np.ix_(before_E, after_E)]).sum())
    return cost / max(int(transitions_LEE.sum()), 1)
