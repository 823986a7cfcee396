"""Crossdock's own layer, one variant for each way of moving tokens: same mathematics unless its description says otherwise."""

import os
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.peers.case import LayerWeights, Sizes
from crossdock.models.moe import MoELayer
from crossdock.runtime.context import StepContext
from crossdock.runtime.mesh import Mesh, initialise
from crossdock.runtime.overlap import Schedule, Sequential, run

VARIANTS = {
    "crossdock flat": "one row per (token, expert)",
    "crossdock deduplicated": "one row per (token, device)",
}

_meshes: list[Mesh] = []


def join() -> None:
    """Join the world and make the one mesh of this rank."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    initialise(rank, world_size)
    nodes: list[int] = [0] * world_size
    dist.all_gather_object(nodes, int(os.environ["GROUP_RANK"]))
    _meshes.append(Mesh.create(rank, world_size, world_size, tuple(nodes)))


def build(variant: str, sizes: Sizes, weights: LayerWeights, rank: int) -> nn.Module:
    """The layer of this rank."""
    mine = weights.of_rank(rank, sizes)
    moe = MoELayer(
        sizes.model_width,
        sizes.expert_width,
        sizes.num_experts,
        sizes.top_k,
        mesh=_meshes[0],
        dispatch=variant.split()[1],
        dtype=mine.down_EDF.dtype,
    )
    with torch.no_grad():
        moe.gate.weight_ED.copy_(mine.router_ED)
        moe.bank.inner.copy_(torch.cat([mine.gate_EFD, mine.up_EFD], dim=1))
        moe.bank.outer.copy_(mine.down_EDF.transpose(1, 2))
    return Layer(moe, Sequential(0))


def down_gradient(layer: nn.Module) -> Tensor | None:
    """Gradient of this rank's `down`, [S, D, F]."""
    gradient = cast(Layer, layer).moe.bank.outer.grad
    return None if gradient is None else gradient.transpose(1, 2)


class Layer(nn.Module):
    """A `MoELayer` under a schedule, as a block drives it; without the gate's noise and its balance losses, which no other row has."""

    def __init__(self, moe: MoELayer, schedule: Schedule) -> None:
        super().__init__()
        self.moe, self.schedule = moe, schedule

    def forward(self, x_TD: Tensor) -> Tensor:
        self.moe.mesh.ledger.take()
        unknown_T = torch.zeros(len(x_TD), dtype=torch.int64)
        context = StepContext(0, 0, False, unknown_T, first_token=self.moe.mesh.rank * len(x_TD))
        routing = self.moe.route(x_TD, context, len(x_TD))
        _, y_TD = run(self.schedule, self.moe, x_TD, routing.assignment, [], None)
        return y_TD
