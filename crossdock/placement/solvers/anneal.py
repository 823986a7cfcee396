"""Method anneal: swap search on the predicted cost, layer by layer, from several starts.

With tokens at home on every device alike the cost is a sum over layers, so each layer is searched alone: every round anneals once from the
best assignment so far or from a fresh start, then descends to a local optimum. Layers take turns, so that a time cap hurts all alike, and a
layer that stopped improving makes room for the others. A layer's random numbers depend on (seed, layer, round) alone. Objective hops
couples the layers and has a search of its own, `chain_search.py`.
"""

from collections.abc import Sequence

import numpy as np

from crossdock.errors import InfeasiblePlan
from crossdock.placement.solvers.problem import Problem, Solution
from crossdock.placement.solvers.search import chain, chain_search, starts
from crossdock.placement.solvers.search.layer_search import Deadline, LayerSearch, Placed, anneal_layer, descend, placed_at
from crossdock.placement.solvers.search.price import Layer, Price, layer_of, price_of
from crossdock.placement.solvers.search.swaps import TokenSets
from crossdock.placement.solvers.solution import solution_of

MAX_ROUNDS = 12
PATIENCE = 4  # rounds without improvement after which a layer rests
PROPOSALS_PER_PAIR = 40.0
MOST_SWAPS = 400  # of the first two rounds; every second round makes twice as many
TEMPERATURES = ((0.1, 0.01), (0.32, 0.016))  # hot, cold, as a share of the layer's cost per item; rounds take them in turn


def solve(problem: Problem, seconds: float, seed: int) -> Solution:
    """Anneal until every layer rests or `seconds` are over. Never worse than contiguous or balance on the same cost.

    Raises `InfeasiblePlan`, naming the layer and the lowest peak found, where no plan within the load cap was found.
    """
    deadline = Deadline(seconds)
    if problem.objective == "hops":
        found, stopped_by = chain_search.search(problem, seed, deadline)
        chain.check_load_cap(found)
        return solution_of(problem, found.device_LE, method="anneal", seed=seed, seconds=deadline.elapsed_s, stopped_by=stopped_by)
    placed_L, stopped_by = search_layers(problem, seed, deadline)
    check_load_cap(problem, placed_L)
    device_LE = np.stack([placed.device_I[: problem.num_experts] for placed in placed_L])
    return solution_of(problem, device_LE, method="anneal", seed=seed, seconds=deadline.elapsed_s, stopped_by=stopped_by)


def best_of(problem: Problem, plans: Sequence[starts.IntArray]) -> list[Placed]:
    """The best assignment of each layer among those of the plans ([L, E] each)."""
    price, start_LXE = price_of(problem), np.stack(plans, axis=1)
    return [_best_start(problem, price, layer, start_LXE[layer]) for layer in range(problem.num_layers)]


def search_layers(problem: Problem, seed: int, deadline: Deadline, begun: Sequence[starts.IntArray] = ()) -> tuple[list[Placed], str]:
    """The best assignment found for each layer, never worse than those of `begun` ([L, E] each), and why the search stopped.

    A broken load cap is the caller's to refuse.
    """
    price = price_of(problem)
    own = [starts.balanced(problem), starts.clustered(problem), starts.contiguous(problem)]
    start_LXE = np.stack(own, axis=1)
    best_L = best_of(problem, [*own, starts.evened(problem), *begun])
    quiet_L = [0] * problem.num_layers
    if deadline.passed:
        return best_L, "seconds"
    for number in range(MAX_ROUNDS):
        awake = [layer for layer in range(problem.num_layers) if quiet_L[layer] < PATIENCE]
        for turn, layer in enumerate(awake):
            share = deadline.share(len(awake) - turn)
            found = _round(problem, price, layer, number, seed, best_L[layer], start_LXE[layer], share)
            improved = found.better_than(best_L[layer])
            quiet_L[layer] = 0 if improved else quiet_L[layer] + 1
            best_L[layer] = found if improved else best_L[layer]
            if deadline.passed:
                return best_L, "seconds"
    return best_L, "iterations" if any(quiet < PATIENCE for quiet in quiet_L) else "done"


def check_load_cap(problem: Problem, placed_L: list[Placed]) -> None:
    """Raise `InfeasiblePlan` unless every layer keeps to the load cap."""
    broken = [layer for layer, placed in enumerate(placed_L) if placed.excess > 0]
    if not broken:
        return
    peaks = [_peak(problem, layer, placed_L[layer]) for layer in broken]
    worst = int(np.argmax(peaks))
    load_E = problem.affinity.load_LE[broken[worst]]
    expert = int(load_E.argmax())
    share = load_E[expert] / max(load_E.sum(), 1) * problem.num_devices
    raise InfeasiblePlan(
        f"no plan found within load cap {problem.constraints.load_cap:g} in {len(broken)} of {problem.num_layers} layers; "
        f"layer {broken[worst]} reaches {peaks[worst]:.3f} at best (its expert {expert} alone is {share:.3f} of a mean device); "
        f"give --load-cap {np.ceil(max(peaks) * 100) / 100:g}, more slots or more seconds"
    )


def _round(
    problem: Problem, price: Price, number: int, round_number: int, seed: int, best: Placed, start_XE: starts.IntArray, deadline: Deadline
) -> Placed:
    """One annealing of one layer, from the best so far or, in every other round, from the next start or a fresh draw."""
    layer = layer_of(problem, number)
    rng = np.random.default_rng([seed, number, round_number])
    device_I = best.device_I
    if round_number % 2:
        fresh = round_number // 2
        device_I = starts.with_vacancies(start_XE[fresh], problem.slots_R) if fresh < len(start_XE) else _shuffled(layer, best, rng)
    search = _searching(problem, layer, price, TokenSets(layer.member_UK, layer.count_U, layer.num_items), device_I)
    descend(search, rng, deadline)
    begun = search.placed()
    hot, cold = (share * max(begun.value, 1e-300) / layer.num_items for share in TEMPERATURES[round_number // 2 % len(TEMPERATURES)])
    proposals, most_swaps = PROPOSALS_PER_PAIR * max(search.num_pairs, 1), MOST_SWAPS << (round_number // 2)
    found = anneal_layer(search, rng, hot, cold, proposals, most_swaps, deadline)
    if deadline.passed:
        return min(begun, found, key=Placed.key)
    again = _searching(problem, layer, price, search.copies.sets, found.device_I)
    descend(again, rng, deadline)
    return min(begun, found, again.placed(), key=Placed.key)


def _best_start(problem: Problem, price: Price, number: int, start_XE: starts.IntArray) -> Placed:
    layer, node_R = layer_of(problem, number), np.array(problem.topology.node_of_R)
    placed = [placed_at(layer, price, node_R, starts.with_vacancies(device_E, problem.slots_R)) for device_E in start_XE]
    return min(placed, key=Placed.key)


def _searching(problem: Problem, layer: Layer, price: Price, sets: TokenSets, device_I: starts.IntArray) -> LayerSearch:
    return LayerSearch(layer, sets, price, np.array(problem.topology.node_of_R), device_I)


def _shuffled(layer: Layer, best: Placed, rng: np.random.Generator) -> starts.IntArray:
    """A random assignment with the pinned items where they are."""
    device_I = best.device_I.copy()
    free = layer.pinned_I < 0
    device_I[free] = rng.permutation(device_I[free])
    return device_I


def _peak(problem: Problem, layer: int, placed: Placed) -> float:
    load_R = np.bincount(placed.device_I[: problem.num_experts], problem.affinity.load_LE[layer], problem.num_devices)
    return float(load_R.max() / load_R.mean())
