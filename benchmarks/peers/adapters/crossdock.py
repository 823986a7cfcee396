"""Crossdock's own layer, one variant for each way of moving tokens; and its experts alone, the floor of every row."""

import os
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.peers.case import LayerWeights, Sizes
from crossdock.models.moe import MoELayer
from crossdock.runtime.context import StepContext
from crossdock.runtime.mesh import Mesh, initialise
from crossdock.runtime.overlap import Chunked, Schedule, Sequential, run

VARIANTS = {
    "crossdock flat": "one row per (token, expert), waited for at once",
    "crossdock deduplicated": "one row per (token, device), waited for at once",
    "crossdock hierarchical": "one row per (token, node) over the slow link, waited for at once",
    "crossdock flat 2 chunks": "the same in 2 chunks, one travels while another is computed",
    "crossdock deduplicated 2 chunks": "the same in 2 chunks",
    "crossdock deduplicated 4 chunks": "the same in 4 chunks",
    "crossdock hierarchical 4 chunks": "the same in 4 chunks",
    "crossdock deduplicated 4 chunks bf16-wire": "rows travel in bf16: other numbers where the experts compute in fp32",
    "experts alone": "the experts on the rows that arrive, nothing sent",
}

_meshes: list[Mesh] = []


@dataclass(frozen=True)
class Ways:
    """What a variant's name says."""

    dispatch: str
    schedule: Schedule
    wire: str | None

    @staticmethod
    def of(variant: str) -> "Ways":
        _, dispatch, *rest = variant.split()
        chunks = int(rest[0]) if rest else 1
        schedule = Chunked(0, chunks, chunks) if chunks > 1 else Sequential(0)
        return Ways(dispatch, schedule, "bf16" if "bf16-wire" in rest else None)


def join() -> None:
    """Join the world and make the one mesh of this rank."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    initialise(rank, world_size)
    nodes: list[int] = [0] * world_size
    dist.all_gather_object(nodes, int(os.environ["GROUP_RANK"]))
    _meshes.append(Mesh.create(rank, world_size, world_size, tuple(nodes)))


def build(variant: str, sizes: Sizes, weights: LayerWeights, rank: int) -> nn.Module:
    """The layer of this rank."""
    ways = Ways.of("crossdock flat" if variant == "experts alone" else variant)
    mine = weights.of_rank(rank, sizes)
    moe = MoELayer(
        sizes.model_width,
        sizes.expert_width,
        sizes.num_experts,
        sizes.top_k,
        mesh=_meshes[0],
        dispatch=ways.dispatch,
        wire=ways.wire,
        dtype=mine.down_EDF.dtype,
    )
    with torch.no_grad():
        moe.gate.weight_ED.copy_(mine.router_ED)
        moe.bank.inner.copy_(torch.cat([mine.gate_EFD, mine.up_EFD], dim=1))
        moe.bank.outer.copy_(mine.down_EDF.transpose(1, 2))
    return ExpertsAlone(moe) if variant == "experts alone" else Layer(moe, ways.schedule)


def down_gradient(layer: nn.Module) -> Tensor | None:
    """Gradient of this rank's `down`, [S, D, F]."""
    gradient = cast(Any, layer).moe.bank.outer.grad
    return None if gradient is None else gradient.transpose(1, 2)


class Layer(nn.Module):
    """A `MoELayer` under a schedule, as a block drives it; without the gate's noise and its balance losses, which no other row has."""

    def __init__(self, moe: MoELayer, schedule: Schedule) -> None:
        super().__init__()
        self.moe, self.schedule = moe, schedule

    def forward(self, x_TD: Tensor) -> Tensor:
        self.moe.mesh.ledger.take()
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
