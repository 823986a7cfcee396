"""Inequalities that tie one item to several others, found where a fractional solution breaks them, with the prices they are worth.

Let X say which items share a group. For an item i and a set T of others, with t of T in i's group, the pairs of T that share a group are at
least t (t - 1) / 2, and t - t (t - 1) / 2 <= 1 for every whole t. So

    sum over j in T of X[i, j]  -  sum over pairs j, k in T of X[j, k]  <=  1,

the claws, or 2-partition inequalities with one centre (Groetschel and Wakabayashi 1990); with two items in T they are the triangles.
Relaxations without them let an item share a fraction of its group with many that share little with each other.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Array = NDArray[np.float32]
IntArray = NDArray[np.int64]

MOST = 6  # items of T
NEIGHBOURS, STARTS = 64, 24  # of an item: those that T is made of, and those that it begins with
KEPT = 8  # new inequalities of one centre and one search
LEAST = 0.03  # breach from which an inequality is taken
NONE = -1


class Claws:
    """The inequalities of one matrix X [J, J], and their prices, which `rise` where X breaks them and fall where it does not."""

    def __init__(self, num_items: int) -> None:
        self.num_items = num_items
        self.member_CM = np.full((0, MOST + 1), NONE, dtype=np.int64)  # the centre, then T
        self.price_C = np.zeros(0, dtype=np.float32)
        self._build()

    def pressure(self) -> NDArray[np.float64]:
        """[J, J], symmetric: what the inequalities charge for a unit of each entry, which stands for its mirror image as well."""
        half_JJ = (self._sign.T @ self.price_C.astype(np.float64)).reshape(self.num_items, self.num_items)
        return np.asarray(half_JJ + half_JJ.T)

    def rise(self, box_JJ: Array, step: float) -> None:
        """Move the prices by what X breaks each inequality by, in steps that are small where inequalities share entries."""
        breach_C = self._sign @ box_JJ.ravel() - 1.0
        self.price_C = np.maximum(self.price_C + step * self._step_C * breach_C, 0.0).astype(np.float32)

    def extend(self, box_JJ: Array) -> int:
        """Drop inequalities without a price, add broken ones; how many were added."""
        found_CM = _broken(box_JJ)
        used = self.price_C > 0.0
        both_CM = np.concatenate([self.member_CM[used], found_CM])
        self.member_CM, first_C = np.unique(both_CM, axis=0, return_index=True)
        self.price_C = np.concatenate([self.price_C[used], np.zeros(len(found_CM), dtype=np.float32)])[first_C]
        self._build()
        return int((first_C >= np.count_nonzero(used)).sum())

    def _build(self) -> None:
        """The matrix [C, J * J] of signs, on the upper triangle, and the steps."""
        rows, columns, signs = [], [], []
        for a in range(MOST + 1):
            for b in range(a + 1, MOST + 1):
                row_V = np.flatnonzero((self.member_CM[:, a] != NONE) & (self.member_CM[:, b] != NONE))
                pair_V2 = np.sort(self.member_CM[row_V][:, [a, b]], axis=1)
                rows.append(row_V)
                columns.append(pair_V2[:, 0] * self.num_items + pair_V2[:, 1])
                signs.append(np.full(len(row_V), 1.0 if a == 0 else -1.0, dtype=np.float32))
        row_V, column_V, num_claws = np.concatenate(rows), np.concatenate(columns), len(self.member_CM)
        self._sign = sparse.csr_matrix((np.concatenate(signs), (row_V, column_V)), shape=(num_claws, self.num_items**2))
        shared = np.bincount(column_V, minlength=self.num_items**2)  # inequalities that use an entry
        self._step_C = (1.0 / np.maximum(np.bincount(row_V, shared[column_V], num_claws), 1.0)).astype(np.float32)


def _broken(box_JJ: Array) -> IntArray:
    """[C, M + 1]: for each centre some of the inequalities that X breaks; T grows by what adds most, from several first items."""
    apart_JJ = box_JJ.copy()
    np.fill_diagonal(apart_JJ, np.inf)  # no item is taken twice
    found = []
    for centre, near_J in enumerate(box_JJ):
        near_X = np.argsort(-near_J, kind="stable")[: NEIGHBOURS + 1]
        near_X = near_X[near_X != centre]
        if not len(near_X):
            continue
        own_X, among_XX = near_J[near_X], apart_JJ[np.ix_(near_X, near_X)]
        starts = np.arange(min(STARTS, len(near_X)))
        chosen_VM = np.full((len(starts), MOST), NONE)
        chosen_VM[:, 0] = starts
        total_V, gain_VX = own_X[starts], own_X - among_XX[starts]
        for place in range(1, MOST):
            best_V = gain_VX.argmax(axis=1)
            more_V = gain_VX[starts, best_V]
            adds_V = more_V > 0.0
            if not adds_V.any():
                break
            chosen_VM[adds_V, place] = best_V[adds_V]
            total_V = total_V + np.where(adds_V, more_V, 0.0)
            gain_VX = gain_VX - among_XX[best_V]
        worst_V = np.argsort(-total_V, kind="stable")
        worst_V = worst_V[total_V[worst_V] > 1.0 + LEAST]
        member_VM = np.where(chosen_VM == NONE, NONE, near_X[chosen_VM])[worst_V]
        different_VM = np.unique(np.sort(member_VM, axis=1)[:, ::-1], axis=0, return_index=True)
        picked = np.sort(different_VM[1])[:KEPT]  # the worst first
        member_VM = np.sort(member_VM[picked], axis=1)[:, ::-1]
        found.append(np.column_stack([np.full(len(member_VM), centre), member_VM]))
    return np.concatenate(found) if found else np.full((0, MOST + 1), NONE, dtype=np.int64)
