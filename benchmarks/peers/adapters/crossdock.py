"""Crossdock's own layer, one variant for each way of moving tokens; and its experts alone, the floor of every row."""

import os
import statistics
import time
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.peers.case import Case, LayerWeights
from benchmarks.peers.rounds import EXPERTS_ALONE
from crossdock.models.moe import MoELayer
from crossdock.placement.costs.cost import Workload
from crossdock.placement.records.affinity import Affinity
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import Trace
from crossdock.placement.solvers import solve
from crossdock.placement.solvers.problem import Problem
from crossdock.placement.strategies.gather import GatherCost, choose_gathered
from crossdock.runtime.experts.overlap import Chunked, Schedule, Sequential, run
from crossdock.runtime.training.context import StepContext
from crossdock.runtime.transport.collectives import broadcast_object
from crossdock.runtime.transport.mesh import Mesh, initialise

VARIANTS = {
    "crossdock deduplicated": "one row per (token, device), waited for at once",
    "experts alone": "the experts on the rows that arrive, nothing sent",
}
LOCAL_VARIANTS = {
    "crossdock flat": "one row per (token, expert), waited for at once",
    "crossdock deduplicated 2 chunks": "in 2 chunks, one travels while another is computed",
}
NODES_VARIANTS = {
    "crossdock deduplicated 4 chunks": "in 4 chunks, one travels while another is computed",
    "crossdock hierarchical 4 chunks": "one row per (token, node) over the slow link, 4 chunks",
}
FP32_NODES_VARIANTS = {
    "crossdock hierarchical 4 chunks bf16-wire": "rows travel in bf16: other numbers, since the experts compute in fp32",
}
SKEWED_LOCAL_VARIANTS = {
    "crossdock flat packed": "experts packed on ranks for even load by the planner",
    "crossdock flat packed gathered": "packed; weights of hot experts travel instead of their tokens",
}
SKEWED_NODES_VARIANTS = {
    "crossdock hierarchical packed 4 chunks": "experts packed on ranks for even load by the planner",
    "crossdock hierarchical packed gathered 4 chunks": "packed; weights of hot experts travel instead of their tokens",
}
"""A planner has seen the routing before, as from a recorded trace."""

_meshes: list[Mesh] = []


@dataclass(frozen=True)
class Ways:
    """What a variant's name says."""

    dispatch: str
    chunks: int = 1
    wire: str | None = None
    packed: bool = False
    gathered: bool = False

    @staticmethod
    def of(variant: str) -> "Ways":
        if variant == EXPERTS_ALONE:
            return Ways("flat")
        _, dispatch, *rest = variant.split()
        chunks = int(rest[rest.index("chunks") - 1]) if "chunks" in rest else 1
        return Ways(dispatch, chunks, "bf16" if "bf16-wire" in rest else None, "packed" in rest, "gathered" in rest)

    @property
    def schedule(self) -> Schedule:
        return Chunked(0, self.chunks, self.chunks) if self.chunks > 1 else Sequential(0)


def join() -> None:
    """Join the world and make the one mesh of this rank."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    initialise(rank, world_size)
    nodes: list[int] = [0] * world_size
    dist.all_gather_object(nodes, int(os.environ["GROUP_RANK"]))
    _meshes.append(Mesh.create(rank, world_size, world_size, tuple(nodes)))


def build(variant: str, case: Case, weights: LayerWeights, rank: int) -> nn.Module:
    """The layer of this rank."""
    mesh, sizes, ways = _meshes[0], case.sizes, Ways.of(variant)
    plan = packed(case, mesh) if ways.packed else Plan.contiguous(1, sizes.num_experts, sizes.ranks)
    moe = MoELayer(
        sizes.model_width,
        sizes.expert_width,
        sizes.num_experts,
        sizes.top_k,
        mesh=mesh,
        plan=plan,
        dispatch=ways.dispatch,
        wire=ways.wire,
        dtype=weights.down_EDF.dtype,
    )
    mine = list(moe.layout.local_experts)
    with torch.no_grad():
        moe.gate.weight_ED.copy_(weights.router_ED)
        moe.bank.inner.copy_(torch.cat([weights.gate_EFD[mine], weights.up_EFD[mine]], dim=1))
        moe.bank.outer.copy_(weights.down_EDF[mine].transpose(1, 2))
    if ways.gathered:
        moe.set_gathered(hot_experts(moe, case, plan))
    return ExpertsAlone(moe) if variant == EXPERTS_ALONE else Layer(moe, ways.schedule)


def load_RE(case: Case) -> NDArray[np.int64]:
    """Rows by home and expert, [R, E]."""
    return np.stack([np.bincount(expert_TK.flatten().numpy(), minlength=case.sizes.num_experts) for expert_TK in case.expert_RTK])


def topology_of(mesh: Mesh, flop_per_s: float = 8e10) -> Topology:
    """Nodes and ranks as they are, behind links of 500 Mbit/s where there are several nodes."""
    nodes = len(set(mesh.node_of_rank))
    return Topology.uniform(
        nodes,
        mesh.world_size // nodes,
        flop_per_s=flop_per_s,
        same_node_bytes_per_s=5e8,
        other_node_bytes_per_s=500e6 / 8,
        shared_by_node=True,
    )


def workload_of(case: Case) -> Workload:
    """The layer as the cost model wants it."""
    sizes = case.sizes
    return Workload(sizes.tokens, sizes.model_width, sizes.expert_width, case.dtype, dispatch="flat")  # type: ignore[arg-type]


def packed(case: Case, mesh: Mesh) -> Plan:
    """The planner's packing for even load."""
    affinity = Affinity.from_trace(Trace(case.expert_RTK.flatten(0, 1).unsqueeze(1).numpy(), case.sizes.num_experts))
    return solve(Problem(affinity, topology_of(mesh), workload_of(case)), "balance").plan


def hot_experts(moe: MoELayer, case: Case, plan: Plan) -> tuple[int, ...]:
    """The experts that the cost model gathers, with the experts' speed as rank 0 measures it now."""
    load = load_RE(case)
    rows_MD = torch.randn(load.sum() // case.sizes.ranks, case.sizes.model_width, dtype=moe.bank.inner.dtype).requires_grad_()
    num_slots = len(moe.layout.local_experts)
    count_S = torch.full((num_slots,), len(rows_MD) // num_slots)
    count_S[0] += len(rows_MD) - int(count_S.sum())
    seconds = []
    for _ in range(3):
        begin_s = time.perf_counter()
        moe.bank(rows_MD, count_S).backward(rows_MD.detach())
        seconds.append(time.perf_counter() - begin_s)
    flop = 3 * workload_of(case).row_flop * len(rows_MD)
    speed: float = broadcast_object(flop / statistics.median(seconds), moe.mesh)
    cost = GatherCost(load, plan, 0, topology_of(moe.mesh, speed), workload_of(case), moe.bank.inner.element_size())
    return choose_gathered(cost).experts


def down_gradient(layer: nn.Module) -> Tensor | None:
    """Gradient of this rank's `down`, [S, D, F]."""
    gradient: Tensor = cast(Any, layer).moe.bank.outer.grad
    return gradient.transpose(1, 2)


def experts_of(layer: nn.Module) -> list[int]:
    """Which experts those are, where a plan has placed them."""
    return list(cast(Any, layer).moe.layout.local_experts)


class Layer(nn.Module):
    """A `MoELayer` under a schedule, as a block drives it; without the gate's noise and its balance losses, which no other row has."""

    def __init__(self, moe: MoELayer, schedule: Schedule) -> None:
        super().__init__()
        self.moe, self.schedule = moe, schedule

    def forward(self, x_TD: Tensor) -> Tensor:
        self.moe.mesh.ledger.take()
        self.moe.prefetch()
        routing = self.moe.route(x_TD, context_of(self.moe, x_TD), len(x_TD))
        _, y_TD = run(self.schedule, self.moe, x_TD, routing.assignment, [], None)
        return y_TD


def context_of(moe: MoELayer, x_TD: Tensor) -> StepContext:
    """Evaluation, in which the gate adds no noise."""
    return StepContext(0, 0, False, torch.zeros(len(x_TD), dtype=torch.int64), first_token=moe.mesh.rank * len(x_TD))


class ExpertsAlone(nn.Module):
    """Forward and backward of the experts on the rows that the first step's dispatch brought; returns zeros."""

    def __init__(self, moe: MoELayer) -> None:
        super().__init__()
        self.moe = moe
        self._arrived: tuple[Tensor, Tensor] | None = None

    def forward(self, x_TD: Tensor) -> Tensor:
        if self._arrived is None:
            with torch.no_grad():
                routing = self.moe.route(x_TD, context_of(self.moe, x_TD), len(x_TD))
                rows_MD, count_S, _ = self.moe.dispatch_start(x_TD, routing.assignment).wait()
            self._arrived = rows_MD.requires_grad_(), count_S
        y_TD: Tensor = _Instead.apply(self.moe.bank(*self._arrived), x_TD)
        return y_TD


class _Instead(torch.autograd.Function):
    """Zeros of x's shape; backward, ones for the rows and zeros for x."""

    @staticmethod
    def forward(ctx: Any, rows_MD: Tensor, x_TD: Tensor) -> Tensor:
        ctx.save_for_backward(rows_MD)
        return torch.zeros_like(x_TD)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor]:
        (rows_MD,) = ctx.saved_tensors
        return torch.ones_like(rows_MD), torch.zeros_like(grad_TD)
