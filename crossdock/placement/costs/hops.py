"""Hops: which links copies cross, one array for each hop. Direct dispatches have one hop, hierarchical dispatch has two.

    hierarchical    1. home n * G + g to rank m * G + g of every other node m that holds an expert of the token: one row per (token, node)
                    2. from there to the devices of node m: one row per (token, device)

Rank n * G + g is device g of node n. Inside its own node a home sends as it always did, and what is on its device already crosses no link.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossdock.errors import BadConfig

Counts = NDArray[Any]  # int64 where exact, else float64


def devices_per_node(node_of_device: Sequence[int]) -> int | None:
    """How many consecutive devices each node holds, where that is the same number for all nodes, else None: (5, 5, 2, 2) gives 2."""
    blocks = [len(list(block)) for _, block in itertools.groupby(node_of_device)]
    return blocks[0] if len(blocks) == len(set(node_of_device)) and len(set(blocks)) == 1 else None


def check_nodes(node_of_device: Sequence[int]) -> int:
    """G, devices per node; raises `BadConfig` where hierarchical dispatch cannot be had."""
    size = devices_per_node(node_of_device)
    if size is None:
        raise BadConfig(
            "hierarchical dispatch needs nodes that hold equally many consecutive devices, and these lie on nodes "
            f"{', '.join(map(str, node_of_device))}; use dispatch deduplicated, or other devices"
        )
    return size


def hops_of_copies(copies_RR: Counts, node_copies_RN: Counts, node_of_device: Sequence[int], dispatch: str) -> Counts:
    """Rows over every link in each hop, [H, ..., R, R]. Nodes of one device, and one node alone, leave hierarchical dispatch one hop."""
    if dispatch != "hierarchical" or check_nodes(node_of_device) in (1, len(node_of_device)):
        return copies_RR[None]
    return two_hops(copies_RR, node_copies_RN, node_of_device)


def two_hops(copies_RR: Counts, node_copies_RN: Counts, node_of_device: Sequence[int]) -> Counts:
    """Rows over every link in each hop, [2, ..., R, R], from row to column.

    `copies_RR` [..., R, R] are copies from home to distinct device, `node_copies_RN` [..., R, N] those from home to distinct node, by the
    numbers in `node_of_device`, 0 to N - 1.
    """
    per_node = check_nodes(node_of_device)
    num_devices = len(node_of_device)
    num_nodes = num_devices // per_node
    lead = copies_RR.shape[:-2]
    hops = np.zeros((2, *lead, num_devices, num_devices), dtype=copies_RR.dtype)
    # [..., home node, home's number, node, device's number]
    rail, inside = (hop.reshape(*lead, num_nodes, per_node, num_nodes, per_node) for hop in hops)
    copies = copies_RR.reshape(rail.shape)
    in_device_order = list(dict.fromkeys(node_of_device))
    node_copies = node_copies_RN[..., in_device_order].reshape(*lead, num_nodes, per_node, num_nodes)
    for node in range(num_nodes):
        others = np.arange(num_nodes) != node
        for local in range(per_node):
            rail[..., node, local, others, local] = node_copies[..., node, local, others]
            # Whoever stands on this rail at `node` passes on the copies of all homes of the rail; to itself only a home sends.
            inside[..., node, local, node, :] = copies[..., :, local, node, :].sum(axis=-2)
            inside[..., node, local, node, local] = copies[..., node, local, node, local]
    return hops
