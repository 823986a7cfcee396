"""Solvers, one file for each method, in one table; every one is `(problem, seconds, seed) -> Solution`."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from crossdock.errors import InfeasiblePlan, UsageError
from crossdock.placement.problem import Problem, Solution
from crossdock.placement.solvers import anneal, auto, balance, coherent, columns, contiguous, dp, eplb, exflow, ilp, moetuner, random, sweep
from crossdock.placement.solvers.solution import device_loads

Solver = Callable[[Problem, float, int], Solution]

SOLVERS: dict[str, Solver] = {
    "contiguous": contiguous.solve,
    "random": random.solve,
    "balance": balance.solve,
    "eplb": eplb.solve,
    "eplb_global": eplb.solve_global,
    "exflow": exflow.solve,
    "moetuner": moetuner.solve,
    "dp": dp.solve,
    "sweep": sweep.solve,
    "anneal": anneal.solve,
    "columns": columns.solve,
    "ilp": ilp.solve,
    "auto": auto.solve,
}


HOME_ALONE = ("dp", "sweep", "anneal", "columns", "ilp")
"""Methods that price the seconds of tokens on their way home; elsewhere they have nothing to search by."""


def check_mode(problem: Problem, method: str) -> None:
    """Raise `UsageError` where `method` cannot price the problem's mode."""
    if method in HOME_ALONE and coherent.is_about(problem):
        raise UsageError(f"method {method} prices the seconds of tokens that return home; in mode coherent use auto, or objective hops")


def solve(problem: Problem, method: str, seconds: float = 10.0, seed: int = 0) -> Solution:
    """Solve `problem` with a method of the table. `seconds` caps the search; the same seed and the same iterations give the same plan.

    Raises `UsageError` for an unknown method and `InfeasiblePlan` where the method's plan breaks the load cap.
    """
    if method not in SOLVERS:
        raise UsageError(f"method is {method!r}; choose from {', '.join(SOLVERS)}")
    if not seconds > 0:
        raise UsageError(f"seconds is {seconds}; give more than 0")
    check_mode(problem, method)
    solution = SOLVERS[method](problem, seconds, seed)
    check_constraints(problem, solution)
    return solution


def load_peaks(problem: Problem, solution: Solution) -> list[float]:
    """Per layer, the busiest device's load over the mean."""
    load_LR = device_loads(problem, solution.plan)
    return (load_LR.max(axis=1) / np.maximum(load_LR.mean(axis=1), 1e-300)).tolist()


def check_constraints(problem: Problem, solution: Solution) -> None:
    """Raise `InfeasiblePlan`, naming the constraint, where the solution breaks one: published methods and baselines know few of them."""
    method = solution.plan.method
    for pin in problem.constraints.pins:
        if solution.plan.slot_LRE[pin.layer, pin.device, pin.expert] < 0:
            raise InfeasiblePlan(
                f"method {method} breaks pins: layer {pin.layer} has no copy of expert {pin.expert} on device {pin.device}; use method auto"
            )
    held_LR = np.count_nonzero(solution.plan.slots_LRS >= 0, axis=2)
    if (held_LR > problem.slots_R).any():
        layer, device = np.argwhere(held_LR > problem.slots_R)[0]
        raise InfeasiblePlan(
            f"method {method} breaks slots: device {device} holds {held_LR[layer, device]} experts of layer {layer} and may hold "
            f"{problem.slots_R[device]} (slots and memory); use method auto"
        )
    cap = problem.constraints.load_cap
    if cap is None:
        return
    for number, affinity in enumerate([problem.affinity, *problem.also]):
        peaks = load_peaks(replace(problem, affinity=affinity, also=()), solution)
        if max(peaks) > cap + 1e-9:
            where = f" on routing {number + 1} of {len(problem.also) + 1}" if problem.also else ""
            raise InfeasiblePlan(
                f"method {method} loads a device of layer {peaks.index(max(peaks))} with {max(peaks):.3f} of the mean{where}, "
                f"above load cap {cap:g}; use method auto, or a higher cap"
            )
