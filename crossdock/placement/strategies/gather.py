"""Expert-gather: which experts' weights should travel to every rank, so that their tokens stay at home, and what that carries and costs.

Where an expert is hot, its tokens from all ranks are more bytes than its weights, and its rank has more to compute than the others. A
gathered expert is computed by every rank for its own tokens: its weights go out once a forward pass, and the gradients of every rank's
weights come back and are summed on their way (Tutel's adaptive parallelism, arXiv 2206.03382; Janus, SIGCOMM 2023; FasterMoE's shadowing).
For tokens this is a plan with a copy of the expert on every device; the optimizer knows nothing of it.

Weights cross between two nodes once: a node that holds no copy has a leader for each gathered expert, which passes it on to its
neighbours, and sums their gradients on the way back.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crossdock.errors import BadConfig, BadData
from crossdock.placement.costs.cost import Float, Workload, block_cost, pass_seconds, transfer_seconds
from crossdock.placement.records.plan import EMPTY, Plan, choose_replica
from crossdock.placement.records.topology import Topology

Bool = NDArray[np.bool_]

LEAST_GAIN = 1e-9  # below this, differences are rounding
EXCHANGE_WITH = 8  # cooler experts than these are never the better choice, and trying all would be E^2


@dataclass(frozen=True, order=True)
class WeightTransfer:
    """The weights of one expert on their way from one device to another."""

    source: int
    target: int
    expert: int


Hops = tuple[tuple[WeightTransfer, ...], tuple[WeightTransfer, ...]]
"""From holders to the devices nearest to them, then from leaders to their neighbours; each sorted by source, target and expert."""


def weight_hops(device_RE: ArrayLike, node_of_R: Sequence[int], experts: Collection[int]) -> Hops:
    """Who sends the weights of `experts` to whom, so that every device has them.

    device_RE: int [R, E], the device whose copy each device uses; itself where it holds one (`choose_replica`). Leaders take turns by
    expert, so that what an expert's weights cost does not depend on what else is gathered.
    """
    devices = np.asarray(device_RE)
    first: list[WeightTransfer] = []
    second: list[WeightTransfer] = []
    for expert in experts:
        for node in sorted(set(node_of_R)):
            members = [device for device, its_node in enumerate(node_of_R) if its_node == node]
            without = [device for device in members if devices[device, expert] != device]
            if len(without) == len(members):
                leader = members[expert % len(members)]
                first.append(WeightTransfer(int(devices[leader, expert]), leader, expert))
                second += [WeightTransfer(leader, device, expert) for device in members if device != leader]
            else:
                first += [WeightTransfer(int(devices[device, expert]), device, expert) for device in without]
    return tuple(sorted(first)), tuple(sorted(second))


def check_gathered(experts: Collection[int], num_experts: int) -> None:
    """Raise `BadConfig` unless `experts` are different experts of a layer with `num_experts`."""
    if len(set(experts)) != len(experts) or not all(0 <= expert < num_experts for expert in experts):
        raise BadConfig(f"gathered experts are {sorted(experts)}; name different ones, each from 0 to {num_experts - 1}")


def gathered_plan(plan: Plan, experts_of_layer: Sequence[Collection[int]]) -> Plan:
    """The plan that tokens see: `plan` with a copy of each layer's gathered experts on every device that has none.

    Replayed by the evaluator it gives the very bytes of tokens that the runtime counts while those experts are gathered.
    """
    assert len(experts_of_layer) == plan.num_layers, f"gathered experts of {len(experts_of_layer)} layers for {plan.num_layers}"
    extra_LRS = np.full((plan.num_layers, plan.num_devices, max(map(len, experts_of_layer), default=0)), EMPTY, dtype=np.int32)
    for layer, experts in enumerate(experts_of_layer):
        check_gathered(experts, plan.num_experts)
        for device in range(plan.num_devices):
            absent = [expert for expert in sorted(experts) if plan.slot_LRE[layer, device, expert] == EMPTY]
            extra_LRS[layer, device, : len(absent)] = absent
    return Plan(np.concatenate((plan.slots_LRS, extra_LRS), axis=2), plan.num_experts, plan.mode, method=plan.method, seed=plan.seed)


def weight_bytes(
    plan: Plan, experts_of_layer: Sequence[Collection[int]], node_of_R: Sequence[int], expert_bytes: int
) -> tuple[int, int, int]:
    """Bytes of weights and of their gradients in one forward and backward pass, by link class: what the runtime counts as "weights"."""
    device_LRE = choose_replica(plan, node_of_R) // plan.slots_per_device
    totals = [0, 0, 0]
    for device_RE, experts in zip(device_LRE, experts_of_layer, strict=True):
        for transfer in sum(weight_hops(device_RE, node_of_R, experts), ()):
            totals[1 if node_of_R[transfer.source] == node_of_R[transfer.target] else 2] += 2 * expert_bytes
    return totals[0], totals[1], totals[2]


@dataclass(frozen=True)
class Prefetch:
    """Compute that runs while weights travel and nothing else does: before the dispatch forward, after its gradient backward."""

    forward_s: float = 0.0
    backward_s: float = 0.0


@dataclass(frozen=True)
class GatherChoice:
    """The experts to gather, the block's predicted seconds with them (forward and backward), and without any."""

    experts: tuple[int, ...]
    block_s: float
    block_without_s: float


class GatherCost:
    """Prices sets of gathered experts of one layer: seconds of its block, forward and backward.

    load_RE: [R, E], rows of one micro-batch by home and expert; a row is priced as one copy on the wire, as flat dispatch sends it.
    Weights that have not come when the dispatch starts share its links and make it that much longer; backward their gradients follow
    the gradient of the dispatch in the same way.
    """

    def __init__(
        self,
        load_RE: ArrayLike,
        plan: Plan,
        layer: int,
        topology: Topology,
        workload: Workload,
        weight_element_bytes: int,
        prefetch: Prefetch = Prefetch(),
    ) -> None:
        self.load_RE = np.asarray(load_RE, dtype=np.float64)
        if self.load_RE.shape != (plan.num_devices, plan.num_experts):
            raise BadData(
                f"loads are given for {self.load_RE.shape} (homes, experts), and the plan has {plan.num_devices} devices and "
                f"{plan.num_experts} experts; count the layer's rows by home and expert"
            )
        self.topology, self.workload, self.prefetch = topology, workload, prefetch
        num_devices, num_experts = self.load_RE.shape
        device_RE = choose_replica(plan, topology.node_of_R)[layer] // plan.slots_per_device
        device_ERD = device_RE.T[:, :, None] == np.arange(num_devices)
        load_ER1 = self.load_RE.T[:, :, None]
        self._away_ERR = load_ER1 * device_ERD
        self._home_ERR = load_ER1 * np.eye(num_devices)
        self._hop_HERR = np.zeros((2, num_experts, num_devices, num_devices))
        for hop, transfers in enumerate(weight_hops(device_RE, topology.node_of_R, range(num_experts))):
            for transfer in transfers:
                self._hop_HERR[hop, transfer.expert, transfer.source, transfer.target] = workload.expert_parameters * weight_element_bytes

    def of(self, experts: Collection[int]) -> float:
        """Seconds with `experts` gathered."""
        num_experts = self.load_RE.shape[1]
        check_gathered(experts, num_experts)
        return float(self.of_sets(np.isin(np.arange(num_experts), list(experts))[None])[0])

    def of_sets(self, gathered_BE: Bool) -> Float:
        """Seconds [B] with each of the sets, bool [B, E]."""
        gathered = gathered_BE.astype(np.float64)
        copies_BRR = self._away_ERR.sum(axis=0) + np.tensordot(gathered, self._home_ERR - self._away_ERR, axes=1)
        block = block_cost(copies_BRR, copies_BRR.sum(axis=-2), self.topology, self.workload)
        out_s, back_s = np.zeros(len(gathered)), np.zeros(len(gathered))
        for hop_ERR in self._hop_HERR:
            bytes_BRR = np.tensordot(gathered, hop_ERR, axes=1)
            moves = bytes_BRR.any(axis=(-2, -1))
            out_s += np.where(moves, transfer_seconds(bytes_BRR, self.topology), 0.0)
            back_s += np.where(moves, transfer_seconds(np.swapaxes(bytes_BRR, -1, -2), self.topology), 0.0)
        late_out_s = np.maximum(out_s - self.prefetch.forward_s, 0.0)
        late_back_s = np.maximum(back_s - self.prefetch.backward_s, 0.0)
        slowest_s = block.expert_s - self.workload.expert_overhead_s
        forward, backward = pass_seconds(self.workload, block.dispatch_s, block.combine_s, slowest_s, late_out_s, late_back_s)
        return np.asarray(forward + backward)


def choose_gathered(cost: GatherCost) -> GatherChoice:
    """The set of experts with the shortest predicted block.

    Tries the n hottest experts for every n, then improves the best of them by adding, dropping and exchanging single experts.
    """
    load_E = cost.load_RE.sum(axis=0)
    hottest_E = np.argsort(-load_E, kind="stable")
    num_experts = len(load_E)
    rank_E = np.argsort(hottest_E, kind="stable")
    prefix_BE = rank_E[None, :] < np.arange(num_experts + 1)[:, None]
    prefix_s = cost.of_sets(prefix_BE)
    chosen_E, block_s = prefix_BE[prefix_s.argmin()], float(prefix_s.min())
    while True:
        neighbour_BE = _neighbours(chosen_E, hottest_E)
        neighbour_s = cost.of_sets(neighbour_BE)
        if neighbour_s.min() >= block_s * (1.0 - LEAST_GAIN):
            return GatherChoice(tuple(np.flatnonzero(chosen_E).tolist()), block_s, float(prefix_s[0]))
        chosen_E, block_s = neighbour_BE[neighbour_s.argmin()], float(neighbour_s.min())


def _neighbours(chosen_E: Bool, hottest_E: NDArray[np.int64]) -> Bool:
    """Every set with one expert more or less than `chosen_E`, or one exchanged for one of the hottest that are not in it."""
    flip_EE = np.eye(len(chosen_E), dtype=bool)
    hottest_outside = [expert for expert in hottest_E.tolist() if not chosen_E[expert]][:EXCHANGE_WITH]
    exchange = [flip_EE[out] | flip_EE[into] for out in np.flatnonzero(chosen_E).tolist() for into in hottest_outside]
    return chosen_E[None, :] ^ np.array([*flip_EE, *exchange])
