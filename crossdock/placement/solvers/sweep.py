"""Method sweep: alternating exact assignment, from a greedy start and from random ones, without annealing.

Objective hops: one layer at a time between its neighbours, exactly, until a whole sweep brings nothing (swaps under a load cap); the plans
of all starts are recombined at the end. The other objectives do not couple layers: there one expert of every device is taken out at a time,
and all are put back by an exact assignment, which is a cyclic exchange among all devices at once.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from crossdock.placement.records.plan import EMPTY
from crossdock.placement.solvers import anneal
from crossdock.placement.solvers.problem import Problem, Solution
from crossdock.placement.solvers.search import starts
from crossdock.placement.solvers.search.chain import Chain, check_load_cap, greedy
from crossdock.placement.solvers.search.layer_search import Deadline, LayerSearch, Placed, placed_at
from crossdock.placement.solvers.search.price import layer_of, price_of
from crossdock.placement.solvers.search.recombine import interchangeable, recombined
from crossdock.placement.solvers.search.swaps import TokenSets
from crossdock.placement.solvers.solution import solution_of

IntArray = NDArray[np.int64]

STARTS = 16  # chains, for objective hops
EXCHANGES = 400  # tried in every layer, for the other objectives
QUIET = 60  # exchanges in a row that bring nothing, after which a layer rests


def solve(problem: Problem, seconds: float, seed: int) -> Solution:
    """Raises `InfeasiblePlan` where the load cap was not met."""
    deadline = Deadline(seconds)
    if problem.objective == "hops":
        chain, stopped_by = _chain(problem, seed, deadline)
        check_load_cap(chain)
        return solution_of(problem, chain.device_LE, method="sweep", seed=seed, seconds=deadline.elapsed_s, stopped_by=stopped_by)
    placed_L = exchanged_layers(problem, seed, deadline)
    anneal.check_load_cap(problem, placed_L)
    device_LE = np.stack([placed.device_I[: problem.num_experts] for placed in placed_L])
    stopped_by = "seconds" if deadline.passed else "done"
    return solution_of(problem, device_LE, method="sweep", seed=seed, seconds=deadline.elapsed_s, stopped_by=stopped_by)


def exchanged_layers(problem: Problem, seed: int, deadline: Deadline) -> list[Placed]:
    """The best assignment of every layer, for objectives that do not couple them. A broken load cap is the caller's to refuse."""
    start_LXE = np.stack([starts.contiguous(problem), starts.balanced(problem), starts.clustered(problem)], axis=1)
    return [_exchanged(problem, layer, start_LXE[layer], seed, deadline) for layer in range(problem.num_layers)]


def _chain(problem: Problem, seed: int, deadline: Deadline) -> tuple[Chain, str]:
    chains = [greedy(problem), Chain(problem, starts.balanced(problem)), Chain(problem, starts.clustered(problem))]
    chains += [Chain(problem, starts.random(problem, seed + number)) for number in range(STARTS - len(chains))]
    met = [Chain(problem, starts.contiguous(problem)), Chain(problem, starts.balanced(problem))]
    for chain in chains:
        chain.polish(deadline)
        met.append(chain)
        if deadline.passed:
            break
    best = min(met, key=Chain.key)
    feasible = [chain.device_LE for chain in met if not chain.excesses().any()]
    if interchangeable(problem) and len(feasible) > 1 and not deadline.passed:
        crossed = Chain(problem, recombined(problem, np.stack(feasible)))
        crossed.polish(deadline)
        best = min(best, crossed, key=Chain.key)
    return best, "seconds" if deadline.passed else "done"


def _exchanged(problem: Problem, number: int, start_XE: IntArray, seed: int, deadline: Deadline) -> Placed:
    """The best assignment of one layer: its starts as they are, and all but the first after exchanges."""
    layer, price, node_R = layer_of(problem, number), price_of(problem), np.array(problem.topology.node_of_R)
    share = deadline.share(problem.num_layers - number)
    rng = np.random.default_rng([seed, number])
    begun_XI = [starts.with_vacancies(device_E, problem.slots_R) for device_E in start_XE]
    best = min((placed_at(layer, price, node_R, device_I) for device_I in begun_XI), key=Placed.key)
    sets = TokenSets(layer.member_UK, layer.count_U, layer.num_items)
    for device_I in begun_XI[1:]:
        if share.passed:
            break
        search, quiet = LayerSearch(layer, sets, price, node_R, device_I), 0
        for _ in range(EXCHANGES):
            if share.passed or quiet >= QUIET:
                break
            quiet = 0 if _exchange(search, rng) else quiet + 1
        best = min(best, search.placed(), key=Placed.key)
    return best


def _exchange(search: LayerSearch, rng: np.random.Generator) -> bool:
    """Take one item from every device and put them back in the best way, or leave all as it was. Whether it helped."""
    before, device_I = search.placed(), search.device_I.copy()
    free = np.flatnonzero(search.layer.pinned_I == EMPTY)
    shuffled = rng.permutation(free)
    devices, first = np.unique(device_I[shuffled], return_index=True)
    taken = shuffled[first]
    arriving = search.copies.arriving(taken)
    chosen = linear_sum_assignment(arriving)[1]
    _move(search, taken, devices[chosen])
    if search.placed().better_than(before):
        return True
    _move(search, taken, device_I[taken])
    return False


def _move(search: LayerSearch, items: IntArray, target: IntArray) -> None:
    """Bring each item to its target, a permutation of the devices that they stand on, swap by swap."""
    for item, device in zip(items.tolist(), target.tolist(), strict=True):
        if search.device_I[item] != device:
            search.swap(item, int(items[search.device_I[items] == device][0]))
