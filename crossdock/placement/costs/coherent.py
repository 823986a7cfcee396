"""What a plan costs where tokens stay with their experts: context-coherent traffic, one expert per token (ExFlow, IPDPS 2024).

A token moves from the device of its expert in one layer to that of its expert in the next, once forward and once backward, and home behind
the last layer. Every attention sends the keys and values of every token to every device, and their gradients back. What a plan saves is
what `evaluate.cross_device_hops` counts; what it costs beyond experts is dense imbalance, because attention, dense layers and gates run
where the tokens are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crossdock.errors import BadData
from crossdock.placement.costs.cost import BACKWARD_FLOP_RATIO, Workload, transfer_seconds
from crossdock.placement.records.plan import Plan, choose_replica
from crossdock.placement.records.topology import LINK_CLASSES, Topology
from crossdock.placement.records.trace import Trace

Counts = NDArray[np.int64]
Float = NDArray[np.float64]
Sizes = tuple[int, int, int]


@dataclass(frozen=True)
class Context:
    """What attention and dense layers ask of the devices, per token and block.

    key_value_bytes   bytes of one attention's keys and values of a token: 2 x key-value heads x head width x bytes of an element
    attentions        attentions of a block: 2 where a dense layer comes before each MoE layer
    dense_s           forward seconds of everything in a block but the routed experts, for one token on one device
    """

    key_value_bytes: int = 0
    attentions: int = 1
    dense_s: float = 0.0


@dataclass(frozen=True, eq=False)
class CoherentEvaluation:
    """What a trace does under a plan with coherent traffic; bytes are of the whole trace, forward and backward, by link class.

    moves_LRR          int64 [L + 1, R, R], tokens from device (row) to device (column) behind each layer's gate; the last of them go home
    rows_LR            int64 [L, R], tokens that each device's experts compute: a dropped one stays where it is and is computed nowhere
    hops_LRR           int64 [L - 1, R, R], tokens with a choice in a layer and in the next, from device to device: what `evaluate` counts
    residents_LR       int64 [L, R], tokens on each device when a layer begins
    token_bytes        rows of the all-to-alls: what the runtime counts as "tokens"
    key_value_bytes    what the runtime counts as "keys_values"
    dense_max_over_mean  mean over layers of the busiest device's residents over the mean device's
    step_s             predicted seconds of a step; nothing is hidden, because every stage needs what the one before it moved
    """

    num_tokens: int
    moves_LRR: Counts
    rows_LR: Counts
    hops_LRR: Counts
    residents_LR: Counts
    token_bytes: Sizes
    key_value_bytes: Sizes
    dense_max_over_mean: float
    step_s: float

    @property
    def moved(self) -> float:
        """Tokens that change device, as a fraction of all tokens in all layers; the way home is not counted."""
        layers_LRR = self.moves_LRR[:-1]
        return float(1.0 - np.trace(layers_LRR, axis1=1, axis2=2).sum() / max(layers_LRR.sum(), 1))


def evaluate_coherent(trace: Trace, plan: Plan, topology: Topology, workload: Workload, context: Context) -> CoherentEvaluation:
    """Replay `trace` under `plan`, whatever the mode it was solved for.

    Of several copies of an expert a token goes to the one nearest to where it is. Of `workload` its sizes, `micro_batches`, `other_s` and
    `expert_overhead_s` count; a step has `tokens_per_rank` tokens on every device and the trace's proportions. Raises `BadData` for a trace
    with several experts per token or without homes, and where plan or topology are for other sizes.
    """
    plan.check_model(trace.num_layers, trace.num_experts, topology.num_devices)
    if trace.experts_TLK.shape[2] != 1 or trace.home_T is None:
        homes = "no homes" if trace.home_T is None else "homes"
        raise BadData(f"coherent traffic needs one expert per token, and homes; the trace has {trace.experts_TLK.shape[2]}, and {homes}")
    moves_LRR, chosen_LRR, hops_LRR = _moves(trace, plan, topology)
    rows_LR = chosen_LRR.sum(axis=1)
    residents_LR = moves_LRR[:-1].sum(axis=2)
    to_everyone_LRR = np.repeat(residents_LR[:, :, None], topology.num_devices, axis=2)
    per_class = [topology.link_class_RR == link_class for link_class in range(len(LINK_CLASSES))]
    mean_L = residents_LR.mean(axis=1)
    scale = np.float64(workload.tokens_per_rank * topology.num_devices / trace.num_tokens)
    scaled = (np.asarray(moves_LRR * scale), np.asarray(rows_LR * scale), np.asarray(residents_LR * scale))
    return CoherentEvaluation(
        num_tokens=trace.num_tokens,
        moves_LRR=moves_LRR,
        rows_LR=rows_LR,
        hops_LRR=hops_LRR,
        residents_LR=residents_LR,
        token_bytes=_sizes(moves_LRR, per_class, 2 * workload.copy_bytes),
        key_value_bytes=_sizes(to_everyone_LRR, per_class, 2 * context.attentions * context.key_value_bytes),
        dense_max_over_mean=float((residents_LR.max(axis=1) / mean_L).mean()),
        step_s=step_seconds(*scaled, topology, workload, context),
    )


def _moves(trace: Trace, plan: Plan, topology: Topology) -> tuple[Counts, Counts, Counts]:
    """From device to device: all tokens [L + 1, R, R], those with a choice [L, R, R], and those with one before it too [L - 1, R, R]."""
    num_devices, home_T = topology.num_devices, trace.home_T
    assert home_T is not None
    if len(home_T) and home_T.max() >= num_devices:
        raise BadData(f"a token lives on device {home_T.max()}, and topology {topology.name} has devices 0..{num_devices - 1}")
    device_LRE = choose_replica(plan, topology.node_of_R) // plan.slots_per_device
    moves_LRR = np.zeros((trace.num_layers + 1, num_devices, num_devices), dtype=np.int64)
    chosen_LRR, hops_LRR = (
        np.zeros((layers, num_devices, num_devices), dtype=np.int64) for layers in (trace.num_layers, trace.num_layers - 1)
    )
    here_T, came_T = home_T.astype(np.int64), np.zeros(trace.num_tokens, dtype=bool)
    for layer in range(trace.num_layers):
        expert_T = trace.experts_TLK[:, layer, 0]
        goes_T = expert_T < plan.num_experts  # a dropped token stays where it is
        next_T = here_T.copy()
        next_T[goes_T] = device_LRE[layer, here_T[goes_T], expert_T[goes_T]]
        np.add.at(moves_LRR[layer], (here_T, next_T), 1)
        np.add.at(chosen_LRR[layer], (here_T[goes_T], next_T[goes_T]), 1)
        if layer > 0:
            np.add.at(hops_LRR[layer - 1], (here_T[goes_T & came_T], next_T[goes_T & came_T]), 1)
        here_T, came_T = next_T, goes_T
    np.add.at(moves_LRR[-1], (here_T, home_T), 1)
    return moves_LRR, chosen_LRR, hops_LRR


def _sizes(counts_LRR: Counts, per_class: Sequence[NDArray[np.bool_]], unit_bytes: int) -> Sizes:
    same_device, same_node, other_node = (int(counts_LRR[:, of_class_RR].sum()) * unit_bytes for of_class_RR in per_class)
    return same_device, same_node, other_node


def step_seconds(moves_LRR: Float, rows_LR: Float, residents_LR: Float, topology: Topology, workload: Workload, context: Context) -> float:
    """All micro-batches and the rest of the step, from tokens of one micro-batch: [L + 1, R, R] that move, [L, R] that experts compute,
    [L, R] that are there."""
    per_layer = zip(rows_LR, residents_LR, strict=True)
    layers_s = sum(layer_seconds(rows_R, residents_R, topology, workload, context) for rows_R, residents_R in per_layer)
    moved_s = sum(move_seconds(moves_RR, topology, workload) for moves_RR in moves_LRR)
    return workload.micro_batches * (layers_s + moved_s) + workload.other_s


def layer_seconds(rows_R: Float, residents_R: Float, topology: Topology, workload: Workload, context: Context) -> float:
    """Forward and backward of a block: experts on `rows_R`; on `residents_R` dense layers, and their keys and values to every device."""
    expert_s = (rows_R * workload.row_flop / topology.flop_per_s_R).max()
    compute_s = (1 + BACKWARD_FLOP_RATIO) * (expert_s + context.dense_s * residents_R.max()) + 2 * workload.expert_overhead_s
    to_everyone_RR = np.repeat(residents_R[:, None], topology.num_devices, axis=1)
    return float(compute_s + context.attentions * _both_ways_s(to_everyone_RR * context.key_value_bytes, topology))


def move_seconds(moves_RR: Float, topology: Topology, workload: Workload) -> float:
    """Tokens to their next device, and their gradients back."""
    return _both_ways_s(moves_RR * workload.copy_bytes, topology)


def _both_ways_s(bytes_RR: Float, topology: Topology) -> float:
    return float(transfer_seconds(bytes_RR, topology).sum() + transfer_seconds(bytes_RR.T, topology).sum())
