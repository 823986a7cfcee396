"""Lower bounds on the copies that the distinct groups of a token's experts need, by a convex relaxation of who shares a group with whom.

Let Z be the 0-1 matrix of one layer that says which experts share a group (a device, or a node) of S experts each. A token whose expert e
has m fellow experts in its group owes 1 / (1 + m) of a copy to e, so that the copies are a convex function of Z where 1 / (1 + m) is
continued between whole m by straight lines: with j = floor(m),

    copies of (token, e) >= 2 / (j + 2) - m / ((j + 1) (j + 2)),      m = sum of Z[e, f] over the token's other experts f,

with equality where Z is a real grouping. Every choice of j is valid, also one for each token and expert, and so is every mean of choices;
what is left is a linear bound a - <W, Z>. Z itself lies in the two sets of `colocation.py`: beside the constant vector its eigenvalues
are S, G - 1 times, and else 0; its entries are in [0, 1], its diagonal is 1, and its rows times the load are at most the load cap, if any.
For any multipliers M

    copies >= a - max over spectrum of <M, Z> - max over box of <W - M, Z>.

The alternating direction method finds M, the tangents at its iterates, averaged, find W and a; every iteration has its own valid bound.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from crossdock.cores import available_cores
from crossdock.placement.records.trace import NO_EXPERT
from crossdock.placement.solvers.certificates.blas_threads import single_threaded_blas
from crossdock.placement.solvers.certificates.colocation import _clipped_to_sum, _without_constant
from crossdock.placement.solvers.problem import Problem
from crossdock.placement.solvers.search.layer_search import Deadline

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

STEP = 0.1  # penalty of the iteration, in units of the tangents' mean row
ROUND = 20  # iterations of one layer before the next one's turn
ITERATIONS = 200
SETTLED = 2e-4  # relative gain of a round below which a layer is done
LEAST_NEW = 0.1  # share of the newest tangent in the mean, while the iteration is young
MAX_ITEMS = 1024  # larger eigenvalue problems take longer than anyone waits
SAFETY = 1e-9


def fewest_copies(
    problem: Problem, num_groups: int, deadline: Deadline, *, capped: bool, asked_L: NDArray[np.bool_] | None = None
) -> FloatArray:
    """[L]: copies of the whole trace to distinct groups of equal capacity, at least; 0 where the relaxation has nothing to say.

    `capped` asks for the problem's load cap to be used: of a device's group, not of a node's. `asked_L` leaves out layers, which get 0.
    """
    affinity, num_slots = problem.affinity, int(problem.slots_R.sum())
    if affinity.top_k == 1 or num_groups == 1 or num_slots % num_groups or num_slots > MAX_ITEMS:
        return np.zeros(problem.num_layers)
    cap = problem.constraints.load_cap if capped else None
    numbers = np.arange(problem.num_layers) if asked_L is None else np.flatnonzero(asked_L)
    waiting = layers = [_Layer(problem, int(number), num_groups, cap) for number in numbers]
    with single_threaded_blas(), ThreadPoolExecutor(available_cores()) as threads:
        while waiting and not deadline.passed:
            list(threads.map(lambda layer: layer.round(deadline), waiting))
            waiting = [layer for layer in waiting if not layer.is_done]
    best_L = np.zeros(problem.num_layers)
    best_L[numbers] = [layer.best for layer in layers]
    return best_L


class _Layer:
    """The iteration of one layer; `best` is the best bound so far."""

    def __init__(self, problem: Problem, number: int, num_groups: int, cap: float | None) -> None:
        sets = problem.affinity.sets[number]
        self.num_experts, self.num_groups = problem.num_experts, num_groups
        self.num_items = int(problem.slots_R.sum())
        self.size = self.num_items // num_groups
        self.member_KU: IntArray = np.where(sets.experts_UK == NO_EXPERT, self.num_experts, sets.experts_UK).astype(np.int64).T.copy()
        self.count_U = sets.count_U.astype(np.float64)
        self.basis = _without_constant(self.num_items)
        self.load_I: FloatArray | None = None
        if cap is not None:
            load_E = problem.affinity.load_LE[number].astype(np.float64)
            self.load_I = np.pad(load_E, (0, self.num_items - self.num_experts)) / max(cap * load_E.sum() / num_groups, 1e-300)
        self.price_I = np.zeros(self.num_items)
        self.box_II = np.full((self.num_items, self.num_items), (self.size - 1) / max(self.num_items - 1, 1))
        np.fill_diagonal(self.box_II, 1.0)
        self.shift_II = np.zeros_like(self.box_II)
        self.constant, self.tangent_II = self._tangent(self.box_II)
        self.step = STEP * max(float(self.tangent_II.sum()) / self.num_items, 1e-300)
        self.best, self.number, self.is_done = 0.0, 0, False

    def round(self, deadline: Deadline) -> None:
        """Some iterations; the layer is done where they gain little."""
        before = self.best
        for _ in range(ROUND):
            self.best = max(self.best, self._iterate() * (1.0 - SAFETY))
            if deadline.passed:
                return
        self.is_done = self.number >= ITERATIONS or self.best - before < SETTLED * self.best

    def _iterate(self) -> float:
        """One iteration; the bound of its multipliers."""
        wanted_II = self.box_II - self.shift_II
        value, vector = np.linalg.eigh(self.basis.T @ ((wanted_II + wanted_II.T) / 2.0) @ self.basis)
        kept = _clipped_to_sum(value, float(self.size), float(self.size * (self.num_groups - 1)))
        used = kept > 0.0
        factor = self.basis @ vector[:, used]
        spectrum_II = self.size / self.num_items + (factor * kept[used]) @ factor.T
        multiplier_II = self.step * (wanted_II - spectrum_II)
        bound = self.constant - float((multiplier_II * spectrum_II).sum()) - self._most_in_box(self.tangent_II - multiplier_II)
        target_II = spectrum_II + self.shift_II + self.tangent_II / self.step
        if self.load_I is None:
            self.box_II = np.clip(target_II, 0.0, 1.0)
        else:
            np.fill_diagonal(target_II, 1.0)
            self.box_II, price_I = _clipped_to_load(target_II, self.load_I)
            self.price_I = self.step * price_I
        np.fill_diagonal(self.box_II, 1.0)
        self.shift_II = spectrum_II + self.shift_II - self.box_II
        self.number += 1
        constant, tangent_II = self._tangent(self.box_II)
        share = max(1.0 / (self.number + 1), LEAST_NEW if self.number <= ITERATIONS // 2 else LEAST_NEW / 5.0)
        self.constant += share * (constant - self.constant)
        self.tangent_II += share * (tangent_II - self.tangent_II)
        return bound

    def _most_in_box(self, gain_II: FloatArray) -> float:
        """The maximum of <gain, Z> over the box, or more: load is bought at the last iteration's price."""
        own_I = np.diag(gain_II).copy()
        bought = 0.0
        if self.load_I is not None:
            gain_II = gain_II - self.price_I[:, None] * self.load_I
            bought = float((self.price_I * (1.0 - self.load_I)).sum())
        positive_II = np.maximum(gain_II, 0.0)
        np.fill_diagonal(positive_II, 0.0)
        return float(positive_II.sum() + own_I.sum()) + bought

    def _tangent(self, box_II: FloatArray) -> tuple[float, FloatArray]:
        """Constant a and slopes W [I, I] of the linear bound that touches the copies at `box_II`."""
        side = self.num_experts + 1  # the last one gathers absent choices
        together = np.zeros((side, side))
        together[:-1, :-1] = box_II[: self.num_experts, : self.num_experts]
        flat, top_k = together.ravel(), len(self.member_KU)
        fellows_KU = np.zeros(self.member_KU.shape)
        pairs = [(first, second) for first in range(top_k) for second in range(first)]
        for first, second in pairs:
            shared_U = flat[self.member_KU[first] * side + self.member_KU[second]]
            fellows_KU[first] += shared_U
            fellows_KU[second] += shared_U
        whole_KU = np.floor(fellows_KU + 1e-9)
        weight_KU = np.where(self.member_KU < self.num_experts, self.count_U, 0.0)
        slope_KU = weight_KU / ((whole_KU + 1.0) * (whole_KU + 2.0))
        slopes = np.zeros(side * side)
        for first, second in pairs:
            place_U = self.member_KU[first] * side + self.member_KU[second]
            slopes += np.bincount(place_U, (slope_KU[first] + slope_KU[second]) / 2.0, side * side)
        tangent_EE = slopes.reshape(side, side)[:-1, :-1]
        tangent_II = np.zeros_like(box_II)
        tangent_II[: self.num_experts, : self.num_experts] = tangent_EE + tangent_EE.T
        return float((weight_KU * 2.0 / (whole_KU + 2.0)).sum()), tangent_II


def _clipped_to_load(target_II: FloatArray, load_I: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The nearest matrix with entries in [0, 1] whose rows times `load_I` are at most 1, and the price of load that each row paid."""
    low_I, high_I = np.zeros(len(target_II)), np.full(len(target_II), 1.0)
    while ((np.clip(target_II - high_I[:, None] * load_I, 0.0, 1.0) @ load_I) > 1.0).any() and high_I.max() < 1e12:
        high_I *= 4.0
    for _ in range(40):
        middle_I = (low_I + high_I) / 2.0
        heavy_I = np.clip(target_II - middle_I[:, None] * load_I, 0.0, 1.0) @ load_I > 1.0
        low_I, high_I = np.where(heavy_I, middle_I, low_I), np.where(heavy_I, high_I, middle_I)
    light_I = np.clip(target_II, 0.0, 1.0) @ load_I <= 1.0
    price_I = np.where(light_I, 0.0, high_I)
    return np.clip(target_II - price_I[:, None] * load_I, 0.0, 1.0), price_I
