"""What it costs to go from one plan to another between two steps, and after how many steps that has paid back.

The runtime moves weights and both moments of every expert, layer by layer and tensor by tensor (`runtime.adaptation.migrate`); every new
copy comes from the nearest device that holds the expert (`choose_replica`).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crossdock.placement.costs.cost import Workload, transfer_seconds
from crossdock.placement.records.plan import EMPTY, Plan, choose_replica
from crossdock.placement.records.topology import LINK_CLASSES, Topology

TENSORS_PER_EXPERT = 2  # inner and outer
STATES = 3  # weight and both moments, moved one after another


@dataclass(frozen=True)
class Move:
    """A migration: experts that gain a device, its bytes over same_device, same_node and other_node links, and its seconds."""

    moves: int
    bytes_by_class: tuple[int, int, int]
    seconds: float

    @property
    def bytes(self) -> int:
        return sum(self.bytes_by_class)


def moved_bytes(before: Plan, after: Plan, topology: Topology, workload: Workload) -> NDArray[np.int64]:
    """int64 [L, R, R]: bytes from row to column of one expert group. Raises `BadData` where the plans are of different shapes."""
    after.check_model(before.num_layers, before.num_experts, before.num_devices)
    source_LRE = choose_replica(before, topology.node_of_R) // before.slots_per_device
    layer_H, target_H, expert_H = np.nonzero((after.slot_LRE != EMPTY) & (before.slot_LRE == EMPTY))
    bytes_LRR = np.zeros((before.num_layers, before.num_devices, before.num_devices), dtype=np.int64)
    np.add.at(bytes_LRR, (layer_H, source_LRE[layer_H, target_H, expert_H], target_H), workload.expert_moved_bytes)
    return bytes_LRR


def price_of_move(before: Plan, after: Plan, topology: Topology, workload: Workload) -> Move:
    """What the migration carries and how long it takes: one all-to-all for each tensor and state of each layer, one after another."""
    bytes_LRR = moved_bytes(before, after, topology, workload)
    exchanges = TENSORS_PER_EXPERT * STATES
    seconds = exchanges * float(transfer_seconds(bytes_LRR / exchanges, topology).sum()) if bytes_LRR.any() else 0.0
    first, second, third = (int(bytes_LRR[:, topology.link_class_RR == number].sum()) for number in range(len(LINK_CLASSES)))
    return Move(len(before.moves_to(after)), (first, second, third), seconds)


def steps_to_pay_back(seconds: float, step_before_s: float, step_after_s: float) -> int | None:
    """Steps after which `seconds` of moving are saved; 0 where moving costs nothing, None where steps become no shorter."""
    if seconds <= 0.0:
        return 0
    return math.ceil(seconds / (step_before_s - step_after_s)) if step_after_s < step_before_s else None
