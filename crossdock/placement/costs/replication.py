"""Copies of an expert in one group: what the sums of their gradients send, how long that takes, and what all copies keep in memory.

Once a step every copy of an expert must get the sum of all copies' gradients. An expert with m copies is cut into
m shares, one for each holder in ascending order of device; every holder sends each share to the holder that owns it (first hop), and
owners send the sums back (second hop). Each holder sends 2 (m - 1) / m of the gradient, which is the least that any way of doing it needs
(Patarasuk and Yuan 2009), and devices without a copy have no part in it.

The price is that of all layers' sums together with the links to themselves, and an upper bound: the runtime lets each layer's sums travel
under the backward pass of the layers below, where they share links with tokens and find them idle while devices compute. On two emulated
nodes that halved what they add to a step; where several groups hold the same experts, sums over these come first, and copies pay in full.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crossdock.placement.costs.cost import Float, Workload, transfer_seconds
from crossdock.placement.records.plan import EMPTY, Plan
from crossdock.placement.records.topology import LINK_CLASSES, Topology


def share_sizes(num_elements: int, num_holders: int) -> NDArray[np.int64]:
    """int64 [m]: elements of each holder's share; the first ones are larger by one where it does not divide."""
    small, larger = divmod(num_elements, num_holders)
    return small + (np.arange(num_holders) < larger).astype(np.int64)


def holders(holds_RE: NDArray[np.bool_]) -> dict[int, NDArray[np.int64]]:
    """The devices, ascending, of every expert of a layer that has several copies; `holds_RE` says which device holds which expert."""
    return {int(expert): np.flatnonzero(holds_RE[:, expert]) for expert in np.flatnonzero(holds_RE.sum(axis=0) > 1)}


def layer_gradient_bytes(holds_RE: NDArray[np.bool_], workload: Workload) -> NDArray[np.int64]:
    """int64 [R, R]: bytes that the copies' gradients of one layer send from row to column in the first hop; the second sends them back."""
    bytes_RR = np.zeros((len(holds_RE), len(holds_RE)), dtype=np.int64)
    for devices in holders(holds_RE).values():
        bytes_RR[np.ix_(devices, devices)] += share_sizes(workload.expert_parameters, len(devices)) * workload.gradient_bytes
    np.fill_diagonal(bytes_RR, 0)  # its own share needs no journey
    return bytes_RR


def gradient_bytes(plan: Plan, workload: Workload) -> NDArray[np.int64]:
    """int64 [R, R]: the same of all layers of a plan."""
    total_RR = np.zeros((plan.num_devices, plan.num_devices), dtype=np.int64)
    if plan.has_replicas:
        for slot_RE in plan.slot_LRE:
            total_RR += layer_gradient_bytes(slot_RE != EMPTY, workload)
    return total_RR


def gradient_seconds(bytes_RR: ArrayLike, topology: Topology) -> Float:
    """Seconds of both hops, for `bytes_RR` [..., R, R] of the first; 0 where nothing travels."""
    first = np.asarray(bytes_RR, dtype=np.float64)
    if not first.any():
        return np.zeros(first.shape[:-2])
    both = transfer_seconds(first, topology) + transfer_seconds(np.swapaxes(first, -1, -2), topology)
    return np.asarray(np.where(first.any(axis=(-2, -1)), both, 0.0))


def gradient_bytes_by_class(bytes_RR: NDArray[np.int64], topology: Topology) -> tuple[int, int, int]:
    """Bytes of both hops over each class of link: what the ledger counts as "gradients" in one step."""
    first, second, third = (2 * int(bytes_RR[topology.link_class_RR == number].sum()) for number in range(len(LINK_CLASSES)))
    return first, second, third


def memory_bytes(plan: Plan, workload: Workload) -> Float:
    """float64 [R]: memory of each device for its experts with optimizer state, over all layers; an empty slot takes none."""
    return plan.held_LR.sum(axis=0) * workload.expert_state_bytes
