"""Upper bounds on what co-location can keep between consecutive layers: an eigenvalue bound and a counting bound tied by multipliers.

Let Y[l] be the 0-1 matrix that says which expert of layer l shares its group (device, or node) with which of layer l + 1, and Z[l] the same
within layer l. All groups hold S experts of each layer. For the pair of layers l, l + 1 the matrix X = [[Z[l], Y[l]], [Y[l]', Z[l+1]]] has

    spectrum   the blocks' row sums are S; beside the two vectors that are constant on a layer, X has G - 1 eigenvalues 2 S and else 0
    box        entries are in [0, 1], diagonals are 1, neighbouring pairs share their Z; within the load cap, if there is one, the rows of Z
               times the layer's loads are at most the cap; and X keeps to the inequalities of `claws.py`

Keeping sum <W[l], Y[l]> over both at once is hard, over each alone it is easy: for any multipliers M, and any prices of load and of
inequalities, of which the box's part pays in advance for what they allow,

    kept <= max over spectrum of <M, X> + max over box of <W - M, X>,

the first being a sum of eigenvalues of M, the second a sum of positive entries. Good multipliers come from the alternating direction method
(Boyd et al. 2011), over-relaxed, in single precision; the bound of the multipliers that it has come to is computed in double precision.
Inequalities are added when the iteration has come near its end without them (Wiegele and Zhao 2022 do so for partitions of graphs).
"""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from crossdock.cores import available_cores
from crossdock.placement.solvers.certificates.blas_threads import single_threaded_blas
from crossdock.placement.solvers.certificates.claws import Claws
from crossdock.placement.solvers.search.layer_search import Deadline

FloatArray = NDArray[np.float64]
Array = NDArray[np.float32]

STEP = 2.2  # penalty, in units of the mean of the largest S flows of a row
RELAXATION = 1.6
LOAD_STEP, CLAW_STEP = 0.2, 0.3  # of the steps that suit prices alone; less because all moves at once
ITERATIONS = 600
EVERY = 10  # iterations between two bounds
CUT_AFTER = 20  # iterations without inequalities
CUT_EVERY = 20
CUT_WORTH = 40  # iterations that must still fit into the time for new inequalities to pay
SETTLED = 1e-4  # relative gain between two bounds below which the iteration ends
MOST_ITEMS = 1024  # of a layer: beyond, one iteration takes a minute, and its matrices gigabytes
SAFETY = 1e-7  # of all tokens, for rounding


def most_kept(
    flow_PII: FloatArray, num_groups: int, deadline: Deadline, load_LI: FloatArray | None = None, cap_L: FloatArray | None = None
) -> float:
    """An upper bound on the tokens that any grouping keeps in their group from layer to layer.

    `flow_PII` [P, I, I]: tokens from each item of a layer to each of the next, for P pairs of layers; I must divide by `num_groups`. With
    `load_LI` [P + 1, I] and `cap_L` [P + 1] only groupings count that give no group more than the cap. With more
    than `MOST_ITEMS` items it is the tokens that there are.
    """
    total = float(flow_PII.sum())
    if not total or num_groups == 1 or flow_PII.shape[1] > MOST_ITEMS:
        return total
    unit = total / (flow_PII.shape[0] * flow_PII.shape[1])  # the mean row's tokens
    with single_threaded_blas(), ThreadPoolExecutor(max(1, available_cores() - 1)) as threads:
        relaxation = _Relaxation(flow_PII / unit, num_groups, load_LI, cap_L, threads)
        best = _lowest(relaxation, deadline)
    return min(best * unit + SAFETY * total, total)


def _lowest(relaxation: "_Relaxation", deadline: Deadline) -> float:
    """The lowest bound of the iterations, at least one, until time is over or nothing is gained any more."""
    best, began_s = np.inf, time.monotonic()
    for number in range(1, ITERATIONS + 1):
        relaxation.iterate()
        if number % EVERY and number < ITERATIONS and not deadline.passed:
            continue
        bound = relaxation.bound()
        settled, best = best - bound < SETTLED * abs(best), min(best, bound)
        if deadline.passed:
            break
        cuts = 0
        if (
            number >= CUT_AFTER
            and (settled or number % CUT_EVERY == 0)
            and deadline.left_s * number > CUT_WORTH * (time.monotonic() - began_s)
        ):
            cuts = relaxation.extend()
        if settled and not cuts:
            break
    return best


class _Relaxation:
    """The state of the iteration: the box's Z and Y, the shift that is minus the multipliers over the penalty, and prices."""

    def __init__(
        self, weight_PII: FloatArray, num_groups: int, load_LI: FloatArray | None, cap_L: FloatArray | None, threads: ThreadPoolExecutor
    ) -> None:
        num_pairs, num_items, _ = weight_PII.shape
        self.num_groups, self.num_items, self.size = num_groups, num_items, num_items // num_groups
        self.mean, self.threads = self.size / num_items, threads
        self.weight_PII = weight_PII.astype(np.float32)
        largest = np.partition(weight_PII, num_items - self.size, axis=2)[:, :, num_items - self.size :]
        self.penalty = STEP * float(largest.mean())
        Q = _without_constant(num_items)
        self.basis = np.block([[Q, np.zeros_like(Q)], [np.zeros_like(Q), Q]])
        self.basis32 = self.basis.astype(np.float32)
        self.within_LII = np.full((num_pairs + 1, num_items, num_items), self.mean, dtype=np.float32)
        self.across_PII = np.full((num_pairs, num_items, num_items), self.mean, dtype=np.float32)
        self.shift_PJJ = np.zeros((num_pairs, 2 * num_items, 2 * num_items), dtype=np.float32)
        self.target_PJJ = np.zeros_like(self.shift_PJJ)
        self.shares_L = np.full(num_pairs + 1, 2.0)
        self.shares_L[[0, -1]] = 1.0
        self.claws = [Claws(2 * num_items) for _ in range(num_pairs)]
        self.load_LI = None if load_LI is None or cap_L is None else load_LI / np.maximum(cap_L, 1e-300)[:, None]
        self.price_LI = np.zeros((num_pairs + 1, num_items))

    def iterate(self) -> None:
        """Project every pair onto the spectrum, then all of them onto the box, and move multipliers and prices."""
        pairs = range(len(self.weight_PII))
        list(self.threads.map(self._to_spectrum, pairs))
        list(self.threads.map(self._within, range(len(self.within_LII))))
        list(self.threads.map(self._across, pairs))

    def extend(self) -> int:
        """Add inequalities that the box breaks; how many."""
        return sum(self.threads.map(lambda pair: self.claws[pair].extend(self._box(pair)), range(len(self.claws))))

    def bound(self) -> float:
        """What the multipliers and prices of now prove, in units of the weights."""
        pairs = range(len(self.weight_PII))
        charge_LII = np.zeros(self.within_LII.shape)
        total = 0.0
        for pair, (value, charge_JJ) in enumerate(self.threads.map(self._priced, pairs)):
            charge_LII[pair] += charge_JJ[: self.num_items, : self.num_items]
            charge_LII[pair + 1] += charge_JJ[self.num_items :, self.num_items :]
            total += value
        for layer in range(len(charge_LII)):
            charge_II = charge_LII[layer]
            if self.load_LI is not None:
                charge_II = charge_II + self._load_charge(layer)
                total += float(self.price_LI[layer].sum())
            total += float(np.maximum(-np.triu(charge_II, 1), 0.0).sum() - np.trace(charge_II) / 2.0)
        return total

    def _box(self, pair: int) -> Array:
        return np.block([[self.within_LII[pair], self.across_PII[pair]], [self.across_PII[pair].T, self.within_LII[pair + 1]]])

    def _projected(self, wanted_JJ: Array) -> Array:
        """The nearest matrix of the spectrum."""
        value, vector = np.linalg.eigh(self.basis32.T @ wanted_JJ @ self.basis32)
        kept = _clipped_to_sum(value.astype(np.float64), 2.0 * self.size, 2.0 * self.size * (self.num_groups - 1))
        used = kept > 0.0
        factor = self.basis32 @ vector[:, used]
        return np.asarray((factor * kept[used].astype(np.float32)) @ factor.T + np.float32(self.mean))

    def _to_spectrum(self, pair: int) -> None:
        """Into `target_PJJ`: the projection, carried on beyond where the box stood, and the shift."""
        box_JJ = self._box(pair)
        spectrum_JJ = self._projected(box_JJ - self.shift_PJJ[pair])
        self.target_PJJ[pair] = RELAXATION * spectrum_JJ + (1.0 - RELAXATION) * box_JJ + self.shift_PJJ[pair]

    def _within(self, layer: int) -> None:
        """Project a layer's Z onto the box, loads bought at the last price."""
        before, after = slice(0, self.num_items), slice(self.num_items, None)  # the layer as the first of a pair, and as the second
        wanted_II = np.zeros((self.num_items, self.num_items))
        for pair, corner in ((layer, before), (layer - 1, after)):
            if 0 <= pair < len(self.weight_PII):
                wanted_II += self.target_PJJ[pair, corner, corner]
                wanted_II -= self.claws[pair].pressure()[corner, corner] / (2.0 * self.penalty)
        if self.load_LI is not None:
            wanted_II -= self._load_charge(layer) / (2.0 * self.penalty)
        within_II = np.clip(wanted_II / self.shares_L[layer], 0.0, 1.0)
        np.fill_diagonal(within_II, 1.0)
        self.within_LII[layer] = within_II
        if self.load_LI is not None:
            load_I = self.load_LI[layer]
            step = LOAD_STEP * 2.0 * self.penalty * self.shares_L[layer] / max(float(load_I @ load_I), 1e-300)
            self.price_LI[layer] = np.maximum(self.price_LI[layer] + step * (within_II @ load_I - 1.0), 0.0)

    def _across(self, pair: int) -> None:
        """Project a pair's Y onto the box; then prices of the pair's inequalities and its shift."""
        half, target_JJ = self.num_items, self.target_PJJ[pair]
        gain_II = (self.weight_PII[pair] - self.claws[pair].pressure()[:half, half:]) / self.penalty
        self.across_PII[pair] = np.clip((target_JJ[:half, half:] + target_JJ[half:, :half].T + gain_II) / 2.0, 0.0, 1.0)
        box_JJ = self._box(pair)
        self.claws[pair].rise(box_JJ, CLAW_STEP * 2.0 * self.penalty)
        self.shift_PJJ[pair] = target_JJ - box_JJ

    def _load_charge(self, layer: int) -> FloatArray:
        """[I, I], symmetric: what a pair of items that share a group pays for each other's load."""
        assert self.load_LI is not None
        charge_II = np.outer(self.price_LI[layer], self.load_LI[layer])
        return charge_II + charge_II.T

    def _priced(self, pair: int) -> tuple[float, FloatArray]:
        """The spectrum's part of the bound and the box's part for Y; and [J, J] what M and inequalities charge for each with its mirror."""
        wanted_JJ = (self._box(pair) - self.shift_PJJ[pair]).astype(np.float64)
        wanted_JJ = (wanted_JJ + wanted_JJ.T) / 2.0
        multiplier_JJ = self.penalty * (wanted_JJ - self._projected(wanted_JJ.astype(np.float32)))
        multiplier_JJ = (multiplier_JJ + multiplier_JJ.T) / 2.0
        value = np.linalg.eigvalsh(self.basis.T @ multiplier_JJ @ self.basis)
        spectrum = 2.0 * self.size * value[len(value) - self.num_groups + 1 :].sum() + self.mean * multiplier_JJ.sum()
        charge_JJ = 2.0 * multiplier_JJ + self.claws[pair].pressure()
        across = np.maximum(self.weight_PII[pair] - charge_JJ[: self.num_items, self.num_items :], 0.0).sum()
        return float(spectrum + across + self.claws[pair].price_C.sum(dtype=np.float64)), charge_JJ


def _without_constant(num_items: int) -> FloatArray:
    """[I, I - 1]: an orthonormal basis of the vectors that sum to 0."""
    full = np.column_stack([np.ones(num_items), np.eye(num_items)[:, : num_items - 1]])
    return np.ascontiguousarray(np.linalg.qr(full)[0][:, 1:])


def _clipped_to_sum(value: FloatArray, cap: float, total: float) -> FloatArray:
    """The nearest point with entries in [0, cap] and sum `total`: all entries lowered alike, then clipped."""
    low, high = float(value.min()) - cap, float(value.max())
    for _ in range(60):
        middle = (low + high) / 2.0
        if np.clip(value - middle, 0.0, cap).sum() > total:
            low = middle
        else:
            high = middle
    return np.clip(value - high, 0.0, cap)
