"""One layer whose experts may have several copies: what every home sends under it, and the price of each copy that could be added.

With copies the homes differ: each uses its nearest copy (`plan.choose_replica`). Adding a copy of expert e changes the way of e alone, and
only for homes that now have a nearer one, so all devices that could take the copy are priced from two tables of e:

    rest_HP    copies from each home to each place that tokens cause without e
    shared_HP  of the tokens that use e, those that send a copy to the place anyhow, for another of their experts
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crossdock.placement.costs.cost import BACKWARD_FLOP_RATIO, NUM_DIRECTIONS, block_cost
from crossdock.placement.costs.hops import two_hops
from crossdock.placement.costs.replication import share_sizes
from crossdock.placement.records.plan import choose_devices
from crossdock.placement.solvers.problem import Problem
from crossdock.placement.solvers.search.price import has_two_hops, layer_of, price_of
from crossdock.placement.solvers.search.swaps import TokenSets

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Bool = NDArray[np.bool_]

NORM = 8  # of device times, beside their maximum: sees that the second busiest device got lighter as well
NORM_WEIGHT = 0.2


@dataclass(frozen=True, eq=False)
class Traffic:
    """What a layer sends and computes, of the whole trace, for B candidates: copies to devices and to nodes by home, and rows by home and
    device."""

    copies_BRR: FloatArray
    node_copies_BRN: FloatArray
    rows_BRR: FloatArray


@dataclass(frozen=True, eq=False)
class Priced:
    """B candidates: what breaks the load cap, the layer's share of the objective, and what the search descends on."""

    excess_B: FloatArray
    value_B: FloatArray
    guide_B: FloatArray

    def best(self) -> int:
        """The candidate with the least excess, and among those the least guide."""
        return int(np.lexsort((self.guide_B, self.excess_B))[0])


class CopiedLayer:
    """A mutable layer: `holds_RE` says which devices hold which experts; `add` puts one copy more."""

    def __init__(self, problem: Problem, number: int, holds_RE: Bool) -> None:
        self.problem, self.number = problem, number
        layer = layer_of(problem, number)
        self._sets = TokenSets(layer.member_UK, layer.count_U, layer.num_items)
        self._price = price_of(problem)
        self._node_R = np.array(problem.topology.node_of_R)
        self._node_of_place = np.append(self._node_R, problem.topology.num_nodes)
        self._loads = [load_LE[number].astype(np.float64) for load_LE in problem.loads]
        self.load_E = problem.affinity.load_LE[number].astype(np.float64)
        self.holds_RE = holds_RE.copy()
        self.device_RE = choose_devices(holds_RE[None], self._node_R, np.arange(problem.num_experts))[0]
        self.traffic = self._whole()

    @property
    def room_R(self) -> IntArray:
        """int64 [R]: slots that are left on each device."""
        return np.asarray(self.problem.slots_R - self.holds_RE.sum(axis=1))

    def priced(self) -> Priced:
        """The layer as it stands, one candidate."""
        return self._priced(self.traffic, self.device_RE[None])

    def busy_experts(self, how_many: int) -> IntArray:
        """Experts worth a copy: those with the highest load per copy on the device that computes longest, on the one that receives most, on
        the busiest under each routing that the load cap is about, and anywhere."""
        copies_E = self.holds_RE.sum(axis=0)
        rows_R, copies_R = self.traffic.rows_BRR[0].sum(axis=0), self.traffic.copies_BRR[0].sum(axis=0)
        slowest = [(rows_R / self.problem.topology.flop_per_s_R).argmax(), copies_R.argmax()]
        everywhere_E = np.ones(len(copies_E), dtype=bool)
        found = [(self.load_E, everywhere_E), *((self.load_E, self.holds_RE[device]) for device in slowest)]
        if self._price.peak_cap is not None:
            found += [(load_E, self.holds_RE[_rows(self.device_RE[None], load_E)[0].argmax()]) for load_E in self._loads]
        per_copy = [np.where(held_E, load_E / copies_E, -1.0) for load_E, held_E in found]
        return np.unique(np.concatenate([np.argsort(-weight_E, kind="stable")[:how_many] for weight_E in per_copy]))

    def with_copy(self, expert: int, target_B: IntArray) -> Priced:
        """Prices with one more copy of `expert`, on each of the devices `target_B`."""
        traffic, device_BR = self._moved(expert, target_B)
        device_BRE = np.repeat(self.device_RE[None], len(target_B), axis=0)
        device_BRE[:, :, expert] = device_BR
        priced = self._priced(traffic, device_BRE)
        if self.problem.objective != "seconds":
            return priced
        return Priced(priced.excess_B, priced.value_B, priced.guide_B + self._gradient_price(expert, target_B))

    def add(self, expert: int, target: int) -> None:
        """Put a copy of `expert` on device `target`, which has none."""
        self.traffic, device_BR = self._moved(expert, np.array([target]))
        self.device_RE[:, expert] = device_BR[0]
        self.holds_RE[target, expert] = True

    def _moved(self, expert: int, target_B: IntArray) -> tuple[Traffic, IntArray]:
        """Traffic with the copy on each of the targets, and the device [B, R] that each home then uses."""
        R, N, load = self.problem.num_devices, self.problem.topology.num_nodes, self.load_E[expert] / self.problem.num_devices
        holds_BR1 = np.repeat(self.holds_RE[None, :, expert, None], len(target_B), axis=0)
        holds_BR1[np.arange(len(target_B)), target_B] = True
        device_BR = choose_devices(holds_BR1, self._node_R, np.array([expert]))[..., 0]
        before_R, home_R = self.device_RE[:, expert], np.arange(R)
        shared_HP, shared_HN = self._shared(expert)

        def moved(counts_HP: FloatArray, shared_HP: FloatArray, before_H: IntArray, after_BH: IntArray) -> FloatArray:
            rest_HP = counts_HP.copy()
            rest_HP[home_R, before_H] -= load - shared_HP[home_R, before_H]
            counts_BHP = np.repeat(rest_HP[None], len(after_BH), axis=0)
            counts_BHP[np.arange(len(after_BH))[:, None], home_R, after_BH] += load - shared_HP[home_R, after_BH]
            return counts_BHP

        nothing_HP = np.zeros((R, R))
        traffic = Traffic(
            moved(self.traffic.copies_BRR[0], shared_HP, before_R, device_BR),
            moved(self.traffic.node_copies_BRN[0], shared_HN, self._node_R[before_R], self._node_R[device_BR])
            if N > 1
            else np.repeat(self.traffic.node_copies_BRN, len(target_B), axis=0),
            moved(self.traffic.rows_BRR[0], nothing_HP, before_R, device_BR),
        )
        return traffic, device_BR

    def _shared(self, expert: int) -> tuple[FloatArray, FloatArray]:
        """[R, R] and [R, N]: tokens of `expert` that send a copy to each device (node) anyhow, by home, each home with its share."""
        set_V = self._sets.holding(expert)
        member_VK, count_V = self._sets.member_UK[set_V], self._sets.count_U[set_V] / self.problem.num_devices
        R, N = self.problem.num_devices, self.problem.topology.num_nodes
        device_RX = np.pad(self.device_RE, ((0, 0), (0, self._sets.num_items + 1 - self.problem.num_experts)), constant_values=R)
        member_VK = np.where(member_VK == expert, self._sets.num_items, member_VK)
        shared_HP, shared_HN = np.empty((R, R)), np.empty((R, N))
        row_V1 = np.arange(len(set_V))[:, None]
        known: dict[bytes, int] = {}
        for home in range(R):
            same = known.setdefault(device_RX[home].tobytes(), home)
            if same < home:  # homes that use the same copies of everything
                shared_HP[home], shared_HN[home] = shared_HP[same], shared_HN[same]
                continue
            device_VK = device_RX[home][member_VK]
            for shared, place_VK, num_places in ((shared_HP, device_VK, R), (shared_HN, self._node_of_place[device_VK], N)):
                present_VP = np.zeros((len(set_V), num_places + 1), dtype=bool)
                present_VP[row_V1, place_VK] = True
                shared[home] = count_V @ present_VP[:, :num_places]
        return shared_HP, shared_HN

    def _whole(self) -> Traffic:
        """Traffic of the layer as it stands, from all sets."""
        R, N, num_items = self.problem.num_devices, self.problem.topology.num_nodes, self._sets.num_items
        device_RX = np.pad(self.device_RE, ((0, 0), (0, num_items + 1 - self.problem.num_experts)), constant_values=R)
        copies_RR, node_copies_RN, rows_RR = np.zeros((R, R)), np.zeros((R, N)), np.zeros((R, R))
        row_U1 = np.arange(len(self._sets.count_U))[:, None]
        known: dict[bytes, int] = {}
        for home in range(R):
            same = known.setdefault(device_RX[home].tobytes(), home)
            if same < home:
                copies_RR[home], node_copies_RN[home], rows_RR[home] = copies_RR[same], node_copies_RN[same], rows_RR[same]
                continue
            device_UK = device_RX[home][self._sets.member_UK]
            for counts, place_UK, num_places in ((copies_RR, device_UK, R), (node_copies_RN, self._node_of_place[device_UK], N)):
                present_UP = np.zeros((len(row_U1), num_places + 1), dtype=bool)
                present_UP[row_U1, place_UK] = True
                counts[home] = self._sets.count_U @ present_UP[:, :num_places]
            rows_RR[home] = np.bincount(self.device_RE[home], self.load_E, R)
        return Traffic(copies_RR[None] / R, node_copies_RN[None] / R, rows_RR[None] / R)

    def _priced(self, traffic: Traffic, device_BRE: IntArray) -> Priced:
        excess_B = np.zeros(len(device_BRE))
        if self._price.peak_cap is not None:
            for load_E in self._loads:
                excess_B += self._price.excess(_rows(device_BRE, load_E))
        problem = self.problem
        if problem.objective != "seconds":
            copies_BR, nodes_BN = traffic.copies_BRR.sum(axis=1), traffic.node_copies_BRN.sum(axis=1)
            value_B = self._price.value(copies_BR, nodes_BN, traffic.rows_BRR.sum(axis=1))
            return Priced(excess_B, value_B, value_B)
        topology, workload, scale = problem.topology, problem.workload, problem.tokens_per_trace_token
        sent_BRR = traffic.rows_BRR if workload.dispatch == "flat" else traffic.copies_BRR
        hops = list(two_hops(sent_BRR, traffic.node_copies_BRN, topology.node_of_R)) if has_two_hops(problem) else [sent_BRR]
        rows_BR = traffic.rows_BRR.sum(axis=1) * scale
        block = block_cost(hops[0] * scale, rows_BR, topology, workload, hops[1] * scale if len(hops) > 1 else None)
        value_B = workload.micro_batches * block.total_s
        seconds_BR = rows_BR * (workload.row_flop / topology.flop_per_s_R)
        port_s_BRR = sent_BRR * scale * np.where(topology.link_class_RR > 0, workload.copy_bytes / topology.bytes_per_s_RR, 0.0)
        norm_B = (1.0 + BACKWARD_FLOP_RATIO) * np.linalg.norm(seconds_BR, NORM, axis=1)
        norm_B = norm_B + NUM_DIRECTIONS * np.linalg.norm(port_s_BRR.sum(axis=1), NORM, axis=1)
        return Priced(excess_B, value_B, value_B + NORM_WEIGHT * workload.micro_batches * norm_B)

    def _gradient_price(self, expert: int, target_B: IntArray) -> FloatArray:
        """[B]: what a copy's gradient adds to the step if all devices share that alike: mean seconds of both hops over the devices."""
        workload, topology = self.problem.workload, self.problem.topology
        seconds_RR = np.where(topology.link_class_RR > 0, 2 * workload.gradient_bytes / topology.bytes_per_s_RR, 0.0)
        held = np.flatnonzero(self.holds_RE[:, expert])

        def mean_s(devices: IntArray) -> float:
            sizes = share_sizes(workload.expert_parameters, len(devices))
            return float((seconds_RR[np.ix_(devices, devices)] * sizes).sum() / len(seconds_RR))

        return np.array([mean_s(np.sort(np.append(held, target))) for target in target_B.tolist()]) - mean_s(held)


def _rows(device_BRE: IntArray, load_E: FloatArray) -> FloatArray:
    """[B, R]: rows on each device under such a load, homes anywhere alike."""
    num_candidates, num_devices, _ = device_BRE.shape
    place = device_BRE + num_devices * np.arange(num_candidates)[:, None, None]
    weight = np.broadcast_to(load_E / num_devices, device_BRE.shape)
    rows_X = np.bincount(place.ravel(), weight.ravel(), num_candidates * num_devices)
    return np.asarray(rows_X, dtype=np.float64).reshape(num_candidates, num_devices)
