"""Dense parameters in parts by FSDP2 (`torch.distributed.fsdp.fully_shard`): every rank keeps 1/world of each, gradients and state too.

A unit (a block of the model) is gathered from all ranks before its forward and its backward pass and let go of after each; the rest of the
model is one more unit. Gradients are summed as they are scattered, in fp32 (float64 for float64). Bf16 models keep their fp32 masters as
the parts, and gather in bf16. Experts stay where the plan puts them, and gates, which are small and wide, on every rank.

Zhao et al. 2023 (arXiv 2304.11277) describes the first version; parts are rows of each parameter here, so that a part is told by its rows.
"""

import warnings
from collections.abc import Collection, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from crossdock.runtime.optimization.optimizer import master_dtype
from crossdock.runtime.transport.mesh import Mesh


def shard_dense(model: nn.Module, units: Iterable[nn.Module], whole: Collection[nn.Parameter], mesh: Mesh) -> None:
    """Cut every parameter of `model` that is not in `whole` into parts over the world; once, before an engine is made.

    units: modules that are called as such, one after the other, each of which is gathered for itself.
    """
    # imported here: it takes long, and most runs have no use for it
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    assert mesh.world_size > 1, "a lone rank has nobody to share with"
    kept = set(whole)
    cut = [parameter for parameter in model.parameters() if parameter not in kept]
    dtypes = {parameter.dtype for parameter in cut}
    assert len(dtypes) == 1, f"dense parameters of several formats: {dtypes}"
    (dtype,) = dtypes
    with torch.no_grad():
        for parameter in cut:
            parameter.data = parameter.data.to(master_dtype(dtype))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=master_dtype(dtype), cast_forward_inputs=False)
    ranks = init_device_mesh(mesh.device.type, (mesh.world_size,))
    for module in (*units, model):
        fully_shard(module, mesh=ranks, mp_policy=policy, ignored_params=kept, reshard_after_forward=True)
    # blocks return views, which nothing adds to in place: what the warning fears does not happen
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # sums: the engine divides, all gradients alike
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def is_part(parameter: Tensor) -> bool:
    """Whether `parameter` is one of those that were cut."""
    return hasattr(parameter, "to_local")  # a DTensor


def local_part(value: Tensor) -> Tensor:
    """This rank's rows of a cut parameter or its gradient, in the same memory; not differentiable."""
    return cast(Tensor, cast(Any, value.detach()).to_local())


def rows_before(num_rows: int, rank: int, world_size: int) -> int:
    """Rows of the ranks before `rank`: all take equally many, rounded up, as long as there are any."""
    return min(num_rows, rank * -(-num_rows // world_size))


def set_gradient_sync(model: nn.Module, sync: bool) -> None:
    """Whether the next backward pass scatters gradients, or adds them up on this rank."""
    if hasattr(model, "set_requires_gradient_sync"):  # only cut models have it
        cast(Any, model).set_requires_gradient_sync(sync)
