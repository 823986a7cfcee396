"""Method random: a uniform draw of equally many experts on each device; what placement is worth shows against it."""

from crossdock.placement.solvers.problem import Problem, Solution
from crossdock.placement.solvers.search import starts
from crossdock.placement.solvers.search.layer_search import Deadline
from crossdock.placement.solvers.solution import solution_of


def solve(problem: Problem, seconds: float, seed: int) -> Solution:
    """One draw from `seed`. Looks at slots and pins, not at the load cap."""
    clock = Deadline(seconds)
    device_LE = starts.random(problem, seed)
    return solution_of(problem, device_LE, method="random", seed=seed, seconds=clock.elapsed_s, stopped_by="done")
