"""Search for objective hops: annealing by noisy exact assignments, window by window, and recombination of the plans it met.

The first chain is the greedy one, or has experts assigned to nodes first where hops between them cost more (`nested.py`); the first round
warms it up a little, or the first few where nodes came first. After it rounds come in blocks: the first ones of a block anneal all layers
from a fresh draw; then the plans found so far are recombined layer by layer (`recombine.py`), and the best is annealed in windows of
neighbouring layers. A round's random numbers depend on (seed, round).
"""

import numpy as np
from numpy.typing import NDArray

from crossdock.placement.solvers.problem import Problem
from crossdock.placement.solvers.search import nested, starts
from crossdock.placement.solvers.search.chain import Chain, anneal, greedy
from crossdock.placement.solvers.search.layer_search import Deadline
from crossdock.placement.solvers.search.recombine import interchangeable, recombined

IntArray = NDArray[np.int64]

MAX_ROUNDS = 256
PATIENCE = 32  # rounds without improvement after which the search ends
SWEEPS = 200
HOT, WARM, TEPID, COLD = 2.2, 0.25, 0.1, 0.03  # noise, as a multiple of what an expert keeps on its device on average
BLOCK, FRESH = 16, 4  # rounds of a block, and how many of them start from a fresh draw
WINDOW = 8  # neighbouring layers that are annealed together while the others stand still
START_SHARE = 2.5  # one part in so many of the time goes to the first chain where nodes come first
POOL = 16  # plans that are recombined


def search(problem: Problem, seed: int, deadline: Deadline, begun: tuple[IntArray, ...] = ()) -> tuple[Chain, str]:
    """The best chain found, never worse than those of `begun` ([L, E] each), and why the search stopped."""
    first = nested.start(problem, seed, deadline.share(START_SHARE)) if nested.suits(problem) else greedy(problem)
    first.polish(deadline)
    evened, mended = Chain(problem, starts.evened(problem)), Chain(problem, first.device_LE)
    mended.mend(evened.device_LI)
    given = [starts.contiguous(problem), starts.balanced(problem), starts.clustered(problem), *begun]
    pool = sorted([mended, first, evened, *(Chain(problem, device_LE) for device_LE in given)], key=Chain.key)
    quiet = 0
    for number in range(MAX_ROUNDS):
        if deadline.passed or problem.num_layers == 1:
            break
        chain = _round(problem, number, seed, pool, first.kept_per_expert(), deadline)
        improved = chain.key() < pool[0].key()
        quiet = 0 if improved else quiet + 1
        pool = sorted([*pool, chain], key=Chain.key)[:POOL]
        if quiet >= PATIENCE:
            return pool[0], "done"
    return pool[0], "seconds" if deadline.passed else "iterations"


def _round(problem: Problem, number: int, seed: int, pool: list[Chain], kept: float, deadline: Deadline) -> Chain:
    """One annealing. `kept` is what an expert keeps on its device on average, in tokens."""
    rng = np.random.default_rng([seed, number])
    everything = np.arange(problem.num_layers)
    chain = Chain(problem, pool[0].device_LE)
    chain.price_LR = pool[0].price_LR.copy()
    two_levels = nested.suits(problem)
    if number == 0 or (two_levels and number < FRESH):
        anneal(chain, everything, SWEEPS // 2, ((TEPID if two_levels else WARM) * kept, COLD * kept), rng, deadline)
    elif number % BLOCK < FRESH:
        chain = Chain(problem, starts.random(problem, seed + number))
        anneal(chain, everything, SWEEPS, (HOT * kept, COLD * kept), rng, deadline)
    elif number % BLOCK == FRESH and interchangeable(problem):
        feasible = [other.device_LE for other in pool if not other.excesses().any()]
        chain = Chain(problem, recombined(problem, np.stack(feasible))) if feasible else chain
        chain.polish(deadline)
    else:
        middle = int(rng.integers(problem.num_layers))
        window = everything[max(middle - WINDOW // 2, 0) : middle + WINDOW // 2]
        anneal(chain, window, SWEEPS, (HOT * kept, COLD * kept), rng, deadline)
    if chain.key()[0] > 0:
        chain.mend(pool[0].device_LI)
        chain.polish(deadline)
    return chain
