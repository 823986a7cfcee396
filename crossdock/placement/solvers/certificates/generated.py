"""Lower bounds on the copies that distinct groups need, from the set partitioning program of `columns.py` where its sets cannot be listed.

The linear relaxation chooses G of all sets of S items, every item once, so that the tokens that use each set are fewest. For any prices
of the items of a layer (Gilmore and Gomory 1961; Lasdon 1970),

    copies >= sum of all prices + G * (the least, over all sets of S items, of the set's tokens less its prices).

Good prices are the duals of the program over few sets, to which a local search adds sets that are cheaper than their prices until it
finds no more; `pricing.py` then proves how cheap any set can be, first roughly, then more closely, and finds the sets that the local search
has missed. Prices that are not the best cost sharpness, never validity. Load cap and pins only make plans dearer, so that the bound holds
with them as well.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import linprog

from crossdock.cores import available_cores
from crossdock.placement.solvers.certificates.blas_threads import single_threaded_blas
from crossdock.placement.solvers.certificates.pricing import LEAST_SIZE, Pricing
from crossdock.placement.solvers.problem import Problem
from crossdock.placement.solvers.search import starts
from crossdock.placement.solvers.search.layer_search import Deadline
from crossdock.placement.solvers.search.price import Layer, layer_of

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

MAX_SIZE, MAX_ITEMS = 12, 96  # of larger groups, or among more items, the search for the cheapest proves nothing in time
SLACKS = (0.012, 0.004, 0.001)  # of the bound, given up by the successive proofs
DESCENTS = 40  # of the local search in a round
QUIET = 1  # rounds without a cheaper set after which the local search is left
MOST_THREADS = 2  # more wait for one another: many small array operations hold the interpreter's lock
NEAR = 0.002  # of all tokens: sets of no larger reduced cost come into the program with the set beside them
NEAREST = 60  # such sets of each descent
SAFETY = 1e-9


def unsuited(problem: Problem, num_groups: int) -> bool:
    """Whether the groups are of unequal size, or too small or too large for this bound."""
    num_items = int(problem.slots_R.sum())
    return num_items % num_groups > 0 or num_items > MAX_ITEMS or not LEAST_SIZE <= num_items // num_groups <= MAX_SIZE


def fewest_copies(problem: Problem, num_groups: int, deadline: Deadline) -> tuple[FloatArray, NDArray[np.bool_]]:
    """[L]: copies of the whole trace to distinct groups of equal capacity, at least; and the layers whose first proof was not finished."""
    group_LI = _begun(problem, num_groups)
    layers = [Generation(layer_of(problem, number), group_I, num_groups, deadline) for number, group_I in enumerate(group_LI)]
    with single_threaded_blas(), ThreadPoolExecutor(min(MOST_THREADS, available_cores())) as threads:
        for slack in SLACKS:
            list(threads.map(Generation.prove, layers, [slack] * len(layers)))
    return np.array([layer.bound for layer in layers]), np.array([not layer.is_proven for layer in layers])


def _begun(problem: Problem, num_groups: int) -> IntArray:
    """[L, I]: a quick grouping of all items, vacancies where there is room."""
    device_LE = starts.clustered(problem)
    group_R = np.arange(problem.num_devices) if num_groups == problem.num_devices else np.array(problem.topology.node_of_R)
    size = int(problem.slots_R.sum()) // num_groups
    group_LI = np.empty((problem.num_layers, size * num_groups), dtype=np.int64)
    for group_I, device_E in zip(group_LI, device_LE, strict=True):
        group_E = group_R[device_E]
        free_G = size - np.bincount(group_E, minlength=num_groups)
        group_I[:] = np.append(group_E, np.repeat(np.arange(num_groups), free_G))
    return group_LI


class Generation:
    """The program of one layer; `bound` is the best bound so far, `cost_of` the tokens that use each set known."""

    def __init__(self, layer: Layer, group_I: IntArray, num_groups: int, deadline: Deadline) -> None:
        self.layer, self.num_groups, self.deadline = layer, num_groups, deadline
        self.size = layer.num_items // num_groups
        self.bound, self.is_proven = 0.0, False
        self._rng = np.random.default_rng(layer.number)
        self.cost_of: dict[tuple[int, ...], float] = {}
        self._begun_GS = np.argsort(group_I, kind="stable").reshape(num_groups, self.size)

    def prove(self, slack: float) -> None:
        """Raise the bound to within `slack` of the relaxation, as far as time allows."""
        if self.deadline.passed:
            return
        price_I, constant, value = self._prices()
        search = Pricing(self.layer, price_I, self.size, constant - slack * value / self.num_groups, self.deadline)
        proven = float(price_I.sum()) + self.num_groups * search.lowest()
        self.bound = max(self.bound, float(np.ceil(proven * (1.0 - SAFETY))))
        self.is_proven = self.is_proven or search.is_finished
        for reduced, member_S in search.found:
            self._know(member_S, reduced + float(price_I[member_S].sum()))

    def _prices(self) -> tuple[FloatArray, float, float]:
        """Prices [I], the price of a group, and the value of the relaxation over the sets that were found worth knowing."""
        exchanges, quiet = _Exchanges(self.layer), 0
        for member_S in self._begun_GS if not self.cost_of else ():
            cost, cost_SI = exchanges.of(member_S)
            self._know(member_S, cost)
            self._know_beside(member_S, cost_SI, np.argwhere(np.isfinite(cost_SI)))
        while True:
            price_I, constant, value, support_XS = self._relaxed()
            if quiet == QUIET or self.deadline.passed:
                return price_I, constant, value
            begin = [self._stirred(member_S) for member_S in self._rng.permutation(support_XS)[: DESCENTS * 3 // 4]]
            begin += [self._rng.choice(self.layer.num_items, self.size, replace=False) for _ in range(DESCENTS - len(begin))]
            lowest = min(self._descend(exchanges, member_S, price_I, constant) for member_S in begin)
            quiet = 0 if lowest < -1e-6 * value else quiet + 1

    def _relaxed(self) -> tuple[FloatArray, float, float, IntArray]:
        """The program over all sets known: prices, price of a group, value, and the sets [X, S] that it uses."""
        member_CS, cost_C = np.array(list(self.cost_of), dtype=np.int64), np.array(list(self.cost_of.values()), dtype=np.float64)
        num_items, (num_sets, size) = self.layer.num_items, member_CS.shape
        row = np.append(member_CS.ravel(), np.full(num_sets, num_items))
        column = np.append(np.repeat(np.arange(num_sets), size), np.arange(num_sets))
        held = sparse.csc_array((np.ones(len(row)), (row, column)), shape=(num_items + 1, num_sets))
        ruinous = 2.0 * float(self.layer.count_U.sum()) * self.num_groups
        slack = sparse.csc_array(np.hstack([np.eye(num_items + 1), -np.eye(num_items + 1)]))
        cost_X: FloatArray = np.concatenate([cost_C, np.full(2 * num_items + 2, ruinous)])
        rows: Any = sparse.hstack([held, slack], format="csc")
        right_Y: FloatArray = np.append(np.ones(num_items), float(self.num_groups))
        answer = linprog(
            cost_X,
            A_eq=rows,
            b_eq=right_Y,
            method="highs-ds",
        )
        assert answer.x is not None, answer.message  # slacks make the program feasible, and costs are positive
        dual_Y = np.asarray(answer.eqlin.marginals)
        return dual_Y[:-1], float(dual_Y[-1]), float(cost_X @ answer.x), member_CS[answer.x[:num_sets] > 1e-9]

    def _stirred(self, member_S: IntArray) -> IntArray:
        """The set with up to half of its items exchanged for others."""
        stirred_S, number = member_S.copy(), int(self._rng.integers(1, self.size // 2 + 1))
        others = np.setdiff1d(np.arange(self.layer.num_items), member_S)
        number = min(number, len(others))
        stirred_S[self._rng.choice(self.size, number, replace=False)] = self._rng.choice(others, number, replace=False)
        return stirred_S

    def _descend(self, exchanges: "_Exchanges", member_S: IntArray, price_I: FloatArray, constant: float) -> float:
        """Make the best exchange until none helps; the set met then, and those beside it, become known. Its reduced cost."""
        member_S = member_S.copy()
        near = NEAR * float(self.layer.count_U.sum())
        while True:
            cost, cost_SI = exchanges.of(member_S)
            reduced = cost - float(price_I[member_S].sum()) - constant
            reduced_SI = cost_SI - (price_I[member_S].sum() - price_I[member_S][:, None] + price_I) - constant
            out, item = np.unravel_index(int(reduced_SI.argmin()), reduced_SI.shape)
            if not reduced_SI[out, item] < reduced - 1e-6 * max(1.0, abs(cost)):
                break
            member_S[out] = item
        self._know(member_S, cost)
        beside = np.argwhere(reduced_SI < near)
        self._know_beside(member_S, cost_SI, beside[np.argsort(reduced_SI[tuple(beside.T)], kind="stable")[:NEAREST]])
        return reduced

    def _know_beside(self, member_S: IntArray, cost_SI: FloatArray, exchanges_X2: IntArray) -> None:
        for out, item in exchanges_X2:
            other_S = member_S.copy()
            other_S[out] = item
            self._know(other_S, float(cost_SI[out, item]))

    def _know(self, member_S: IntArray, cost: float) -> None:
        self.cost_of[tuple(np.sort(member_S).tolist())] = cost


class _Exchanges:
    """A layer's token sets as a dense table, and from it the cost of every exchange of a member for another item."""

    def __init__(self, layer: Layer) -> None:
        exact: type[np.floating[Any]] = np.float32 if layer.count_U.sum() < 2**24 else np.float64  # whole numbers
        used_UI = np.zeros((len(layer.count_U), layer.num_items + 1), dtype=exact)
        np.put_along_axis(used_UI, layer.member_UK, 1.0, axis=1)
        self._used_UI = np.ascontiguousarray(used_UI[:, :-1])
        self._used_IU = np.ascontiguousarray(self._used_UI.T)
        self._count_U, self._num_tokens = layer.count_U.astype(exact), float(layer.count_U.sum())

    def of(self, member_S: IntArray) -> tuple[float, FloatArray]:
        """Tokens that use the set, and [S, I] those that would use it if one of its members gave way to another item; inf for members."""
        used_SU = self._used_IU[member_S]
        here_U = used_SU.sum(axis=0)
        none_U = self._count_U * (here_U == 0)
        used_SU *= self._count_U * (here_U == 1)
        cost = float(self._num_tokens - none_U.sum(dtype=np.float64))
        changed_XI = (np.vstack([none_U, used_SU]) @ self._used_UI).astype(np.float64)
        arriving_I, shared_SI = changed_XI[0], changed_XI[1:]
        leaving_S = shared_SI[np.arange(len(member_S)), member_S]
        cost_SI = cost - leaving_S[:, None] + arriving_I + shared_SI
        cost_SI[:, member_S] = np.inf
        return cost, cost_SI
