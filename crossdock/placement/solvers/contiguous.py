"""Method contiguous: consecutive experts on consecutive devices, as every framework does that does not plan."""

from crossdock.placement.solvers.problem import Problem, Solution
from crossdock.placement.solvers.search import starts
from crossdock.placement.solvers.search.layer_search import Deadline
from crossdock.placement.solvers.solution import solution_of


def solve(problem: Problem, seconds: float, seed: int) -> Solution:
    """No search: `seconds` and `seed` change nothing. Looks at slots and pins, not at the load cap."""
    clock = Deadline(seconds)
    device_LE = starts.contiguous(problem)
    return solution_of(problem, device_LE, method="contiguous", seed=seed, seconds=clock.elapsed_s, stopped_by="done")
