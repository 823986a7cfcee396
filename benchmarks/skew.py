"""What does a skewed layer cost beside a balanced one, and what of it does gathering the hot experts save?

    python -m benchmarks.skew [--rates none,1e9,500e6] [--repeats 11] [--out FILE] [--json] [--short]      (root: it makes namespaces)

One layer of routed experts, forward and backward, on 4 ranks: dispatch, experts, combine; no gate, no attention beside it, so that
whatever travels is waited for. `none` is 4 ranks on one host; a rate is that of each link of two emulated nodes with two ranks. Every token
chooses one of 16 experts. Rows:

    balanced          every expert equally often, experts in equal blocks
    skewed            expert i as often as i^-1.2 says (Zipf), the same layout; which expert is the hottest is drawn
    packed            the same routing, experts packed on ranks for equal load: what static placement can do without copies
    gathered          the same routing and the layout of `skewed`, hot experts gathered: `placement.strategies.gather` chooses them from
                      the load and from speeds that were measured here
    packed_gathered   the packing with hot experts gathered

Columns, medians over paired repeats in one process group (a repeat's time is that of its slowest rank):

    step_s            forward and backward
    over_balanced     median of the repeats' ratios to the balanced row, with its quartiles
    load              rows of the busiest rank over the mean: what step_s / balanced step_s would be, were computing all there is
    predicted_s       what the choice of experts was made by
    bound_s           the busiest rank's arithmetic at the speed measured here, or the bytes of the busiest node at the link's rate, the
                      longer of the two: no order of work is faster
    token_bytes, weight_bytes    between ranks, counted; gathered experts' weights equal their prediction or the program fails
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import on_ranks
from benchmarks.command_line import one_line_errors
from benchmarks.measure import Spread, in_turns, paired_ratio, publish
from benchmarks.netlab import Lab
from benchmarks.on_ranks import meeting, set_rate, slowest, started, tell, timed
from crossdock.placement.costs.cost import NUM_DIRECTIONS, Workload
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.topology import Topology
from crossdock.placement.strategies.gather import GatherCost, choose_gathered, weight_bytes
from crossdock.runtime.dispatch.assignment import Assignment
from crossdock.runtime.dispatch.dispatcher import DISPATCHERS
from crossdock.runtime.dispatch.layout import ExpertLayout
from crossdock.runtime.experts.expert_bank import ExpertBank
from crossdock.runtime.experts.gathered import GatheringBank
from crossdock.runtime.transport.all_to_all import Route, all_to_all_start
from crossdock.runtime.transport.collectives import all_gather_objects, broadcast_object
from crossdock.runtime.transport.ledger import bytes_by_class
from crossdock.runtime.transport.mesh import Mesh

RANKS = 4
VARIANTS = ("balanced", "skewed", "packed", "gathered", "packed_gathered")
COLUMNS = ["variant", "link_bit_per_s", "step_s", "step_s_low", "step_s_high", "over_balanced", "load", "predicted_s", "bound_s"]
COLUMNS += ["gathered", "token_bytes", "weight_bytes"]


@dataclass(frozen=True)
class Shape:
    """Sizes of the layer; GELU experts in fp32."""

    tokens: int = 4096  # of one rank
    model_width: int = 512
    expert_width: int = 1024
    num_experts: int = 16
    exponent: float = 1.2

    @property
    def workload(self) -> Workload:
        """The same as the cost model wants it."""
        return Workload(self.tokens, self.model_width, self.expert_width, wire="fp32", expert_matrices=2, dispatch="flat")

    def shares(self, skewed: bool) -> NDArray[np.float64]:
        """How often each expert is chosen, [E]: equally, or by Zipf's law in an order drawn once."""
        if not skewed:
            return np.full(self.num_experts, 1.0 / self.num_experts)
        share_E = np.arange(1, self.num_experts + 1) ** -self.exponent
        return np.asarray(np.random.default_rng(0).permutation(share_E / share_E.sum()))

    def chosen(self, skewed: bool, rank: int) -> NDArray[np.int64]:
        """int64 [T]: the expert of each token of `rank`; the shares hold exactly, to one token."""
        edge_E = np.round(np.cumsum(self.shares(skewed)) * self.tokens).astype(np.int64)
        expert_T = np.repeat(np.arange(self.num_experts), np.diff(edge_E, prepend=0))
        return np.random.default_rng(1 + rank).permutation(expert_T)


def packed(share_E: NDArray[np.float64]) -> Plan:
    """Experts from the hottest down, each on the rank with the least load so far."""
    load_R = np.zeros(RANKS)
    device_E = np.zeros(len(share_E), dtype=np.int64)
    for expert in np.argsort(-share_E, kind="stable"):
        device_E[expert] = load_R.argmin()
        load_R[device_E[expert]] += share_E[expert]
    return Plan.from_devices(device_E[None], RANKS)


class Layer:
    """One variant's layer on this rank: its experts, its routing, and one step of both."""

    def __init__(self, shape: Shape, mesh: Mesh, skewed: bool, plan: Plan, gathered: Sequence[int]) -> None:
        self.mesh, self.plan, self.gathered, self.shape = mesh, plan, tuple(gathered), shape
        layout = ExpertLayout.from_plan(plan, 0, mesh)
        self.bank = ExpertBank(layout, shape.model_width, shape.expert_width, "gelu")
        self.bank.reset_parameters(0)
        for parameter in self.bank.parameters():
            parameter.grad = torch.zeros_like(parameter)  # accumulated into, as in every micro-batch but the first
        self.gathering = GatheringBank(self.bank, layout.with_gathered(gathered, mesh), mesh) if gathered else None
        self.dispatcher = DISPATCHERS["flat"](mesh, self.gathering.layout if self.gathering else layout, None)
        generator = torch.Generator().manual_seed(mesh.rank)
        self.x_TD = torch.randn(shape.tokens, shape.model_width, generator=generator).requires_grad_()
        self.grad_TD = torch.randn(shape.tokens, shape.model_width, generator=generator)
        expert_T1 = torch.from_numpy(shape.chosen(skewed, mesh.rank))[:, None]
        self.assignment = Assignment.from_topk(expert_T1, torch.ones(shape.tokens, 1))

    def step(self) -> None:
        """Forward and backward."""
        self.x_TD.grad = None
        experts: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = self.bank
        if self.gathering is not None:
            self.gathering.enter()
            experts = self.gathering
        rows_MD, count_S, handle = self.dispatcher.dispatch_start(self.x_TD, self.assignment).wait()
        if self.gathering is not None:
            self.gathering.arrive()
        self.dispatcher.combine_start(experts(rows_MD, count_S), handle).wait().backward(self.grad_TD)

    def counted(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Bytes of tokens and of weights in one step, all ranks together, by link class."""
        self.mesh.ledger.take()
        self.step()
        flights = self.mesh.ledger.take()
        of_ranks = all_gather_objects((bytes_by_class(flights), bytes_by_class(flights, "weights")), self.mesh)
        tokens, weights = (np.sum([pair[kind] for pair in of_ranks], axis=0) for kind in (0, 1))
        return tokens, weights


# ---- on every rank


def measured_topology(mesh: Mesh, shape: Shape, rate_bit_per_s: float | None, repeats: int) -> Topology:
    """Nodes and ranks as they are, with the speed of experts and of messages inside a node as measured now."""
    balanced = Layer(shape, mesh, False, Plan.contiguous(1, shape.num_experts, RANKS), ())
    rows_MD = torch.randn(shape.tokens, shape.model_width).requires_grad_()
    count_S = torch.full((balanced.bank.layout.num_slots,), shape.tokens // balanced.bank.layout.num_slots)
    count_S[0] += shape.tokens - int(count_S.sum())
    same_node = [rank for rank in range(RANKS) if mesh.node_of_rank[rank] == mesh.node_of_rank[mesh.rank] and rank != mesh.rank]
    sent_R = tuple(1024 if rank in same_node else 0 for rank in range(RANKS))
    route = Route(mesh, mesh.token_group, sent_R, sent_R, 0, "dispatch", "tokens", 0)
    message = torch.zeros(sum(sent_R), 1024)
    compute, messages = [], []
    for _ in range(repeats):
        compute.append(timed(mesh, lambda: balanced.bank(rows_MD, count_S).backward(rows_MD.detach())))
        messages.append(timed(mesh, lambda: all_to_all_start(message, route).wait()))
    # The least disturbed of a few repeats: medians of so few would follow whatever else the machine does.
    expert_s, message_s = min(slowest(mesh, compute)), min(slowest(mesh, messages))
    nodes = len(set(mesh.node_of_rank))
    found = Topology.uniform(
        nodes,
        RANKS // nodes,
        flop_per_s=3 * shape.workload.row_flop * shape.tokens / expert_s,
        same_node_bytes_per_s=message.numel() * 4 / message_s,
        other_node_bytes_per_s=(rate_bit_per_s or 1e12) / 8,
        shared_by_node=True,
    )
    return broadcast_object(found, mesh)


def measure(mesh: Mesh, shape: Shape, rate_bit_per_s: float | None, repeats: int) -> list[dict[str, Any]]:
    """The rows of one link rate."""
    topology = measured_topology(mesh, shape, rate_bit_per_s, repeats)
    blocks, packing = Plan.contiguous(1, shape.num_experts, RANKS), packed(shape.shares(True))
    costs: dict[str, GatherCost] = {}
    layers: dict[str, Layer] = {}
    for variant in VARIANTS:
        skewed, plan = variant != "balanced", packing if variant.startswith("packed") else blocks
        load_RE = np.array([np.bincount(shape.chosen(skewed, rank), minlength=shape.num_experts) for rank in range(RANKS)])
        costs[variant] = GatherCost(load_RE, plan, 0, topology, shape.workload, weight_element_bytes=4)
        experts = choose_gathered(costs[variant]).experts if variant.endswith("gathered") else ()
        layers[variant] = Layer(shape, mesh, skewed, plan, experts)
    samples = in_turns({variant: functools.partial(timed, mesh, layer.step) for variant, layer in layers.items()}, repeats, warmup=2)
    steps = {variant: slowest(mesh, seconds) for variant, seconds in samples.items()}
    return [row(variant, layers[variant], costs[variant], steps, rate_bit_per_s) for variant in VARIANTS]


def row(variant: str, layer: Layer, cost: GatherCost, steps: Mapping[str, Sequence[float]], rate: float | None) -> dict[str, Any]:
    """One variant's row. Fails where the bytes of weights are not those predicted."""
    shape, topology, mesh = layer.shape, cost.topology, layer.mesh
    tokens, weights = layer.counted()
    expert_bytes = shape.workload.expert_parameters * 4
    assert tuple(weights) == weight_bytes(layer.plan, [layer.gathered], mesh.node_of_rank, expert_bytes)
    rows_R = np.array(all_gather_objects(int(_rows(layer)), mesh))
    compute_s = 3 * shape.workload.row_flop * rows_R.max() / topology.flop_per_s_R[0]
    link_s = 0.0 if rate is None else _node_bytes(layer, weights[2]) * 8 / rate
    spread, ratio = Spread.of(steps[variant]), paired_ratio(steps[variant], steps["balanced"])
    return {
        "variant": variant,
        "link_bit_per_s": rate,
        **spread.row("step_s"),
        "over_balanced": ratio.median,
        "over_balanced_quartile_1": ratio.quartile_1,
        "over_balanced_quartile_3": ratio.quartile_3,
        "load": float(rows_R.max() / rows_R.mean()),
        "predicted_s": cost.of(layer.gathered),
        "bound_s": max(compute_s, link_s),
        "gathered": len(layer.gathered),
        "token_bytes": int(tokens[1:].sum()),
        "weight_bytes": int(weights[1:].sum()),
        "repeats": spread.count,
    }


def _rows(layer: Layer) -> int:
    """Rows that this rank's experts compute."""
    with torch.no_grad():
        return len(layer.dispatcher.dispatch_start(layer.x_TD, layer.assignment).wait().rows_MD)


def _node_bytes(layer: Layer, weight_bytes_between_nodes: int) -> float:
    """Bytes that the busiest of two nodes sends or receives in a step: rows both ways, forward and backward, and its share of weights."""
    mesh, shape = layer.mesh, layer.shape
    layout = layer.dispatcher.layout
    slot_T = layout.slot_of_expert_E[layer.assignment.expert_A]
    node_R = np.array(mesh.node_of_rank)
    mine = [int((slot_T // layout.num_slots == rank).sum()) for rank in range(RANKS)]
    copies_RR = np.array(all_gather_objects(mine, mesh))
    crossing = [copies_RR[np.ix_(node_R == here, node_R != here)].sum() for here in (0, 1)]
    # What one node sends in dispatch comes back in combine: out and in carry the sum of both directions' rows.
    token_bytes = sum(crossing) * shape.workload.copy_bytes * NUM_DIRECTIONS / 2
    return float(token_bytes + weight_bytes_between_nodes / 2)


def worker(options: argparse.Namespace) -> None:
    """One rank: measure, and tell the rows."""
    with meeting(options) as (mesh, lab):
        rows = []
        for rate in options.rates:
            set_rate(mesh, lab, rate)
            rows += measure(mesh, Shape(**json.loads(options.shape)), rate, options.repeats)
        tell(mesh, rows)


# ---- the command


def _parser() -> argparse.ArgumentParser:
    parser = on_ranks.parser("benchmarks.skew", __doc__, repeats=11, read_rates=on_ranks.rates_or_none)
    parser.set_defaults(rates=[None, 1e9, 500e6])
    parser.add_argument("--tokens", type=int, default=Shape.tokens, help="of one rank")
    parser.add_argument("--model-width", type=int, default=Shape.model_width)
    parser.add_argument("--expert-width", type=int, default=Shape.expert_width)
    return parser


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.lab:
        worker(options)
        return 0
    if options.short:
        options.rates, options.repeats = [500e6], 3
        options.tokens, options.model_width, options.expert_width = 512, 64, 64
    shape = Shape(options.tokens, options.model_width, options.expert_width)
    rows: list[dict[str, Any]] = []
    for nodes, rates in ((1, [r for r in options.rates if r is None]), (2, [r for r in options.rates if r is not None])):
        if not rates:
            continue
        with Lab(nodes, rates[0]) as lab:
            rows += started("benchmarks.skew", lab, RANKS // nodes, shape, argparse.Namespace(rates=rates, repeats=options.repeats))
    publish(rows, f"one skewed layer on {RANKS} ranks, {shape}", options.out, options.json, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
