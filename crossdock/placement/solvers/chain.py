"""Annealing for objective hops, where each layer is tied to its neighbours: tokens' first choices should follow one another on one device.

Given the neighbours, a layer is a linear assignment problem: expert e on device r keeps the tokens that come from r or go on to r. So a
layer is annealed with its neighbours held still, sweep after sweep while the temperature falls, and the end is polished with exact
assignments (the alternating sweep of `scipy.optimize.linear_sum_assignment`), or with swaps alone where a load cap couples the experts of a
layer. The objective is ExFlow's (arXiv 2401.08383). In mode home it saves no bytes; it is here to be compared.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from crossdock.errors import InfeasiblePlan
from crossdock.placement.plan import EMPTY
from crossdock.placement.problem import Problem, Solution
from crossdock.placement.solvers import starts
from crossdock.placement.solvers.price import FIXED_CHARGE
from crossdock.placement.solvers.search import FROZEN, Deadline
from crossdock.placement.solvers.solution import solution_of

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

MAX_ROUNDS = 6
PATIENCE = 3
SWEEPS = 60
TEMPERATURES = (2e-2, 5e-4)  # hot, cold, as a share of a layer's tokens
EXCESS_WEIGHT = 3.0  # of one mean load above the cap, as a multiple of a layer's tokens


class Chain:
    """The assignment of all layers' items to devices, changed layer by layer. `device_LI` includes vacancies, see `swaps.py`."""

    def __init__(self, problem: Problem, device_LE: IntArray) -> None:
        affinity = problem.affinity
        self.problem = problem
        self.device_LI = np.stack([starts.with_vacancies(device_E, problem.slots_R) for device_E in device_LE])
        num_items = self.device_LI.shape[1]
        vacancies = num_items - problem.num_experts
        self.transitions_LII = np.pad(affinity.transitions_LEE.astype(np.float64), ((0, 0), (0, vacancies), (0, vacancies)))
        self.load_LI = np.pad(affinity.load_LE.astype(np.float64), ((0, 0), (0, vacancies)))
        self.pinned_LI = np.pad(starts.pinned_devices(problem), ((0, 0), (0, vacancies)), constant_values=EMPTY)

    def attraction(self, layer: int) -> FloatArray:
        """[I, R]: tokens that an item of the layer keeps on their device when it stands on device r."""
        kept_IR = np.zeros((self.device_LI.shape[1], self.problem.num_devices))
        if layer > 0:
            kept_IR += self.transitions_LII[layer - 1].T @ self._one_hot(layer - 1)
        if layer + 1 < len(self.device_LI):
            kept_IR += self.transitions_LII[layer] @ self._one_hot(layer + 1)
        return kept_IR

    def excess(self, load_R: FloatArray, mean: float) -> FloatArray:
        """By how much each load stands above the cap, in mean loads, with a fixed charge so that the last bit is worth mending."""
        cap = self.problem.constraints.load_cap
        if cap is None:
            return np.zeros_like(load_R)
        above_R = load_R / max(mean, 1e-300) - cap
        return np.where(above_R > 1e-12, above_R + FIXED_CHARGE, 0.0)

    def mend(self, layer_device_LI: IntArray) -> None:
        """Layers that break the load cap take the given assignment."""
        for layer in range(len(self.device_LI)):
            load_R = self._load(layer)
            if self.excess(load_R, load_R.mean()).any():
                self.device_LI[layer] = layer_device_LI[layer]

    def key(self) -> tuple[float, float]:
        """What makes one chain better than another: what breaks the load cap, then the tokens that move."""
        moved = sum(
            float(transitions_II[before_I[:, None] != after_I].sum())
            for transitions_II, before_I, after_I in zip(self.transitions_LII, self.device_LI, self.device_LI[1:], strict=False)
        )
        load_LR = [self._load(layer) for layer in range(len(self.device_LI))]
        return float(sum(self.excess(load_R, load_R.mean()).sum() for load_R in load_LR)), moved

    def anneal(self, layer: int, temperature: float, rng: np.random.Generator) -> None:
        """As many Metropolis proposals in one layer as it has pairs, without rejections; at temperature 0 best swaps until none helps."""
        kept_IR, device_I, load_I = self.attraction(layer), self.device_LI[layer], self.load_LI[layer]
        free = np.flatnonzero(self.pinned_LI[layer] == EMPTY)
        first, second = (free[side] for side in np.triu_indices(len(free), 1))
        load_R, clock, tokens = self._load(layer), 0.0, float(self.problem.affinity.num_tokens)
        mean, weight = load_R.mean(), EXCESS_WEIGHT * tokens
        own_I = kept_IR[np.arange(len(device_I)), device_I]
        while clock < len(first):
            p, q = device_I[first], device_I[second]
            change = own_I[first] + own_I[second] - kept_IR[first, q] - kept_IR[second, p]
            if self.problem.constraints.load_cap is not None:
                heavier = load_I[second] - load_I[first]
                above_R = self.excess(load_R, mean)
                change = change + weight * (
                    self.excess(load_R[p] + heavier, mean) + self.excess(load_R[q] - heavier, mean) - above_R[p] - above_R[q]
                )
            crossing = p != q
            if temperature > 0.0:
                total = np.cumsum(np.where(crossing, np.exp(-np.maximum(change, 0.0) / temperature), 0.0))
                clock += len(first) / total[-1] if len(first) and total[-1] > FROZEN else np.inf
                if clock >= len(first):
                    return
                chosen = int(np.searchsorted(total, rng.random() * total[-1], side="right").clip(max=len(first) - 1))
            else:
                chosen = int(np.where(crossing, change, np.inf).argmin()) if len(first) else 0
                if not len(first) or not crossing[chosen] or change[chosen] >= -1e-9:
                    return
            a, b = int(first[chosen]), int(second[chosen])
            heavier_by = load_I[b] - load_I[a]
            load_R[device_I[a]] += heavier_by
            load_R[device_I[b]] -= heavier_by
            device_I[[a, b]] = device_I[[b, a]]
            own_I[[a, b]] = kept_IR[[a, b], device_I[[a, b]]]

    def assign(self, layer: int) -> None:
        """The best assignment of one layer between its neighbours; only where nothing caps the load."""
        kept_IR, pinned_I = self.attraction(layer), self.pinned_LI[layer]
        wrong_IR = (pinned_I[:, None] != EMPTY) & (pinned_I[:, None] != np.arange(self.problem.num_devices))
        price_IR = np.where(wrong_IR, -float(self.problem.affinity.num_tokens) * 4.0, kept_IR)
        device_of_slot_I = np.repeat(np.arange(self.problem.num_devices), self.problem.slots_R)
        slot_I = linear_sum_assignment(price_IR[:, device_of_slot_I], maximize=True)[1]
        self.device_LI[layer] = device_of_slot_I[slot_I]

    def polish(self, deadline: Deadline) -> None:
        """Sweeps of exact assignments, or of best swaps, until a whole sweep brings nothing."""
        before = (np.inf, np.inf)
        while self.key() < before and not deadline.passed:
            before = self.key()
            for layer in range(len(self.device_LI)):
                if self.problem.constraints.load_cap is None:
                    self.assign(layer)
                else:
                    self.anneal(layer, 0.0, np.random.default_rng(0))

    def _one_hot(self, layer: int) -> FloatArray:
        return np.asarray(self.device_LI[layer][:, None] == np.arange(self.problem.num_devices), dtype=np.float64)

    def _load(self, layer: int) -> FloatArray:
        return np.asarray(np.bincount(self.device_LI[layer], self.load_LI[layer], self.problem.num_devices), dtype=np.float64)


def solve(problem: Problem, seconds: float, seed: int) -> Solution:
    """Anneal the chain until rounds bring nothing, or `seconds` are over. Raises `InfeasiblePlan` where the load cap was not met."""
    deadline = Deadline(seconds)
    begun = [Chain(problem, device_LE) for device_LE in (starts.contiguous(problem), starts.balanced(problem), starts.clustered(problem))]
    best = min(begun, key=Chain.key)
    quiet, stopped_by = 0, "iterations"
    for number in range(MAX_ROUNDS):
        chain = Chain(problem, starts.random(problem, seed + number) if number else starts.balanced(problem))
        _anneal_all(chain, np.random.default_rng([seed, number]), deadline)
        if chain.key()[0] > 0:
            chain.mend(best.device_LI)
            chain.polish(deadline)
        improved = chain.key() < best.key()
        best, quiet = (chain, 0) if improved else (best, quiet + 1)
        if deadline.passed or quiet >= PATIENCE:
            stopped_by = "seconds" if deadline.passed else "done"
            break
    excess = best.key()[0]
    if excess > 0:
        raise InfeasiblePlan(
            f"no plan found within load cap {problem.constraints.load_cap:g}: devices stand {excess:.3f} mean loads above it in all; "
            "give a higher --load-cap, more slots or more seconds"
        )
    device_LE = best.device_LI[:, : problem.num_experts]
    return solution_of(problem, device_LE, method="anneal", seed=seed, seconds=deadline.elapsed_s, stopped_by=stopped_by)


def _anneal_all(chain: Chain, rng: np.random.Generator, deadline: Deadline) -> None:
    tokens = float(chain.problem.affinity.num_tokens)
    hot, cold = (share * tokens for share in TEMPERATURES)
    for sweep in range(SWEEPS):
        temperature = hot * (cold / hot) ** (sweep / (SWEEPS - 1))
        for layer in rng.permutation(len(chain.device_LI)):
            if deadline.passed:
                return chain.polish(Deadline(1.0))
            chain.anneal(int(layer), temperature, rng)
    return chain.polish(deadline)
