"""One MoE layer's step on a cluster of any size, as tasks for `benchmarks.simulate`: who sends how much to whom, and what it waits for.

Routing is uniform and loads are even, so every node does the same at the same time: one node stands for all. Its ports, its devices and its
cores are the resources; what the other nodes send arrives as its own leaves. A step is dispatch, experts, combine, forward and backward,
one after the other (nothing hidden); `PHASES` says what each strategy moves in one way of one direction.

    flat            a row for each (token, expert), straight to its device
    deduplicated    a row for each (token, device)
    hierarchical    a row for each (token, node) over the slow link, to the device of the same number there, which fans out; back the same
    gather          no tokens: the weights of all experts to every node once, inside to every device; gradients back
    coherent        top-1: tokens stay at their expert, one movement to the next layer's expert, and keys and values of all tokens to all
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.simulate import Task, simulate

BACKWARD_FLOP_RATIO = 2.0


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal devices. Message costs are time on the sending port; core costs are zero where devices are not cores."""

    nodes: int
    devices_per_node: int
    nic_bytes_per_s: float
    """Of a node's one network card, or of each device's where `nic_per_device`; each direction."""
    local_bytes_per_s: float
    """Of each device to the others of its node, each direction."""
    nic_per_device: bool = False
    nic_message_s: float = 0.0
    local_message_s: float = 0.0
    exchange_s: float = 0.0
    """Fixed cost of one all-to-all: launch, and waiting for one another."""
    latency_s: float = 0.0
    """Of the network, one way; a dispatch pays it twice, for its counts go ahead."""
    contention: float = 0.0
    """What a card loses where many senders meet at each receiver: none between two nodes, this part of it between very many."""
    cores_per_node: float = math.inf
    """Cores that all devices of a node share for copying, where devices are processes of a host."""
    core_s_per_byte: float = 0.0
    core_s_per_message: float = 0.0
    core_s_per_phase: float = 0.0
    """Sorting and gathering rows before each phase, on each device's core."""
    flop_per_s: float = math.inf

    @property
    def devices(self) -> int:
        return self.nodes * self.devices_per_node

    @property
    def met_nic_bytes_per_s(self) -> float:
        """What a card gives while every node sends to every other one."""
        others = max(1, self.nodes - 1)
        return self.nic_bytes_per_s * (1.0 - self.contention * (1.0 - 1.0 / others))


@dataclass(frozen=True)
class Layer:
    """One MoE layer; tokens are those of one device. `kv_width`: elements of a token's key and value together, for `coherent`."""

    tokens: int = 4096
    model_width: int = 2048
    expert_width: int = 1408
    num_experts: int = 64
    top_k: int = 2
    element_bytes: int = 2
    expert_matrices: int = 3
    kv_width: int = 512

    @property
    def row_bytes(self) -> int:
        return self.model_width * self.element_bytes

    @property
    def expert_bytes(self) -> int:
        return self.expert_matrices * self.model_width * self.expert_width * self.element_bytes

    @property
    def row_flop(self) -> int:
        return 2 * self.expert_matrices * self.model_width * self.expert_width


@dataclass(frozen=True)
class Phase:
    """What each device sends side by side, mean over devices: bytes and messages to other nodes and to others of its node."""

    nic_bytes: float = 0.0
    nic_messages: int = 0
    local_bytes: float = 0.0
    local_messages: int = 0


@dataclass(frozen=True)
class Way:
    """One movement of all devices: phases one after the other. counted: whether counts must be exchanged first."""

    phases: tuple[Phase, ...]
    counted: bool = False

    @property
    def back(self) -> "Way":
        return Way(self.phases[::-1])


def met(num_experts: int, num_here: float, top_k: int) -> float:
    """Probability that at least one of `top_k` different experts, drawn evenly, is among `num_here` of `num_experts`."""
    missed = 1.0
    for drawn in range(top_k):
        missed *= max(0.0, num_experts - num_here - drawn) / (num_experts - drawn)
    return 1.0 - missed


def flat(cluster: Cluster, layer: Layer) -> Way:
    each = layer.tokens * layer.top_k / cluster.devices * layer.row_bytes  # to one device
    return Way((_direct(cluster, each),), counted=True)


def deduplicated(cluster: Cluster, layer: Layer) -> Way:
    each = layer.tokens * met(layer.num_experts, layer.num_experts / cluster.devices, layer.top_k) * layer.row_bytes
    return Way((_direct(cluster, each),), counted=True)


def hierarchical(cluster: Cluster, layer: Layer) -> Way:
    rails, neighbours = cluster.nodes - 1, cluster.devices_per_node - 1
    to_node = layer.tokens * met(layer.num_experts, layer.num_experts / cluster.nodes, layer.top_k) * layer.row_bytes
    of_rail = cluster.nodes * layer.tokens * layer.row_bytes  # tokens of one number on all nodes, of which a part goes to each neighbour
    to_neighbour = of_rail * met(layer.num_experts, layer.num_experts / cluster.devices, layer.top_k)
    over_rails = Phase(nic_bytes=rails * to_node, nic_messages=rails)
    return Way((over_rails, Phase(local_bytes=neighbours * to_neighbour, local_messages=neighbours)), counted=True)


def gather(cluster: Cluster, layer: Layer) -> Way:
    """Weights, and then a dispatch of which nothing leaves its device."""
    weights = _broadcast(cluster, layer.num_experts / cluster.devices * layer.expert_bytes)
    return Way((*weights.phases, Phase()), counted=True)


def keys_and_values(cluster: Cluster, layer: Layer) -> Way:
    return _broadcast(cluster, layer.tokens * layer.kv_width * layer.element_bytes)


def next_expert(cluster: Cluster, layer: Layer) -> Way:
    return Way((_direct(cluster, layer.tokens / cluster.devices * layer.row_bytes),), counted=True)


def _direct(cluster: Cluster, each_bytes: float) -> Phase:
    others, neighbours = cluster.devices - cluster.devices_per_node, cluster.devices_per_node - 1
    return Phase(others * each_bytes, others, neighbours * each_bytes, neighbours)


def _broadcast(cluster: Cluster, own_bytes: float) -> Way:
    """What each device holds to one device of every other node, and then inside the nodes from every device to every other one."""
    rails, neighbours = cluster.nodes - 1, cluster.devices_per_node - 1
    inside = Phase(local_bytes=neighbours * cluster.nodes * own_bytes, local_messages=neighbours)
    return Way((Phase(nic_bytes=rails * own_bytes, nic_messages=rails), inside))


def two_dimensional(cluster: Cluster, payload_bytes: float) -> Way:
    """Tutel's 2DH (arXiv 2206.03382): rows for one rail are joined inside the node first, and then cross in one message for each node."""
    rails, neighbours = cluster.nodes - 1, cluster.devices_per_node - 1
    inside = Phase(local_bytes=payload_bytes * neighbours / cluster.devices_per_node, local_messages=neighbours)
    return Way((inside, Phase(nic_bytes=payload_bytes * rails / cluster.nodes, nic_messages=rails)))


WAYS: Mapping[str, Callable[[Cluster, Layer], tuple[Way, Way]]] = {
    "flat": lambda cluster, layer: (flat(cluster, layer), flat(cluster, layer).back),
    "deduplicated": lambda cluster, layer: (deduplicated(cluster, layer), deduplicated(cluster, layer).back),
    "hierarchical": lambda cluster, layer: (hierarchical(cluster, layer), hierarchical(cluster, layer).back),
    "gather": lambda cluster, layer: (gather(cluster, layer), Way((Phase(),))),
    "coherent": lambda cluster, layer: (next_expert(cluster, layer), keys_and_values(cluster, layer)),
}
"""What moves before the experts and what after them, forward; backward the same ways in reverse order and direction."""


def step_tasks(cluster: Cluster, layer: Layer, strategy: str) -> tuple[dict[str, float], list[Task]]:
    """Capacities and tasks of one step on one node; the last task is called `step`."""
    before, after = WAYS[strategy](cluster, layer)
    rows_s = layer.tokens * layer.top_k * layer.row_flop / cluster.flop_per_s
    parts = [("dispatch", before, rows_s), ("combine", after, 0.0)]
    parts += [("combine back", after.back, BACKWARD_FLOP_RATIO * rows_s), ("dispatch back", before.back, 0.0)]
    return _capacities(cluster), _in_turn(cluster, parts)


def all_to_all_tasks(cluster: Cluster, payload_bytes: float, kind: str) -> tuple[dict[str, float], list[Task]]:
    """One all-to-all in which every device has `payload_bytes` for all devices together; kind: linear or two_dimensional."""
    ways = {"linear": Way((_direct(cluster, payload_bytes / cluster.devices),)), "two_dimensional": two_dimensional(cluster, payload_bytes)}
    return _capacities(cluster), _in_turn(cluster, [(kind, ways[kind], 0.0)])


def _capacities(cluster: Cluster) -> dict[str, float]:
    devices = cluster.devices_per_node
    capacity_per_s = {"nic": float(devices if cluster.nic_per_device else 1), "local": float(devices)}
    if math.isfinite(cluster.cores_per_node):
        capacity_per_s["cores"] = cluster.cores_per_node
    return capacity_per_s


def _in_turn(cluster: Cluster, parts: Sequence[tuple[str, Way, float]]) -> list[Task]:
    """Tasks of (name, movement, seconds of compute after it), one after the other, and `step` at the end."""
    tasks: list[Task] = []
    ended: list[str] = []
    for name, way, compute_s in parts:
        for number, phase in enumerate(way.phases):
            if cluster.core_s_per_phase:
                tasks.append(_on_cores(cluster, f"{name} {number} rows", cluster.core_s_per_phase, ended))
                ended = [tasks[-1].name]
            latency_s = cluster.exchange_s + cluster.latency_s * (2 if way.counted and number == 0 else 1)
            transfers = _transfers(cluster, f"{name} {number}", phase, ended, latency_s)
            tasks += transfers
            ended = [task.name for task in transfers] or ended
        if compute_s:
            tasks.append(_on_cores(cluster, f"experts after {name}", compute_s, ended))
            ended = [tasks[-1].name]
    return [*tasks, Task("step", 0.0, after=ended)]


def _on_cores(cluster: Cluster, name: str, seconds: float, after: list[str]) -> Task:
    """Compute of every device, each on a core of its own as far as there are any."""
    demand = {"cores": 1.0} if math.isfinite(cluster.cores_per_node) else {}
    return Task(name, seconds, demand, after, ceiling=1.0, count=cluster.devices_per_node)


def _transfers(cluster: Cluster, name: str, phase: Phase, after: list[str], latency_s: float) -> list[Task]:
    """One task for each kind of link: all messages of a device share it alike."""
    links = (
        ("nic", phase.nic_bytes, phase.nic_messages, cluster.met_nic_bytes_per_s, cluster.nic_message_s, latency_s),
        ("local", phase.local_bytes, phase.local_messages, cluster.local_bytes_per_s, cluster.local_message_s, cluster.exchange_s),
    )
    tasks = []
    for link, num_bytes, messages, bytes_per_s, message_s, begins_after_s in links:
        if messages == 0:
            continue
        port_s = num_bytes / bytes_per_s + messages * message_s
        core_s = num_bytes * cluster.core_s_per_byte + messages * cluster.core_s_per_message
        demand = {link: port_s}  # one unit of work is all that a device has to send
        if math.isfinite(cluster.cores_per_node):
            demand["cores"] = core_s
        ceiling = 1.0 / max(core_s, port_s if link == "local" or cluster.nic_per_device else 0.0, 1e-12)  # one core, one port a device
        tasks.append(Task(f"{name} {link}", 1.0, demand, after, begins_after_s, ceiling, cluster.devices_per_node))
    return tasks


def step_s(cluster: Cluster, layer: Layer, strategy: str) -> float:
    """Seconds of one layer's forward and backward pass."""
    return simulate(*step_tasks(cluster, layer, strategy))["step"].end_s
