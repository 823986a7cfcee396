"""Local search over what devices hold, for costs that are a sum over devices: two devices pool their experts and split them anew, best of
all.

Works on the table of `columns.py`, in which the cost of every set of experts that a device may hold is looked up.
"""

import itertools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from crossdock.placement.solvers.search.layer_search import Deadline

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
CostOf = Callable[[IntArray], FloatArray]  # [..., S] experts, ascending, padded at the end -> cost, inf where not allowed


def lookup(member_CS: IntArray, cost_C: FloatArray, num_experts: int) -> CostOf:
    """The costs of a table of sets as a function of the set, whatever the order of its members."""
    base_S = (num_experts + 1) ** np.arange(member_CS.shape[1])[::-1]
    key_C = np.sort(member_CS, axis=1) @ base_S
    order_C = np.argsort(key_C)
    sorted_key_C, sorted_cost_C = key_C[order_C], cost_C[order_C]

    def cost_of(member_XS: IntArray) -> FloatArray:
        key_X = np.sort(member_XS, axis=-1) @ base_S
        place_X = np.searchsorted(sorted_key_C, key_X).clip(max=len(sorted_key_C) - 1)
        return np.where(sorted_key_C[place_X] == key_X, sorted_cost_C[place_X], np.inf)

    return cost_of


def improved(
    held_RS: IntArray, cost_of: CostOf, rounds: int, rng: np.random.Generator, enough: float, deadline: Deadline
) -> tuple[IntArray, float]:
    """Descend, then stir three devices and descend again, `rounds` times or until the cost is at most `enough`. Sets and their cost."""
    best_RS = _descended(held_RS, cost_of)
    best = _total(best_RS, cost_of)
    num_devices, num_slots = held_RS.shape
    for _ in range(rounds if num_devices > 2 else 0):
        if best <= enough or deadline.passed:
            break
        stirred_RS = best_RS.copy()
        three = rng.choice(num_devices, 3, replace=False)
        stirred_RS[three] = rng.permutation(stirred_RS[three].ravel()).reshape(3, num_slots)
        stirred_RS = _descended(stirred_RS, cost_of)
        cost = _total(stirred_RS, cost_of)
        if cost < best or (cost == best and np.isfinite(cost)):
            best_RS, best = stirred_RS, cost
    return best_RS, best


def _total(held_RS: IntArray, cost_of: CostOf) -> float:
    return float(cost_of(held_RS).sum())  # inf where a set is not allowed


def _descended(held_RS: IntArray, cost_of: CostOf) -> IntArray:
    """Split the pair of devices that gains most, again and again; sets that are not allowed are got rid of first."""
    held_RS = held_RS.copy()
    num_devices, num_slots = held_RS.shape
    if num_devices < 2 or num_slots == 0:
        return held_RS
    first_P, second_P = np.triu_indices(num_devices, 1)
    ways = np.array([(0, *rest) for rest in itertools.combinations(range(1, 2 * num_slots), num_slots - 1)])
    others = np.array([[place for place in range(2 * num_slots) if place not in way] for way in ways.tolist()])
    split_of_P: dict[tuple[int, int], tuple[float, IntArray, IntArray]] = {}
    stale = set(zip(first_P.tolist(), second_P.tolist(), strict=True))
    cost_R = cost_of(held_RS)
    while stale:
        pairs = np.array(sorted(stale))
        pool_PX = np.concatenate([held_RS[pairs[:, 0]], held_RS[pairs[:, 1]]], axis=1)
        left_PWS, right_PWS = pool_PX[:, ways], pool_PX[:, others]
        cost_PW = _finite(cost_of(left_PWS)) + _finite(cost_of(right_PWS))
        way_P = cost_PW.argmin(axis=1)
        row = np.arange(len(pairs))
        gain_P = _finite(cost_R[pairs]).sum(axis=1) - cost_PW[row, way_P]
        for pair, gain, left_S, right_S in zip(pairs.tolist(), gain_P.tolist(), left_PWS[row, way_P], right_PWS[row, way_P], strict=True):
            split_of_P[pair[0], pair[1]] = (gain, left_S, right_S)
        stale = set()
        a, b = max(split_of_P, key=lambda pair: split_of_P[pair][0])
        gain, left_S, right_S = split_of_P[a, b]
        if gain <= 1e-9:
            break
        held_RS[a], held_RS[b] = left_S, right_S
        cost_R[[a, b]] = cost_of(held_RS[[a, b]])
        stale = {pair for pair in split_of_P if a in pair or b in pair}
    return held_RS


def _finite(cost: FloatArray) -> FloatArray:
    """A set that is not allowed costs more than any plan."""
    return np.where(np.isfinite(cost), cost, 1e15)
