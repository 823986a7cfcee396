"""Solvers, one file for each method, in one table; every one is `(problem, seconds, seed) -> Solution`."""

from collections.abc import Callable

from crossdock.errors import UsageError
from crossdock.placement.solvers import (
    anneal,
    auto,
    balance,
    coherent,
    columns,
    contiguous,
    dp,
    eplb,
    exflow,
    ilp,
    moetuner,
    random,
    replicas,
    sweep,
)
from crossdock.placement.solvers.constraints import check_constraints, load_peaks
from crossdock.placement.solvers.problem import Problem, Solution

__all__ = [
    "HOME_ALONE",
    "SOLVERS",
    "Solver",
    "check_constraints",
    "check_known",
    "check_method",
    "check_mode",
    "check_seconds",
    "load_peaks",
    "solve",
]

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
    "replicas": replicas.solve,
    "auto": auto.solve,
}


HOME_ALONE = ("dp", "sweep", "anneal", "columns", "ilp", "replicas")
"""Methods that price the seconds of tokens on their way home; elsewhere they have nothing to search by."""


CHECKS: dict[str, Callable[[Problem], None]] = {
    "moetuner": moetuner.check,
    "dp": dp.check,
    "columns": columns.check,
    "ilp": ilp.check,
    "replicas": replicas.check,
}
"""What a method cannot take, told before the search by the methods that are not for every problem; they ask it themselves as well."""


def check_known(method: str) -> None:
    """Raise `UsageError` for a method that is not in the table."""
    if method not in SOLVERS:
        raise UsageError(f"method is {method!r}; choose from {', '.join(SOLVERS)}")


def check_method(problem: Problem, method: str) -> None:
    """Raise `UsageError` for an unknown method, and where `method` refuses the problem for its objective, its mode or its size."""
    check_known(method)
    check_mode(problem, method)
    if method in CHECKS:
        CHECKS[method](problem)


def check_mode(problem: Problem, method: str) -> None:
    """Raise `UsageError` where `method` cannot price the problem's mode."""
    if method in HOME_ALONE and coherent.is_about(problem):
        raise UsageError(f"method {method} prices the seconds of tokens that return home; in mode coherent use auto, or objective hops")


def check_seconds(seconds: float) -> None:
    """Raise `UsageError` for a cap on the search that leaves it no time."""
    if not seconds > 0:
        raise UsageError(f"seconds is {seconds}; give more than 0")


def solve(problem: Problem, method: str, seconds: float = 10.0, seed: int = 0) -> Solution:
    """Solve `problem` with a method of the table. `seconds` caps the search; the same seed and the same iterations give the same plan.

    Raises `UsageError` for an unknown method and `InfeasiblePlan` where the method's plan breaks the load cap.
    """
    check_known(method)
    check_seconds(seconds)
    check_mode(problem, method)
    solution = SOLVERS[method](problem, seconds, seed)
    check_constraints(problem, solution)
    return solution
