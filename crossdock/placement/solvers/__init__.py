"""Solvers, one file for each method, in one table; every one is `(problem, seconds, seed) -> Solution`."""

from collections.abc import Callable

from crossdock.errors import InfeasiblePlan, UsageError
from crossdock.placement.problem import Problem, Solution
from crossdock.placement.solvers import anneal, balance, columns, contiguous, dp, ilp, random, sweep

Solver = Callable[[Problem, float, int], Solution]

SOLVERS: dict[str, Solver] = {
    "contiguous": contiguous.solve,
    "random": random.solve,
    "balance": balance.solve,
    "dp": dp.solve,
    "sweep": sweep.solve,
    "anneal": anneal.solve,
    "columns": columns.solve,
    "ilp": ilp.solve,
}


def solve(problem: Problem, method: str, seconds: float = 10.0, seed: int = 0) -> Solution:
    """Solve `problem` with a method of the table. `seconds` caps the search; the same seed and the same iterations give the same plan.

    Raises `UsageError` for an unknown method and `InfeasiblePlan` where the method's plan breaks the load cap.
    """
    if method not in SOLVERS:
        raise UsageError(f"method is {method!r}; choose from {', '.join(SOLVERS)}")
    if not seconds > 0:
        raise UsageError(f"seconds is {seconds}; give more than 0")
    solution = SOLVERS[method](problem, seconds, seed)
    check_load_cap(problem, solution)
    return solution


def load_peaks(problem: Problem, solution: Solution) -> list[float]:
    """Per layer, the busiest device's load over the mean."""
    peaks = []
    for device_E, load_E in zip(solution.plan.device_of_LE(), problem.affinity.load_LE, strict=True):
        load_R = [float(load_E[device_E == device].sum()) for device in range(problem.num_devices)]
        peaks.append(max(load_R) * problem.num_devices / max(sum(load_R), 1.0))
    return peaks


def check_load_cap(problem: Problem, solution: Solution) -> None:
    """Raise `InfeasiblePlan` where the solution breaks the problem's load cap: methods that only balance or ignore load may do so."""
    cap = problem.constraints.load_cap
    if cap is None:
        return
    peaks = load_peaks(problem, solution)
    if max(peaks) > cap + 1e-9:
        raise InfeasiblePlan(
            f"method {solution.plan.method} loads a device of layer {peaks.index(max(peaks))} with {max(peaks):.3f} of the mean, "
            f"above load cap {cap:g}; use method anneal or ilp, or a higher cap"
        )
