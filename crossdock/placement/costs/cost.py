"""The cost model: seconds of one optimizer step under a plan, from counts of copies and rows. Pure functions over numpy arrays.

Only exposed time counts: a block takes

    max(compute beside the dispatch, dispatch) + experts + max(compute beside the combine, combine)

on the slowest device and link, once forward and once backward. That is the makespan of ScMoE's schedule
(arXiv 2404.05019, which itself minimises only the mismatch of the two sides); an ordinary block has an empty window. Solvers, the evaluator
and the overlap schedule all call `makespan`.

Transfers. `copies_RR[h, d]` counts copies that homes on device h send to device d. Dispatch carries them from h to d and combine carries as
many back. In backward the gradient of the combine travels from h to d and the gradient of the dispatch from d to h, so four transfers need
two times: `dispatch_s` (h to d) and `combine_s` (d to h). Hierarchical dispatch takes two hops, one after the other (`placement.hops`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from crossdock import strict_yaml
from crossdock.errors import BadConfig
from crossdock.placement.records.kept import kept_with_first
from crossdock.placement.records.topology import LINK_CLASSES, OTHER_NODE, Topology
from crossdock.strict_yaml import Document, StrictModel

Float = NDArray[np.float64]
Dispatch = Literal["deduplicated", "flat", "hierarchical"]
DISPATCHES: tuple[Dispatch, ...] = get_args(Dispatch)
WireName = Literal["fp64", "fp32", "bf16", "int8"]
WIRE_NAMES: tuple[WireName, ...] = get_args(WireName)

NUM_DIRECTIONS = 4  # dispatch and combine, forward and backward
BACKWARD_FLOP_RATIO = 2.0  # gradients of the inputs and of the weights


def makespan(before_s: ArrayLike, dispatch_s: ArrayLike, expert_s: ArrayLike, after_s: ArrayLike, combine_s: ArrayLike) -> Any:
    """Seconds of a block whose dispatch runs beside `before_s` of compute and whose combine runs beside `after_s`.

    Scalars or arrays of one shape. Compute never overlaps compute, and the experts wait for the last token.
    """
    return np.maximum(before_s, dispatch_s) + expert_s + np.maximum(after_s, combine_s)


def row_bytes(wire: WireName, width: int) -> int:
    """Bytes of a row of `width` elements on the wire; int8 has a scale of 16 bits for every 128 elements, the last block may be short."""
    element_bytes = {"fp64": 8, "fp32": 4, "bf16": 2, "int8": 1}[wire]
    return width * element_bytes + (2 * -(-width // 128) if wire == "int8" else 0)


def _check_number(name: str, value: float, least: float) -> None:
    if not (np.isfinite(value) and value >= least):
        raise BadConfig(f"{name} is {value}; give a finite number of at least {least}")


@dataclass(frozen=True)
class Window:
    """Seconds of compute that run while tokens travel, for each of the four transfers; 0 where nothing does."""

    dispatch_forward_s: float = 0.0
    combine_forward_s: float = 0.0
    dispatch_backward_s: float = 0.0
    combine_backward_s: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_number(f"window.{field.name}", getattr(self, field.name), least=0.0)


@dataclass(frozen=True)
class Workload:
    """What one step asks of the devices.

    tokens_per_rank             tokens of one micro-batch on one device
    model_width                 D, elements of a row on the wire
    expert_width                F, hidden width of an expert
    wire                        format of rows on the wire: "fp64", "fp32", "bf16", or "int8" with a scale for every 128 elements
    expert_matrices             D x F matrices of an expert: 2 with GELU, 3 with SwiGLU
    dispatch                    "deduplicated", "flat" or "hierarchical", see the glossary in plan.py
    window                      compute beside the transfers of every block
    turn_windows                the same for each turn, where a block routes its tokens in several (DGMoE) and each has other compute beside
                                it; `window` is then their mean, and every turn counts as a micro-batch
    other_s                     the rest of the step: everything outside the blocks' dispatch, experts, combine and windows
    micro_batches               forward and backward passes in a step
    expert_overhead_s           fixed cost of a block's experts in one direction, whatever their rows
    state_bytes_per_parameter   memory for weight, gradient, master copy and optimizer state of one expert parameter
    gradient_bytes              bytes of one parameter's gradient, master weight and each of two moments: 4, or 8 in double precision
    """

    tokens_per_rank: int = 4096
    model_width: int = 2048
    expert_width: int = 1408
    wire: WireName = "bf16"
    expert_matrices: int = 3
    dispatch: Dispatch = "deduplicated"
    window: Window = Window()
    turn_windows: tuple[Window, ...] = ()
    other_s: float = 0.0
    micro_batches: int = 1
    expert_overhead_s: float = 0.0
    state_bytes_per_parameter: float = 18.0
    gradient_bytes: int = 4

    def __post_init__(self) -> None:
        for name in ("tokens_per_rank", "model_width", "expert_width", "expert_matrices", "micro_batches", "gradient_bytes"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise BadConfig(f"{name} is {value!r}; give an integer")
            _check_number(name, value, least=1)
        for name in ("other_s", "expert_overhead_s", "state_bytes_per_parameter"):
            _check_number(name, getattr(self, name), least=0.0)
        if self.dispatch not in DISPATCHES:
            raise BadConfig(f"dispatch is {self.dispatch!r}; choose from {', '.join(DISPATCHES)}")
        if self.wire not in WIRE_NAMES:
            raise BadConfig(f"wire is {self.wire!r}; choose from {', '.join(WIRE_NAMES)}")

    @property
    def windows(self) -> tuple[Window, ...]:
        """The windows that blocks take turns with; one for most."""
        return self.turn_windows or (self.window,)

    @property
    def copy_bytes(self) -> int:
        """Bytes of one copy in one direction."""
        return row_bytes(self.wire, self.model_width)

    @property
    def expert_parameters(self) -> int:
        return self.expert_matrices * self.model_width * self.expert_width

    @property
    def row_flop(self) -> int:
        """Flop of one row through one expert, forward."""
        return 2 * self.expert_parameters

    @property
    def expert_state_bytes(self) -> float:
        """Memory of one expert of one layer with its optimizer state."""
        return self.expert_parameters * self.state_bytes_per_parameter

    @property
    def expert_moved_bytes(self) -> int:
        """What a migration carries of one expert of one layer: its master weights and both moments."""
        return self.expert_parameters * 3 * self.gradient_bytes

    @classmethod
    def load(cls, path: Path | str) -> "Workload":
        """Read YAML or JSON; absent keys keep their defaults. Raises `MissingInput` and `BadConfig`."""
        return cls._from_document(strict_yaml.load(Path(path)))

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], name: str = "workload") -> "Workload":
        """The same from a mapping; `name` stands for the file in messages."""
        return cls._from_document(Document(value=dict(mapping), name=name, line_of={}))

    @classmethod
    def _from_document(cls, document: Document) -> "Workload":
        values = strict_yaml.validated(_WorkloadFile, document).model_dump()
        turn_windows = tuple(Window(**window) for window in values["turn_windows"])
        return cls(**(values | {"window": Window(**values["window"]), "turn_windows": turn_windows}))

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, as `from_mapping` reads them and JSON writes them."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class BlockCost:
    """Seconds of one MoE block in one micro-batch, or of many: every field has the leading shape of the counts (0-d for one block).

    dispatch_s   the transfer from homes to experts, on its slowest device or link (dispatch forward, combine backward)
    combine_s    the transfer from experts to homes (combine forward, dispatch backward)
    expert_s     the experts of the slowest device, forward; backward takes twice as much flop
    forward_s    makespan forward; it contains the windows
    backward_s   makespan backward
    exposed_s    what the transfers of both directions exceed their windows by
    """

    dispatch_s: Float
    combine_s: Float
    expert_s: Float
    forward_s: Float
    backward_s: Float
    exposed_s: Float

    @property
    def total_s(self) -> Float:
        return np.asarray(self.forward_s + self.backward_s)

    @classmethod
    def of_layers(cls, blocks: Iterable["BlockCost"]) -> "BlockCost":
        """Fields of shape [L] from the costs of single blocks, of which one at a time needs memory for its links."""
        costs = list(blocks)
        return cls(*(np.array([getattr(cost, field.name) for cost in costs]) for field in fields(cls)))


def transfer_seconds(bytes_RR: ArrayLike, topology: Topology) -> Any:
    """Seconds of one all-to-all: `bytes_RR` [..., R, R] from row to column, result [...].

    Each device has one port for every link class, full duplex, and uses its ports side by side, so the transfer takes as long as the
    busiest port: the sum over its peers of bytes / (bytes/s of that link), sending or receiving. Where the devices of a node share a
    network card, that card is one more port. Every rank takes part in the collective, bytes or none, so the longest latency of each link
    class is always paid.
    """
    sent_RR = np.asarray(bytes_RR, dtype=np.float64)
    busiest_s = np.zeros(sent_RR.shape[:-2])
    for link in _links(topology):
        port_s: Any = 0.0
        if link.s_per_byte_RR is not None:
            port_s_RR = sent_RR * link.s_per_byte_RR
            port_s = np.maximum(port_s_RR.sum(axis=-1).max(axis=-1), port_s_RR.sum(axis=-2).max(axis=-1))
        if link.card_s_per_byte_RR is not None:
            port_s = np.maximum(port_s, _shared_card_seconds(sent_RR * link.card_s_per_byte_RR, topology))
        busiest_s = np.maximum(busiest_s, port_s + link.latency_s)
    return busiest_s


@dataclass(frozen=True, eq=False)
class _Link:
    """One link class of a topology: seconds per byte on each of its links and 0 elsewhere, None where they take no time; the same of the
    network cards that nodes share, None where there are none."""

    s_per_byte_RR: Float | None
    latency_s: float
    card_s_per_byte_RR: Float | None


@kept_with_first
def _links(topology: Topology) -> tuple[_Link, ...]:
    """What every transfer on a topology asks again: searches price millions of them."""
    found = []
    for link_class in range(len(LINK_CLASSES)):
        of_class_RR = topology.link_class_RR == link_class
        if not of_class_RR.any():
            continue
        s_per_byte_RR = np.where(of_class_RR, 1.0 / topology.bytes_per_s_RR, 0.0)
        has_cards = link_class == OTHER_NODE and topology.node_bytes_per_s is not None
        found.append(
            _Link(
                s_per_byte_RR if s_per_byte_RR.any() else None,
                float(topology.latency_s_RR[of_class_RR].max()),
                of_class_RR / (topology.node_bytes_per_s or 1.0) if has_cards else None,
            )
        )
    return tuple(found)


def sum_by_node(values: Float, topology: Topology, axis: int = -1) -> Float:
    """Sums over the devices of each node: `values` with R along `axis` become as many with N there."""
    order_R, begin_N = _node_order(topology)
    return np.asarray(np.add.reduceat(np.take(values, order_R, axis), begin_N, axis=axis))


@kept_with_first
def _node_order(topology: Topology) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Devices node after node [R], and where each node's begin among them [N]."""
    node_R = np.array(topology.node_of_R)
    order_R = np.argsort(node_R, kind="stable")
    return order_R, np.searchsorted(node_R[order_R], np.arange(topology.num_nodes))


def block_cost(
    copies_RR: ArrayLike, rows_R: ArrayLike, topology: Topology, workload: Workload, second_hop_RR: ArrayLike | None = None
) -> BlockCost:
    """Cost of one block, or of many at once.

    `copies_RR` [..., R, R] are the copies of one micro-batch from home (row) to device (column), counted as `workload.dispatch` sends
    them; `rows_R` [..., R] are the rows that each device's experts compute. With hierarchical dispatch `copies_RR` and `second_hop_RR` are
    the two hops. Expected values are as welcome as counts.
    """
    hops = [np.asarray(hop_RR, dtype=np.float64) * workload.copy_bytes for hop_RR in (copies_RR, second_hop_RR) if hop_RR is not None]
    dispatch_s = np.add.reduce([transfer_seconds(bytes_RR, topology) for bytes_RR in hops])
    combine_s = dispatch_s  # where links are as fast both ways, what goes back takes as long
    if not topology.is_symmetric:
        combine_s = np.add.reduce([transfer_seconds(np.swapaxes(bytes_RR, -1, -2), topology) for bytes_RR in hops])
    slowest_s = (np.asarray(rows_R, dtype=np.float64) * workload.row_flop / topology.flop_per_s_R).max(axis=-1)
    expert_s = slowest_s + workload.expert_overhead_s
    forward_s, backward_s = pass_seconds(workload, dispatch_s, combine_s, slowest_s)
    exposed_s = np.mean(
        [
            np.maximum(dispatch_s - window.dispatch_forward_s, 0.0)
            + np.maximum(combine_s - window.combine_forward_s, 0.0)
            + np.maximum(dispatch_s - window.combine_backward_s, 0.0)
            + np.maximum(combine_s - window.dispatch_backward_s, 0.0)
            for window in workload.windows
        ],
        axis=0,
    )
    return BlockCost(dispatch_s, combine_s, expert_s, forward_s, backward_s, exposed_s)


def pass_seconds(
    workload: Workload, dispatch_s: Any, combine_s: Any, slowest_s: Any, late_out_s: Any = 0.0, late_back_s: Any = 0.0
) -> tuple[Any, Any]:
    """Makespans of blocks forward and backward, mean over their turns; scalars or arrays of one shape.

    slowest_s: the experts of the slowest device forward, without their fixed cost. late_out_s: by how much weights of gathered experts come
    after the tokens forward; late_back_s: the same of their gradients, after the last transfer of the backward pass.
    """
    expert_s = slowest_s + workload.expert_overhead_s
    expert_backward_s = BACKWARD_FLOP_RATIO * slowest_s + workload.expert_overhead_s
    forward_s = backward_s = 0.0
    for window in workload.windows:
        forward_s = forward_s + makespan(window.dispatch_forward_s, dispatch_s + late_out_s, expert_s, window.combine_forward_s, combine_s)
        backward_s = backward_s + makespan(
            window.combine_backward_s, dispatch_s, expert_backward_s, window.dispatch_backward_s, combine_s + late_back_s
        )
    return forward_s / len(workload.windows), backward_s / len(workload.windows)


def step_seconds(block: BlockCost, workload: Workload) -> float:
    """Seconds of a step whose blocks cost `block` (fields of shape [L]): all micro-batches and the rest of the step."""
    return float(workload.micro_batches * block.total_s.sum() + workload.other_s)


class _WindowFile(StrictModel):
    dispatch_forward_s: float = Field(default=Window.dispatch_forward_s, ge=0)
    combine_forward_s: float = Field(default=Window.combine_forward_s, ge=0)
    dispatch_backward_s: float = Field(default=Window.dispatch_backward_s, ge=0)
    combine_backward_s: float = Field(default=Window.combine_backward_s, ge=0)


class _WorkloadFile(StrictModel):
    tokens_per_rank: int = Field(default=Workload.tokens_per_rank, ge=1)
    model_width: int = Field(default=Workload.model_width, ge=1)
    expert_width: int = Field(default=Workload.expert_width, ge=1)
    wire: WireName = Workload.wire
    expert_matrices: int = Field(default=Workload.expert_matrices, ge=1)
    dispatch: Dispatch = Workload.dispatch
    window: _WindowFile = _WindowFile()
    turn_windows: list[_WindowFile] = Field(default_factory=list)
    other_s: float = Field(default=Workload.other_s, ge=0)
    micro_batches: int = Field(default=Workload.micro_batches, ge=1)
    expert_overhead_s: float = Field(default=Workload.expert_overhead_s, ge=0)
    state_bytes_per_parameter: float = Field(default=Workload.state_bytes_per_parameter, ge=0)
    gradient_bytes: int = Field(default=Workload.gradient_bytes, ge=1)


def _shared_card_seconds(card_s_RR: Float, topology: Topology) -> Float:
    leaving_N = sum_by_node(card_s_RR.sum(axis=-1), topology)
    arriving_N = sum_by_node(card_s_RR.sum(axis=-2), topology)
    return np.asarray(np.maximum(leaving_N.max(axis=-1), arriving_N.max(axis=-1)))
