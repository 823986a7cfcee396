"""Method dp: proven optima for few experts per layer, by listing everything that a layer can look like.

A state is an assignment of a layer's experts to devices that keeps to slots, pins and load cap. Where layers are independent the best
state of every layer is the optimum. Objective hops is a shortest path through the layers. Devices that are interchangeable make states
equal up to their names: one state of each class stands at the head of a step, and all of them at its end,

    best[l + 1, class of q] = min over classes p and states q' of the class of q:  best[l, p] + hops(p, q')

which is exact because renaming the devices of all layers alike changes no hop (8 experts on 4 devices: 105 classes of 2,520 states).
"""

import itertools

import numpy as np
from numpy.typing import NDArray

from crossdock.errors import InfeasiblePlan, UsageError
from crossdock.placement.records.plan import EMPTY
from crossdock.placement.solvers.problem import Problem, Solution
from crossdock.placement.solvers.search import starts
from crossdock.placement.solvers.search.chain import greedy
from crossdock.placement.solvers.search.layer_search import Deadline
from crossdock.placement.solvers.search.price import Layer, layer_of, price_of
from crossdock.placement.solvers.search.recombine import interchangeable
from crossdock.placement.solvers.solution import solution_of

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

MAX_EXPERTS = 16
MAX_STATES = 70_000
MAX_TABLE = 200_000_000  # entries of one step's table of classes x states; it is made in parts
_PART = 1 << 22


def solve(problem: Problem, seconds: float, seed: int) -> Solution:
    """The optimum and its proof; nothing is random and nothing is cut short, `seconds` and `seed` change nothing.

    Raises `UsageError` where there are too many states and `InfeasiblePlan` where a layer has none.
    """
    check(problem)
    clock = Deadline(seconds)
    device_PE = states(problem)
    device_LE = _chained(problem, device_PE) if problem.objective == "hops" else _separate(problem, device_PE)
    return solution_of(problem, device_LE, method="dp", seed=seed, seconds=clock.elapsed_s, stopped_by="optimal", proven=True)


def check(problem: Problem) -> None:
    """Raise `UsageError` where the method cannot take the problem."""
    if why := unsuited(problem):
        raise UsageError(f"method dp {why}; use method auto")


def unsuited(problem: Problem) -> str:
    """Why the method cannot take the problem, or nothing."""
    if problem.num_experts > MAX_EXPERTS:
        return f"lists all placements of a layer, and {problem.num_experts} experts have too many (at most {MAX_EXPERTS})"
    count = _num_states(problem)
    if count > MAX_STATES:
        return f"would list {count:,} placements of every layer, above {MAX_STATES:,}"
    if problem.objective == "hops" and (problem.slots_R > 1).any() and count * max(count // len(_renamings(problem)), 1) > MAX_TABLE:
        return f"would compare {count:,} placements of every layer with those of the next, above {MAX_TABLE:,} pairs"
    return ""


def states(problem: Problem) -> IntArray:
    """[P, E]: every assignment of the experts to devices that keeps to the slots."""
    taken = np.zeros((1, problem.num_devices), dtype=np.int64)
    device_PE = np.zeros((1, 0), dtype=np.int64)
    for _ in range(problem.num_experts):
        parent, device = np.nonzero(taken < problem.slots_R)
        device_PE = np.column_stack([device_PE[parent], device])
        taken = taken[parent]
        taken[np.arange(len(device)), device] += 1
        left = problem.slots_R.sum() - device_PE.shape[1]
        keep = left >= problem.num_experts - device_PE.shape[1]
        device_PE, taken = (device_PE, taken) if keep else (device_PE[:0], taken[:0])
    return device_PE


def _num_states(problem: Problem) -> int:
    """How many rows `states` has, without making them: assignments by how full the devices are, device by device."""
    ways = [1] + [0] * problem.num_experts  # ways[n]: n given experts on the devices so far
    choose = [[0] * (problem.num_experts + 1) for _ in range(problem.num_experts + 1)]
    for n in range(problem.num_experts + 1):
        choose[n][0] = 1
        for k in range(1, n + 1):
            choose[n][k] = choose[n - 1][k - 1] + choose[n - 1][k]
    for slots in problem.slots_R.tolist():
        ways = [sum(ways[n - k] * choose[n][k] for k in range(min(slots, n) + 1)) for n in range(problem.num_experts + 1)]
    return ways[problem.num_experts]


def _allowed(problem: Problem, number: int, device_PE: IntArray) -> NDArray[np.bool_]:
    """Which states keep to the layer's pins and load cap."""
    pinned_E = starts.pinned_devices(problem)[number]
    allowed_P = ((pinned_E == EMPTY) | (device_PE == pinned_E)).all(axis=1)
    cap = problem.constraints.load_cap
    if cap is not None:
        for load_LE in problem.loads:
            load_PR = _loads(problem, load_LE[number], device_PE)
            allowed_P &= load_PR.max(axis=1) <= cap * load_PR.mean(axis=1) * (1 + 1e-12)
    if not allowed_P.any():
        raise InfeasiblePlan(
            f"layer {number}: none of the {len(device_PE):,} placements that keep to the slots keeps to "
            + ("the pins" if cap is None else f"load cap {cap:g}" + (" and the pins" if problem.constraints.pins else ""))
            + "; give a higher --load-cap, more slots or fewer pins"
        )
    return np.asarray(allowed_P)


def _loads(problem: Problem, load_E: IntArray, device_PE: IntArray) -> FloatArray:
    """[P, R]: rows of each device in each state."""
    return np.stack([(device_PE == device) @ load_E.astype(np.float64) for device in range(problem.num_devices)], axis=1)


def _separate(problem: Problem, device_PE: IntArray) -> IntArray:
    """Every layer's cheapest state."""
    price = price_of(problem)
    node_R = np.array(problem.topology.node_of_R)
    best = []
    for number in range(problem.num_layers):
        kept_PE = device_PE[_allowed(problem, number, device_PE)]
        touched_M = _touched_by_mask(layer_of(problem, number), problem.num_experts)
        bit_E = 1 << np.arange(problem.num_experts)
        mask_PR = np.stack([(kept_PE == device) @ bit_E for device in range(problem.num_devices)], axis=1)
        mask_PN = np.stack([(node_R[kept_PE] == node) @ bit_E for node in range(problem.topology.num_nodes)], axis=1)
        value_P = price.value(touched_M[mask_PR], touched_M[mask_PN], _loads(problem, problem.affinity.load_LE[number], kept_PE))
        best.append(kept_PE[int(value_P.argmin())])
    return np.stack(best)


def _touched_by_mask(layer: Layer, num_experts: int) -> FloatArray:
    """[2 ** E]: tokens that use any expert of each set of experts, a set given by its bits: all less those within the complement."""
    within_M = np.zeros(1 << num_experts)
    member_UK = np.minimum(layer.member_UK, num_experts)
    mask_U = np.where(member_UK < num_experts, 1 << np.minimum(member_UK, num_experts - 1), 0).sum(axis=1)
    np.add.at(within_M, mask_U, layer.count_U)
    for expert in range(num_experts):  # sums over subsets, one element at a time (Yates 1937)
        halves = within_M.reshape(-1, 2, 1 << expert)
        halves[:, 1] += halves[:, 0]
    return np.asarray(layer.count_U.sum() - within_M[::-1])


def _renamings(problem: Problem) -> IntArray:
    """[G, R]: the permutations of the devices that change no hop, no slot and no pin; the identity alone beyond 8 devices."""
    identity = np.arange(problem.num_devices)[None]
    if problem.constraints.pins or problem.num_devices > 8:
        return identity
    hop_cost_RR, slots_R = problem.hop_cost_RR, problem.slots_R
    order_GR = np.array(list(itertools.permutations(range(problem.num_devices))))
    order_GR = order_GR[(slots_R[order_GR] == slots_R).all(axis=1)]
    return order_GR[(hop_cost_RR[order_GR[:, :, None], order_GR[:, None, :]] == hop_cost_RR).all(axis=(1, 2))]


def _chained(problem: Problem, device_PE: IntArray) -> IntArray:
    """The shortest path through the layers' states."""
    R, E = problem.num_devices, problem.num_experts
    if interchangeable(problem) and (problem.slots_R == 1).all():
        return _one_each(problem, device_PE)
    class_P, head_C = _classes(problem, device_PE)
    order_P = np.argsort(class_P, kind="stable")  # states, class by class
    first_C = np.searchsorted(class_P[order_P], np.arange(len(head_C)))
    one_hot_PER = np.eye(R)[device_PE]
    head_cost = (one_hot_PER[head_C] @ problem.hop_cost_RR).reshape(len(head_C), E * R)  # cost of a hop from e to each device
    best_C = np.where(_allowed(problem, 0, device_PE)[head_C], 0.0, np.inf)
    steps: list[tuple[IntArray, IntArray]] = []
    for layer in range(1, problem.num_layers):
        transitions_EE = problem.affinity.transitions_LEE[layer - 1].astype(np.float64)
        arriving_PX = np.einsum("ef,pfr->per", transitions_EE, one_hot_PER, optimize=True).reshape(len(device_PE), E * R)[order_P]
        reached_P, came_from_P = np.empty(len(device_PE)), np.empty(len(device_PE), dtype=np.int64)
        part = max(1, _PART // len(head_C))
        for begin in range(0, len(device_PE), part):
            total_CQ = head_cost @ arriving_PX[begin : begin + part].T + best_C[:, None]
            came_from_P[begin : begin + part] = total_CQ.argmin(axis=0)
            reached_P[begin : begin + part] = total_CQ.min(axis=0)
        reached_P[~_allowed(problem, layer, device_PE)[order_P]] = np.inf
        best_C = np.minimum.reduceat(reached_P, first_C)
        chosen_C = np.array([begin + reached_P[begin:end].argmin() for begin, end in itertools.pairwise([*first_C, len(device_PE)])])
        steps.append((order_P[chosen_C], came_from_P[chosen_C]))
    return _walked_back(problem, device_PE, class_P, head_C, steps, int(best_C.argmin()))


def _one_each(problem: Problem, device_PE: IntArray) -> IntArray:
    """All states are one another's renamings: every step is a linear assignment behind the layer before."""
    for number in range(problem.num_layers):
        _allowed(problem, number, device_PE)
    return greedy(problem).device_LE


def _classes(problem: Problem, device_PE: IntArray) -> tuple[IntArray, IntArray]:
    """[P] class of each state, and [C] the state at the head of each class."""
    weight_E = problem.num_devices ** np.arange(problem.num_experts)
    key_P = device_PE @ weight_E
    for order_R in _renamings(problem):
        np.minimum(key_P, order_R[device_PE] @ weight_E, out=key_P)
    heads, class_P = np.unique(key_P, return_inverse=True)
    own_P = device_PE @ weight_E
    sorted_P = np.argsort(own_P)
    return class_P.reshape(-1), sorted_P[np.searchsorted(own_P[sorted_P], heads)]


def _walked_back(
    problem: Problem, device_PE: IntArray, class_P: IntArray, head_C: IntArray, steps: list[tuple[IntArray, IntArray]], last: int
) -> IntArray:
    """Devices of all layers from the classes and states of the best path, named anew so that consecutive layers fit.

    A step ends in state q' of a class whose head is q: the part of the path before it is renamed by the permutation that takes q' to q.
    """
    renamings = _renamings(problem)
    chosen: list[tuple[int, int]] = []  # (head of the layer, state that the step into it reached)
    position = last
    for reached_C, came_from_C in reversed(steps):
        chosen.append((int(head_C[position]), int(reached_C[position])))
        position = int(came_from_C[position])
    path = [device_PE[head_C[position]]]
    for head, reached in reversed(chosen):
        order = renamings[(renamings[:, device_PE[reached]] == device_PE[head]).all(axis=1).argmax()]
        path = [order[device_E] for device_E in path] + [device_PE[head]]
    return np.stack(path)
