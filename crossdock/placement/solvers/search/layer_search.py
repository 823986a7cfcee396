"""Swap search in one layer: a mutable assignment of items to devices, annealing without rejections, and descent to a local optimum.

An annealing step prices many swaps at once and makes one of them, drawn with the probabilities that Metropolis proposals would accept; the
clock then moves on by the number of proposals that this would have taken (Bortz, Kalos and Lebowitz 1975, the n-fold way). In a cold layer
where nothing is accepted for a long time, that time passes at no cost.
"""

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crossdock.placement.solvers.search.price import TIE_WEIGHT, Layer, Price
from crossdock.placement.solvers.search.swaps import CopyState, TokenSets, copies_per_place

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

FROZEN = 1e-200  # summed acceptance below which nothing will ever happen
MAX_PAIRS = 2048  # swaps priced in one step
EXCESS_WEIGHT = 3.0  # of one mean load above the cap, as a multiple of the layer's whole cost


class Deadline:
    """A cap on wall time. `passed` stays true once it was."""

    def __init__(self, seconds: float) -> None:
        self.started_s = time.monotonic()
        self._end_s = self.started_s + seconds

    @property
    def passed(self) -> bool:
        return time.monotonic() >= self._end_s

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started_s

    @property
    def left_s(self) -> float:
        return max(0.0, self._end_s - time.monotonic())

    def share(self, parts: float) -> "Deadline":
        """A deadline for the first of `parts` equal parts of the time that is left."""
        return Deadline(self.left_s / parts)


@dataclass(frozen=True, eq=False)
class Placed:
    """An assignment `device_I` of one layer and its price; they compare by what breaks the load cap, then by value with its tie-breaker."""

    device_I: IntArray
    value: float
    tie: float
    excess: float

    def key(self) -> tuple[float, float]:
        return self.excess, self.value * (1.0 + TIE_WEIGHT * self.tie)

    def better_than(self, other: "Placed") -> bool:
        (mine_excess, mine), (their_excess, theirs) = self.key(), other.key()
        if abs(mine_excess - their_excess) > 1e-12:
            return mine_excess < their_excess
        return mine < theirs - 1e-12 * abs(theirs)


def placed_at(layer: Layer, price: Price, node_R: IntArray, device_I: IntArray) -> Placed:
    """An assignment with its price, homes anywhere alike; without the tables that price swaps, which take a hundred times as long."""
    copies_R = copies_per_place(layer.member_UK, layer.count_U, device_I, len(node_R))
    nodes_N = None
    if price.needs_nodes:
        nodes_N = copies_per_place(layer.member_UK, layer.count_U, node_R[device_I], int(node_R.max()) + 1)
    return _priced(price, device_I, copies_R, nodes_N, _loads(layer, device_I, len(node_R)))


def _loads(layer: Layer, device_I: IntArray, num_devices: int) -> FloatArray:
    return np.bincount(device_I, layer.load_I, num_devices).astype(np.float64)


def _priced(price: Price, device_I: IntArray, copies_R: FloatArray, nodes_N: FloatArray | None, load_R: FloatArray) -> Placed:
    nodes = np.zeros((1, 1)) if nodes_N is None else nodes_N[None]
    copies, load = copies_R[None], load_R[None]
    value, tie = price.value(copies, nodes, load), price.tie(copies, nodes, load)
    return Placed(device_I.copy(), float(value[0]), float(tie[0]), float(price.excess(load)[0]))


class LayerSearch:
    """The assignment of one layer's items to devices, with the price of every swap. Changed by `swap` alone.

    Where the homes of the sets are known, `home_costs` says what a copy from each home counts to each device and to each node.
    """

    def __init__(
        self,
        layer: Layer,
        sets: TokenSets,
        price: Price,
        node_R: IntArray,
        device_I: IntArray,
        home_costs: tuple[FloatArray | None, FloatArray | None] = (None, None),
    ) -> None:
        self.layer, self.price, self.node_R = layer, price, node_R
        to_device, to_node = home_costs
        self.copies = CopyState(sets, device_I, len(node_R), to_device)
        self.nodes = CopyState(sets, node_R[device_I], int(node_R.max()) + 1, to_node) if price.needs_nodes else None
        self.load_R = _loads(layer, device_I, len(node_R))
        free = np.flatnonzero(layer.pinned_I < 0)
        first, second = np.triu_indices(len(free), 1)
        expert_in_pair = free[first] < layer.num_experts
        self._first, self._second = free[first[expert_in_pair]], free[second[expert_in_pair]]

    @property
    def device_I(self) -> IntArray:
        return self.copies.place_I

    @property
    def num_pairs(self) -> int:
        return len(self._first)

    def placed(self) -> Placed:
        """The present assignment with its price."""
        return _priced(self.price, self.device_I, self.copies.copies_P, self.nodes.copies_P if self.nodes else None, self.load_R)

    def energy(self, placed: Placed) -> float:
        """What annealing minimises: the value, its tie-breaker, and a price for breaking the load cap."""
        return placed.value * (1.0 + TIE_WEIGHT * placed.tie) + EXCESS_WEIGHT * placed.value * placed.excess

    def pairs(self, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
        """Swaps to look at in one step: all that change the value, or a fair sample of them."""
        first, second = self._first, self._second
        if len(first) > MAX_PAIRS:
            chosen = rng.integers(len(first), size=MAX_PAIRS)
            first, second = first[chosen], second[chosen]
        return self.crossing(first, second, self.node_R if self.price.nodes_only else None)

    def chunks(self, rng: np.random.Generator) -> list[tuple[IntArray, IntArray]]:
        """All swaps in random order, in parts that are priced together."""
        order = rng.permutation(len(self._first))
        return [(self._first[part], self._second[part]) for part in np.split(order, range(MAX_PAIRS, len(order), MAX_PAIRS))]

    def energies(self, first: IntArray, second: IntArray) -> FloatArray:
        """Energy after each swap alone."""
        row, p, q = np.arange(len(first)), self.device_I[first], self.device_I[second]
        copies = np.tile(self.copies.copies_P, (len(first), 1))
        copies[row, p] += self.copies.change_first(first, second)
        copies[row, q] += self.copies.change_first(second, first)
        load = np.tile(self.load_R, (len(first), 1))
        heavier = self.layer.load_I[second] - self.layer.load_I[first]
        load[row, p] += heavier
        load[row, q] -= heavier
        nodes = np.zeros((len(first), 1))
        if self.nodes:
            apart = self.node_R[p] != self.node_R[q]
            nodes = np.tile(self.nodes.copies_P, (len(first), 1))
            nodes[row, self.node_R[p]] += np.where(apart, self.nodes.change_first(first, second), 0.0)
            nodes[row, self.node_R[q]] += np.where(apart, self.nodes.change_first(second, first), 0.0)
        value = self.price.value(copies, nodes, load)
        energy = value * (1.0 + TIE_WEIGHT * self.price.tie(copies, nodes, load))
        return energy if self.price.peak_cap is None else energy + EXCESS_WEIGHT * value * self.price.excess(load)

    def swap(self, a: int, b: int) -> None:
        """Exchange the devices of items a and b."""
        p, q = int(self.device_I[a]), int(self.device_I[b])
        heavier = self.layer.load_I[b] - self.layer.load_I[a]
        self.load_R[p] += heavier
        self.load_R[q] -= heavier
        self.copies.swap(a, b)
        if self.nodes:
            self.nodes.swap(a, b)

    def crossing(self, first: IntArray, second: IntArray, place_R: IntArray | None = None) -> tuple[IntArray, IntArray]:
        """Those of the swaps whose items stand on different devices, or on devices of different `place_R`."""
        place_I = self.device_I if place_R is None else place_R[self.device_I]
        keep = place_I[first] != place_I[second]
        return first[keep], second[keep]


def descend(search: LayerSearch, rng: np.random.Generator, deadline: Deadline) -> None:
    """Make the best swap of one part after another, until a whole round of parts offers none. Leaves a local optimum, or stops in time."""
    energy = search.energy(search.placed())
    quiet = 0
    chunks = search.chunks(rng)
    while quiet < len(chunks) and not deadline.passed:
        for first, second in chunks:
            first, second = search.crossing(first, second)
            quiet += 1
            if not len(first) or deadline.passed:
                continue
            after = search.energies(first, second)
            best = int(after.argmin())
            if after[best] < energy - 1e-12 * abs(energy):
                search.swap(int(first[best]), int(second[best]))
                energy, quiet = float(after[best]), 0


def anneal_layer(
    search: LayerSearch, rng: np.random.Generator, hot: float, cold: float, proposals: float, most_swaps: int, deadline: Deadline
) -> Placed:
    """Anneal from temperature `hot` to `cold` over so many Metropolis proposals or swaps made, whichever passes sooner; the best met."""
    best = search.placed()
    energy = search.energy(best)
    clock, swaps = 0.0, 0
    while (progress := max(clock / proposals, swaps / most_swaps)) < 1.0 and not deadline.passed:
        temperature = hot * (cold / hot) ** progress
        first, second = search.pairs(rng)
        if not len(first):
            break
        after = search.energies(first, second)
        weight = np.exp(np.minimum((energy - after) / temperature, 0.0))
        total = np.cumsum(weight)
        if total[-1] < FROZEN:
            break
        chosen = int(np.searchsorted(total, rng.random() * total[-1], side="right").clip(max=len(first) - 1))
        clock += len(first) / total[-1]
        search.swap(int(first[chosen]), int(second[chosen]))
        energy, swaps = float(after[chosen]), swaps + 1
        if energy < search.energy(best) - 1e-12 * abs(energy) or best.excess > 0:
            now = search.placed()
            best = now if now.better_than(best) else best
    return best
