"""The objective of one layer as a function of a few numbers per device, for many candidate plans at once; and the layer's constraints.

With tokens at home on every device alike, a layer's cost in mode home depends only on how many token copies and rows each device gets: a
copy for device d comes from each home with equal chance. Every port of the all-to-all is then a linear function of the copies per device,
which makes thousands of candidates cheap to price and gives the integer program its rows. `cost.block_cost` is the same function, slow and
general, and a test holds them equal.
"""

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crossdock.placement.costs.cost import pass_seconds, sum_by_node
from crossdock.placement.costs.hops import check_nodes
from crossdock.placement.records.kept import kept_with_first
from crossdock.placement.records.plan import EMPTY
from crossdock.placement.records.topology import LINK_CLASSES, OTHER_NODE, Topology
from crossdock.placement.records.trace import NO_EXPERT
from crossdock.placement.solvers.problem import Problem

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
TIE_WEIGHT = 1e-6  # of the tie-breaker beside the objective, as a share of the objective's own size
FIXED_CHARGE = 0.02  # mean loads, for every device above the load cap, so that the last bit of an excess is worth mending


@dataclass(frozen=True, eq=False)
class Ports:
    """Every port of one all-to-all, as a function of X counts of copies sent (or returned).

    `seconds_JX` float [J, X] for each count, plus `latency_J`, are ports that many counts share; `own_s_CX` [C, X] and `own_latency_C` are
    C ports for every count that it has to itself, none where the seconds are 0. A table of all would be mostly zeros, and gigabytes for
    thousands of devices.
    """

    seconds_JX: FloatArray
    latency_J: FloatArray
    own_s_CX: FloatArray
    own_latency_C: FloatArray

    @property
    def num_entries(self) -> int:
        """Entries of `table`."""
        J, X = self.seconds_JX.shape
        return (J + np.count_nonzero(self.own_s_CX)) * X

    def busiest(self, count_PX: FloatArray) -> FloatArray:
        """Seconds of the all-to-all, [P], for counts of one micro-batch [P, X]."""
        shared_P = (count_PX @ self.seconds_JX.T + self.latency_J).max(axis=1)
        for own_s_X, latency_s in zip(self.own_s_CX, self.own_latency_C, strict=True):
            shared_P = np.maximum(shared_P, (count_PX * own_s_X).max(axis=1) + latency_s)
        return np.asarray(shared_P)

    def table(self) -> tuple[FloatArray, FloatArray]:
        """Seconds of all ports for each count [J + those of single counts, X] and their latencies, for linear programs."""
        own = [np.diag(own_s_X)[own_s_X > 0] for own_s_X in self.own_s_CX]
        return np.concatenate([self.seconds_JX, *own]), np.append(self.latency_J, np.repeat(self.own_latency_C, list(map(len, own))))


@kept_with_first
def direct_ports(topology: Topology, copy_bytes: float, combine: bool) -> Ports:
    """The ports that `cost.transfer_seconds` takes the maximum over where counts are of copies to each device, from all homes alike.

    With combine, device d sends its answers to all homes, and home r receives those of every d: the dispatch on turned links.
    """
    if combine and topology.is_symmetric:
        return direct_ports(topology, copy_bytes, False)
    each = copy_bytes / topology.num_devices

    def by_device(per_byte_RR: FloatArray) -> tuple[FloatArray, FloatArray]:
        return each * per_byte_RR, each * per_byte_RR.sum(axis=0)

    return _ports(topology, by_device, np.arange(topology.num_devices), combine)


@kept_with_first
def hierarchical_ports(topology: Topology, copy_bytes: float, combine: bool) -> tuple[Ports, Ports]:
    """The same for each of the two hops of hierarchical dispatch (`hops.two_hops`): counts of copies to each device, and behind those to
    each node, X = R + N."""
    if combine and topology.is_symmetric:
        return hierarchical_ports(topology, copy_bytes, False)
    R, N, node_R = topology.num_devices, topology.num_nodes, np.array(topology.node_of_R)
    rank_R, node_RN = np.arange(R), np.arange(N)[None, :]
    device_NG = np.argsort(node_R, kind="stable").reshape(N, -1)
    rail_RN = device_NG[:, rank_R % (R // N)].T  # the device of each node that stands on the rail of device r
    elsewhere_RN = node_RN != node_R[:, None]
    each = copy_bytes / R

    def between_nodes(per_byte_RR: FloatArray) -> tuple[FloatArray, FloatArray]:
        sent_RX = np.zeros((R, R + N))
        sent_RX[:, R:] = np.where(elsewhere_RN, each * per_byte_RR[rank_R[:, None], rail_RN], 0.0)
        return sent_RX, np.where(elsewhere_RN, each * per_byte_RR[rail_RN, rank_R[:, None]], 0.0).sum(axis=1)

    def within_nodes(per_byte_RR: FloatArray) -> tuple[FloatArray, FloatArray]:
        sent_RX = np.zeros((R, R + N))
        for device_G in device_NG:  # each passes on what came over its rail from the homes of all nodes, and to itself only its own
            inside = np.ix_(device_G, device_G)
            sent_RX[inside] = N * each * per_byte_RR[inside]
        sent_RX[rank_R, rank_R] = each * per_byte_RR[rank_R, rank_R]
        return sent_RX, sent_RX[:, :R].sum(axis=0)

    return _ports(topology, between_nodes, R + node_R, combine), _ports(topology, within_nodes, rank_R, combine)


def _ports(
    topology: Topology, by_device: Callable[[FloatArray], tuple[FloatArray, FloatArray]], own_count_R: IntArray, combine: bool
) -> Ports:
    """All ports. Given the seconds that a byte takes on every link [R, R], `by_device` says what the port by which each device sends takes
    for every count [R, X], and that by which it receives for the count `own_count_R` [R], on which alone that depends."""
    node_R = np.array(topology.node_of_R)
    port_of: dict[bytes, tuple[FloatArray, float]] = {}  # equal ones once, by digest: np.unique would sort them, which takes long
    own: list[tuple[FloatArray, float]] = []
    for link_class in range(len(LINK_CLASSES)):
        of_class_RR = topology.link_class_RR == link_class
        if not of_class_RR.any():
            continue
        latency_s = float(topology.latency_s_RR[of_class_RR].max())
        per_byte_RR = np.where(of_class_RR, 1.0 / topology.bytes_per_s_RR, 0.0)
        sent_RX, received_R = by_device(per_byte_RR.T if combine else per_byte_RR)
        shared, own_X = [sent_RX], np.zeros(sent_RX.shape[1])
        np.maximum.at(own_X, own_count_R, received_R)
        owns = [own_X]
        if link_class == OTHER_NODE and topology.node_bytes_per_s is not None:
            sent_RX, received_R = by_device(np.where(of_class_RR, 1.0 / topology.node_bytes_per_s, 0.0))
            received_NX = np.zeros((topology.num_nodes, sent_RX.shape[1]))
            np.add.at(received_NX, (node_R, own_count_R), received_R)
            shared.append(sum_by_node(sent_RX, topology, axis=0))
            # Where nodes are devices, or a node's devices receive for one count, cards are ports of single counts as well.
            if (np.count_nonzero(received_NX, axis=1) <= 1).all() and (np.count_nonzero(received_NX, axis=0) <= 1).all():
                owns.append(received_NX.sum(axis=0))
            else:
                shared.append(received_NX)
        for port_X in (port_X for part in shared for port_X in np.ascontiguousarray(part)):
            digest = hashlib.blake2b(port_X, digest_size=16, salt=struct.pack("d", latency_s)).digest()
            if digest not in port_of:
                port_of[digest] = port_X.copy(), latency_s
        own += [(own_X, latency_s) for own_X in owns if own_X.any()]
    rows, latencies = zip(*port_of.values(), strict=True)
    own_s_CX = np.array([own_X for own_X, _ in own]).reshape(len(own), len(rows[0]))
    return Ports(np.array(rows), np.array(latencies), own_s_CX, np.array([latency_s for _, latency_s in own]))


def has_two_hops(problem: Problem) -> bool:
    """Whether the workload's dispatch goes over nodes: hierarchical, on nodes of several devices."""
    topology = problem.topology
    return problem.workload.dispatch == "hierarchical" and check_nodes(topology.node_of_R) not in (1, topology.num_devices)


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer of a problem as arrays. Items are its experts, then a vacancy for every slot left over; see `swaps.py`.

    member_UK int64 [U, K] items of each distinct token set, padded with the number of items; count_U tokens with that set;
    load_I rows of each item (0 for a vacancy); device_I the device of each pinned item, -1 for all others.
    """

    number: int
    num_experts: int
    member_UK: IntArray
    count_U: FloatArray
    load_I: FloatArray
    pinned_I: IntArray

    @property
    def num_items(self) -> int:
        return len(self.load_I)


def layer_of(problem: Problem, number: int) -> Layer:
    """Layer `number` of the problem."""
    num_experts, num_items = problem.num_experts, int(problem.slots_R.sum())
    sets = problem.affinity.sets[number]
    member_UK = np.where(sets.experts_UK == NO_EXPERT, num_items, sets.experts_UK).astype(np.int64)
    load_I = np.zeros(num_items)
    load_I[:num_experts] = problem.affinity.load_LE[number]
    pinned_I = np.full(num_items, EMPTY, dtype=np.int64)
    for pin in problem.constraints.pins:
        if pin.layer == number:
            pinned_I[pin.expert] = pin.device
    return Layer(number, num_experts, member_UK, sets.count_U.astype(np.float64), load_I, pinned_I)


@dataclass(frozen=True, eq=False)
class Price:
    """What one layer adds to the objective, from counts over the trace: copies [P, R], copies to distinct nodes [P, N], rows [P, R].

    `value` is in the unit of the objective, so that the layers' values, plus `constant`, sum to it. `tie` decides between equal values
    and is of the order of 1. `peak_cap` is the load cap as a multiple of the mean, or None. Where `needs_nodes` is False the copies to
    nodes may be anything; with `nodes_only` swaps within a node change nothing.
    """

    value: Callable[[FloatArray, FloatArray, FloatArray], FloatArray]
    tie: Callable[[FloatArray, FloatArray, FloatArray], FloatArray]
    constant: float
    peak_cap: float | None
    needs_nodes: bool
    nodes_only: bool = False

    def excess(self, load_PR: FloatArray) -> FloatArray:
        """By how much, in mean loads, devices stand above the cap, each with a fixed charge; 0 where the plan keeps to the cap."""
        if self.peak_cap is None:
            return np.zeros(len(load_PR))
        mean_P1 = np.maximum(load_PR.mean(axis=1, keepdims=True), 1e-300)
        above_PR = load_PR / mean_P1 - self.peak_cap
        return np.where(above_PR > 1e-12, above_PR + FIXED_CHARGE, 0.0).sum(axis=1)


def price_of(problem: Problem) -> Price:
    """The price of every layer under objective seconds, devices or nodes; hops couples layers and has its own search in `chain.py`."""
    topology, tokens = problem.topology, problem.affinity.num_tokens
    per_layer = 1.0 / (tokens * problem.num_layers)
    cap = problem.constraints.load_cap

    def peak(load_PR: FloatArray) -> FloatArray:
        return np.asarray(load_PR.max(axis=1) / np.maximum(load_PR.mean(axis=1), 1e-300) / topology.num_devices)

    if problem.objective == "devices":
        return Price(lambda copies, nodes, load: copies.sum(axis=1) * per_layer, lambda copies, nodes, load: peak(load), 0.0, cap, False)
    if problem.objective == "nodes":
        return Price(
            lambda copies, nodes, load: nodes.sum(axis=1) * per_layer,
            lambda copies, nodes, load: copies.sum(axis=1) / (tokens * problem.affinity.top_k),
            0.0,
            cap,
            needs_nodes=True,
            nodes_only=True,
        )
    seconds = BlockSeconds.of(problem)
    slow_share_R = _slowest_class_share(topology)
    return Price(
        lambda copies, nodes, load: seconds(copies, nodes, load),
        lambda copies, nodes, load: copies @ slow_share_R / (tokens * problem.affinity.top_k),
        problem.workload.other_s,
        cap,
        needs_nodes=has_two_hops(problem),
    )


@dataclass(frozen=True, eq=False)
class BlockSeconds:
    """Seconds that one layer adds to the step, from counts over the trace: `cost.block_cost` for uniform homes, times the micro-batches."""

    problem: Problem
    dispatch: tuple[Ports, ...]  # hop by hop
    combine: tuple[Ports, ...]

    @classmethod
    def of(cls, problem: Problem) -> "BlockSeconds":
        topology, copy_bytes = problem.topology, problem.workload.copy_bytes
        if has_two_hops(problem):
            return cls(problem, hierarchical_ports(topology, copy_bytes, False), hierarchical_ports(topology, copy_bytes, True))
        return cls(problem, (direct_ports(topology, copy_bytes, False),), (direct_ports(topology, copy_bytes, True),))

    def __call__(self, copies_PR: FloatArray, nodes_PN: FloatArray, load_PR: FloatArray) -> FloatArray:
        problem, workload = self.problem, self.problem.workload
        sent_PX = load_PR if workload.dispatch == "flat" else copies_PR
        if len(self.dispatch) > 1:
            sent_PX = np.concatenate([copies_PR, nodes_PN], axis=1)
        sent_PX = sent_PX * problem.tokens_per_trace_token
        slowest_P = (load_PR * (problem.tokens_per_trace_token * workload.row_flop) / problem.topology.flop_per_s_R).max(axis=1)
        dispatch_P, combine_P = (np.sum([hop.busiest(sent_PX) for hop in hops], axis=0) for hops in (self.dispatch, self.combine))
        return self.from_times(dispatch_P, combine_P, slowest_P)

    def from_times(self, dispatch_s: FloatArray, combine_s: FloatArray, slowest_s: FloatArray) -> FloatArray:
        """The same from the times of the two all-to-alls and of the busiest device's experts forward. Monotone in all three."""
        workload = self.problem.workload
        forward_s, backward_s = pass_seconds(workload, dispatch_s, combine_s, slowest_s)
        return np.asarray(workload.micro_batches * (forward_s + backward_s))


def _slowest_class_share(topology: Topology) -> FloatArray:
    """[R]: share of homes from which device r is reached over the slowest link class that the topology has; 1 where it has no links."""
    present = [k for k in range(1, len(LINK_CLASSES)) if (topology.link_class_RR == k).any()]
    if not present:
        return np.ones(topology.num_devices)
    slowest = min(present, key=lambda k: float(topology.bytes_per_s_RR[topology.link_class_RR == k].min()))
    return np.asarray((topology.link_class_RR == slowest).mean(axis=0))
