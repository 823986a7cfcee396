"""What a layer's token copies would become after each possible swap of two items, kept up to date while swaps are made.

A layer has R * S items: its E experts, then one vacancy for every slot left over. Items stand on places (devices, or nodes); a token of
de-duplicated dispatch sends one copy to every distinct place that its experts stand on. For the swap of items a and b, on places p and q,

    copies leaving p  = tokens that used a and nothing else on p, unless they also use b       alone_II[a, a] - alone_II[a, b]
    copies entering p = tokens that use b and nothing on p so far                              absent_IP[b, p]

so that two tables give the change of every swap at once, and a swap changes only the terms of the token sets that hold a or b.

Where the homes of tokens are known (sequence homing), a copy counts what the way from its home to its place costs: 0 on the home itself.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
_CHUNK = 1 << 16  # sets whose K x K pairs are held in memory at once


def copies_per_place(member_UK: IntArray, count_U: NDArray[np.number[Any]], place_I: IntArray, num_places: int) -> FloatArray:
    """[P]: token copies sent to each place, one for every distinct place of a token's items; padding is nowhere. Needs no tables."""
    place_UK = np.sort(np.append(place_I, num_places)[member_UK], axis=1)
    is_first_UK = np.diff(place_UK, axis=1, prepend=-1) != 0
    copies_P = np.bincount(place_UK.ravel(), (is_first_UK * count_U[:, None]).ravel(), num_places + 1)[:num_places]
    return np.asarray(copies_P, dtype=np.float64)


class TokenSets:
    """The distinct expert sets of one layer's tokens, with an index from item to sets; never changed after construction.

    member_UK int64 [U, K] holds items, `num_items` where a set has fewer than K; count_U is the number of tokens with that set. home_U is
    the home of those tokens, where homes are known: then a row stands for a set and a home.
    """

    def __init__(self, member_UK: IntArray, count_U: NDArray[np.generic], num_items: int, home_U: IntArray | None = None) -> None:
        self.member_UK = np.ascontiguousarray(member_UK, dtype=np.int64)
        self.count_U = np.asarray(count_U, dtype=np.float64)
        self.num_items = num_items
        self.home_U = home_U
        flat = self.member_UK.ravel()
        order = np.argsort(flat, kind="stable")
        self._set_of_entry = order // max(1, self.member_UK.shape[1])
        self._start = np.searchsorted(flat[order], np.arange(num_items + 1))

    def holding(self, item: int) -> IntArray:
        """Numbers of the sets that hold `item`."""
        return self._set_of_entry[self._start[item] : self._start[item + 1]]


class CopyState:
    """Copies per place under an assignment of items to places, and the tables that price every swap. Changed by `swap` alone.

    copies_P [P]: token copies sent to each place. alone_II, absent_IP: see the module. The last row and column of the tables
    belong to the padding of short sets and are ignored. Where the homes of the sets are known, cost_HP [homes, P] is what a copy from each
    home to each place counts, and copies_P are such costs.
    """

    def __init__(self, sets: TokenSets, place_I: NDArray[np.generic], num_places: int, cost_HP: FloatArray | None = None) -> None:
        assert (cost_HP is None) == (sets.home_U is None), "costs by home and homes come together"
        self.sets, self.num_places = sets, num_places
        self._cost_HP = None if cost_HP is None else np.pad(cost_HP, ((0, 0), (0, 1)))  # padding is nowhere and costs nothing
        num_items = sets.num_items
        member_UK, count_U = sets.member_UK, sets.count_U
        self._place_of_item = np.append(np.asarray(place_I, dtype=np.int64), num_places)
        place_UK = self._place_of_item[member_UK]
        num_sets = len(count_U)
        here_UP = np.zeros((num_sets, num_places + 1), dtype=np.int8 if member_UK.shape[1] < 128 else np.int16)
        for place_U in place_UK.T:
            here_UP[np.arange(num_sets), place_U] += 1
        here_UP[:, num_places] = 0  # padding is nowhere
        self._here_UP = here_UP
        everywhere = np.arange(num_sets)
        self.copies_P = np.array([self._weight(everywhere, place) @ (here_UP[:, place] > 0) for place in range(num_places)])
        alone_UK = self._weight(everywhere, place_UK) * (np.take_along_axis(here_UP, place_UK, axis=1) == 1)
        self._alone = np.zeros((num_items + 1, num_items + 1))
        for start in range(0, num_sets, _CHUNK):
            part = slice(start, start + _CHUNK)
            self._alone += self._pairs(member_UK[part], member_UK[part], alone_UK[part])
        self._absent = np.empty((num_items + 1, num_places))
        for place in range(num_places):
            absent_U = self._weight(everywhere, place) * (here_UP[:, place] == 0)
            self._absent[:, place] = np.bincount(member_UK.ravel(), np.repeat(absent_U, member_UK.shape[1]), num_items + 1)
        self._marked_U = np.zeros(num_sets, dtype=bool)

    @property
    def place_I(self) -> IntArray:
        return self._place_of_item[:-1]

    def change_first(self, first: IntArray, second: IntArray) -> FloatArray:
        """For swaps of items `first` and `second` (arrays that broadcast), the change of copies on the place of `first`.

        With the arguments exchanged it is the change on the place of `second`; no other place changes. Meaningless where both items
        stand on one place, where a swap changes nothing.
        """
        return self._alone[first, second] - self._alone[first, first] + self._absent[second, self._place_of_item[first]]

    def arriving(self, items: IntArray) -> FloatArray:
        """[X, X]: copies that item `items[x]` would bring to the place of `items[y]` if all of them, on distinct places,
        were taken away."""
        place_X = self._place_of_item[items]
        return self._absent[np.ix_(items, place_X)] + self._alone[np.ix_(items, items)].T

    def swap(self, a: int, b: int) -> None:
        """Exchange the places of items a and b."""
        p, q = int(self._place_of_item[a]), int(self._place_of_item[b])
        if p == q:
            return
        touched, num_a, num_b = self._touched(a, b)
        member_VK = self.sets.member_UK[touched]
        before_VP = self._here_UP[touched]
        after_VP = before_VP.copy()
        after_VP[:num_a, p] -= 1
        after_VP[:num_a, q] += 1
        after_VP[num_a : num_a + num_b, q] -= 1
        after_VP[num_a : num_a + num_b, p] += 1
        alone_before_VK = self._alone_weight(touched, before_VP, self._place_of_item[member_VK])
        self._place_of_item[a], self._place_of_item[b] = q, p
        change_VK = self._alone_weight(touched, after_VP, self._place_of_item[member_VK]) - alone_before_VK
        self._here_UP[touched] = after_VP
        changed_V, changed_K = np.nonzero(change_VK)
        change = change_VK[changed_V, changed_K]
        self._alone += self._pairs(member_VK[changed_V, changed_K][:, None], member_VK[changed_V], change[:, None])
        for place in (p, q):
            absent_change_V = np.subtract(after_VP[:, place] == 0, before_VP[:, place] == 0, dtype=np.int64) * self._weight(touched, place)
            changed_V = np.flatnonzero(absent_change_V)
            weight = np.repeat(absent_change_V[changed_V], member_VK.shape[1])
            self._absent[:, place] += np.bincount(member_VK[changed_V].ravel(), weight, self.sets.num_items + 1)
            self.copies_P[place] -= absent_change_V.sum()

    def _weight(self, sets_V: IntArray, place: IntArray | int) -> FloatArray:
        """What a copy of each set `sets_V` [V] on a place counts, times its tokens: [V] for one place, [V, K] for `place` [V, K]."""
        many = np.ndim(place) == 2
        count_V = self.sets.count_U[sets_V]
        if self._cost_HP is None or self.sets.home_U is None:
            return count_V[:, None] if many else count_V
        home_V = self.sets.home_U[sets_V]
        return np.asarray((count_V[:, None] if many else count_V) * self._cost_HP[home_V[:, None] if many else home_V, place])

    def _alone_weight(self, sets_V: IntArray, here_VP: NDArray[np.generic], place_VK: IntArray) -> FloatArray:
        """[V, K]: weight of each item's copy where the item is the only one of its set there, else 0."""
        return np.asarray(self._weight(sets_V, place_VK) * (np.take_along_axis(here_VP, place_VK, axis=1) == 1))

    def _touched(self, a: int, b: int) -> tuple[IntArray, int, int]:
        """Sets that hold a and not b, then b and not a, then both; and how many of the first two kinds."""
        with_a, with_b, marked_U = self.sets.holding(a), self.sets.holding(b), self._marked_U
        marked_U[with_b] = True
        only_a, both = with_a[~marked_U[with_a]], with_a[marked_U[with_a]]
        marked_U[with_b] = False
        marked_U[with_a] = True
        only_b = with_b[~marked_U[with_b]]
        marked_U[with_a] = False
        return np.concatenate([only_a, only_b, both]), len(only_a), len(only_b)

    def _pairs(self, row: IntArray, column: IntArray, weight: FloatArray) -> FloatArray:
        """Sum over sets of weight[u, i] at [row[u, i], column[u, j]] for all i, j, as [I + 1, I + 1]."""
        size = self.sets.num_items + 1
        key = row[:, :, None] * size + column[:, None, :]
        return np.asarray(
            np.bincount(key.ravel(), np.repeat(weight.ravel(), column.shape[1]), size * size).reshape(size, size), dtype=np.float64
        )
