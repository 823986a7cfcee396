"""Method balance: even load by the greedy rule of EPLB's packing, heaviest expert first to the least loaded device with a free slot."""

from crossdock.placement.solvers.problem import Problem, Solution
from crossdock.placement.solvers.search import starts
from crossdock.placement.solvers.search.layer_search import Deadline
from crossdock.placement.solvers.solution import solution_of


def solve(problem: Problem, seconds: float, seed: int) -> Solution:
    """No search: `seconds` and `seed` change nothing. Devices of unequal speed are loaded by the time they need; traffic is ignored."""
    clock = Deadline(seconds)
    device_LE = starts.balanced(problem)
    return solution_of(problem, device_LE, method="balance", seed=seed, seconds=clock.elapsed_s, stopped_by="done")
