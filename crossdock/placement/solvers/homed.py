"""Experts and homes planned together: the plan whose copies, with every sequence at its best home, cost least.

With homes known, a token's copies in a layer cost what the ways from its home to its experts' distinct devices cost, 0 for its own. Both
halves lower this one sum, so that it never rises:

    homes     every sequence goes where its copies cost least, equally many everywhere: `homing.assign_homes`
    experts   in each layer, devices are relabelled (an exact assignment: which experts stand together stays, and where changes), then
              experts are swapped, by the search of method anneal, whose tables know the homes

Optimising homes against each expert alone, as if copies were not shared, is worse than no homing at all at 8 devices; the sum above counts
distinct copies. It begins from the plans of other methods (relabelled around several draws of homes) and from clusters of sequences.
Related: NetMoE (ICLR 2025) places samples for given experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import linear_sum_assignment

from crossdock.placement.homing.homes import CopyCosts, assign_homes
from crossdock.placement.records.trace import NO_EXPERT, Trace
from crossdock.placement.solvers.problem import Problem
from crossdock.placement.solvers.search import starts
from crossdock.placement.solvers.search.layer_search import Deadline, LayerSearch, Placed, anneal_layer, descend
from crossdock.placement.solvers.search.price import BlockSeconds, Layer, Price, layer_of, price_of
from crossdock.placement.solvers.search.swaps import TokenSets

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

NUM_DRAWS = 8  # of homes, around which each plan to begin from is relabelled
MAX_TURNS = 30  # homes and labels in turn, until nothing changes
SHAKEN_SHARE = 0.3  # of the sequences, whose homes are exchanged after a round without improvement
QUIET_ROUNDS = 3  # rounds without improvement after which the search ends
PROPOSALS_PER_PAIR = 20.0
MOST_SWAPS = 400
TEMPERATURES = ((0.03, 0.003), (0.1, 0.01), (0.32, 0.016))  # hot, cold, as a share of the layer's cost per item; rounds take them in turn
MIN_GAIN = 1e-9  # relative


@dataclass(frozen=True, eq=False)
class Homed:
    """Devices [L, E], homes [Q] of the sequences of the trace, what they cost in the problem's objective, and why the search ended."""

    device_LE: IntArray
    home_Q: IntArray
    value: float
    stopped_by: str


@dataclass(frozen=True, eq=False)
class _LayerSets:
    """The distinct expert sets of one layer: items [U, K] padded with `num_items`, and how often each sequence has each, sparse [Q, U]."""

    layer: Layer
    member_UK: IntArray
    count_QU: sparse.csr_array

    @classmethod
    def of(cls, problem: Problem, trace: Trace, sequence_T: IntArray, number: int, distinct: bool) -> "_LayerSets":
        layer = layer_of(problem, number)
        experts_TK = np.sort(trace.experts_TLK[:, number], axis=1)
        if not distinct:  # every (token, expert) is a copy of its own
            sequence_T, experts_TK = np.repeat(sequence_T, trace.top_k), experts_TK.reshape(-1, 1)
        experts_UK, set_T = np.unique(experts_TK, axis=0, return_inverse=True)
        member_UK = np.where(experts_UK == NO_EXPERT, layer.num_items, experts_UK).astype(np.int64)
        shape = int(sequence_T.max()) + 1, len(member_UK)
        ones_T = np.ones(len(set_T))
        return cls(layer, member_UK, sparse.csr_array((ones_T, (sequence_T, set_T.reshape(-1))), shape=shape))

    def visits(self, place_E: IntArray, num_places: int) -> FloatArray:
        """[Q, places]: copies of each sequence to each place."""
        return np.asarray(self.count_QU @ self._there(place_E, num_places))

    def visits_by_home(self, count_HU: FloatArray, place_E: IntArray, num_places: int) -> FloatArray:
        """[H, places]: copies of all sequences of each home to each place."""
        return np.asarray(count_HU @ self._there(place_E, num_places))

    def _there(self, place_E: IntArray, num_places: int) -> FloatArray:
        place_I = np.append(place_E, np.full(self.layer.num_items + 1 - len(place_E), num_places))
        place_UK = place_I[self.member_UK]
        return np.stack([(place_UK == place).any(axis=1) for place in range(num_places)], axis=1).astype(np.float64)

    def by_home(self, home_Q: IntArray, num_homes: int) -> FloatArray:
        """[H, U]: tokens of each home with each set."""
        member_HQ = sparse.csr_array((np.ones(len(home_Q)), (home_Q, np.arange(len(home_Q)))), shape=(num_homes, len(home_Q)))
        return np.asarray((member_HQ @ self.count_QU).toarray())

    def at_homes(self, count_HU: FloatArray) -> TokenSets:
        """A row for every home and set that occurs."""
        home_X, set_X = np.nonzero(count_HU)
        return TokenSets(self.member_UK[set_X], count_HU[home_X, set_X], self.layer.num_items, home_X.astype(np.int64))


class _Joint:
    """The joint problem: what a plan with homes costs, and the two half steps. Holds no state between calls."""

    def __init__(self, problem: Problem, trace: Trace, sequence_T: IntArray, costs: CopyCosts) -> None:
        kept_T = sequence_T >= 0
        trace, sequence_T = trace.select(kept_T), sequence_T[kept_T]
        self.problem, self.costs = problem, costs
        self.num_devices = problem.num_devices
        self.node_R = np.array(problem.topology.node_of_R)
        self.num_nodes = problem.topology.num_nodes
        self.sets = [_LayerSets.of(problem, trace, sequence_T, layer, costs.distinct) for layer in range(problem.num_layers)]
        self.num_sequences = int(sequence_T.max()) + 1
        share = problem.affinity.num_tokens / trace.num_tokens  # tokens that fill no sequence count like the others
        self.price = _price(problem, costs, share)
        self.relabels = (
            not problem.constraints.pins
            and costs.node_HN is None
            and len(set(problem.slots_R.tolist())) == 1
            and len(set(problem.topology.flop_per_s_R.tolist())) == 1
        )

    def home_costs(self, device_LE: IntArray) -> FloatArray:
        """[Q, R]: what each sequence costs at each home."""
        cost_QH = np.zeros((self.num_sequences, self.num_devices))
        for sets, device_E in zip(self.sets, device_LE, strict=True):
            node_QN = np.zeros((self.num_sequences, self.num_nodes))
            if self.costs.node_HN is not None:
                node_QN = sets.visits(self.node_R[device_E], self.num_nodes)
            cost_QH += self.costs.per_home(sets.visits(device_E, self.num_devices), node_QN)
        return cost_QH

    def searching(self, layer: int, device_E: IntArray, home_Q: IntArray) -> LayerSearch:
        """The layer's search with these homes."""
        sets = self.sets[layer]
        device_I = starts.with_vacancies(device_E, self.problem.slots_R)
        at_homes = sets.at_homes(sets.by_home(home_Q, self.num_devices))
        return LayerSearch(sets.layer, at_homes, self.price, self.node_R, device_I, (self.costs.device_HR, self.costs.node_HN))

    def relabelled(self, device_LE: IntArray, home_Q: IntArray) -> IntArray:
        """Each layer's groups of experts on the devices where they cost least with these homes."""
        device_LE = device_LE.copy()
        for layer, sets in enumerate(self.sets):
            copies_HG = sets.visits_by_home(sets.by_home(home_Q, self.num_devices), device_LE[layer], self.num_devices)
            _, device_G = linear_sum_assignment(copies_HG.T @ self.costs.device_HR)
            device_LE[layer] = device_G[device_LE[layer]]
        return device_LE

    def settled(self, device_LE: IntArray, home_Q: IntArray | None) -> tuple[IntArray, IntArray, float]:
        """Homes and labels in turn, from these devices and, where given, around these homes first; their summed cost of copies."""
        cost = np.inf
        for _ in range(MAX_TURNS):
            if home_Q is not None and self.relabels:
                device_LE = self.relabelled(device_LE, home_Q)
            cost_QH = self.home_costs(device_LE)
            home_Q = assign_homes(cost_QH)
            after = float(cost_QH[np.arange(len(home_Q)), home_Q].sum())
            if after >= cost * (1 - MIN_GAIN) or not self.relabels:
                return device_LE, home_Q, min(after, cost)
            cost = after
        assert home_Q is not None
        return device_LE, home_Q, cost

    def swapped(self, device_LE: IntArray, home_Q: IntArray, seed: int, turn: int, deadline: Deadline) -> IntArray:
        """Each layer's experts swapped for these homes: down to a local optimum in turn 0, after annealing in later ones."""
        found_LE = device_LE.copy()
        for layer in range(len(found_LE)):
            share = deadline.share(len(found_LE) - layer)
            rng = np.random.default_rng([seed, layer, turn])
            search = self.searching(layer, device_LE[layer], home_Q)
            best = search.placed()
            if turn > 0:
                hot, cold = (part * max(best.value, 1e-300) / search.layer.num_items for part in TEMPERATURES[turn % len(TEMPERATURES)])
                annealed = anneal_layer(search, rng, hot, cold, PROPOSALS_PER_PAIR * max(search.num_pairs, 1), MOST_SWAPS, share.share(1.5))
                best = annealed if annealed.better_than(best) else best
                search = self.searching(layer, annealed.device_I[: self.problem.num_experts], home_Q)
            descend(search, rng, share)
            best = min(best, search.placed(), key=Placed.key)
            found_LE[layer] = best.device_I[: self.problem.num_experts]
        return found_LE

    def value(self, device_LE: IntArray, home_Q: IntArray) -> tuple[float, float]:
        """(what the plan breaks the load cap by, the objective), summed over layers."""
        placed = [self.searching(layer, device_E, home_Q).placed() for layer, device_E in enumerate(device_LE)]
        return sum(layer.excess for layer in placed), sum(layer.value for layer in placed) + self.price.constant


def improve(
    problem: Problem, trace: Trace, sequence_T: IntArray, costs: CopyCosts, begun: Sequence[IntArray], seconds: float, seed: int
) -> Homed:
    """The best plan with homes found in `seconds`, never worse than any of `begun` [L, E] with the best homes for it.

    `sequence_T` numbers the sequence of each token of the trace that the problem counts (`homing.sequences_of`).
    """
    assert begun, "the search needs a plan to begin from"
    deadline = Deadline(seconds)
    joint = _Joint(problem, trace, sequence_T, costs)
    rng = np.random.default_rng(seed)
    met = [joint.settled(device_LE, None)[:2] for device_LE in begun]
    if joint.relabels:
        drawing = deadline.share(4)
        for draw in range(NUM_DRAWS):
            if drawing.passed:
                break
            home_Q = rng.permutation(joint.num_sequences) % problem.num_devices
            tried = [joint.settled(device_LE, home_Q) for device_LE in begun[-1 if draw else 0 :]]
            met += [(device_LE, homes) for device_LE, homes, _ in tried]
    best = min(met, key=lambda found: joint.value(*found))
    best_value = joint.value(*best)
    here, quiet, turn = best, 0, 0
    while quiet < QUIET_ROUNDS * len(TEMPERATURES) and not deadline.passed:
        device_LE = joint.swapped(here[0], here[1], seed, turn, deadline.share(2) if turn < 2 else deadline)
        device_LE, home_Q, _ = joint.settled(device_LE, None)
        value = joint.value(device_LE, home_Q)
        is_better = value[0] < best_value[0] - 1e-12 or (value[0] <= best_value[0] + 1e-12 and value[1] < best_value[1] * (1 - MIN_GAIN))
        if is_better:
            best, best_value, quiet = (device_LE, home_Q), value, 0
        else:
            quiet += 1
        here, turn = (best[0], best[1] if is_better else _shaken(best[1], rng)), turn + 1
    return Homed(*best, best_value[1], "seconds" if deadline.passed else "done")


def _shaken(home_Q: IntArray, rng: np.random.Generator) -> IntArray:
    """Some of the sequences exchange their homes: experts that are swapped for these may leave a local optimum."""
    chosen = np.flatnonzero(rng.random(len(home_Q)) < SHAKEN_SHARE)
    shaken_Q = home_Q.copy()
    shaken_Q[chosen] = home_Q[rng.permutation(chosen)]
    return shaken_Q


def _price(problem: Problem, costs: CopyCosts, share: float) -> Price:
    """What one layer adds to the objective, from what its copies cost [P, R], [P, N] and its rows [P, R]."""
    plain = price_of(problem)
    per_layer = share / (problem.affinity.num_tokens * problem.num_layers)
    has_nodes = costs.node_HN is not None

    def copies_cost(copies: FloatArray, nodes: FloatArray) -> FloatArray:
        return copies.sum(axis=1) + (nodes.sum(axis=1) if has_nodes else 0.0)

    def tie(copies: FloatArray, nodes: FloatArray, load: FloatArray) -> FloatArray:
        return np.asarray(load.max(axis=1) / np.maximum(load.mean(axis=1), 1e-300) / problem.num_devices)

    if problem.objective != "seconds":
        return replace(plain, value=lambda c, n, load: copies_cost(c, n) * per_layer, tie=tie, needs_nodes=has_nodes, nodes_only=False)
    block, workload = BlockSeconds.of(problem), problem.workload
    scale = problem.tokens_per_trace_token * share / problem.num_devices

    def seconds(copies: FloatArray, nodes: FloatArray, load: FloatArray) -> FloatArray:
        # a port is as busy as the mean one: homes and the load cap even them out, and the evaluator has the last word
        transfer_P = copies_cost(copies, nodes) * scale
        slowest_P = (load * (problem.tokens_per_trace_token * workload.row_flop) / problem.topology.flop_per_s_R).max(axis=1)
        return block.from_times(transfer_P, transfer_P, slowest_P)

    return replace(plain, value=seconds, tie=tie, needs_nodes=has_nodes, nodes_only=False)
