"""Expert parallelism as a first draft: sort, all-to-all, a loop over the experts, index_add; autograd through torch's own all-to-all."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.case import Case, LayerWeights, Sizes

VARIANTS = {"naive": "40 lines of plain torch"}


def build(variant: str, case: Case, weights: LayerWeights, rank: int) -> nn.Module:
    """The layer of this rank."""
    return NaiveLayer(case.sizes, weights.of_rank(rank, case.sizes))


def down_gradient(layer: nn.Module) -> Tensor | None:
    """Gradient of this rank's `down`, [S, D, F]."""
    return layer.down.grad  # type: ignore[return-value]


class NaiveLayer(nn.Module):
    """x [T, D] -> y [T, D]."""

    def __init__(self, sizes: Sizes, mine: LayerWeights) -> None:
        super().__init__()
        self.sizes = sizes
        self.router, self.gate, self.up, self.down = (nn.Parameter(tensor.clone()) for tensor in vars(mine).values())

    def forward(self, x_TD: Tensor) -> Tensor:
        probability_TK, expert_TK = (x_TD @ self.router.t()).float().softmax(-1).topk(self.sizes.top_k)
        weight_TK = (probability_TK / probability_TK.sum(-1, keepdim=True)).to(x_TD.dtype)
        order = expert_TK.flatten().argsort(stable=True)
        token = order // self.sizes.top_k
        sent = torch.bincount(expert_TK.flatten(), minlength=self.sizes.num_experts).view(self.sizes.ranks, -1)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        rows = Exchange.apply(x_TD[token], sent.sum(1).tolist(), received.sum(1).tolist())
        slot = torch.arange(self.sizes.num_slots).repeat(self.sizes.ranks).repeat_interleave(received.flatten())
        by_slot = slot.argsort(stable=True)
        parts = rows[by_slot].split(received.sum(0).tolist())
        done = torch.cat(
            [
                F.linear(F.silu(F.linear(part, self.gate[number])) * F.linear(part, self.up[number]), self.down[number])
                for number, part in enumerate(parts)
            ]
        )
        back = torch.empty_like(rows).index_copy(0, by_slot, done)
        home = Exchange.apply(back, received.sum(1).tolist(), sent.sum(1).tolist())
        return torch.zeros_like(x_TD).index_add(0, token, home * weight_TK.flatten()[order, None])


class Exchange(torch.autograd.Function):
    """An all-to-all of rows, whose gradient is the all-to-all back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        ctx.send, ctx.receive = send, receive
        out = rows.new_empty(sum(receive), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), receive, send)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        out = grad.new_empty(sum(ctx.send), grad.shape[1])
        dist.all_to_all_single(out, grad.contiguous(), ctx.send, ctx.receive)
        return out, None, None
