"""Probe: measure this cluster over a live mesh, the way the runtime will use it, and describe it as a `Topology`.

Run by `crossdock probe` and by the calibration of a training run; takes a few seconds. Every rank calls `probe` at the same time and gets
the same topology. Speeds are taken per link class from the runtime's own all-to-all, with all ranks of the class talking at once, and from
the runtime's own experts with all devices computing at once: what a step shares (cores, memory, a network card) is shared here too.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from crossdock.errors import BadConfig
from crossdock.placement.records.topology import OTHER_NODE, SAME_NODE, Topology
from crossdock.runtime.dispatch.layout import ExpertLayout
from crossdock.runtime.experts.expert_bank import ExpertBank
from crossdock.runtime.transport.all_to_all import Route, all_to_all_start
from crossdock.runtime.transport.collectives import all_gather_objects, barrier
from crossdock.runtime.transport.ledger import Ledger
from crossdock.runtime.transport.mesh import Mesh

Float = NDArray[np.float64]
Pairs = NDArray[np.bool_]

FIRST_BYTES = 1 << 16
MAX_BYTES = 1 << 26
LONG_ENOUGH_S = 0.02  # one transfer; beyond this, latency and the clock no longer matter
TRAIN = 10  # small transfers timed as one, because a single one is shorter than the barrier before it is precise
ALIKE = 0.15  # devices within this of one another count as equal
SHARED_BELOW = 0.75  # of what its devices would send with a network card each


@dataclass(frozen=True)
class Link:
    """One direction of a link class: seconds of an empty transfer, and bytes/s that one device sustains."""

    latency_s: float
    bytes_per_s: float


def probe(
    mesh: Mesh,
    *,
    model_width: int = 512,
    expert_width: int = 2048,
    activation: str = "swiglu",
    dtype: torch.dtype = torch.float32,
    rows: int = 512,
    slots: int = 2,
    shared_by_node: bool | None = None,
    repeats: int = 5,
    name: str = "",
) -> Topology:
    """The topology of one expert group (R devices), measured; equal on every rank.

    Args:
        model_width, expert_width, activation, dtype: the experts whose flop/s are measured, on `rows` rows split over `slots` of them.
        shared_by_node: whether the devices of a node share one network card; None lets one of them send alone, then all, and compares.
        repeats: medians are over so many.

    Raises `BadConfig` where the numbers make no experts. Raises `PeerLost` where a rank does not answer.
    """
    if min(rows, slots, repeats) < 1 or rows < slots:
        raise BadConfig(f"{rows} rows over {slots} slots, {repeats} repeats; give at least one row to every slot, and one repeat")
    mesh = dataclasses.replace(mesh, ledger=Ledger(mesh.device, enabled=False))
    flop_per_s = _flop_per_s(mesh, model_width, expert_width, activation, dtype, rows, slots, repeats)
    same_node, other_node, node_bytes_per_s = _links(mesh, shared_by_node, repeats)
    node_of_R = _renumbered(mesh.node_of_rank[: mesh.expert_parallel])
    num_nodes, class_RR = max(node_of_R) + 1, _classes(node_of_R)
    return Topology(
        name=name or f"{num_nodes}x{len(node_of_R) // num_nodes}-measured",
        node_of_R=node_of_R,
        flop_per_s_R=_merged(_by_replica(mesh, flop_per_s)),
        memory_bytes_R=_merged(_by_replica(mesh, _memory_bytes(mesh))),
        bytes_per_s_RR=np.array([np.inf, same_node.bytes_per_s, other_node.bytes_per_s])[class_RR],
        latency_s_RR=np.array([0.0, same_node.latency_s, other_node.latency_s])[class_RR],
        node_bytes_per_s=node_bytes_per_s,
        measured=True,
        source=f"crossdock probe on {mesh.device.type}; experts {model_width} x {expert_width}, {str(dtype).removeprefix('torch.')}",
    )


# ---- links


def _links(mesh: Mesh, shared_by_node: bool | None, repeats: int) -> tuple[Link, Link, float | None]:
    """(same node, other node, bytes/s of a node's shared card or None). A class without links gets a link that nothing uses."""
    nodes = mesh.node_of_expert_rank
    same_node = other_node = Link(0.0, 1.0)
    if len(set(nodes)) < len(nodes):
        same_node = _link(mesh, _pairs_of_class(nodes, SAME_NODE), repeats)
    if len(set(nodes)) == 1:
        return same_node, other_node, None
    together = _link(mesh, _pairs_of_class(nodes, OTHER_NODE), repeats)
    devices_per_node = max(nodes.count(node) for node in nodes)
    if devices_per_node == 1 or shared_by_node is False:
        return same_node, together, None
    alone = _link(mesh, _first_of_each_node(nodes), repeats)
    node_bytes_per_s = together.bytes_per_s * devices_per_node
    if shared_by_node is None:
        shared_by_node = node_bytes_per_s < SHARED_BELOW * devices_per_node * alone.bytes_per_s
    if not shared_by_node:
        return same_node, together, None
    fills_the_card = alone.bytes_per_s > (1 - ALIKE) * node_bytes_per_s
    return same_node, Link(together.latency_s, node_bytes_per_s if fills_the_card else alone.bytes_per_s), node_bytes_per_s


def _pairs_of_class(nodes: Sequence[int], link_class: int) -> Pairs:
    """bool [R, R]: every pair of ranks whose link is of the class."""
    return np.asarray(_classes(nodes) == link_class)


def _first_of_each_node(nodes: Sequence[int]) -> Pairs:
    """bool [R, R]: the first rank of every node with the first ranks of the others."""
    first = np.array([nodes.index(node) == rank for rank, node in enumerate(nodes)])
    return np.asarray((_classes(nodes) == OTHER_NODE) & first[:, None] & first[None, :])


def _link(mesh: Mesh, pairs_RR: Pairs, repeats: int) -> Link:
    """Latency and bytes/s of a device when all `pairs_RR` talk at once, as much in both directions."""
    peers = int(pairs_RR.sum(axis=1).max())
    latency_s = _transfer_s(mesh, pairs_RR, 1, TRAIN, repeats)
    peer_bytes = max(1, FIRST_BYTES // peers)
    seconds = _transfer_s(mesh, pairs_RR, peer_bytes, 1, 1)
    while seconds < LONG_ENOUGH_S and peer_bytes * peers < MAX_BYTES:
        peer_bytes *= 4
        seconds = _transfer_s(mesh, pairs_RR, peer_bytes, 1, 1)
    seconds = _transfer_s(mesh, pairs_RR, peer_bytes, 1, repeats)
    return Link(_rounded(latency_s), _rounded(peer_bytes * peers / max(seconds - latency_s, seconds / 10)))


def _transfer_s(mesh: Mesh, pairs_RR: Pairs, peer_bytes: int, train: int, repeats: int) -> float:
    """Median seconds, on the slowest rank, of one all-to-all in which each pair exchanges `peer_bytes` each way."""
    sizes = tuple(int(size) for size in pairs_RR[mesh.expert_rank] * peer_bytes)
    route = Route(mesh, mesh.token_group, sizes, sizes, layer=0, stage="dispatch", kind="tokens", movement=0)
    rows = torch.zeros(sum(sizes), dtype=torch.uint8, device=mesh.device)

    def exchange() -> None:
        for _ in range(train):
            all_to_all_start(rows, route).wait()

    return _slowest_s(mesh, exchange, repeats) / train


# ---- devices


def _flop_per_s(
    mesh: Mesh, model_width: int, expert_width: int, activation: str, dtype: torch.dtype, rows: int, slots: int, repeats: int
) -> float:
    """Sustained flop/s of this device in its experts, forward and backward, while all devices compute."""
    layout = ExpertLayout(0, torch.arange(slots, device=mesh.device), tuple(range(slots)), slots, num_ranks=1)
    bank = ExpertBank(layout, model_width, expert_width, activation=activation, dtype=dtype, device=mesh.device)
    bank.reset_parameters(seed=0)
    generator = torch.Generator().manual_seed(0)
    rows_MD = torch.randn(rows, model_width, generator=generator).to(mesh.device, dtype).requires_grad_()
    count_S = torch.full((slots,), rows // slots)
    count_S[: rows % slots] += 1
    gradient_MD = torch.ones_like(rows_MD)

    def step() -> None:
        bank(rows_MD, count_S).backward(gradient_MD)
        bank.zero_grad()
        rows_MD.grad = None

    step()
    matrices = sum(parameter.numel() for parameter in bank.expert_tensors().values()) // slots
    samples_s = _own_s(mesh, step, repeats)
    return 3 * 2 * matrices * rows / statistics.median(samples_s)


def _memory_bytes(mesh: Mesh) -> float:
    """Memory of this device; on the CPU the ranks of a node share its memory evenly."""
    if mesh.device.type == "cuda":
        return float(torch.cuda.get_device_properties(mesh.device).total_memory)
    import psutil

    return float(psutil.virtual_memory().total // mesh.node_of_rank.count(mesh.node_of_rank[mesh.rank]))


# ---- clocks and agreement


def _own_s(mesh: Mesh, call: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of `call` on this rank, `repeats` times, each begun by all ranks together."""
    samples_s = []
    for _ in range(repeats):
        barrier(mesh)
        begin_s = time.perf_counter()
        call()
        if mesh.device.type == "cuda":
            torch.cuda.synchronize(mesh.device)
        samples_s.append(time.perf_counter() - begin_s)
    return samples_s


def _slowest_s(mesh: Mesh, call: Callable[[], Any], repeats: int) -> float:
    """Median over the repeats of the slowest rank's seconds; equal on every rank."""
    samples_s = all_gather_objects(_own_s(mesh, call, repeats), mesh)
    return statistics.median(max(of_ranks) for of_ranks in zip(*samples_s, strict=True))


def _by_replica(mesh: Mesh, value: float) -> list[list[float]]:
    """Every rank's value, one list of R for each copy of the expert group."""
    values = all_gather_objects(value, mesh)
    R = mesh.expert_parallel
    return [values[first : first + R] for first in range(0, len(values), R)]


def _merged(values_of_replicas: Sequence[Sequence[float]]) -> Float:
    """float64 [R]: the median over the replicas, rounded; devices that measure alike get one figure, as they are the same kind."""
    value_R = np.median(np.array(values_of_replicas, dtype=np.float64), axis=0)
    if value_R.min() >= (1 - ALIKE) * value_R.max():
        value_R = np.full_like(value_R, np.median(value_R))
    return np.array([_rounded(value) for value in value_R])


def _rounded(value: float) -> float:
    """Four significant digits: no measurement here has more, and a person may read the file."""
    return float(f"{value:.4g}")


def _renumbered(nodes: Sequence[int]) -> tuple[int, ...]:
    """Node numbers without gaps, in the order of their first device."""
    order = list(dict.fromkeys(nodes))
    return tuple(order.index(node) for node in nodes)


def _classes(nodes: Sequence[int]) -> NDArray[np.int64]:
    node_R = np.array(nodes)
    class_RR = np.where(node_R[:, None] == node_R[None, :], SAME_NODE, OTHER_NODE)
    np.fill_diagonal(class_RR, 0)
    return class_RR
