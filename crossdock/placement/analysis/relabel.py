"""Relabelling: the same plan under other names of devices, chosen so that as few experts as possible move from an old plan.

Devices of a node that are alike, and whole nodes that are alike, may exchange their contents, and no token notices: homes are anywhere
alike. Which contents stand under which name is then a matter of where the experts are now: an assignment of least cost (Crouse 2016, in
scipy) inside every pair of nodes, and one more between nodes. Layers are renamed one by one, except where they depend on one another.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from crossdock.placement.records.plan import EMPTY, Plan, choose_devices
from crossdock.placement.records.topology import Topology
from crossdock.placement.solvers.problem import Pin

IntArray = NDArray[np.int64]
Bool = NDArray[np.bool_]
FORBIDDEN = 1e12  # what breaking a pin counts


def relabelled(
    plan: Plan, old: Plan, topology: Topology, *, pins: Iterable[Pin] = (), together: bool = False, tolerance: float = 0.0
) -> Plan:
    """`plan` with devices renamed so that `old.moves_to` it is shortest; `plan` itself where renaming shortens nothing.

    together: all layers under one renaming, as what passes from layer to layer asks for (objective hops, mode coherent). tolerance: speeds,
    memories and links that differ by at most this share count as alike, as measured ones do; 0 leaves every evaluation what it was. Where
    experts have copies, a layer is renamed only if every home then uses the copy that it used before, under its new name.
    Raises `BadData` where the plans are of different shapes.
    """
    old.check_model(plan.num_layers, plan.num_experts, plan.num_devices)
    alike = Alike.of(topology, tolerance)
    holds_LRE, held_LRE = plan.slot_LRE != EMPTY, old.slot_LRE != EMPTY
    gains_LRR = np.stack(
        [(holds_RE[:, None, :] & ~held_RE[None, :, :]).sum(axis=2) for holds_RE, held_RE in zip(holds_LRE, held_LRE, strict=True)]
    )
    cost_LRR = gains_LRR + _pin_costs(holds_LRE, tuple(pins))
    one = together or plan.mode == "coherent" or plan.objective == "hops" or plan.has_replicas
    groups = [range(plan.num_layers)] if one else [[layer] for layer in range(plan.num_layers)]
    name_LR = np.tile(np.arange(plan.num_devices), (plan.num_layers, 1))
    for layers in groups:
        cost_RR = cost_LRR[list(layers)].sum(axis=0)
        name_R = alike.cheapest(cost_RR)
        here_R = np.arange(plan.num_devices)
        if cost_RR[here_R, name_R].sum() < cost_RR[here_R, here_R].sum() and _same_copies(holds_LRE[list(layers)], name_R, topology):
            name_LR[list(layers)] = name_R
    if (name_LR == np.arange(plan.num_devices)).all():
        return plan
    return renamed(plan, name_LR)


def renamed(plan: Plan, name_LR: IntArray) -> Plan:
    """The plan in which what stood on device r of layer l stands on device `name_LR[l, r]`."""
    slots_LRS = np.empty_like(plan.slots_LRS)
    np.put_along_axis(slots_LRS, name_LR[:, :, None], plan.slots_LRS, axis=1)
    return replace(plan, slots_LRS=slots_LRS)


class Alike:
    """Devices and nodes of a topology that may exchange their contents: `classes` lists, node by node, its sets of equal devices, and
    `node_kind` the kind of each node; nodes of one kind correspond class by class."""

    def __init__(self, classes: list[list[IntArray]], node_kind: list[int]) -> None:
        self.classes, self.node_kind = classes, node_kind

    @classmethod
    def of(cls, topology: Topology, tolerance: float = 0.0) -> "Alike":
        """Everything that may change places without changing speeds, memories, nodes and links by more than `tolerance`."""
        node_R = np.array(topology.node_of_R)
        members = [np.flatnonzero(node_R == node) for node in range(topology.num_nodes)]
        classes = []
        for devices in members:
            found: list[list[int]] = []
            for device in devices.tolist():
                home = next((part for part in found if _exchangeable(topology, [part[0]], [device], tolerance)), None)
                found.append([device]) if home is None else home.append(device)
            found.sort(key=lambda part: (len(part), topology.flop_per_s_R[part[0]], topology.memory_bytes_R[part[0]]))
            classes.append([np.array(part) for part in found])  # in an order by which those of equal nodes correspond
        node_kind: list[int] = []
        for node in range(len(members)):
            same = [
                earlier
                for earlier in range(node)
                if node_kind[earlier] == earlier and _corresponding(topology, classes[earlier], classes[node], tolerance)
            ]
            node_kind.append(same[0] if same else node)
        return cls(classes, node_kind)

    def cheapest(self, cost_RR: NDArray[np.float64]) -> IntArray:
        """int64 [R]: the new name of each device such that the sum of `cost_RR[device, name]` is least."""
        from scipy.optimize import linear_sum_assignment  # 0.3 s, and every rank imports this module

        kept_RR = cost_RR - 0.5 / (len(cost_RR) + 1) * np.eye(len(cost_RR))  # of equal ones the one that renames least
        num_nodes = len(self.classes)
        cost_NN = np.full((num_nodes, num_nodes), 4 * FORBIDDEN * len(cost_RR))
        within: dict[tuple[int, int], list[tuple[IntArray, IntArray]]] = {}
        for node in range(num_nodes):
            for other in range(num_nodes):
                if self.node_kind[node] == self.node_kind[other]:
                    parts = []
                    for devices, names in zip(self.classes[node], self.classes[other], strict=True):
                        row, column = linear_sum_assignment(kept_RR[np.ix_(devices, names)])
                        parts.append((devices[row], names[column]))
                    within[node, other] = parts
                    cost_NN[node, other] = sum(float(kept_RR[devices, names].sum()) for devices, names in parts)
        name_R = np.arange(len(cost_RR))
        for node, other in np.column_stack(linear_sum_assignment(cost_NN)).tolist():
            for devices, names in within[node, other]:
                name_R[devices] = names
        return name_R


def _exchangeable(topology: Topology, earlier: list[int], later: list[int], tolerance: float) -> bool:
    """Whether the topology stays the same, but for `tolerance`, when the two lists of devices change places."""
    order = np.arange(topology.num_devices)
    order[earlier], order[later] = later, earlier
    per_device = (topology.flop_per_s_R, topology.memory_bytes_R)
    per_link = (topology.bytes_per_s_RR, topology.latency_s_RR)
    return (
        all(np.allclose(values, values[order], rtol=tolerance, atol=0) for values in per_device)
        and all(np.allclose(values, values[np.ix_(order, order)], rtol=tolerance, atol=0) for values in per_link)
        and np.array_equal(topology.link_class_RR, topology.link_class_RR[np.ix_(order, order)])
    )


def _corresponding(topology: Topology, earlier: list[IntArray], later: list[IntArray], tolerance: float) -> bool:
    if [len(part) for part in earlier] != [len(part) for part in later]:
        return False
    return _exchangeable(topology, np.concatenate(earlier).tolist(), np.concatenate(later).tolist(), tolerance)


def _pin_costs(holds_LRE: Bool, pins: tuple[Pin, ...]) -> NDArray[np.float64]:
    """[L, R, R]: forbids every name on which a pinned expert must be and would not."""
    num_layers, num_devices, _ = holds_LRE.shape
    cost_LRR = np.zeros((num_layers, num_devices, num_devices))
    for pin in pins:
        cost_LRR[pin.layer, ~holds_LRE[pin.layer, :, pin.expert], pin.device] = FORBIDDEN
    return cost_LRR


def _same_copies(holds_LRE: Bool, name_R: IntArray, topology: Topology) -> bool:
    """Whether every home uses the same copies after the renaming, under their new names."""
    if (holds_LRE.sum(axis=1) == 1).all():
        return True
    node_R, expert_E = np.array(topology.node_of_R), np.arange(holds_LRE.shape[2])
    renamed_LRE = np.empty_like(holds_LRE)
    renamed_LRE[:, name_R] = holds_LRE
    before_LRE, after_LRE = (choose_devices(holds, node_R, expert_E) for holds in (holds_LRE, renamed_LRE))
    return bool(np.array_equal(name_R[before_LRE], after_LRE[:, name_R]))
