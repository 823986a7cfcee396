"""Expert parallelism in your own training loop: one layer, one call before the optimizer.

    python examples/drop_in.py                                  one process, all experts in it
    torchrun --nproc-per-node 2 examples/drop_in.py             two processes, half of the experts in each; the losses are the same

Everything but the three lines marked Crossdock is plain PyTorch; the model learns to reverse the sign of every second feature.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

from crossdock.models.moe import MoELayer
from crossdock.runtime.transport.mesh import Mesh


def train(rank: int, world_size: int, num_steps: int = 20) -> list[float]:
    """Train on this rank's share of 8 sequences of 16 tokens a step; returns the loss of the global batch at every step."""
    mesh = Mesh.create(rank, world_size, expert_parallel=world_size) if world_size > 1 else None  # Crossdock: who holds which experts
    torch.manual_seed(0)  # the same dense weights and the same data everywhere
    moe = MoELayer(model_width=32, expert_width=64, num_experts=8, top_k=2, mesh=mesh)  # Crossdock: in place of a feed-forward layer
    model = nn.ModuleDict({"in": nn.Linear(32, 32), "moe": moe, "out": nn.Linear(32, 32)})
    dense = [parameter for name, parameter in model.named_parameters() if "bank" not in name]  # `bank`: the experts of this rank
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sign = torch.ones(32)
    sign[::2] = -1
    losses = []
    for _ in range(num_steps):
        x: Tensor = torch.randn(8, 16, 32).chunk(world_size)[rank]
        hidden = model["in"](x)
        loss = (model["out"](hidden + moe(hidden)) - sign * x).square().mean()
        optimizer.zero_grad()
        (loss + sum(moe.losses.values())).backward()
        if world_size > 1:
            for tensor in (loss.detach(), *(parameter.grad for parameter in dense)):  # means over ranks, in place
                dist.all_reduce(tensor)
                tensor /= world_size
        moe.finish_gradients()  # Crossdock: the same for the experts, which no other rank holds
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        dist.init_process_group("gloo")
    losses = train(rank, world_size)
    if rank == 0:
        print(f"loss of the first step {losses[0]:.6f}, of the last {losses[-1]:.6f}")
    if world_size > 1:
        dist.destroy_process_group()
