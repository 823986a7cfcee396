"""The one decision of a step that all ranks share: the sums of their numbers, and a stop for all where one of them is not finite."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crossdock.errors import NonFiniteLoss
from crossdock.runtime.transport import collectives
from crossdock.runtime.transport.mesh import Mesh


@dataclass(frozen=True)
class StepReport:
    """What all ranks agree on: the global norm before clipping, and the sum over ranks of each scalar given to an engine's `step`."""

    grad_norm: float
    sums: Mapping[str, float]


def agree(step: int, scalars: Mapping[str, Tensor | float], dense_sq: Tensor, own_sq: Tensor, mesh: Mesh) -> tuple[dict[str, float], float]:
    """(sums of `scalars` over ranks, squared norm of the gradients): the one exchange of numbers, and the one wait of the host, in a step.

    scalars: the same keys on every rank, `loss` among them. dense_sq: squared norm of gradients that are the same on every rank.
    own_sq: that of gradients of which every rank has others; it is summed over the ranks.
    Raises `NonFiniteLoss` on every rank where any number of any rank is not finite.
    """
    values = [torch.as_tensor(value, dtype=torch.float64, device=mesh.device).detach().reshape(()) for value in scalars.values()]
    *mine, dense, own = torch.stack([*values, dense_sq, own_sq]).tolist()
    numbers_R = collectives.all_gather_numbers((*mine, own, dense), mesh)
    # ill ranks are named by number: the sum of their losses would say nothing
    ill_ranks = np.flatnonzero(~np.isfinite(numbers_R).all(axis=1)).tolist()
    if ill_ranks:
        loss = dict(zip(scalars, mine, strict=True)).get("loss", math.nan)
        raise NonFiniteLoss(
            f"step {step}: loss or gradient is not finite on rank {', '.join(map(str, ill_ranks[:8]))} of {mesh.world_size} "
            f"(loss of rank {mesh.rank}: {loss:.6g}); nothing was updated. "
            "Lower train.optimizer.lr, lengthen its warm-up, or look at the data"
        )
    *sums, own_sum, _ = numbers_R.sum(axis=0).tolist()
    return dict(zip(scalars, sums, strict=True)), dense + own_sum


def clip_factor(grad_norm: float, clip_norm: float) -> float:
    """What gradients of that norm are multiplied by, so that it is at most `clip_norm`."""
    return min(1.0, clip_norm / (grad_norm + 1e-12))
