"""Sequence homing: which device processes which sequence of a batch, so that most copies of its tokens find their experts at home.

Within one global batch it is mathematically free which rank processes which sequence, as long as every rank gets equally many. What a
sequence would cost at each home is a sum over its tokens; giving every sequence a home at the least total cost is a transportation problem,
which is solved exactly. Costs are integers, so that every rank finds the same homes from the same batch without a word.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crossdock.errors import BadData, UsageError
from crossdock.placement.costs.cost import Dispatch, Workload
from crossdock.placement.costs.hops import check_nodes
from crossdock.placement.records.plan import Plan, choose_replica
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import NO_EXPERT, Trace

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

MAX_PART = 512
"""Sequences that are given homes together: the exact solution takes about 3 ms for them, and grows with their square."""
_CHUNK_TOKENS = 1 << 14  # tokens whose presence on devices is held in memory at once


@dataclass(frozen=True, eq=False)
class CopyCosts:
    """What the copies of a token at home on device h cost, in any one unit.

    device_HR   float64 [R, R]: a copy from home h to device r; 0 on the home itself
    node_HN     float64 [R, N]: a copy from home h to node n, for hierarchical dispatch; None for the others
    node_R      the node of each device
    distinct    one copy for all of a token's experts on a device; False: one for each (flat dispatch)
    """

    device_HR: FloatArray
    node_HN: FloatArray | None
    node_R: tuple[int, ...]
    distinct: bool

    @classmethod
    def of(cls, topology: Topology, workload: Workload, objective: str = "seconds") -> "CopyCosts":
        """Under objective seconds what each copy keeps its links busy; under devices 1 for every copy that leaves its device, under nodes
        1 for every copy that leaves its node. Raises `UsageError` for hops, which homes do not change."""
        if objective == "hops":
            raise UsageError("objective hops counts steps between experts, and homes do not change them; choose seconds, devices or nodes")
        node_R = np.array(topology.node_of_R)
        apart_RR, abroad_RR = ~np.eye(len(node_R), dtype=bool), node_R[:, None] != node_R
        link_RR = _link_seconds(topology, workload)
        if objective != "seconds":
            link_RR = (apart_RR if objective == "devices" else abroad_RR).astype(np.float64)
        if not _has_rails(workload.dispatch, topology) or objective == "devices":
            return cls(link_RR, None, topology.node_of_R, workload.dispatch != "flat")
        rail_HN, inside_HR = _rails(link_RR, topology)
        return cls(inside_HR, rail_HN, topology.node_of_R, True)

    @property
    def num_devices(self) -> int:
        return len(self.node_R)

    def per_home(self, device_XR: FloatArray, node_XN: FloatArray) -> FloatArray:
        """[X, R]: the cost at each home, from copies [X, R] to devices and [X, N] to nodes that are the same for every home."""
        cost_XH = device_XR @ self.device_HR.T
        return cost_XH if self.node_HN is None else cost_XH + node_XN @ self.node_HN.T

    def at_home(self, home: int, device_XR: FloatArray, node_XN: FloatArray) -> FloatArray:
        """[X]: the same for one home."""
        cost_X = device_XR @ self.device_HR[home]
        return cost_X if self.node_HN is None else cost_X + node_XN @ self.node_HN[home]


def _has_rails(dispatch: Dispatch, topology: Topology) -> bool:
    return dispatch == "hierarchical" and check_nodes(topology.node_of_R) not in (1, topology.num_devices)


def _link_seconds(topology: Topology, workload: Workload) -> FloatArray:
    """[R, R]: seconds that a copy keeps its link busy; where a node shares a card, each of its devices has an equal part of that."""
    seconds_RR = workload.copy_bytes / topology.bytes_per_s_RR
    if topology.node_bytes_per_s is not None:
        size_R = np.bincount(topology.node_of_R)[np.array(topology.node_of_R)]
        shared_R = workload.copy_bytes * size_R / topology.node_bytes_per_s
        node_R = np.array(topology.node_of_R)
        seconds_RR = np.where(node_R[:, None] != node_R, np.maximum(seconds_RR, shared_R[:, None]), seconds_RR)
    return np.where(np.eye(topology.num_devices, dtype=bool), 0.0, seconds_RR)


def _rails(link_RR: FloatArray, topology: Topology) -> tuple[FloatArray, FloatArray]:
    """Hierarchical dispatch: what the way to a node costs, [R, N], and what is then left to a device of it, [R, R]; see `hops.py`."""
    per_node, num_devices = check_nodes(topology.node_of_R), topology.num_devices
    local_R = np.arange(num_devices) % per_node
    block_R = np.arange(num_devices) // per_node
    rail_HN = np.zeros((num_devices, num_devices // per_node))
    inside_HR = np.zeros((num_devices, num_devices))
    for home in range(num_devices):
        for block in range(num_devices // per_node):
            gate = block * per_node + local_R[home]
            members = np.flatnonzero(block_R == block)
            node = topology.node_of_R[members[0]]
            rail_HN[home, node] = 0.0 if block == block_R[home] else link_RR[home, gate]
            inside_HR[home, members] = link_RR[gate, members]
    return rail_HN, inside_HR


# ---- homes -----------------------------------------------------------------------------------------------------------


def assign_homes(cost_QR: ArrayLike) -> IntArray:
    """int64 [Q]: a home for each sequence, at the least total cost, the numbers of sequences of any two homes differing by one at most.

    `cost_QR` [Q, R] is what each sequence costs at each home; with integers below 2**53 the answer is the same on every machine. More than
    `MAX_PART` sequences are divided into parts by turns, each of them solved exactly.
    """
    from scipy.optimize import linear_sum_assignment

    cost_QR = np.asarray(cost_QR)
    num_sequences, num_homes = cost_QR.shape
    home_Q = np.empty(num_sequences, dtype=np.int64)
    num_parts = max(1, min(-(-num_sequences // MAX_PART), num_sequences // num_homes))
    for part in range(num_parts):
        # by turns of whole rounds of homes, so that every part but one gives each home equally many
        members = np.flatnonzero(np.arange(num_sequences) // num_homes % num_parts == part)
        place_P = np.arange(len(members)) % num_homes
        row, column = linear_sum_assignment(cost_QR[members][:, place_P])
        home_Q[members[row]] = place_P[column]
    return home_Q


def homes_as_read(num_sequences: int, num_homes: int) -> IntArray:
    """int64 [Q]: what ranks read without homing: equal shares of consecutive sequences."""
    return np.arange(num_sequences) * num_homes // num_sequences


# ---- sequences of a trace --------------------------------------------------------------------------------------------


def sequences_of(trace: Trace, sequence_tokens: int | None = None) -> IntArray:
    """int64 [T]: a number 0 .. Q-1 for the sequence of each token, all of one length; -1 for tokens that fill no sequence.

    Without `sequence_tokens` the trace's own sequences; with it, pieces of that many consecutive tokens of each of them, or of the whole
    trace where it names none. Raises `UsageError` where the trace has no sequences of one length and no length is given, `BadData` where
    no sequence is that long.
    """
    if sequence_tokens is None:
        if trace.sequence_T is None:
            raise UsageError("the trace names no sequences, and homes are given to sequences; give --sequence-tokens, such as 128")
        number_T = np.unique(trace.sequence_T, return_inverse=True)[1].reshape(-1).astype(np.int64)
        length_Q = np.bincount(number_T)
        if length_Q.min() != length_Q.max():
            raise UsageError(
                f"the sequences of the trace have {length_Q.min()} to {length_Q.max()} tokens, and ranks get equal numbers of tokens; "
                f"give --sequence-tokens {length_Q.min()} or less, to cut them into equal pieces"
            )
        return number_T
    source_T = np.zeros(trace.num_tokens, dtype=np.int64) if trace.sequence_T is None else trace.sequence_T.astype(np.int64)
    order_T = np.argsort(source_T, kind="stable")
    sorted_T = source_T[order_T]
    start_T = np.searchsorted(sorted_T, sorted_T)
    place_T = np.arange(len(sorted_T)) - start_T
    length_T = np.searchsorted(sorted_T, sorted_T, side="right") - start_T
    whole_T = place_T < length_T // sequence_tokens * sequence_tokens
    if not whole_T.any():
        raise BadData(f"no sequence of the trace has {sequence_tokens} tokens; the longest has {length_T.max()}; give fewer")
    number_T = np.full(trace.num_tokens, -1, dtype=np.int64)
    number_T[order_T[whole_T]] = np.arange(int(whole_T.sum())) // sequence_tokens
    return number_T


def known_costs(trace: Trace, sequence_T: IntArray, plan: Plan, costs: CopyCosts) -> FloatArray:
    """float64 [Q, R]: what each sequence costs at each home when its routing is known: the sum over its tokens and layers."""
    num_sequences, num_devices = int(sequence_T.max()) + 1, costs.num_devices
    cost_QH = np.zeros((num_sequences, num_devices))
    device_LRE = choose_replica(plan, costs.node_R) // plan.slots_per_device
    for first in range(0, trace.num_tokens, _CHUNK_TOKENS):
        part = slice(first, first + _CHUNK_TOKENS)
        kept_T = sequence_T[part] >= 0
        number_T, experts_TLK = sequence_T[part][kept_T], trace.experts_TLK[part][kept_T]
        if plan.has_replicas:
            homes = [costs.at_home(home, *_presence(experts_TLK, device_LRE[:, home], costs)) for home in range(num_devices)]
            cost_TH = np.stack(homes, axis=1)
        else:
            cost_TH = costs.per_home(*_presence(experts_TLK, device_LRE[:, 0], costs))
        cost_QH += sums_by_sequence(number_T, cost_TH, num_sequences)
    return cost_QH


def sums_by_sequence(number_T: IntArray, value_TX: NDArray[np.generic], num_sequences: int) -> FloatArray:
    """float64 [Q, X]: sums of `value_TX` over the tokens of each sequence; exact for integers while sums stay below 2**53."""
    return np.stack([np.bincount(number_T, value_X, num_sequences) for value_X in value_TX.T], axis=1)


def _presence(experts_TLK: NDArray[np.uint16], device_LE: NDArray[np.int32], costs: CopyCosts) -> tuple[FloatArray, FloatArray]:
    """Copies of each token, over all layers: [T, R] to devices and [T, N] to nodes."""
    num_nodes = max(costs.node_R) + 1
    node_R = np.array(costs.node_R)
    device_TR, node_TN = np.zeros((len(experts_TLK), costs.num_devices)), np.zeros((len(experts_TLK), num_nodes))
    for layer, device_E in enumerate(device_LE):
        choice_TK = experts_TLK[:, layer]
        device_TK = np.where(choice_TK == NO_EXPERT, -1, device_E[np.minimum(choice_TK, len(device_E) - 1)])
        for device in range(costs.num_devices):
            on_TK = device_TK == device
            device_TR[:, device] += on_TK.any(axis=1) if costs.distinct else on_TK.sum(axis=1)
        for node in range(num_nodes if costs.node_HN is not None else 0):
            node_TN[:, node] += ((device_TK >= 0) & (node_R[device_TK] == node)).any(axis=1)
    return device_TR, node_TN


@dataclass(frozen=True, eq=False)
class Batches:
    """The sequences of a trace drawn into global batches, as training would draw them: [B, sequences], each sequence once."""

    sequence_BQ: IntArray
    num_devices: int

    @classmethod
    def draw(cls, num_sequences: int, batch_sequences: int, num_devices: int, seed: int) -> "Batches":
        """A keyed draw; what does not fill a batch is left out. Raises `UsageError` where a batch does not divide over the devices,
        `BadData` where there are too few sequences for one."""
        if batch_sequences % num_devices:
            raise UsageError(
                f"{batch_sequences} sequences of a batch do not divide over {num_devices} devices; "
                f"give --batch-sequences {-(-batch_sequences // num_devices) * num_devices}"
            )
        if num_sequences < batch_sequences:
            raise BadData(
                f"the trace has {num_sequences} sequences, fewer than one batch of {batch_sequences}; "
                "give fewer --batch-sequences, or shorter --sequence-tokens"
            )
        whole = num_sequences // batch_sequences * batch_sequences
        order_Q = np.random.default_rng(seed).permutation(num_sequences)[:whole]
        return cls(order_Q.reshape(-1, batch_sequences), num_devices)

    def homes(self, cost_QR: ArrayLike | None) -> IntArray:
        """int64 [B, sequences]: homes batch by batch, at the least cost; None: as they are read."""
        as_read = homes_as_read(self.sequence_BQ.shape[1], self.num_devices)
        if cost_QR is None:
            return np.broadcast_to(as_read, self.sequence_BQ.shape).copy()
        return np.stack([assign_homes(np.asarray(cost_QR)[sequence_Q]) for sequence_Q in self.sequence_BQ])

    def trace_at(self, trace: Trace, sequence_T: IntArray, home_BQ: IntArray) -> Trace:
        """The tokens of all batches with these homes."""
        home_Q = np.full(int(sequence_T.max()) + 1, -1, dtype=np.int64)
        home_Q[self.sequence_BQ.reshape(-1)] = home_BQ.reshape(-1)
        home_T = np.where(sequence_T >= 0, home_Q[sequence_T], -1)
        kept_T = home_T >= 0
        return replace(trace.select(kept_T), home_T=home_T[kept_T].astype(np.int32))
