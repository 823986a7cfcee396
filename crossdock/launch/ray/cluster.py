"""What a Ray cluster can hold, and how a run is laid out on it. Pure: facts come in as `Node` values, nothing here talks to Ray."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crossdock.errors import CrossdockError, Unavailable
from crossdock.launch.scripts.allocation import Shape

if TYPE_CHECKING:
    from crossdock.launch.config import RunConfig
    from crossdock.placement.records.topology import Topology

_SHOWN = 4


@dataclass(frozen=True)
class Node:
    """A live node of the cluster: its address, what Ray may hand out on it in all, and what of that the driver of our own job holds."""

    node_id: str
    address: str
    cores: float
    gpus: float
    driver_cores: float = 0.0
    driver_gpus: float = 0.0

    def ranks(self, shape: Shape) -> int:
        """Ranks of the shape's kind that fit here, beside the driver."""
        by_cores = int((self.cores - self.driver_cores) // shape.cores_per_rank)
        return min(by_cores, int(self.gpus - self.driver_gpus)) if shape.gpus else by_cores


@dataclass(frozen=True)
class Place:
    """Where an actor really is, as it says itself, and the GPUs that it may use there."""

    node_id: str
    address: str
    gpus: tuple[str, ...] = ()


def shape_of(world_size: int, topology: "Topology | None", nodes: Sequence[Node], device: str = "auto") -> Shape:
    """The shape of a run that says only how many ranks it has: on as few nodes as hold them, or as many as its topology declares.

    A rank has one core, and a GPU where any node has some and `device` is not cpu. Raises `Unavailable` where the cluster is too small,
    with the numbers.
    """
    gpus, cores_per_rank = device != "cpu" and any(node.gpus for node in nodes), 1
    declared = 0 if topology is None else topology.num_nodes * (world_size // topology.num_devices)
    counts = [declared] if declared else [count for count in range(1, world_size + 1) if world_size % count == 0]
    shapes = [Shape(count, world_size // count, gpus, cores_per_rank) for count in counts]
    fitting = [shape for shape in shapes if len(able(nodes, shape)) >= shape.nodes]
    if not fitting:
        raise Unavailable(too_small(nodes, shapes[0]))
    return fitting[0]


def able(nodes: Sequence[Node], shape: Shape) -> list[Node]:
    """The nodes that can hold a node's worth of ranks, by address: the order of ranks is the same after every restart."""
    return sorted((node for node in nodes if node.ranks(shape) >= shape.ranks_per_node), key=lambda node: (node.address, node.node_id))


def chosen(nodes: Sequence[Node], count: int, suspects: Collection[str]) -> list[Node]:
    """`count` of the nodes in their order; those whose ids are suspects only where others do not suffice: they may be gone already."""
    last = sorted(nodes, key=lambda node: node.node_id in suspects)[:count]
    return [node for node in nodes if node in last]


def check_places(places: Sequence[Place], nodes: Sequence[Node], shape: Shape) -> None:
    """Hold where the ranks really are against the nodes that were chosen for them, in the order of ranks.

    Raises `Unavailable` where a rank is elsewhere, or has not one GPU for itself where it should have: a group formed so would take links
    between nodes for links inside one.
    """
    wanted = [nodes[rank // shape.ranks_per_node] for rank in range(len(places))]
    astray = [
        f"rank {rank} on {place.address} instead of {node.address} (nodes {place.node_id[:12]} and {node.node_id[:12]})"
        for rank, (place, node) in enumerate(zip(places, wanted, strict=True))
        if place.node_id != node.node_id
    ]
    if astray:
        raise Unavailable(
            f"{len(astray)} of {len(places)} ranks run on other nodes than they were given: {_some(astray)}. Ray did not keep its "
            "placement groups on the nodes that they name; see `ray --version` on every node, and start again"
        )
    if not shape.gpus:
        return
    shared = [
        f"rank {rank} on {place.address} has {', '.join(place.gpus) or 'none'}"
        for rank, place in enumerate(places)
        if len(place.gpus) != 1 or any(place == other for peer, other in enumerate(places) if peer != rank)
    ]
    if shared:
        raise Unavailable(
            f"{len(shared)} of {len(places)} ranks have not one GPU for themselves: {_some(shared)}; "
            "see the GPUs of each node in `ray status`"
        )


def _some(findings: Sequence[str]) -> str:
    more = f", and {len(findings) - _SHOWN} more" if len(findings) > _SHOWN else ""
    return ", ".join(findings[:_SHOWN]) + more


def too_small(nodes: Sequence[Node], shape: Shape) -> str:
    """Why the cluster cannot hold the shape, and what to do."""
    kind = "GPUs" if shape.gpus else "cores"
    each = shape.ranks_per_node * (1 if shape.gpus else shape.cores_per_rank)
    has = ", ".join(f"{node.address} {node.gpus if shape.gpus else node.cores:g}" for node in nodes) or "nothing"
    held = [(node.driver_gpus if shape.gpus else node.driver_cores, node.address) for node in nodes]
    driver = "".join(
        f" (the driver of this job holds {number:g} {kind} of {address}: submit it without --entrypoint-num-cpus and --entrypoint-num-gpus)"
        for number, address in held
        if number
    )
    return (
        f"{shape.nodes} nodes with {shape.ranks_per_node} ranks each need {each} {kind} a node, and the cluster has on its nodes: "
        f"{has}{driver}; {len(able(nodes, shape))} of them are large enough. Add nodes, or use fewer ranks"
    )


def shrunk(config: "RunConfig", shape: Shape, num_nodes: int, min_nodes: int) -> "tuple[RunConfig, Shape] | None":
    """The run on at most `num_nodes` of its nodes, and never on fewer than `min_nodes`; None where nothing fits.

    Whole expert groups are dropped where that suffices. Where the rest is less than one group, the group itself shrinks: a given plan and
    topology no longer fit it and are left out, and the run plans anew. The batch stays what it was, so the number of ranks must divide it.
    """
    from crossdock.launch.request import check_world, read_inputs

    for nodes in range(min(num_nodes, shape.nodes), min_nodes - 1, -1):
        world_size = nodes * shape.ranks_per_node
        smaller = config
        if world_size < config.parallel.expert:
            parallel = config.parallel.model_copy(update={"expert": world_size})
            smaller = config.model_copy(update={"parallel": parallel, "plan": None, "topology": None})
        try:
            check_world(smaller, world_size)
            read_inputs(smaller)
        except CrossdockError:
            continue  # this number of ranks does not divide the work; a smaller one may
        return smaller, Shape(nodes, shape.ranks_per_node, shape.gpus, shape.cores_per_rank)
    return None
