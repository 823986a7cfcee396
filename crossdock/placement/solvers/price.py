"""The objective of one layer as a function of a few numbers per device, for many candidate plans at once; and the layer's constraints.

With tokens at home on every device alike, a layer's cost in mode home depends only on how many token copies and rows each device gets: a
copy for device d comes from each home with equal chance. Every port of the all-to-all is then a linear function of the copies per device,
which makes thousands of candidates cheap to price and gives the integer program its rows. `cost.block_cost` is the same function, slow and
general, and a test holds them equal.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crossdock.placement.cost import BACKWARD_FLOP_RATIO, makespan
from crossdock.placement.plan import EMPTY
from crossdock.placement.problem import Problem
from crossdock.placement.topology import LINK_CLASSES, OTHER_NODE, Topology
from crossdock.placement.trace import NO_EXPERT

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
TIE_WEIGHT = 1e-6  # of the tie-breaker beside the objective, as a share of the objective's own size
FIXED_CHARGE = 0.02  # mean loads, for every device above the load cap, so that the last bit of an excess is worth mending


@dataclass(frozen=True, eq=False)
class Ports:
    """Every port of one all-to-all: `seconds_JR` float [J, R] for each copy sent to (or returning from) device r, plus `latency_J`."""

    seconds_JR: FloatArray
    latency_J: FloatArray

    def busiest(self, copies_PR: FloatArray) -> FloatArray:
        """Seconds of the all-to-all, [P], for copies of one micro-batch [P, R]."""
        return np.asarray((copies_PR @ self.seconds_JR.T + self.latency_J).max(axis=1))


def ports_of(topology: Topology, copy_bytes: int, *, combine: bool) -> Ports:
    """The ports that `cost.transfer_seconds` takes the maximum over, for tokens at home on every device alike.

    Dispatch runs from homes to devices, combine from devices to homes; they differ where a link is faster in one direction.
    """
    R, node_R = topology.num_devices, np.array(topology.node_of_R)
    link_bytes_per_s_RR = topology.bytes_per_s_RR.T if combine else topology.bytes_per_s_RR
    rows, latencies = [], []
    for link_class in range(len(LINK_CLASSES)):
        of_class_RR = topology.link_class_RR == link_class
        if not of_class_RR.any():
            continue
        home_side_RR = np.where(of_class_RR, copy_bytes / R / link_bytes_per_s_RR, 0.0)  # port of home h: row h
        class_rows = [home_side_RR, np.diag(home_side_RR.sum(axis=0))]  # port of device d: only its own copies
        if link_class == OTHER_NODE and topology.node_bytes_per_s is not None:
            member_NR = np.arange(topology.num_nodes)[:, None] == node_R
            size_N1 = member_NR.sum(axis=1, keepdims=True)
            card_NR = np.where(member_NR, R - size_N1, 0) / R, np.where(member_NR, 0, size_N1) / R
            class_rows += [side_NR * copy_bytes / topology.node_bytes_per_s for side_NR in card_NR]
        rows += class_rows
        latencies += [np.full(len(part), topology.latency_s_RR[of_class_RR].max()) for part in class_rows]
    table = np.unique(np.column_stack([np.concatenate(rows), np.concatenate(latencies)]), axis=0)
    return Ports(table[:, :-1], table[:, -1])


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
    """What one layer adds to the objective, from counts over the trace: copies [P, R], copies to distinct nodes [P], rows [P, R].

    `value` is in the unit of the objective, so that the layers' values, plus `constant`, sum to it. `tie` decides between equal values
    and is of the order of 1. `peak_cap` is the load cap as a multiple of the mean, or None.
    """

    value: Callable[[FloatArray, FloatArray, FloatArray], FloatArray]
    tie: Callable[[FloatArray, FloatArray, FloatArray], FloatArray]
    constant: float
    peak_cap: float | None
    needs_nodes: bool

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
            lambda copies, nodes, load: nodes * per_layer,
            lambda copies, nodes, load: copies.sum(axis=1) / (tokens * problem.affinity.top_k),
            0.0,
            cap,
            True,
        )
    seconds = BlockSeconds.of(problem)
    slow_share_R = _slowest_class_share(topology)
    return Price(
        lambda copies, nodes, load: seconds(copies, load),
        lambda copies, nodes, load: copies @ slow_share_R / (tokens * problem.affinity.top_k),
        problem.workload.other_s,
        cap,
        False,
    )


@dataclass(frozen=True, eq=False)
class BlockSeconds:
    """Seconds that one layer adds to the step, from counts over the trace: `cost.block_cost` for uniform homes, times the micro-batches."""

    problem: Problem
    dispatch: Ports
    combine: Ports

    @classmethod
    def of(cls, problem: Problem) -> "BlockSeconds":
        topology, copy_bytes = problem.topology, problem.workload.copy_bytes
        return cls(problem, ports_of(topology, copy_bytes, combine=False), ports_of(topology, copy_bytes, combine=True))

    def __call__(self, copies_PR: FloatArray, load_PR: FloatArray) -> FloatArray:
        problem, workload = self.problem, self.problem.workload
        sent_PR = (copies_PR if workload.dispatch == "deduplicated" else load_PR) * problem.tokens_per_trace_token
        slowest_P = (load_PR * (problem.tokens_per_trace_token * workload.row_flop) / problem.topology.flop_per_s_R).max(axis=1)
        return self.from_times(self.dispatch.busiest(sent_PR), self.combine.busiest(sent_PR), slowest_P)

    def from_times(self, dispatch_s: FloatArray, combine_s: FloatArray, slowest_s: FloatArray) -> FloatArray:
        """The same from the times of the two all-to-alls and of the busiest device's experts forward. Monotone in all three."""
        workload, window = self.problem.workload, self.problem.workload.window
        expert_s = slowest_s + workload.expert_overhead_s
        expert_backward_s = BACKWARD_FLOP_RATIO * slowest_s + workload.expert_overhead_s
        forward_s = makespan(window.dispatch_forward_s, dispatch_s, expert_s, window.combine_forward_s, combine_s)
        backward_s = makespan(window.combine_backward_s, dispatch_s, expert_backward_s, window.dispatch_backward_s, combine_s)
        return np.asarray(workload.micro_batches * (forward_s + backward_s))


def _slowest_class_share(topology: Topology) -> FloatArray:
    """[R]: share of homes from which device r is reached over the slowest link class that the topology has; 1 where it has no links."""
    present = [k for k in range(1, len(LINK_CLASSES)) if (topology.link_class_RR == k).any()]
    if not present:
        return np.ones(topology.num_devices)
    slowest = min(present, key=lambda k: float(topology.bytes_per_s_RR[topology.link_class_RR == k].min()))
    return np.asarray((topology.link_class_RR == slowest).mean(axis=0))
