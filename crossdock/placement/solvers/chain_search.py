"""Search for objective hops: annealing by noisy exact assignments, window by window, and recombination of the plans it met.

Rounds come in blocks. The first ones of a block anneal all layers from a fresh draw; then the plans found so far are recombined layer by
layer (`recombine.py`), and the best is annealed again in windows of neighbouring layers. A round's random numbers depend on (seed, round).
"""

import numpy as np
from numpy.typing import NDArray

from crossdock.placement.problem import Problem
from crossdock.placement.solvers import starts
from crossdock.placement.solvers.chain import Chain, anneal, greedy
from crossdock.placement.solvers.recombine import interchangeable, recombined
from crossdock.placement.solvers.search import Deadline

IntArray = NDArray[np.int64]

MAX_ROUNDS = 256
PATIENCE = 32  # rounds without improvement after which the search ends
SWEEPS = 200
HOT, COLD = 0.08, 0.001  # shares of the trace's tokens: where the noise begins and where it ends
BLOCK, FRESH = 16, 4  # rounds of a block, and how many of them start from a fresh draw
WINDOW = 8  # neighbouring layers that are annealed together while the others stand still
POOL = 16  # plans that are recombined


def search(problem: Problem, seed: int, deadline: Deadline, begun: tuple[IntArray, ...] = ()) -> tuple[Chain, str]:
    """The best chain found, never worse than those of `begun` ([L, E] each), and why the search stopped."""
    first = greedy(problem)
    first.polish(deadline)
    given = [starts.contiguous(problem), starts.balanced(problem), starts.clustered(problem), *begun]
    pool = sorted([first, *(Chain(problem, device_LE) for device_LE in given)], key=Chain.key)
    quiet = 0
    for number in range(MAX_ROUNDS):
        if deadline.passed or problem.num_layers == 1:
            break
        chain = _round(problem, number, seed, pool, deadline)
        improved = chain.key() < pool[0].key()
        quiet = 0 if improved else quiet + 1
        pool = sorted([*pool, chain], key=Chain.key)[:POOL]
        if quiet >= PATIENCE:
            return pool[0], "done"
    return pool[0], "seconds" if deadline.passed else "iterations"


def _round(problem: Problem, number: int, seed: int, pool: list[Chain], deadline: Deadline) -> Chain:
    """One annealing. Rounds come in blocks: fresh draws of all layers, then the best of what was found, annealed again window by window."""
    rng = np.random.default_rng([seed, number])
    num_layers = problem.num_layers
    if number % BLOCK < FRESH:
        chain = Chain(problem, starts.random(problem, seed + number))
        anneal(chain, np.arange(num_layers), SWEEPS, (HOT, COLD), rng, deadline)
    else:
        chain = Chain(problem, pool[0].device_LE)
        if number % BLOCK == FRESH:
            feasible = [chain.device_LE for chain in pool if not chain.excesses().any()]
            if len(feasible) > 1 and interchangeable(problem):
                chain = Chain(problem, recombined(problem, np.stack(feasible)))
                chain.polish(deadline)
                return chain
        chain.price_LR = pool[0].price_LR.copy()
        first = int(rng.integers(1 - WINDOW // 2, max(num_layers - WINDOW // 2, 2 - WINDOW // 2)))
        anneal(chain, np.arange(max(first, 0), min(first + WINDOW, num_layers)), SWEEPS, (HOT, COLD), rng, deadline)
    if chain.key()[0] > 0:
        chain.mend(pool[0].device_LI)
        chain.polish(deadline)
    return chain
