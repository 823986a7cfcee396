"""Assignments to start from, [L, E] device of each expert: consecutive blocks, a random draw, even load, experts that tokens use together.

All keep to slots and pins; none looks at the load cap, though `evened` mostly meets it.
"""

import numpy as np
from numpy.typing import NDArray

from crossdock.errors import InfeasiblePlan
from crossdock.placement.records.plan import EMPTY
from crossdock.placement.solvers.problem import Problem

IntArray = NDArray[np.int64]


def contiguous(problem: Problem) -> IntArray:
    """Consecutive experts on consecutive devices, as evenly as slots and pins allow."""
    return np.stack([_fill(pinned_E, np.repeat(np.arange(problem.num_devices), free_R)) for pinned_E, free_R in _layers(problem)])


def random(problem: Problem, seed: int) -> IntArray:
    """A uniform draw with as many experts on each device as `contiguous` puts there."""
    rng = np.random.default_rng(seed)
    return np.stack(
        [_fill(pinned_E, rng.permutation(np.repeat(np.arange(problem.num_devices), free_R))) for pinned_E, free_R in _layers(problem)]
    )


def balanced(problem: Problem) -> IntArray:
    """Heaviest expert first, each to the device that would finish its rows soonest and has a free slot (Graham 1969, LPT)."""
    device_LE = pinned_devices(problem)
    for layer in range(problem.num_layers):
        load_E, device_E = problem.affinity.load_LE[layer], device_LE[layer]
        pinned = device_E != EMPTY
        load_R = np.bincount(device_E[pinned], load_E[pinned], problem.num_devices)
        free_R = problem.slots_R - np.bincount(device_E[pinned], minlength=problem.num_devices)
        for expert in np.argsort(-load_E, kind="stable"):
            if device_E[expert] != EMPTY:
                continue
            finish_R = np.where(free_R > 0, (load_R + load_E[expert]) / problem.topology.flop_per_s_R, np.inf)
            device = int(finish_R.argmin())
            device_E[expert] = device
            load_R[device] += load_E[expert]
            free_R[device] -= 1
    return device_LE


def evened(problem: Problem) -> IntArray:
    """`balanced`, and then swaps with the busiest device while they lower the busier of the two: what a tight load cap asks for."""
    device_LE, pinned_LE = balanced(problem), pinned_devices(problem)
    for load_E, device_E, pinned_E in zip(problem.affinity.load_LE.astype(np.float64), device_LE, pinned_LE, strict=True):
        device_I = with_vacancies(device_E, problem.slots_R)
        load_I = np.append(load_E, np.zeros(len(device_I) - len(load_E)))
        free_I = np.append(pinned_E, np.full(len(device_I) - len(load_E), EMPTY)) == EMPTY
        for _ in range(len(device_I)):
            load_R = np.bincount(device_I, load_I, problem.num_devices)
            busiest = int(load_R.argmax())
            mine, theirs = (np.flatnonzero(free_I & side) for side in (device_I == busiest, device_I != busiest))
            if not len(mine) or not len(theirs):
                break
            lighter_XY = load_I[mine][:, None] - load_I[theirs]
            after_XY = np.maximum(load_R[busiest] - lighter_XY, load_R[device_I[theirs]] + lighter_XY)
            x, y = np.unravel_index(int(after_XY.argmin()), after_XY.shape)
            if after_XY[x, y] >= load_R[busiest]:
                break
            device_I[mine[x]], device_I[theirs[y]] = device_I[theirs[y]], busiest
        device_E[:] = device_I[: len(device_E)]
    return device_LE


def clustered(problem: Problem) -> IntArray:
    """Device by device, node by node: the heaviest expert left, then always the one that most tokens use beside those already there."""
    node_R = np.array(problem.topology.node_of_R)
    device_LE = pinned_devices(problem)
    for layer, (pinned_E, free_R) in enumerate(_layers(problem)):
        device_E = device_LE[layer]
        together_EE = problem.affinity.coactivation_LEE[layer].astype(np.float64)
        load_E = problem.affinity.load_LE[layer]
        left_E = pinned_E == EMPTY
        for device in np.argsort(node_R, kind="stable"):
            for _ in range(free_R[device]):
                placed_E = device_E != EMPTY
                device_of_placed = np.where(placed_E, device_E, 0)
                near_E = placed_E & (device_E == device)
                if not near_E.any():
                    near_E = placed_E & (node_R[device_of_placed] == node_R[device])
                score_E = together_EE[:, near_E].sum(axis=1) if near_E.any() else load_E.astype(np.float64)
                device_E[int(np.where(left_E, score_E, -1.0).argmax())] = device
                left_E = device_E == EMPTY
    return device_LE


def pinned_devices(problem: Problem) -> IntArray:
    """[L, E]: the device of each pinned expert, -1 of all others. An expert pinned twice takes the first; there are no replicas here."""
    device_LE = np.full((problem.num_layers, problem.num_experts), EMPTY, dtype=np.int64)
    for pin in reversed(problem.constraints.pins):
        device_LE[pin.layer, pin.expert] = pin.device
    return device_LE


def with_pinned_copies(problem: Problem, slots_LRS: IntArray) -> IntArray:
    """Slots [L, R, S] that hold every pinned copy, whatever they held: an expert that stands in its way goes to a device with room.

    Raises `InfeasiblePlan` where pins ask for more copies than slots and `replicas` allow.
    """
    _check_pinned_copies(problem)
    num_slots = max(slots_LRS.shape[2], int(problem.slots_R.max()))
    slots_LRS = np.pad(slots_LRS, ((0, 0), (0, 0), (0, num_slots - slots_LRS.shape[2])), constant_values=EMPTY)
    for pin in problem.constraints.pins:
        slots_RS = slots_LRS[pin.layer]
        held_R = (slots_RS != EMPTY).sum(axis=1)
        if pin.expert in slots_RS[pin.device]:
            continue
        if held_R[pin.device] < problem.slots_R[pin.device]:
            slots_RS[pin.device, int((slots_RS[pin.device] == EMPTY).argmax())] = pin.expert
            continue
        pinned = {other.expert for other in problem.constraints.pins if (other.layer, other.device) == (pin.layer, pin.device)}
        slot = next(slot for slot, expert in enumerate(slots_RS[pin.device]) if expert != EMPTY and int(expert) not in pinned)
        moved, slots_RS[pin.device, slot] = int(slots_RS[pin.device, slot]), pin.expert
        if (slots_RS == moved).any():
            continue  # another copy of it is left
        target = int((problem.slots_R - held_R).argmax())
        slots_RS[target, int((slots_RS[target] == EMPTY).argmax())] = moved
    return slots_LRS


def _check_pinned_copies(problem: Problem) -> None:
    most = int(problem.slots_R.sum()) - problem.num_experts
    if problem.constraints.replicas is not None:
        most = min(most, problem.constraints.replicas)
    for layer in range(problem.num_layers):
        pins = {(pin.expert, pin.device) for pin in problem.constraints.pins if pin.layer == layer}
        wanted = len(pins) - len({expert for expert, _ in pins})
        if wanted > most:
            raise InfeasiblePlan(
                f"pins of layer {layer} ask for {wanted} copies beyond the first of every expert, and slots and replicas allow {most}; "
                "unpin some, or give more slots or replicas"
            )


def with_vacancies(device_E: IntArray, slots_R: IntArray) -> IntArray:
    """[I]: the experts' devices, then a vacancy for every slot left."""
    left_R = slots_R - np.bincount(device_E, minlength=len(slots_R))
    return np.concatenate([device_E, np.repeat(np.arange(len(slots_R)), left_R)])


def _layers(problem: Problem) -> list[tuple[IntArray, IntArray]]:
    """Per layer: pinned devices [E], and how many of the other experts each device takes: the emptiest device always takes the next."""
    parts = []
    for pinned_E in pinned_devices(problem):
        taken_R = np.bincount(pinned_E[pinned_E != EMPTY], minlength=problem.num_devices)
        quota_R = taken_R.copy()
        for _ in range(int((pinned_E == EMPTY).sum())):
            quota_R[np.where(quota_R < problem.slots_R, quota_R, np.iinfo(np.int64).max).argmin()] += 1
        parts.append((pinned_E, quota_R - taken_R))
    return parts


def _fill(pinned_E: IntArray, device_X: IntArray) -> IntArray:
    """The unpinned experts take `device_X` in order."""
    device_E = pinned_E.copy()
    device_E[pinned_E == EMPTY] = device_X
    return device_E
