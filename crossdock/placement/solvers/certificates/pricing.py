"""The cheapest contents of one group at given prices, by branch and bound: exact where time allows, else a proven bound from below.

A set A of S items (experts, and vacancies) costs the tokens that use any of them, less the prices of its items. Some items are chosen, t
more are to come out of the candidates, and only tokens that no chosen item serves count on. If such a token has m of the t, then for
every whole j >= 0 (the chord of `bounds.py`, summed over its items)

    1 >= 2 m / (j + 2) - m (m - 1) / ((j + 1) (j + 2)),

so that A costs at least a constant, and v[e] for each item, less W[e, f] for each ordered pair of items. j is chosen for classes of
tokens, by how many candidates they use: with two or fewer, j = 0 is exact. An item has t - 1 fellows, and so at least v[e] less its t - 1
largest W[e, f]; the t smallest of these sum to a bound. W[e, f] + W[f, e] alone matters, so what one end gains may be given to the other:
a few steps from the poorer to the richer items make the bound several times as sharp, which is what makes groups of 8 out of 64 possible.

Every node prices all its children together: the tokens that a child serves are taken off the pairs of its parent by one table of triples.
"""

from functools import lru_cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from crossdock.placement.solvers.search.layer_search import Deadline
from crossdock.placement.solvers.search.price import Layer

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

FEW_USED = (2, 4)  # candidates that a token of the first, and of the second class uses at most; the third class has the others
CHORDS = ((0, 0, 0), (0, 0, 1), (0, 1, 1), (0, 1, 2), (0, 2, 2))  # j of the three classes, all of which are tried
STEPS = 8  # of evening out
STEP = 0.5  # share of the difference that moves from one end of a pair to the other
MOST_FOUND = 400  # sets below the threshold after which the prices are plainly wrong and the search ends
NEVER = 1e15
LEAST_SIZE = 3


class Pricing:
    """One search; `found` are sets [S] below the threshold, with their costs less their prices. `is_finished` unless it had to stop."""

    def __init__(self, layer: Layer, price_I: FloatArray, size: int, threshold: float, deadline: Deadline) -> None:
        assert size >= LEAST_SIZE, "smaller groups are listed, not searched"
        self.price_I, self.size, self.threshold, self.deadline = price_I, size, threshold, deadline
        self.found: list[tuple[float, IntArray]] = []
        self.num_nodes, self.is_finished = 0, True
        self._layer = layer

    def lowest(self) -> float:
        """No set of `size` items costs less, beyond its prices, than this; at most the threshold."""
        member_UK = np.sort(self._layer.member_UK, axis=1)
        items = np.arange(self._layer.num_items)
        return self._expand(member_UK, self._layer.count_U, 0.0, items, np.zeros(0, dtype=np.int64), -np.inf)

    def _expand(self, member_UK: IntArray, count_U: FloatArray, base: float, items: IntArray, chosen: IntArray, known: float) -> float:
        """The same for sets of the chosen, which cost `base`, and of `items`, to which `member_UK` points in ascending order; `known` is a
        bound that the caller has."""
        if self.deadline.passed or len(self.found) >= MOST_FOUND:
            self.is_finished = False
            return min(known, self.threshold)
        self.num_nodes += 1
        node = _Node.of(self, member_UK, count_U, base, items, self.size - len(chosen))
        if node is None:
            return self.threshold
        if node.left == LEAST_SIZE:
            return self._finish(node, chosen)
        (bound_H, useful_HI), lowest = node.children(self.threshold), self.threshold
        for position in np.flatnonzero(bound_H < self.threshold):
            useful = np.flatnonzero(useful_HI[position])
            new_I = np.full(len(node.items) + 1, len(useful))
            new_I[useful] = np.arange(len(useful))
            free_U = ~(node.member_UK == position).any(axis=1)
            below = self._expand(
                np.sort(new_I[node.member_UK[free_U]], axis=1),
                node.count_U[free_U],
                float(node.base_H[position]),
                node.items[useful],
                np.append(chosen, node.items[position]),
                float(bound_H[position]),
            )
            lowest = min(lowest, max(below, float(bound_H[position])))
        return lowest

    def _finish(self, node: "_Node", chosen: IntArray) -> float:
        """All sets of three more items, exactly."""
        alone_I, pair_II = node.used_QI.sum(axis=0) - node.price_I, node.pair_QII.sum(axis=0)
        cost_HII = node.base + alone_I[:, None, None] + alone_I[:, None] + alone_I + node.triples().sum(axis=0)
        cost_HII -= pair_II[:, :, None] + pair_II[:, None, :] + pair_II
        order = np.arange(len(alone_I))
        cheap_HII = (cost_HII < self.threshold) & (order[:, None, None] < order[:, None]) & (order[:, None] < order)
        where = np.argwhere(cheap_HII)
        self.found += [(float(cost_HII[*three]), np.sort(np.append(chosen, node.items[three]))) for three in where]
        return float(cost_HII[cheap_HII].min(initial=self.threshold))


class _Node:
    """Candidates, most expensive first, that may still belong to a cheap set, and the tokens that use them.

    used_QI, pair_QII: tokens of each class that use an item, and both items of a pair; base_H: cost of the chosen and one item more.
    """

    def __init__(
        self, member_UK: IntArray, count_U: FloatArray, class_U: IntArray, used_QI: FloatArray, pair_QII: FloatArray, base: float, left: int
    ) -> None:
        self.member_UK, self.count_U, self.class_U, self.used_QI, self.pair_QII = member_UK, count_U, class_U, used_QI, pair_QII
        self.base, self.left = base, left
        self.items: IntArray
        self.price_I: FloatArray

    @property
    def base_H(self) -> FloatArray:
        return np.asarray(self.base + self.used_QI.sum(axis=0) - self.price_I)

    @classmethod
    def of(cls, search: Pricing, member_UK: IntArray, count_U: FloatArray, base: float, items: IntArray, left: int) -> "_Node | None":
        """The node, after candidates that belong to no set below the threshold are gone; None where too few are left."""
        while len(items) >= left:
            served_U = member_UK[:, 0] < len(items)
            member_UK, count_U = member_UK[served_U], count_U[served_U]
            class_U = np.searchsorted(FEW_USED, (member_UK < len(items)).sum(axis=1))
            used_QI, pair_QII = _tables(member_UK, count_U, class_U, len(items))
            price_I = search.price_I[items]
            bound_I = base + _with_each(used_QI, pair_QII, price_I, left)
            order = np.argsort(-bound_I, kind="stable")
            order = order[bound_I[order] < search.threshold]
            new_I = np.full(len(items) + 1, len(order))
            new_I[order] = np.arange(len(order))
            whole = len(order) == len(items)
            member_UK, items = np.sort(new_I[member_UK], axis=1), items[order]
            if whole:
                node = cls(member_UK, count_U, class_U, used_QI[:, order], pair_QII[:, order][:, :, order], base, left)
                node.items, node.price_I = items, price_I[order]
                return node
        return None

    def triples(self) -> FloatArray:
        """[Q, I, I, I]: tokens of each class that use three items, by ascending position."""
        side, num_classes, (first, second, third) = len(self.items) + 1, len(FEW_USED) + 1, _places(self.member_UK.shape[1], 3)
        many_U = self.class_U > 0
        member_KU = np.ascontiguousarray(self.member_UK[many_U].T)
        place_XU = ((member_KU + self.class_U[many_U] * side) * side)[first]
        place_XU += member_KU[second]
        place_XU *= side
        place_XU += member_KU[third]
        table = _counted(place_XU, self.count_U[many_U], num_classes * side**3)
        return table.reshape(num_classes, side, side, side)[:, :-1, :-1, :-1]

    def children(self, threshold: float) -> tuple[FloatArray, NDArray[np.bool_]]:
        """[H]: a bound for the sets whose first item, by position, is H; where it reaches the threshold it is not made sharper. And [H, I]:
        the items that may follow it in a set below the threshold."""
        left, order = self.left - 1, np.arange(len(self.items))
        later_HI = order > order[:, None]
        pair_HII = later_HI[:, :, None] & later_HI[:, None, :] & (order[:, None] != order)
        real_HII, never_HII, never_HI = pair_HII.astype(np.float64), np.where(pair_HII, 0.0, -NEVER), np.where(later_HI, 0.0, NEVER)
        triple_QHII = self.triples()
        triple_QHII = triple_QHII + np.swapaxes(triple_QHII, 2, 3)
        used_QHI = self.used_QI[:, None, :] - self.pair_QII  # by tokens that the first item does not serve
        pair_QHII = self.pair_QII[:, None] - triple_QHII
        base_H = self.base_H
        bound_H, chord_H = np.full(len(order), -np.inf), np.zeros(len(order), dtype=np.int64)
        bound_H[len(order) - left :] = threshold  # too few items follow
        alone_CQ, fellow_CQ = _chords(left)
        for chord in range(len(alone_CQ)):
            value_HI = _mixed(alone_CQ[chord], used_QHI) - self.price_I + never_HI
            weight_HII = _mixed(fellow_CQ[chord], pair_QHII) + never_HII
            found_H = base_H + _smallest(value_HI - _largest(weight_HII, left - 1), left)
            chord_H = np.where(found_H > bound_H, chord, chord_H)
            bound_H = np.maximum(bound_H, found_H)
        open_H = np.flatnonzero(bound_H < threshold)
        alone_QH, fellow_QH = alone_CQ[chord_H[open_H]].T, fellow_CQ[chord_H[open_H]].T
        value_HI = _mixed(alone_QH[:, :, None], used_QHI[:, open_H]) - self.price_I + never_HI[open_H]
        weight_HII = _mixed(fellow_QH[:, :, None, None], pair_QHII[:, open_H]) + never_HII[open_H]
        for _ in range(STEPS):
            if not len(open_H):
                break
            rest_HI = value_HI - _largest(weight_HII, left - 1)
            least_HT = np.partition(rest_HI, left - 1, axis=1)[:, :left]
            sum_H, last_H = base_H[open_H] + least_HT.sum(axis=1), least_HT[:, -1]
            bound_H[open_H] = np.maximum(bound_H[open_H], sum_H)
            later_HI[open_H] &= sum_H[:, None] + np.maximum(rest_HI - last_H[:, None], 0.0) < threshold
            kept = bound_H[open_H] < threshold
            open_H, value_HI, weight_HII, rest_HI = open_H[kept], value_HI[kept], weight_HII[kept], rest_HI[kept]
            weight_HII += real_HII[open_H] * _evened(rest_HI, left)
        return bound_H, later_HI


def _with_each(used_QI: FloatArray, pair_QII: FloatArray, price_I: FloatArray, left: int) -> FloatArray:
    """[I]: what `left` items that contain an item add at least."""
    alone_CQ, fellow_CQ = _chords(left)
    value_CI, weight_CII = alone_CQ @ used_QI - price_I, np.tensordot(fellow_CQ, pair_QII, 1)
    diagonal = np.arange(len(price_I))
    weight_CII[:, diagonal, diagonal] = -NEVER
    best_I = np.full(len(price_I), -np.inf)
    for step in range(STEPS):
        rest_CI = value_CI - _largest(weight_CII, left - 1)
        least_CT = np.partition(rest_CI, left - 1, axis=1)[:, :left]
        sum_C, last_C = least_CT.sum(axis=1), least_CT[:, -1]
        best_I = np.maximum(best_I, (sum_C[:, None] + np.maximum(rest_CI - last_C[:, None], 0.0)).max(axis=0))
        if step == 0:
            best = slice(int(sum_C.argmax()), int(sum_C.argmax()) + 1)
            value_CI, weight_CII, rest_CI = value_CI[best], weight_CII[best], rest_CI[best]
        weight_CII = weight_CII + _evened(rest_CI, left)
    return best_I


def _tables(member_UK: IntArray, count_U: FloatArray, class_U: IntArray, num_items: int) -> tuple[FloatArray, FloatArray]:
    """[Q, I], [Q, I, I]: tokens of each class that use an item, and both items of a pair (0 on the diagonal)."""
    side, num_classes, (first, second) = num_items + 1, len(FEW_USED) + 1, _places(member_UK.shape[1], 2)
    member_KU = np.ascontiguousarray(member_UK.T)
    class_KU = member_KU + class_U * side
    used_QI = _counted(class_KU, count_U, num_classes * side).reshape(num_classes, side)[:, :-1]
    place_XU = (class_KU * side)[first]
    place_XU += member_KU[second]
    pair_QII = _counted(place_XU, count_U, num_classes * side**2).reshape(num_classes, side, side)[:, :-1, :-1]
    return used_QI, pair_QII + np.swapaxes(pair_QII, 1, 2)


def _counted(place_XU: IntArray, count_U: FloatArray, size: int) -> FloatArray:
    """[size]: the tokens of each place."""
    return np.bincount(place_XU.ravel(), np.broadcast_to(count_U, place_XU.shape).ravel(), size).astype(np.float64, copy=False)


def _chords(left: int) -> tuple[FloatArray, FloatArray]:
    """[C, Q] twice: what a token of each class counts to an item, and takes off again for an ordered pair; j as far as `left` items use."""
    j_CQ = np.unique(np.minimum(CHORDS, left - 2), axis=0)
    return 2.0 / (j_CQ + 2.0), 1.0 / ((j_CQ + 1.0) * (j_CQ + 2.0))


def _mixed(share_Q: FloatArray, table_Q: FloatArray) -> FloatArray:
    """The classes' tables, each times its share. A sum of few terms: einsum and tensordot would keep other threads from running."""
    return np.asarray(sum(share * table for share, table in zip(share_Q, table_Q, strict=True)))


def _evened(rest_XI: FloatArray, left: int) -> FloatArray:
    """[X, I, I]: what moves from the items of small rest to those of large, antisymmetric."""
    return np.asarray((STEP / max(left - 1, 1)) * (rest_XI[:, :, None] - rest_XI[:, None, :]))


def _largest(array: FloatArray, number: int) -> FloatArray:
    """Sum of the largest entries of the last axis."""
    start = array.shape[-1] - number
    return np.asarray(np.partition(array, start, axis=-1)[..., start:].sum(axis=-1))


def _smallest(array: FloatArray, number: int) -> FloatArray:
    """Sum of the smallest entries of the last axis."""
    return np.asarray(np.partition(array, number - 1, axis=-1)[..., :number].sum(axis=-1))


@lru_cache(maxsize=32)
def _places(top_k: int, number: int) -> IntArray:
    """[number, X]: all ways to take so many of K places, in ascending order."""
    return np.array(list(combinations(range(top_k), number)), dtype=np.int64).reshape(-1, number).T
