"""Upper bounds on what co-location can keep between consecutive layers: an eigenvalue bound and a counting bound tied by multipliers.

Let Y[l] be the 0-1 matrix that says which expert of layer l shares its group (device, or node) with which of layer l + 1, and Z[l] the same
within layer l. All groups hold S experts of each layer. For the pair of layers l, l + 1 the matrix X = [[Z[l], Y[l]], [Y[l]', Z[l+1]]] has

    spectrum   the blocks' row sums are S; beside the two vectors that are constant on a layer, X has G - 1 eigenvalues 2 S and else 0
    box        entries are in [0, 1], diagonals are 1, neighbouring pairs share their Z, and within the load cap, if there is one, the rows
               of Z times the layer's loads are at most the cap

Keeping sum <W[l], Y[l]> over both at once is hard, over each alone it is easy: for any multipliers M,

    kept <= max over spectrum of <M, X> + max over box of <W - M, X>,

the first being a sum of eigenvalues of M, the second a sum of positive entries. Good multipliers come from the alternating direction method
(Boyd et al. 2011): its projection onto the spectrum gives them and the maximum at no cost, so that every iteration has its own valid bound.
Without Z the same bound holds with singular values of Y alone; that is quicker, and large problems begin there.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from crossdock.placement.solvers.search.layer_search import Deadline

FloatArray = NDArray[np.float64]

PAIR_STEP, CHAIN_STEP = 0.2, 0.3  # penalty of the two iterations, in units of the flows' mean row
PAIR_ITERATIONS = 60
CHAIN_ITERATIONS = 600
SMALL = 96  # experts per layer up to which the chain iteration starts at once
SETTLED = 2e-5  # relative gain over ten iterations below which the iteration ends
SAFETY = 1e-7  # of all tokens, for rounding


def most_kept(
    flow_PII: FloatArray, num_groups: int, deadline: Deadline, load_LI: FloatArray | None = None, cap_L: FloatArray | None = None
) -> float:
    """An upper bound on the tokens that any grouping keeps in their group from layer to layer.

    `flow_PII` [P, I, I]: tokens from each item of a layer to each of the next, for P pairs of layers; I must divide by `num_groups`. With
    `load_LI` [P + 1, I] and `cap_L` [P + 1] only groupings count that give no group more than the cap.
    """
    total = float(flow_PII.sum())
    if not total or num_groups == 1:
        return total
    unit = total / (flow_PII.shape[0] * flow_PII.shape[1])  # the mean row's tokens
    weight_PII = flow_PII / unit
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) - 1)) as threads:
        pairs = _Pairs(weight_PII, num_groups)
        small = flow_PII.shape[1] <= SMALL
        best = np.inf if small else _iterated(lambda: pairs.iterate(threads), PAIR_ITERATIONS, deadline.share(2.0))
        chain = _Chain(pairs, load_LI, cap_L)
        best = min(best, _iterated(lambda: chain.iterate(threads), CHAIN_ITERATIONS, deadline))
    return min(best * unit + SAFETY * total, total)


def _iterated(iterate: Callable[[], float], most: int, deadline: Deadline) -> float:
    """The lowest bound of the iterations, at least one, until time is over or nothing is gained any more."""
    best, earlier = np.inf, np.inf
    for number in range(most):
        best = min(best, iterate())
        if deadline.passed:
            break
        if number % 10 == 9:
            if earlier - best < SETTLED * abs(best):
                break
            earlier = best
    return best


class _Pairs:
    """The iteration on Y of every pair alone: spectral norm at most S, nuclear norm at most S (G - 1) beside the constant vectors."""

    def __init__(self, weight_PII: FloatArray, num_groups: int) -> None:
        self.weight_PII, self.num_groups = weight_PII, num_groups
        self.num_items = weight_PII.shape[1]
        self.size = self.num_items // num_groups
        self.mean = self.size / self.num_items
        self.basis = _without_constant(self.num_items)
        self.box_PII = np.full(weight_PII.shape, self.mean)
        self.shift_PII = np.zeros(weight_PII.shape)

    def iterate(self, threads: ThreadPoolExecutor) -> float:
        """One iteration; the bound of its multipliers, in units of the weights."""
        return sum(threads.map(self._pair, range(len(self.weight_PII))))

    def _pair(self, pair: int) -> float:
        weight, shift, Q = self.weight_PII[pair], self.shift_PII[pair], self.basis
        wanted = self.box_PII[pair] - shift
        left, value, right = np.linalg.svd(Q.T @ wanted @ Q)
        kept = np.minimum(value, self.size)
        if kept.sum() > self.size * (self.num_groups - 1):
            kept = _clipped_to_sum(value, self.size, self.size * (self.num_groups - 1))
        rank = np.count_nonzero(kept)
        spectrum = self.mean + (Q @ (left[:, :rank] * kept[:rank])) @ (right[:rank] @ Q.T)
        multiplier = PAIR_STEP * (wanted - spectrum)
        bound = float((multiplier * spectrum).sum() + np.maximum(weight - multiplier, 0.0).sum())
        target = spectrum + shift
        self.box_PII[pair] = np.clip(target + weight / PAIR_STEP, 0.0, 1.0)
        self.shift_PII[pair] = target - self.box_PII[pair]
        return bound


class _Chain:
    """The iteration on whole matrices X, which ties the pairs by the Z that they share. Goes on from where `pairs` has come to."""

    def __init__(self, pairs: _Pairs, load_LI: FloatArray | None, cap_L: FloatArray | None) -> None:
        P, self.num_items, _ = pairs.weight_PII.shape
        self.weight_PII, self.num_groups, self.size, self.mean = pairs.weight_PII, pairs.num_groups, pairs.size, pairs.mean
        num_items, Q = self.num_items, pairs.basis
        self.basis = np.block([[Q, np.zeros_like(Q)], [np.zeros_like(Q), Q]])
        self.box_PJJ = np.full((P, 2 * num_items, 2 * num_items), self.mean)
        self.shift_PJJ = np.zeros((P, 2 * num_items, 2 * num_items))
        self.box_PJJ[:, :num_items, num_items:], self.box_PJJ[:, num_items:, :num_items] = pairs.box_PII, np.swapaxes(pairs.box_PII, 1, 2)
        half = pairs.shift_PII * (PAIR_STEP / CHAIN_STEP / 2.0)  # the same multipliers, half on Y and half on its mirror image
        self.shift_PJJ[:, :num_items, num_items:], self.shift_PJJ[:, num_items:, :num_items] = half, np.swapaxes(half, 1, 2)
        self.multiplier_LII, self.target_LII = np.zeros((P + 1, num_items, num_items)), np.zeros((P + 1, num_items, num_items))
        self.spectrum_PJJ = np.zeros_like(self.box_PJJ)
        self.shares_L = np.full(P + 1, 2.0)
        self.shares_L[[0, -1]] = 1.0
        self.load_LI, self.cap_L = load_LI, cap_L
        self.price_LI = np.zeros((P + 1, num_items))

    def iterate(self, threads: ThreadPoolExecutor) -> float:
        """One iteration; the bound of its multipliers, in units of the weights."""
        num_items = self.num_items
        bound = sum(threads.map(self._spectrum, range(len(self.weight_PII))))
        self.multiplier_LII[:], self.target_LII[:] = 0.0, 0.0
        for pair, (spectrum, box, shift) in enumerate(zip(self.spectrum_PJJ, self.box_PJJ, self.shift_PJJ, strict=True)):
            multiplier, target = CHAIN_STEP * (box - shift - spectrum), spectrum + shift
            self.multiplier_LII[pair] += multiplier[:num_items, :num_items]
            self.multiplier_LII[pair + 1] += multiplier[num_items:, num_items:]
            self.target_LII[pair] += target[:num_items, :num_items]
            self.target_LII[pair + 1] += target[num_items:, num_items:]
        bound += sum(threads.map(self._within_layer, range(len(self.target_LII))))
        list(threads.map(self._box, range(len(self.weight_PII))))
        return bound

    def _spectrum(self, pair: int) -> float:
        """Project onto the spectrum; the maximum of <M, X> there and of <W - M, Y> over the box."""
        num_items = self.num_items
        wanted = self.box_PJJ[pair] - self.shift_PJJ[pair]
        value, vector = np.linalg.eigh(self.basis.T @ ((wanted + wanted.T) / 2.0) @ self.basis)
        kept = _clipped_to_sum(value, 2.0 * self.size, 2.0 * self.size * (self.num_groups - 1))
        used = kept > 0.0
        factor = self.basis @ vector[:, used]
        spectrum = self.mean + (factor * kept[used]) @ factor.T
        self.spectrum_PJJ[pair] = spectrum
        multiplier = CHAIN_STEP * (wanted - spectrum)
        across = multiplier[:num_items, num_items:] + multiplier[num_items:, :num_items].T
        return float((multiplier * spectrum).sum() + np.maximum(self.weight_PII[pair] - across, 0.0).sum())

    def _within_layer(self, layer: int) -> float:
        """Project a layer's Z onto the box, into `target_LII`; the maximum of <-M, Z> there, loads bought at the last price."""
        gain = -self.multiplier_LII[layer]
        diagonal = np.arange(self.num_items)
        own = gain[diagonal, diagonal].sum()
        target = self.target_LII[layer] / self.shares_L[layer]
        if self.load_LI is None or self.cap_L is None:
            gain[diagonal, diagonal] = 0.0
            box, bound = np.clip(target, 0.0, 1.0), own + np.maximum(gain, 0.0).sum()
        else:
            load_I, price_I1 = self.load_LI[layer] / max(self.cap_L[layer], 1e-300), self.price_LI[layer][:, None]
            free = gain - price_I1 * load_I
            free[diagonal, diagonal] = 0.0
            bound = own + np.maximum(free, 0.0).sum() + (price_I1[:, 0] * (1.0 - load_I)).sum()
            target[diagonal, diagonal] = 1.0
            box, price_I = _clipped_to_load(target, load_I)
            self.price_LI[layer] = CHAIN_STEP * self.shares_L[layer] * price_I
        box[diagonal, diagonal] = 1.0
        self.target_LII[layer] = box
        return float(bound)

    def _box(self, pair: int) -> None:
        """Project a pair's Y onto the box, and move the multipliers."""
        num_items, target = self.num_items, self.spectrum_PJJ[pair] + self.shift_PJJ[pair]
        across = np.clip(
            (target[:num_items, num_items:] + target[num_items:, :num_items].T) / 2.0 + self.weight_PII[pair] / (2.0 * CHAIN_STEP), 0.0, 1.0
        )
        box = self.box_PJJ[pair]
        box[:num_items, :num_items], box[num_items:, num_items:] = self.target_LII[pair], self.target_LII[pair + 1]
        box[:num_items, num_items:], box[num_items:, :num_items] = across, across.T
        self.shift_PJJ[pair] = target - box


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
