"""The state of a search for objective hops, where each layer is tied to its neighbours: tokens' first choices should follow one another.

Given the neighbours, a layer is a linear assignment problem: expert e on device r keeps the tokens that come from r or go on to r. Without
a load cap `scipy.optimize.linear_sum_assignment` solves it exactly, so that sweeps over the layers descend; with noise added to the table,
and less of it from sweep to sweep, they anneal, every step moving a whole layer. A load cap enters as a price of load on each device,
raised where the device is too full and lowered where it is not; what is left of an excess is mended by swaps. The objective is ExFlow's
(arXiv 2401.08383). In mode home it saves no bytes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import linear_sum_assignment

from crossdock.errors import InfeasiblePlan
from crossdock.placement.records.affinity import Affinity
from crossdock.placement.records.kept import kept_with_first
from crossdock.placement.records.plan import EMPTY
from crossdock.placement.solvers.problem import Problem
from crossdock.placement.solvers.search import starts
from crossdock.placement.solvers.search.layer_search import Deadline
from crossdock.placement.solvers.search.price import FIXED_CHARGE

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Rng = np.random.Generator

EXCESS_WEIGHT = 3.0  # of one mean load above the cap, as a multiple of a layer's tokens
CAP_MARGIN = 0.02  # mean loads below the cap at which the price of a device's load starts to rise
PRICE_STEP = 0.02  # tokens kept that one unit of load must be worth, for every mean load above the cap and sweep
SPARSE = 0.05  # share of pairs with tokens below which a sparse table is quicker
POLISH_S = 1.0  # most that is spent on mending and polishing when the time is over


@dataclass(frozen=True, eq=False)
class _Flow:
    """Tokens from each expert of a layer to each of the next, [E, E]: dense, or sparse where few pairs have any; and the pairs that do."""

    tokens_EE: Any
    from_V: IntArray
    to_V: IntArray
    tokens_V: FloatArray

    def weighed(self, weight_RR: FloatArray, before_E: IntArray, after_E: IntArray) -> float:
        """Tokens, times the weight of the step between the devices of the two layers' experts."""
        return float(self.tokens_V @ weight_RR[before_E[self.from_V], after_E[self.to_V]])


@kept_with_first
def _flows(affinity: Affinity) -> list[_Flow]:
    """Of every pair of layers; a search makes many chains of one problem."""
    flows = []
    for tokens_EE in affinity.transitions_LEE:
        from_V, to_V = np.nonzero(tokens_EE)
        tokens_V = tokens_EE[from_V, to_V].astype(np.float64)
        if len(tokens_V) < SPARSE * tokens_EE.size:
            flows.append(_Flow(sparse.csr_matrix((tokens_V, (from_V, to_V)), shape=tokens_EE.shape), from_V, to_V, tokens_V))
        else:
            flows.append(_Flow(tokens_EE.astype(np.float64), from_V, to_V, tokens_V))
    return flows


class Chain:
    """The assignment of all layers' items to devices, changed layer by layer. `device_LI` includes vacancies, see `swaps.py`."""

    def __init__(self, problem: Problem, device_LE: IntArray) -> None:
        affinity = problem.affinity
        self.problem = problem
        self.device_LI = np.stack([starts.with_vacancies(device_E, problem.slots_R) for device_E in device_LE])
        vacancies = self.device_LI.shape[1] - problem.num_experts
        self.load_LI = np.pad(affinity.load_LE.astype(np.float64), ((0, 0), (0, vacancies)))
        self.pinned_LI = np.pad(starts.pinned_devices(problem), ((0, 0), (0, vacancies)), constant_values=EMPTY)
        self._has_pins = bool(problem.constraints.pins)
        self.node_LI: IntArray | None = None  # the node that each item has to stay in, while that is fixed
        self.price_LR = np.zeros((problem.num_layers, problem.num_devices))
        self._flows = _flows(affinity)
        self._saving_RR = problem.hop_cost_RR.max() - problem.hop_cost_RR
        self._device_of_slot_I = np.repeat(np.arange(problem.num_devices), problem.slots_R)
        self._mean_L = np.maximum(self.load_LI.sum(axis=1) / problem.num_devices, 1e-300)

    @property
    def device_LE(self) -> IntArray:
        return self.device_LI[:, : self.problem.num_experts]

    def attraction(self, layer: int, *, ahead: bool = True) -> FloatArray:
        """[I, R]: what an item of the layer saves, in tokens, when it stands on device r; without `ahead` by the layer before it alone."""
        problem = self.problem
        saved_ER = np.zeros((problem.num_experts, problem.num_devices))
        if layer > 0:
            saved_ER += self._flows[layer - 1].tokens_EE.T @ self._saving_RR[self.device_LE[layer - 1]]
        if ahead and layer + 1 < len(self.device_LI):
            saved_ER += self._flows[layer].tokens_EE @ self._saving_RR.T[self.device_LE[layer + 1]]
        vacancies = self.device_LI.shape[1] - problem.num_experts
        return np.concatenate([saved_ER, np.zeros((vacancies, problem.num_devices))]) if vacancies else saved_ER

    def excess(self, load_R: FloatArray, mean: float) -> FloatArray:
        """By how much each load stands above the cap, in mean loads, with a fixed charge so that the last bit is worth mending."""
        cap = self.problem.constraints.load_cap
        if cap is None:
            return np.zeros_like(load_R)
        above_R = load_R / mean - cap
        return np.where(above_R > 1e-12, above_R + FIXED_CHARGE, 0.0)

    def excesses(self) -> FloatArray:
        """[L]: what each layer breaks the load cap by."""
        return np.array([self.excess(self._load(layer), self._mean_L[layer]).sum() for layer in range(len(self.device_LI))])

    def mend(self, layer_device_LI: IntArray) -> None:
        """Layers that break the load cap take the given assignment."""
        broken_L = self.excesses() > 0
        self.device_LI[broken_L] = layer_device_LI[broken_L]

    def key(self) -> tuple[float, float]:
        """What makes one chain better than another: what breaks the load cap, then what the hops cost, in tokens."""
        return float(self.excesses().sum()), self.cost_tokens()

    def cost_tokens(self) -> float:
        """Tokens that hop, times what their hop costs."""
        device_LE, hop_cost_RR = self.device_LE, self.problem.hop_cost_RR
        return sum(
            flow.weighed(hop_cost_RR, before_E, after_E)
            for flow, before_E, after_E in zip(self._flows, device_LE, device_LE[1:], strict=False)
        )

    def kept_per_expert(self) -> float:
        """What an expert saves on average, in tokens: the scale of the noise that is worth adding."""
        device_LE = self.device_LE
        saved = sum(
            flow.weighed(self._saving_RR, before_E, after_E)
            for flow, before_E, after_E in zip(self._flows, device_LE, device_LE[1:], strict=False)
        )
        return 2.0 * saved / max(len(self._flows) * self.problem.num_experts, 1)

    def assign(self, layer: int, temperature: float, rng: Rng, *, ahead: bool = True) -> None:
        """The best assignment of one layer between its neighbours, for a table with Gumbel noise of `temperature` tokens in it."""
        kept_IR, pinned_I = self.attraction(layer, ahead=ahead), self.pinned_LI[layer]
        if self.price_LR[layer].any():
            kept_IR -= self.load_LI[layer][:, None] * self.price_LR[layer]
        if temperature > 0.0:
            kept_IR += rng.gumbel(scale=temperature, size=kept_IR.shape)
        if self._has_pins:
            wrong_IR = (pinned_I[:, None] != EMPTY) & (pinned_I[:, None] != np.arange(self.problem.num_devices))
            kept_IR[wrong_IR] = _forbidden(kept_IR)
        if self.node_LI is not None:
            kept_IR[self.node_LI[layer][:, None] != np.array(self.problem.topology.node_of_R)] = _forbidden(kept_IR)
        slot_I = linear_sum_assignment(kept_IR[:, self._device_of_slot_I], maximize=True)[1]
        self.device_LI[layer] = self._device_of_slot_I[slot_I]

    def reprice(self, layer: int) -> None:
        """Raise the price of load where the layer's devices are above the cap, lower it where they are below."""
        cap = self.problem.constraints.load_cap
        if cap is not None:
            above_R = self._load(layer) / self._mean_L[layer] - (cap - CAP_MARGIN)
            self.price_LR[layer] = np.maximum(self.price_LR[layer] + PRICE_STEP * above_R, 0.0)

    def descend(self, layer: int) -> None:
        """Best swaps of one layer, the load cap first, until none helps."""
        free_X = np.flatnonzero(self.pinned_LI[layer] == EMPTY)
        if not len(free_X):
            return
        kept_XR, load_X, device_X = self.attraction(layer)[free_X], self.load_LI[layer][free_X], self.device_LI[layer][free_X]
        load_R, mean = self._load(layer), self._mean_L[layer]
        weight = EXCESS_WEIGHT * max(float(self.problem.affinity.num_tokens), 1.0) * max(float(self._saving_RR.max()), 1e-300)

        def leaving(rows: IntArray) -> FloatArray:
            """[V, X]: what changes on the devices of some items when each other item takes their place."""
            device_V = device_X[rows]
            lost_VX = kept_XR[rows, device_V][:, None] - kept_XR[:, device_V].T
            if self.problem.constraints.load_cap is not None:
                after_VX = load_R[device_V][:, None] + (load_X - load_X[rows][:, None])
                lost_VX += weight * (self.excess(after_VX, mean) - self.excess(load_R, mean)[device_V][:, None])
            lost_VX[device_V[:, None] == device_X] = np.inf
            return lost_VX

        leaving_XX = leaving(np.arange(len(free_X)))
        change_XX = leaving_XX + leaving_XX.T
        while True:
            a, b = divmod(int(change_XX.argmin()), len(free_X))
            p, q = device_X[a], device_X[b]
            if p == q or change_XX[a, b] >= -1e-9 * max(1.0, weight):
                break
            load_R[p] += load_X[b] - load_X[a]
            load_R[q] += load_X[a] - load_X[b]
            device_X[a], device_X[b] = q, p
            stale = np.flatnonzero((device_X == p) | (device_X == q))
            leaving_XX[stale] = leaving(stale)
            change_XX[stale] = leaving_XX[stale] + leaving_XX[:, stale].T
            change_XX[:, stale] = change_XX[stale].T
        self.device_LI[layer, free_X] = device_X

    def polish(self, deadline: Deadline) -> None:
        """Sweeps of exact assignments, or of best swaps under a load cap, until a whole sweep brings nothing."""
        rng, before = np.random.default_rng(0), (np.inf, np.inf)
        capped = self.problem.constraints.load_cap is not None
        while (now := self.key()) < before and (now[0], now[1] * (1 + 1e-12)) < before and not deadline.passed:
            before = now
            for layer in range(len(self.device_LI)):
                if deadline.passed:
                    return
                if capped:
                    self.descend(layer)
                else:
                    self.assign(layer, 0.0, rng)

    def _load(self, layer: int) -> FloatArray:
        return np.asarray(np.bincount(self.device_LI[layer], self.load_LI[layer], self.problem.num_devices), dtype=np.float64)


def greedy(problem: Problem) -> Chain:
    """Layer by layer, each assigned best behind the one before; the first layer is packed for even load."""
    chain = Chain(problem, starts.balanced(problem))
    rng = np.random.default_rng(0)
    for layer in range(1, problem.num_layers):
        chain.assign(layer, 0.0, rng, ahead=False)
    return chain


def anneal(chain: Chain, layers_X: IntArray, sweeps: int, temperatures: tuple[float, float], rng: Rng, deadline: Deadline) -> None:
    """Sweeps over some layers with noise from hot to cold, shares of the trace's tokens, or faster where `deadline` is
    near; then polish."""
    cool(chain, layers_X, sweeps, temperatures, rng, deadline)
    chain.polish(Deadline(max(deadline.left_s, POLISH_S)))


def cool(chain: Chain, layers_X: IntArray, sweeps: int, temperatures: tuple[float, float], rng: Rng, deadline: Deadline) -> None:
    """The sweeps of `anneal` alone."""
    hot, cold = temperatures
    budget_s = max(deadline.left_s, 1e-9)
    for sweep in range(sweeps):
        progress = max(sweep / sweeps, 1.0 - deadline.left_s / budget_s)
        if progress >= 1.0:
            break
        for layer in (layers_X if sweep % 2 else rng.permutation(layers_X)).tolist():
            chain.assign(layer, hot * (cold / hot) ** progress, rng)
            chain.reprice(layer)


def check_load_cap(chain: Chain) -> None:
    """Raise `InfeasiblePlan` unless every layer keeps to the load cap."""
    excess_L = chain.excesses()
    if (excess_L > 0).any():
        raise InfeasiblePlan(
            f"no plan found within load cap {chain.problem.constraints.load_cap:g}: devices stand {excess_L.sum():.3f} mean loads above it "
            f"in {np.count_nonzero(excess_L)} of {len(excess_L)} layers; give a higher --load-cap, more slots or more seconds"
        )


def _forbidden(kept_IR: FloatArray) -> float:
    """A value so low that no best assignment takes it where another can be had."""
    return float(kept_IR.min() - len(kept_IR) * (1.0 + np.ptp(kept_IR)))
