"""Method replicas: copies of hot experts in the slots that a memory budget leaves, where they shorten the step by more than they cost.

What a copy gains depends on its layer alone: the busiest device computes less, and homes near the copy send less. What it costs is
shared by all layers: the sums of the copies' gradients travel together (`placement.replication`). So first every layer is searched by
itself, one copy after another, each the best at hand, with the gradients at a mean price; then the numbers of copies of all layers are
chosen together under the exact price. A base plan's own experts stay where they are, so that its pins hold, and the answer is never
worse than the base.

Under objectives devices and nodes copies cost nothing but their slots.
"""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from crossdock.errors import InfeasiblePlan, UsageError
from crossdock.placement.costs.replication import gradient_seconds, layer_gradient_bytes
from crossdock.placement.records.plan import EMPTY
from crossdock.placement.solvers import anneal
from crossdock.placement.solvers.problem import Problem, Solution
from crossdock.placement.solvers.search import starts
from crossdock.placement.solvers.search.copied_layer import Bool, CopiedLayer, FloatArray, IntArray
from crossdock.placement.solvers.search.layer_search import Deadline
from crossdock.placement.solvers.solution import solution_of_slots

EXPERTS_TRIED = 4  # of each of the busiest devices
PATIENCE = 3  # copies in a row that lower nothing: the next one may, as when two devices are equally busy
LEAST_GAIN = 1e-9  # below this share of the step, differences are rounding
BASE_SHARE = 0.5  # of the time, for the plan that copies are added to


def has_room(problem: Problem) -> bool:
    """Whether the problem leaves slots for copies and prices them."""
    return problem.wants_replicas and problem.mode == "home" and problem.objective != "hops" and _most_copies(problem) > 0


def check(problem: Problem) -> None:
    """Raise `UsageError` where the problem leaves no room for copies."""
    if not has_room(problem):
        raise UsageError(
            "method replicas has no slots for copies, or objective hops or mode coherent, which have no price for them; "
            "give --spare-slots, --replicas or more --slots, and objective seconds, devices or nodes"
        )


def solve(problem: Problem, seconds: float, seed: int) -> Solution:
    """Search a plan with one copy of each expert, half of the time within as few slots as it needs, and add copies to it.

    Raises `UsageError` where the problem leaves no room for copies, and `InfeasiblePlan` where no plan within the load cap was found.
    """
    check(problem)
    deadline = Deadline(seconds)
    bases = [base(within_fewest_slots(problem), seed, deadline.share(1.0 / BASE_SHARE))]
    return best_of(problem, bases, seed, deadline, "replicas")


def best_of(problem: Problem, bases: list[IntArray], seed: int, deadline: Deadline, method: str) -> Solution:
    """Copies, those that pins ask for first, added to each of the plans `bases`, slots [L, R, S] each; the best that came out."""
    solutions: list[Solution] = []
    broken: list[InfeasiblePlan] = []
    for turn, slots_LRS in enumerate(bases):
        share = deadline.share(len(bases) - turn)
        try:
            found_LRE, stopped_by = add_copies(problem, _holds(problem, starts.with_pinned_copies(problem, slots_LRS)), share)
        except InfeasiblePlan as error:
            broken.append(error)
            continue
        slots = _slots(problem, found_LRE)
        found = solution_of_slots(problem, slots, method=method, seed=seed, seconds=deadline.elapsed_s, stopped_by=stopped_by)
        solutions.append(found)
    if not solutions:
        raise broken[0]
    return replace(min(solutions, key=lambda solution: solution.cost), seconds=deadline.elapsed_s)


def add_copies(problem: Problem, holds_LRE: Bool, deadline: Deadline) -> tuple[Bool, str]:
    """`holds_LRE` bool [L, R, E] with the copies that pay, and why the search stopped.

    Raises `InfeasiblePlan` where the load cap is broken with them as well.
    """
    paths = []
    for number, holds_RE in enumerate(holds_LRE):
        paths.append(_path(CopiedLayer(problem, number, holds_RE), deadline.share(problem.num_layers - number)))
    length_L = _lengths(problem, paths, deadline)
    excess_L = [path.excess_A[length] for path, length in zip(paths, length_L, strict=True)]
    if max(excess_L) > 0:
        layer = int(np.argmax(excess_L))
        raise InfeasiblePlan(
            f"no plan found within load cap {problem.constraints.load_cap:g} in {np.count_nonzero(excess_L)} of {problem.num_layers} "
            f"layers, with up to {_most_copies(problem)} copies more than experts; layer {layer} is furthest from it; "
            "give a higher --load-cap, more slots or more seconds"
        )
    found_LRE = holds_LRE.copy()
    for number, (path, length) in enumerate(zip(paths, length_L, strict=True)):
        for expert, device in path.added[:length]:
            found_LRE[number, device, expert] = True
    return found_LRE, "seconds" if deadline.passed else "done"


@dataclass(frozen=True, eq=False)
class _Path:
    """Copies of one layer in the order in which they were added, and the layer after each number of them (A = 0, 1, ...): what breaks the
    load cap, its share of the objective, and bytes [A, R, R] of its copies' gradients in the first hop."""

    added: tuple[tuple[int, int], ...]
    excess_A: FloatArray
    value_A: FloatArray
    bytes_ARR: FloatArray


def _path(layer: CopiedLayer, deadline: Deadline) -> _Path:
    problem = layer.problem
    now = layer.priced()
    added: list[tuple[int, int]] = []
    excess, value, gradients = [now.excess_B[0]], [now.value_B[0]], [layer_gradient_bytes(layer.holds_RE, problem.workload)]
    guide, quiet = (now.excess_B[0], now.guide_B[0]), 0
    limit = _most_copies(problem) - (np.count_nonzero(layer.holds_RE) - problem.num_experts)
    while len(added) < limit and quiet < PATIENCE and not deadline.passed:
        best: tuple[tuple[float, float], int, int] | None = None
        for expert in layer.busy_experts(EXPERTS_TRIED).tolist():
            target_B = np.flatnonzero((layer.room_R > 0) & ~layer.holds_RE[:, expert])
            if len(target_B):
                priced = layer.with_copy(expert, target_B)
                chosen = priced.best()
                key = (float(priced.excess_B[chosen]), float(priced.guide_B[chosen]))
                best = min(best, (key, expert, int(target_B[chosen]))) if best else (key, expert, int(target_B[chosen]))
        if best is None:
            break
        key, expert, device = best
        quiet = 0 if key < guide else quiet + 1
        guide = min(guide, key)
        layer.add(expert, device)
        now = layer.priced()
        added.append((expert, device))
        excess.append(now.excess_B[0])
        value.append(now.value_B[0])
        gradients.append(layer_gradient_bytes(layer.holds_RE, problem.workload))
    return _Path(tuple(added), np.array(excess), np.array(value), np.stack(gradients))


def _lengths(problem: Problem, paths: list[_Path], deadline: Deadline) -> list[int]:
    """How many copies of each path to keep: as little above the load cap as can be, and then the lowest objective of all layers together.

    Layer by layer in turn, from no copies and from those that look best alone, until nothing changes.
    """
    least = [path.excess_A.min() for path in paths]
    allowed = [np.flatnonzero(path.excess_A <= lowest) for path, lowest in zip(paths, least, strict=True)]
    counts_gradients = problem.objective == "seconds"

    def settled(length_L: list[int]) -> tuple[float, list[int]]:
        length_L = list(length_L)
        total_RR = sum((path.bytes_ARR[length] for path, length in zip(paths, length_L, strict=True)), start=np.zeros(()))
        improved = True
        while improved:
            improved = False
            for number, path in enumerate(paths):
                rest_RR = total_RR - path.bytes_ARR[length_L[number]]
                value_A = path.value_A[allowed[number]]
                if counts_gradients:
                    value_A = value_A + gradient_seconds(rest_RR + path.bytes_ARR[allowed[number]], problem.topology)
                best = int(value_A.argmin())
                now = int(np.flatnonzero(allowed[number] == length_L[number])[0])
                if value_A[best] < value_A[now] * (1 - LEAST_GAIN):
                    length_L[number], improved = int(allowed[number][best]), True
                    total_RR = rest_RR + path.bytes_ARR[length_L[number]]
            if deadline.passed:
                break
        value = sum(path.value_A[length] for path, length in zip(paths, length_L, strict=True))
        return float(value) + (float(gradient_seconds(total_RR, problem.topology)) if counts_gradients else 0.0), length_L

    fewest = [int(lengths[0]) for lengths in allowed]
    alone = [int(lengths[path.value_A[lengths].argmin()]) for path, lengths in zip(paths, allowed, strict=True)]
    return min(settled(fewest), settled(alone))[1]


def base(problem: Problem, seed: int, deadline: Deadline) -> IntArray:
    """Slots of a plan with one copy of each expert; it may break the load cap, which copies may mend."""
    placed_L, _ = anneal.search_layers(problem, seed, deadline, [starts.random(problem, seed)])
    device_LE = np.stack([placed.device_I[: problem.num_experts] for placed in placed_L])
    return slots_of(problem, device_LE)


def within_fewest_slots(problem: Problem) -> Problem:
    """The same problem without room for copies, as far as memory and pins allow that."""
    constraints = problem.constraints
    pinned = Counter((pin.layer, pin.device) for pin in set(constraints.pins))
    fewest = max([-(-problem.num_experts // problem.num_devices), *pinned.values()])
    if np.minimum(problem.slots_R, fewest).sum() < problem.num_experts:
        fewest = int(problem.slots_R.max())
    tight = replace(constraints, slots=fewest, spare_slots=None, spare_bytes=None, replicas=None)
    return replace(problem, constraints=tight)


def slots_of(problem: Problem, device_LE: IntArray) -> IntArray:
    """int64 [L, R, S] from the device of each expert."""
    return _slots(problem, device_LE[:, None, :] == np.arange(problem.num_devices)[None, :, None])


def _holds(problem: Problem, slots_LRS: IntArray) -> Bool:
    holds_LRE = np.zeros((problem.num_layers, problem.num_devices, problem.num_experts), dtype=bool)
    layer_H, device_H, slot_H = np.nonzero(slots_LRS != EMPTY)
    holds_LRE[layer_H, device_H, slots_LRS[layer_H, device_H, slot_H]] = True
    return holds_LRE


def _slots(problem: Problem, holds_LRE: Bool) -> IntArray:
    slots_LRS = np.full((*holds_LRE.shape[:2], int(problem.slots_R.max())), EMPTY, dtype=np.int64)
    layer_H, device_H, expert_H = np.nonzero(holds_LRE)
    slots_LRS[layer_H, device_H, (np.cumsum(holds_LRE, axis=2) - 1)[layer_H, device_H, expert_H]] = expert_H
    return slots_LRS


def _most_copies(problem: Problem) -> int:
    """Copies beyond the first of every expert that a layer may have."""
    room = int(np.minimum(problem.slots_R, problem.num_experts).sum()) - problem.num_experts
    asked = problem.constraints.replicas
    return room if asked is None else min(room, asked)
