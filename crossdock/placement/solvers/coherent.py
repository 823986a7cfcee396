"""Mode coherent, objective seconds: what a step costs where tokens stay with their experts, and the search for the plan that costs least.

Fewer hops are fewer bytes, but a chain of popular experts on one device gathers the tokens there, and attention waits for that device
(`placement.coherent`). So the chain search for hops runs under several load caps, the plans it finds are priced in seconds, and the best
is annealed by swaps of two experts, each of which changes the terms of one layer and the next, and of later ones that tokens reach from
there past layers that dropped them. Tokens start at homes anywhere alike.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from crossdock.errors import InfeasiblePlan
from crossdock.placement.costs.coherent import layer_seconds, move_seconds
from crossdock.placement.costs.cost import BACKWARD_FLOP_RATIO
from crossdock.placement.records.topology import LINK_CLASSES
from crossdock.placement.solvers.problem import Problem
from crossdock.placement.solvers.search import chain, chain_search, starts
from crossdock.placement.solvers.search.layer_search import Deadline

IntArray = NDArray[np.int64]
Float = NDArray[np.float64]

CAPS = (2.0, 1.5, 1.2)
"""Load caps of the chains that are priced, besides the problem's own."""
CHAINS_SHARE = 0.2  # of the time; swaps get the rest
HOT, WARM = 2.0, 0.03  # at the start, as a multiple of what a swap changes on average
SWAPS_PER_EXPERT = 30
MAX_ROUNDS, PATIENCE = 256, 24


def is_about(problem: Problem) -> bool:
    """Whether the objective is priced here: hops are the same in both modes."""
    return problem.mode == "coherent" and problem.objective == "seconds"


@dataclass(frozen=True, eq=False)
class _Dropped:
    """The affinity's leaps, layer by layer of the L + 1 that a token moves into: `stay` [layer] are (places, tokens) that the layer drops,
    `arrive` [layer] (places, places, tokens) that come from before the layer above, `reach_L` the last layer whose terms a layer is in."""

    stay: tuple[tuple[IntArray, IntArray], ...]
    arrive: tuple[tuple[IntArray, IntArray, IntArray], ...]
    reach_L: IntArray

    @classmethod
    def of(cls, problem: Problem) -> "_Dropped":
        leaps, num_layers = problem.affinity.leaps, problem.num_layers
        assert leaps is not None, "mode coherent has one expert per token"
        # home is place 0, one before those of layer 0
        from_layer_P, to_layer_P = ((place_P - 1) // problem.num_experts for place_P in (leaps.from_P, leaps.to_P))
        stay, arrive, reach_L = [], [], np.arange(1, num_layers + 1)
        for layer in range(num_layers + 1):
            passed_P, met_P = (from_layer_P < layer) & (layer < to_layer_P), to_layer_P == layer
            stay.append((leaps.from_P[passed_P], leaps.count_P[passed_P]))
            arrive.append((leaps.from_P[met_P], leaps.to_P[met_P], leaps.count_P[met_P]))
        placed_P = from_layer_P >= 0
        np.maximum.at(reach_L, from_layer_P[placed_P], to_layer_P[placed_P])
        return cls(tuple(stay), tuple(arrive), reach_L)


class Stay:
    """An assignment `device_LE` [L, E] and its seconds: `layer_s` [L] of the layers, `move_s` [L + 1] of the moves into each and home."""

    def __init__(self, problem: Problem, device_LE: IntArray) -> None:
        self.problem, self.device_LE = problem, device_LE.copy()
        self._unit_RR, self._transitions_LEE = np.eye(problem.num_devices), problem.affinity.transitions_LEE.astype(np.float64)
        self._load_LE = problem.affinity.load_LE.astype(np.float64)
        self._dropped = _Dropped.of(problem)
        num_layers = problem.num_layers
        self.layer_s = np.array([self._layer_s(layer) for layer in range(num_layers)])
        self.move_s = np.array([self._move_s(layer) for layer in range(num_layers + 1)])

    @property
    def step_s(self) -> float:
        """Seconds of the whole step."""
        workload = self.problem.workload
        return float(workload.micro_batches * (self.layer_s.sum() + self.move_s.sum()) + workload.other_s)

    def swap(self, layer: int, one: int, other: int) -> float:
        """Exchange the devices of two experts of a layer; what the step gets longer by, in seconds. The same swap undoes it."""
        device_E = self.device_LE[layer]
        device_E[one], device_E[other] = device_E[other], device_E[one]
        before_s = self.layer_s.sum() + self.move_s.sum()
        for changed in range(layer, int(self._dropped.reach_L[layer]) + 1):
            if changed < self.problem.num_layers:
                self.layer_s[changed] = self._layer_s(changed)
            self.move_s[changed] = self._move_s(changed)
        return float(self.problem.workload.micro_batches * (self.layer_s.sum() + self.move_s.sum() - before_s))

    def rows(self, layer: int) -> Float:
        """[R]: rows of the whole trace on each device."""
        return np.asarray(np.bincount(self.device_LE[layer], self._load_LE[layer], self.problem.num_devices), dtype=np.float64)

    def _residents(self, layer: int) -> Float:
        """[R]: tokens of the whole trace on each device when the layer begins."""
        if layer == 0:
            return np.full(self.problem.num_devices, self.problem.affinity.num_tokens / self.problem.num_devices)
        return self.rows(layer - 1) + self._stay(layer - 1)

    def _stay(self, layer: int) -> Float:
        """[R]: tokens that the layer drops, on the devices that they stay on."""
        place_P, count_P = self._dropped.stay[layer]
        return np.asarray(count_P @ self._at(place_P), dtype=np.float64)

    def _at(self, place_P: IntArray) -> Float:
        """[P, R]: how much of a token at each place is on each device; at home as much on every one."""
        num_devices = self.problem.num_devices
        device_X = np.concatenate([[num_devices], self.device_LE.reshape(-1), [num_devices]])
        return np.vstack([self._unit_RR, np.full(num_devices, 1.0 / num_devices)])[device_X[place_P]]

    def _layer_s(self, layer: int) -> float:
        problem, scale = self.problem, self.problem.tokens_per_trace_token
        return layer_seconds(self.rows(layer) * scale, self._residents(layer) * scale, problem.topology, problem.workload, problem.context)

    def _move_s(self, layer: int) -> float:
        """Into `layer` from where the tokens are; into layer L, home."""
        problem, R = self.problem, self.problem.num_devices
        if layer == 0:
            moves_RR = np.repeat(self.rows(0)[None, :] / R, R, axis=0)
        elif layer == problem.num_layers:
            moves_RR = np.repeat(self.rows(layer - 1)[:, None] / R, R, axis=1)
        else:
            before_ER, after_ER = self._unit_RR[self.device_LE[layer - 1]], self._unit_RR[self.device_LE[layer]]
            moves_RR = before_ER.T @ self._transitions_LEE[layer - 1] @ after_ER
        from_P, to_P, count_P = self._dropped.arrive[layer]
        if len(count_P):
            never_P = (from_P == 0) & (to_P > problem.num_layers * problem.num_experts)  # chosen nowhere: such a token is home all along
            moves_RR = moves_RR + self._at(from_P[~never_P]).T @ (count_P[~never_P, None] * self._at(to_P[~never_P]))
            moves_RR = moves_RR + self._unit_RR * count_P[never_P].sum() / R
        if len(self._dropped.stay[layer][0]):
            moves_RR = moves_RR + np.diag(self._stay(layer))
        return move_seconds(moves_RR * problem.tokens_per_trace_token, problem.topology, problem.workload)


def cost_of(problem: Problem, device_LE: IntArray) -> float:
    """Seconds of a step under an assignment [L, E]."""
    return Stay(problem, device_LE).step_s


def lower_bound(problem: Problem) -> float:
    """What no plan is faster than: experts' arithmetic spread as the devices' speeds are, dense layers on equal shares of the tokens, keys
    and values sent from wherever tokens crowd the links least, and of moves nothing but the latency."""
    load_LE, flop_per_s_R = problem.affinity.load_LE, problem.topology.flop_per_s_R
    spread_s = np.maximum(load_LE.sum(axis=1) / flop_per_s_R.sum(), load_LE.max(axis=1) / flop_per_s_R.max())
    workload, context, num_layers = problem.workload, problem.context, problem.num_layers
    forward_s = float(spread_s.sum()) * problem.tokens_per_trace_token * workload.row_flop
    dense_s = num_layers * context.dense_s * workload.tokens_per_rank
    compute_s = (1 + BACKWARD_FLOP_RATIO) * (forward_s + dense_s) + 2 * num_layers * workload.expert_overhead_s
    moved_s = (num_layers + 1) * move_seconds(np.zeros((problem.num_devices,) * 2), problem.topology, workload)
    attention_s = num_layers * context.attentions * _least_attention_s(problem)
    return workload.other_s + workload.micro_batches * (compute_s + attention_s + moved_s)


def _least_attention_s(problem: Problem) -> float:
    """Keys and values of all tokens to every device and their gradients back, wherever the tokens are.

    x_r tokens on device r keep its port of a link class busy for x_r a_r seconds, and the largest of these is at least sum x / sum (1 / a).
    """
    topology, num_bytes = problem.topology, problem.workload.tokens_per_rank * problem.num_devices * problem.context.key_value_bytes
    total_s = 0.0
    for rate_RR in (topology.bytes_per_s_RR, topology.bytes_per_s_RR.T):
        least_s = 0.0
        for link_class in range(len(LINK_CLASSES)):
            of_class_RR = topology.link_class_RR == link_class
            if not of_class_RR.any():
                continue
            busy_R = np.where(of_class_RR, 1.0 / rate_RR, 0.0).sum(axis=1)
            port_s = num_bytes / float((1.0 / busy_R).sum()) if (busy_R > 0).all() else 0.0
            least_s = max(least_s, port_s + float(topology.latency_s_RR[of_class_RR].max()))
        total_s += least_s
    return total_s


def search(problem: Problem, seed: int, deadline: Deadline, known: list[IntArray]) -> tuple[IntArray, str]:
    """The best assignment found, never worse than those of `known` and the quick starts, and why the search stopped.

    Raises `InfeasiblePlan` where nothing keeps to the load cap.
    """
    met = [starts.contiguous(problem), starts.balanced(problem), *known, *_chains(problem, seed, deadline)]
    met = [device_LE for device_LE in met if _keeps_cap(problem, device_LE, range(problem.num_layers))]
    if not met:
        raise InfeasiblePlan(f"no plan was found within load cap {problem.constraints.load_cap:g}; give more seconds or a higher cap")
    return _improve(problem, met, seed, deadline)


def _chains(problem: Problem, seed: int, deadline: Deadline) -> list[IntArray]:
    """Assignments of few hops under each load cap that is no softer than the problem's."""
    asked = problem.constraints.load_cap
    caps = [asked, *(cap for cap in CAPS if asked is None or cap < asked)]
    found = []
    for number, cap in enumerate(caps):
        constraints = replace(problem.constraints, load_cap=cap)
        of_hops = replace(problem, objective="hops", constraints=constraints, node_weight=_node_weight(problem))
        share = deadline.share((len(caps) - number) / CHAINS_SHARE)
        chained, _ = chain_search.search(of_hops, seed, share, (starts.random(problem, seed),))
        try:
            chain.check_load_cap(chained)
        except InfeasiblePlan:
            continue  # a tighter cap than was asked for need not be reachable
        found.append(chained.device_LE.copy())
    return found


def _node_weight(problem: Problem) -> float:
    """What a hop between nodes costs beside one within, by the links' rates; at least 1."""
    topology = problem.topology
    rates = [topology.bytes_per_s_RR[topology.link_class_RR == link_class] for link_class in (1, 2)]
    if not (len(rates[0]) and len(rates[1])):
        return problem.node_weight
    return max(1.0, float(rates[0].mean() / rates[1].mean()))


def _keeps_cap(problem: Problem, device_LE: IntArray, layers: Iterable[int]) -> bool:
    """Whether these layers do, on every routing that the cap is about."""
    cap = problem.constraints.load_cap
    if cap is None:
        return True
    loads = [np.bincount(device_LE[layer], load_LE[layer], problem.num_devices) for layer in layers for load_LE in problem.loads]
    return all(load_R.max() <= cap * load_R.mean() * (1 + 1e-9) for load_R in loads)


def _anneal(stay: Stay, hot: float, rng: np.random.Generator, deadline: Deadline) -> None:
    """Swaps by Metropolis' rule from `hot` (a multiple of what a swap changes on average) down to nothing, within pins and load cap."""
    problem, device_LE = stay.problem, stay.device_LE
    pinned = {(pin.layer, pin.expert) for pin in problem.constraints.pins}
    num_swaps = SWAPS_PER_EXPERT * problem.num_layers * problem.num_experts
    usual_s = 0.0
    for number in range(num_swaps):
        if deadline.passed:
            return
        layer = int(rng.integers(problem.num_layers))
        one, other = (int(expert) for expert in rng.integers(problem.num_experts, size=2))
        if device_LE[layer, one] == device_LE[layer, other] or {(layer, one), (layer, other)} & pinned:
            continue
        longer_s = stay.swap(layer, one, other)
        usual_s += (abs(longer_s) - usual_s) / min(number + 1, 100)
        heat_s = hot * usual_s * (1.0 - (number + 1) / num_swaps)
        taken = longer_s <= 0 or (heat_s > 0 and rng.random() < np.exp(-longer_s / heat_s))
        if not (taken and _keeps_cap(problem, device_LE, (layer,))):
            stay.swap(layer, one, other)


def _improve(problem: Problem, met: list[IntArray], seed: int, deadline: Deadline) -> tuple[IntArray, str]:
    """Annealed from the best, and every third time from a fresh draw, until a few rounds in a row have found nothing better."""
    best = Stay(problem, min(met, key=lambda device_LE: cost_of(problem, device_LE)))
    quiet = 0
    for number in range(MAX_ROUNDS):
        if deadline.passed:
            return best.device_LE, "seconds"
        afresh = number % 3 == 2 and problem.constraints.load_cap is None
        stay = Stay(problem, starts.random(problem, seed + number) if afresh else best.device_LE)
        _anneal(stay, HOT if afresh else WARM, np.random.default_rng([seed, number]), deadline)
        quiet = 0 if stay.step_s < best.step_s * (1 - 1e-12) else quiet + 1
        best = min(best, stay, key=lambda each: each.step_s)
        if quiet >= PATIENCE:
            return best.device_LE, "done"
    return best.device_LE, "iterations"
