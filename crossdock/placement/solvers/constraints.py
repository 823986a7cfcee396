"""Whether a plan keeps to a problem's constraints, whoever made it: published methods and baselines know few of them."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from crossdock.errors import InfeasiblePlan
from crossdock.placement.records.plan import Plan
from crossdock.placement.solvers.problem import Problem, Solution
from crossdock.placement.solvers.solution import device_loads


def check_constraints(problem: Problem, solution: Solution) -> None:
    """Raise `InfeasiblePlan`, naming the constraint, where the solution breaks one."""
    broken = broken_constraint(problem, solution)
    if broken is not None:
        raise InfeasiblePlan(broken)


def broken_constraint(problem: Problem, solution: Solution) -> str | None:
    """The constraint that the solution breaks, with the numbers and the remedy; None where it keeps to all."""
    checks: tuple[Callable[[Problem, Plan], str | None], ...] = (_pins, _slots, _replicas, _load_cap)
    for check in checks:
        broken = check(problem, solution.plan)
        if broken is not None:
            return f"method {solution.plan.method} {broken}"
    return None


def load_peaks(problem: Problem, solution: Solution) -> list[float]:
    """Per layer, the busiest device's load over the mean."""
    return _peaks(problem, solution.plan)


def _peaks(problem: Problem, plan: Plan) -> list[float]:
    load_LR = device_loads(problem, plan)
    return (load_LR.max(axis=1) / np.maximum(load_LR.mean(axis=1), 1e-300)).tolist()


def _pins(problem: Problem, plan: Plan) -> str | None:
    for pin in problem.constraints.pins:
        if plan.slot_LRE[pin.layer, pin.device, pin.expert] < 0:
            return f"breaks pins: layer {pin.layer} has no copy of expert {pin.expert} on device {pin.device}; " + (
                "unpin some" if plan.method == "auto" else "use method auto"
            )
    return None


def _slots(problem: Problem, plan: Plan) -> str | None:
    held_LR = np.count_nonzero(plan.slots_LRS >= 0, axis=2)
    if (held_LR <= problem.slots_R).all():
        return None
    layer, device = np.argwhere(held_LR > problem.slots_R)[0]
    return (
        f"breaks slots: device {device} holds {held_LR[layer, device]} experts of layer {layer} and may hold "
        f"{problem.slots_R[device]} (slots and memory); use method auto"
    )


def _replicas(problem: Problem, plan: Plan) -> str | None:
    asked = problem.constraints.replicas
    copies_L = np.count_nonzero(plan.slots_LRS >= 0, axis=(1, 2)) - plan.num_experts
    if asked is None or copies_L.max() <= asked:
        return None
    return (
        f"breaks replicas: layer {int(copies_L.argmax())} has {copies_L.max()} copies beyond the first of every expert and may have "
        f"{asked}; use method auto or replicas"
    )


def _load_cap(problem: Problem, plan: Plan) -> str | None:
    cap = problem.constraints.load_cap
    if cap is None:
        return None
    for number, affinity in enumerate([problem.affinity, *problem.also]):
        peaks = _peaks(replace(problem, affinity=affinity, also=()), plan)
        if max(peaks) > cap + 1e-9:
            where = f" on routing {number + 1} of {len(problem.also) + 1}" if problem.also else ""
            return (
                f"loads a device of layer {peaks.index(max(peaks))} with {max(peaks):.3f} of the mean{where}, "
                f"above load cap {cap:g}; use method auto, or a higher cap"
            )
    return None
