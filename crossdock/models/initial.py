"""Initial values that depend on the seed and a parameter's name alone: not on ranks, plan, device, or the order of construction."""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

Fill = Callable[[str, Tensor, float], None]
"""fill(name, tensor, std): normal values with mean 0, in place; std 0 means zeros."""


def named_fill(seed: int, prefix: str = "") -> Fill:
    """A `Fill` that keys its draws by (seed, prefix + name); drawn on the CPU in float32, so that every device holds the same values."""

    def fill(name: str, tensor: Tensor, std: float) -> None:
        digest = hashlib.sha256(f"{seed}/{prefix}{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        with torch.no_grad():
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float32) * std)

    return fill
