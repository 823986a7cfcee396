"""The evaluator: replays a trace under a plan and says what every link carries, what every device computes and how long a step takes.

It shares nothing with the runtime but `choose_replica`, so that its bytes can be held against those that the runtime counts. Where the
trace knows homes, every count is exact; where it does not, counts are expectations over a home drawn uniformly for each token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossdock.errors import BadData, UsageError
from crossdock.placement.costs.cost import NUM_DIRECTIONS, BlockCost, Dispatch, Workload, block_cost, step_seconds
from crossdock.placement.costs.hops import hops_of_copies
from crossdock.placement.costs.replication import gradient_bytes, gradient_bytes_by_class, gradient_seconds
from crossdock.placement.records.plan import Plan, choose_replica
from crossdock.placement.records.topology import LINK_CLASSES, Topology
from crossdock.placement.records.trace import Trace

Counts = NDArray[Any]  # int64 where exact, else float64


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a trace of `num_tokens` tokens does under a plan.

    exact               True where the trace knows homes: the counts below are then integers (int64), else expectations (float64)
    copies_LRR          [L, R, R], copies from home (row) to device (column): flat dispatch makes one for each of a token's experts on the
                        device, the others make one
    hops_HLRR           [H, L, R, R], rows over every link in each hop: `copies_LRR`, or the two hops of hierarchical dispatch
    rows_LR             [L, R], rows that each device's experts compute: one for every (token, expert)
    bytes_by_class      payload over same_device, same_node and other_node links, of the whole trace and all four directions
    devices_per_token   mean over tokens and layers of the distinct devices that the token's experts live on (a replica: the one it uses)
    nodes_per_token     the same of nodes
    cross_device_hops   fraction of consecutive layers whose first choices live on different devices; for information: tokens that return
                        home after every layer save nothing by it. 0 where there is one layer
    cross_node_hops     the same of nodes
    load_max_over_mean  mean over layers of the busiest device's rows over the mean device's
    block               cost of each block, fields of shape [L], for one micro-batch of the workload
    gradient_bytes_by_class   what the gradients of experts with several copies send in one step, over same_device, ... links
    gradient_s          seconds of a step for that
    step_s              predicted seconds of a step
    """

    num_tokens: int
    exact: bool
    copies_LRR: Counts
    hops_HLRR: Counts
    rows_LR: Counts
    bytes_by_class: tuple[int, int, int] | tuple[float, float, float]
    devices_per_token: float
    nodes_per_token: float
    cross_device_hops: float
    cross_node_hops: float
    load_max_over_mean: float
    block: BlockCost
    gradient_bytes_by_class: tuple[int, int, int]
    gradient_s: float
    step_s: float

    @property
    def moved(self) -> float:
        """Copies that leave their device, as a fraction of what flat dispatch would carry in all: 0 nothing moves, 1 everything does."""
        remote = self.copies_LRR.sum() - np.trace(self.copies_LRR, axis1=1, axis2=2).sum()
        return float(remote / max(self.rows_LR.sum(), 1))

    @property
    def kept(self) -> float:
        """1 - moved: what sharing copies and staying at home save."""
        return 1.0 - self.moved

    def bytes_for(self, num_tokens: int) -> tuple[float, ...]:
        """The forecast: `bytes_by_class` scaled to as many tokens."""
        return tuple(size * num_tokens / self.num_tokens for size in self.bytes_by_class)


def evaluate(trace: Trace, plan: Plan, topology: Topology, workload: Workload, trained: Plan | None = None) -> Evaluation:
    """Replay `trace` under `plan`. `trained` is the plan whose copies sum their gradients, where some of `plan`'s are but gathered weights.

    Step time is that of a step with `workload.tokens_per_rank` tokens on every device and the trace's proportions. Raises `BadData` where
    the plan is for another model or number of devices, or a home lies outside the topology; `UsageError` for a plan of mode coherent.
    """
    if plan.mode != "home":
        raise UsageError(f"plan {plan.digest} is of mode {plan.mode}, and this is about tokens that return home; give a plan of mode home")
    plan.check_model(trace.num_layers, trace.num_experts, topology.num_devices)
    _check_homes(trace, topology)
    replay = _replay(trace, plan, topology, workload.dispatch)
    totals, sent_LRR, rows_LR = replay.totals, replay.sent_LRR, replay.rows_LR
    hops_HLRR = hops_of_copies(sent_LRR, replay.node_copies_LRN, topology.node_of_R, workload.dispatch)
    scale = workload.tokens_per_rank * topology.num_devices / trace.num_tokens
    layers = zip(hops_HLRR.swapaxes(0, 1), rows_LR, strict=True)
    block = BlockCost.of_layers(
        block_cost(hops_HRR[0] * scale, rows_R * scale, topology, workload, *(hop_RR * scale for hop_RR in hops_HRR[1:]))
        for hops_HRR, rows_R in layers
    )
    exact = trace.home_T is not None
    unit_bytes = NUM_DIRECTIONS * workload.copy_bytes
    hops_RR = hops_HLRR.sum(axis=(0, 1))
    sent = [hops_RR[topology.link_class_RR == link_class].sum() * unit_bytes for link_class in range(len(LINK_CLASSES))]
    same_device, same_node, other_node = (int(size) if exact else float(size) for size in sent)
    gradient_bytes_RR = gradient_bytes(trained or plan, workload)
    gradient_s = float(gradient_seconds(gradient_bytes_RR, topology))
    return Evaluation(
        num_tokens=trace.num_tokens,
        exact=exact,
        copies_LRR=sent_LRR,
        hops_HLRR=hops_HLRR,
        rows_LR=rows_LR,
        bytes_by_class=(same_device, same_node, other_node),
        devices_per_token=totals.devices / (trace.num_tokens * trace.num_layers),
        nodes_per_token=totals.nodes / (trace.num_tokens * trace.num_layers),
        cross_device_hops=totals.device_hops / max(totals.hops, 1),
        cross_node_hops=totals.node_hops / max(totals.hops, 1),
        load_max_over_mean=_load_max_over_mean(rows_LR),
        block=block,
        gradient_bytes_by_class=gradient_bytes_by_class(gradient_bytes_RR, topology),
        gradient_s=gradient_s,
        step_s=step_seconds(block, workload) + gradient_s,
    )


@dataclass
class _Totals:
    """Sums over tokens and layers, of one scenario or of the mean scenario."""

    devices: float = 0.0
    nodes: float = 0.0
    device_hops: float = 0.0
    node_hops: float = 0.0
    hops: float = 0.0


@dataclass(frozen=True, eq=False)
class _Replay:
    """From each home what the dispatch sends to devices [L, R, R], and copies to distinct nodes [L, R, N]; rows on each device [L, R].

    N is 0 where the dispatch does not ask for nodes: with as many nodes as devices these would be as large as the first.
    """

    sent_LRR: Counts
    node_copies_LRN: Counts
    rows_LR: Counts
    totals: _Totals


def _replay(trace: Trace, plan: Plan, topology: Topology, dispatch: Dispatch) -> _Replay:
    """What every home sends. Integers where homes are known. Otherwise the mean of R scenarios, in the r-th of which
    every token lives on device r; without replicas the scenarios send the same copies, and one stands for all.
    """
    R, N = topology.num_devices, topology.num_nodes
    sent_LRR = np.zeros((trace.num_layers, R, R), dtype=np.int64)
    node_copies_LRN = np.zeros((trace.num_layers, R, N if dispatch == "hierarchical" else 0), dtype=np.int64)
    rows_LR = np.zeros((trace.num_layers, R), dtype=np.int64)
    totals = _Totals()
    scenarios = list(_scenarios(trace, plan, R))
    route = _Route(plan, topology)
    before = [np.empty(0, dtype=np.int64)] * len(scenarios)
    for layer in range(trace.num_layers):
        choice_KT = np.ascontiguousarray(trace.experts_TLK[:, layer].T)
        first_choice_T = trace.first_choice_TL[:, layer]
        for number, home_T in enumerate(scenarios):
            device_KT = route.devices(layer, choice_KT, home_T)
            copy_KT = _distinct(device_KT, R)
            node_copy_KT = _distinct(route.node_X[device_KT], N)
            sent_LRR[layer] += _count_pairs(home_T, device_KT if dispatch == "flat" else copy_KT, R, R)
            if dispatch == "hierarchical":
                node_copies_LRN[layer] += _count_pairs(home_T, node_copy_KT, R, N)
            rows_LR[layer] += np.bincount(device_KT.reshape(-1), minlength=R + 1)[:R]
            totals.devices += np.count_nonzero(copy_KT < R)
            totals.nodes += np.count_nonzero(node_copy_KT < N)
            first_device_T = route.devices(layer, first_choice_T, home_T)
            if layer > 0:
                both_T = (before[number] < R) & (first_device_T < R)
                totals.hops += np.count_nonzero(both_T)
                totals.device_hops += np.count_nonzero(both_T & (before[number] != first_device_T))
                totals.node_hops += np.count_nonzero(both_T & (route.node_X[before[number]] != route.node_X[first_device_T]))
            before[number] = first_device_T
    if trace.home_T is not None:
        return _Replay(sent_LRR, node_copies_LRN, rows_LR, totals)
    totals.devices /= len(scenarios)
    totals.nodes /= len(scenarios)
    if plan.has_replicas:
        return _Replay(sent_LRR / R, node_copies_LRN / R, rows_LR / R, totals)
    sent, node_copies = (np.repeat(counts_LRX[:, :1] / R, R, axis=1) for counts_LRX in (sent_LRR, node_copies_LRN))
    return _Replay(sent, node_copies, rows_LR.astype(np.float64), totals)


def _scenarios(trace: Trace, plan: Plan, num_devices: int) -> Iterator[NDArray[np.int64]]:
    """Homes int64 [T] to replay under."""
    if trace.home_T is not None:
        yield trace.home_T.astype(np.int64)
        return
    for home in range(num_devices if plan.has_replicas else 1):
        yield np.full(trace.num_tokens, home)


class _Route:
    """Where choices go. An absent choice goes to device R, which lies on node N: one past the last of each."""

    def __init__(self, plan: Plan, topology: Topology) -> None:
        self.num_experts = plan.num_experts
        device_LRE = choose_replica(plan, topology.node_of_R) // plan.slots_per_device
        self.device_LRX = np.pad(device_LRE, ((0, 0), (0, 0), (0, 1)), constant_values=topology.num_devices)
        self.node_X = np.append(topology.node_of_R, topology.num_nodes)

    def devices(self, layer: int, choice_XT: NDArray[np.uint16], home_T: NDArray[np.int64]) -> NDArray[np.int64]:
        """Device of each choice [..., T] of the tokens that live at `home_T`."""
        column_XT = np.minimum(choice_XT, self.num_experts)
        return self.device_LRX[layer].reshape(-1)[home_T * (self.num_experts + 1) + column_XT]


def _distinct(place_KT: NDArray[np.int64], nowhere: int) -> NDArray[np.int64]:
    """`place_KT` with every place that stands higher up in its column replaced by `nowhere`."""
    distinct_KT = place_KT.copy()
    for later in range(1, len(place_KT)):
        repeated_T = (place_KT[:later] == place_KT[later]).any(axis=0)
        distinct_KT[later, repeated_T] = nowhere
    return distinct_KT


def _count_pairs(home_T: NDArray[np.int64], place_KT: NDArray[np.int64], num_homes: int, num_places: int) -> NDArray[np.int64]:
    """int64 [homes, places]: how often each home meets each place; place number `num_places` counts for nothing."""
    side = num_places + 1
    pairs = np.bincount((home_T * side + place_KT).reshape(-1), minlength=num_homes * side)
    return pairs.reshape(num_homes, side)[:, :num_places]


def _load_max_over_mean(rows_LR: Counts) -> float:
    mean_L = rows_LR.mean(axis=1)
    busy_L = mean_L > 0
    return float((rows_LR.max(axis=1)[busy_L] / mean_L[busy_L]).mean()) if busy_L.any() else 1.0


def _check_homes(trace: Trace, topology: Topology) -> None:
    if trace.home_T is None or trace.home_T.max() < topology.num_devices:
        return
    token = int(trace.home_T.argmax())
    raise BadData(
        f"token {token} lives on device {trace.home_T[token]}, and topology {topology.name} has devices 0..{topology.num_devices - 1}; "
        "take the topology that the trace was recorded on, or a trace without homes"
    )
