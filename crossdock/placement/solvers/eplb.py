"""Method eplb: DeepSeek's expert-parallel load balancer (deepseek-ai/EPLB, 2025), hierarchical over nodes or global.

Per layer: (1) experts are packed onto nodes, (2) within each node the slots beyond one copy each go to replicas, always of the expert whose
load per copy is highest, (3) copies are packed onto the node's devices. Packing is heaviest first onto the least loaded with room. With one
node steps 2 and 3 are EPLB's global policy, which `eplb_global` applies to any topology. Replicas are made only where the constraints name
more slots than one copy of each expert needs. Groups of experts, which the original keeps in one node, are single experts here: a trace
does not name groups. A copy that would stand beside its twin is left out. Traffic is ignored.
"""

import numpy as np
from numpy.typing import NDArray

from crossdock.placement.records.plan import EMPTY
from crossdock.placement.solvers.problem import Problem, Solution
from crossdock.placement.solvers.search.layer_search import Deadline
from crossdock.placement.solvers.solution import solution_of_slots

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def solve(problem: Problem, seconds: float, seed: int) -> Solution:
    """The hierarchical policy. No search: `seconds` and `seed` change nothing."""
    return _solved(problem, np.array(problem.topology.node_of_R), "eplb", seconds, seed)


def solve_global(problem: Problem, seconds: float, seed: int) -> Solution:
    """The global policy: nodes are ignored."""
    return _solved(problem, np.zeros(problem.num_devices, dtype=np.int64), "eplb_global", seconds, seed)


def _solved(problem: Problem, node_R: IntArray, method: str, seconds: float, seed: int) -> Solution:
    clock = Deadline(seconds)
    slots_LRS = np.full((problem.num_layers, problem.num_devices, int(problem.slots_R.max())), EMPTY, dtype=np.int64)
    for layer, load_E in enumerate(problem.affinity.load_LE):
        _place(problem, node_R, load_E.astype(np.float64), slots_LRS[layer])
    return solution_of_slots(problem, slots_LRS, method=method, seed=seed, seconds=clock.elapsed_s, stopped_by="done")


def _place(problem: Problem, node_R: IntArray, load_E: FloatArray, slots_RS: IntArray) -> None:
    """Fill the slots of one layer."""
    slots_N = np.bincount(node_R, problem.slots_R).astype(np.int64)
    spread = _even(len(load_E), slots_N) if problem.wants_replicas else slots_N
    node_E = pack(load_E, np.arange(len(load_E)), spread)
    for node in range(len(slots_N)):
        devices, experts = np.flatnonzero(node_R == node), np.flatnonzero(node_E == node)
        most = int(slots_N[node]) if problem.wants_replicas else len(experts)
        copies_X = replicated(load_E[experts], min(most, len(experts) * len(devices)))
        expert_C = np.repeat(experts, copies_X)
        device_C = pack(np.repeat(load_E[experts] / copies_X, copies_X), expert_C, problem.slots_R[devices])
        for place, device in enumerate(devices):
            held = np.sort(expert_C[device_C == place])
            slots_RS[device, : len(held)] = held


def replicated(load_X: FloatArray, num_copies: int) -> IntArray:
    """[X]: copies of each expert, one at least, the others one by one to the highest load per copy."""
    copies_X = np.ones(len(load_X), dtype=np.int64)
    for _ in range(num_copies - len(load_X)):
        copies_X[int((load_X / copies_X).argmax())] += 1
    return copies_X


def pack(weight_C: FloatArray, kind_C: IntArray, room_P: IntArray) -> IntArray:
    """[C]: the place of each item, heaviest first onto the lightest place with room and no item of its kind; -1 where there is none.

    With room for all items, only an item beside whose twins alone there is room is left out.
    """
    place_C = np.full(len(weight_C), EMPTY, dtype=np.int64)
    load_P, left_P = np.zeros(len(room_P)), room_P.copy()
    held: list[set[int]] = [set() for _ in room_P]
    for item in np.argsort(-weight_C, kind="stable"):
        kind = int(kind_C[item])
        allowed_P = (left_P > 0) & np.array([kind not in kinds for kinds in held])
        if allowed_P.any():
            place = int(np.where(allowed_P, load_P, np.inf).argmin())
            place_C[item] = place
            load_P[place] += weight_C[item]
            left_P[place] -= 1
            held[place].add(kind)
    return place_C


def _even(num_experts: int, slots_N: IntArray) -> IntArray:
    """[N]: how many different experts each node takes: shares of its slots, as even as whole numbers allow."""
    room_N = np.zeros_like(slots_N)
    for _ in range(num_experts):
        room_N[int(np.where(room_N < slots_N, room_N / np.maximum(slots_N, 1), np.inf).argmin())] += 1
    return room_N
