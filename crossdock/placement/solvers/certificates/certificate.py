"""Certificates: the best proven lower bound on a problem's objective that a given time allows, for all plans with one copy of each expert.

hops       co-location bounds (`colocation.py`) for groups of a device and, where hops between nodes cost more, for groups of a node; they
           know the load cap. Devices, and nodes, need equally many slots
devices    the linear relaxation of `columns.py`, which knows load cap and pins, where the sets of experts can be listed. Else that of
           `generated.py`, which searches for them, and the convex one of `together.py`, which is weaker but knows the load cap and takes
           larger groups. Devices need equally many slots
nodes      those of `generated.py` and `together.py` for groups of a node, which need equally many slots
seconds    the copies that these prove, through the linear program of `bounds.py`
all        else, and never less than, the bounds of `bounds.py`, which cost milliseconds
"""

import numpy as np
from numpy.typing import NDArray

from crossdock.placement.solvers import columns
from crossdock.placement.solvers.certificates import generated, together
from crossdock.placement.solvers.certificates.bounds import copies_to_devices, copies_to_nodes, layer_seconds, lower_bound
from crossdock.placement.solvers.certificates.colocation import most_kept
from crossdock.placement.solvers.problem import Problem
from crossdock.placement.solvers.search.layer_search import Deadline
from crossdock.placement.solvers.search.price import has_two_hops

FloatArray = NDArray[np.float64]

SEARCH_PARTS = 1.2  # of the time, one part for the search for sets and what is left for layers that it did not finish
NODE_SHARE = 1.5  # one part in so many of the time goes to the bound on hops between nodes, which count for most


def certified(problem: Problem, seconds: float) -> float:
    """The bound. Raises `InfeasiblePlan` where it turns out that no plan keeps to the constraints."""
    deadline, cheap = Deadline(seconds), lower_bound(problem)
    if problem.objective == "devices" and not columns.unsuited(problem):
        answers = columns.solve_layers(problem, deadline, bounds_only=True)
        return max(cheap, sum(answer.bound for answer in answers) / (problem.affinity.num_tokens * problem.num_layers))
    if problem.objective == "devices":
        return max(cheap, float(_copies_to_devices(problem, deadline).sum()) / (problem.affinity.num_tokens * problem.num_layers))
    if problem.objective == "nodes":
        return max(cheap, float(_copies_to_nodes(problem, deadline).sum()) / (problem.affinity.num_tokens * problem.num_layers))
    if problem.objective == "seconds" and problem.mode == "home" and problem.workload.dispatch != "flat":
        return max(cheap, _seconds(problem, deadline))
    if problem.objective == "hops" and problem.affinity.transitions_LEE.sum():
        return max(cheap, _hops(problem, deadline))
    return cheap


def _copies_to_devices(problem: Problem, deadline: Deadline) -> FloatArray:
    """[L]: copies to distinct devices, at least; layer by layer the better of the cheap bound and of the relaxation."""
    cheap_L, slots = copies_to_devices(problem), set(problem.slots_R.tolist())
    if len(slots) > 1 or slots == {1}:  # of unequal devices no more is known, and where each has one expert nothing is left to know
        return cheap_L
    return np.maximum(cheap_L, _fewest_copies(problem, problem.num_devices, deadline))


def _copies_to_nodes(problem: Problem, deadline: Deadline) -> FloatArray:
    """[L]: the same for nodes; a device's load cap is its node's as well."""
    cheap_L, slots_N = copies_to_nodes(problem), np.bincount(problem.topology.node_of_R, problem.slots_R)
    if len(set(slots_N.tolist())) > 1:
        return cheap_L
    return np.maximum(cheap_L, _fewest_copies(problem, problem.topology.num_nodes, deadline))


def _fewest_copies(problem: Problem, num_groups: int, deadline: Deadline) -> FloatArray:
    """[L]: by the search for sets, and by the convex relaxation where that is not to the point or was not finished."""
    if num_groups == 1 or generated.unsuited(problem, num_groups):
        return together.fewest_copies(problem, num_groups, deadline, capped=True)
    capped = problem.constraints.load_cap is not None
    found_L, open_L = generated.fewest_copies(problem, num_groups, deadline.share(2.0 if capped else SEARCH_PARTS))
    if capped or open_L.any():
        found_L = np.maximum(found_L, together.fewest_copies(problem, num_groups, deadline, capped=True, asked_L=open_L | capped))
    return found_L


def _seconds(problem: Problem, deadline: Deadline) -> float:
    to_nodes_L = _copies_to_nodes(problem, deadline.share(NODE_SHARE)) if has_two_hops(problem) else None
    proven = layer_seconds(problem, _copies_to_devices(problem, deadline), to_nodes_L)
    return problem.workload.other_s + float(proven.sum())


def _hops(problem: Problem, deadline: Deadline) -> float:
    nodes = np.bincount(problem.topology.node_of_R)
    if len(set(problem.slots_R.tolist())) > 1:
        return 0.0
    levels = [(problem.num_devices, 1.0)]
    if problem.node_weight > 1.0 and len(nodes) > 1 and len(set(nodes.tolist())) == 1:
        levels.insert(0, (len(nodes), problem.node_weight - 1.0))
    total = 0.0
    for number, (num_groups, weight) in enumerate(levels):
        share = deadline if number == len(levels) - 1 else deadline.share(NODE_SHARE)
        total += weight * _least_hops(problem, num_groups, share)
    return total


def _least_hops(problem: Problem, num_groups: int, deadline: Deadline) -> float:
    """The fraction of steps that leave their group, at least. Slots left over are filled with experts that nobody uses."""
    vacancies = int(problem.slots_R.sum()) - problem.num_experts
    flow_PII = np.pad(problem.affinity.transitions_LEE.astype(np.float64), ((0, 0), (0, vacancies), (0, vacancies)))
    cap = problem.constraints.load_cap
    if cap is None:
        kept = most_kept(flow_PII, num_groups, deadline)
    else:
        load_LI = np.pad(problem.affinity.load_LE.astype(np.float64), ((0, 0), (0, vacancies)))
        kept = most_kept(flow_PII, num_groups, deadline, load_LI, cap * load_LI.sum(axis=1) / num_groups)
    return float(1.0 - kept / flow_PII.sum())
