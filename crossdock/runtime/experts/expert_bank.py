"""ExpertBank: the weights of the experts that live on one rank, one slot each, and their network applied to the rows that arrive."""

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from crossdock.errors import BadConfig, BadData
from crossdock.runtime.experts.grouped_mlp import ACTIVATIONS, Network, Recompute, grouped_mlp

if TYPE_CHECKING:
    from crossdock.runtime.dispatch.layout import ExpertLayout

Kernel = Literal["auto", "loop", "grouped"]


class ExpertBank(nn.Module):
    """S feed-forward experts, those that this rank holds, or none: y = activation(x @ inner^T) @ outer, no biases.

    GELU (2 matrices): inner [S, F, D]. SwiGLU (3 matrices, Shazeer 2020): inner [S, 2F, D], the gate's rows, then up's:
    y = (silu(x @ gate^T) * (x @ up^T)) @ outer. outer is [S, F, D] in both.

    Parameters are of `dtype` and used as they are: a bf16 bank computes in bf16 without casting weights every step, and the optimizer
    keeps fp32 masters.
    kernel: "auto" takes `grouped` on CUDA in bf16, `loop` elsewhere (on CPUs it measures faster, and float64 knows nothing else).
    recompute: what is computed again in backward instead of being kept: "none", "activation" or "all" (`grouped_mlp.Recompute`).
    """

    inner: nn.Parameter
    outer: nn.Parameter

    def __init__(
        self,
        layout: "ExpertLayout",
        model_width: int,
        expert_width: int,
        activation: str = "swiglu",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        kernel: Kernel = "auto",
        recompute: Recompute = "none",
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise BadConfig(f"unknown expert activation {activation!r}; choose from {', '.join(ACTIVATIONS)}")
        if recompute not in get_args(Recompute):
            raise BadConfig(f"unknown expert recompute {recompute!r}; choose from {', '.join(get_args(Recompute))}")
        if model_width < 1 or expert_width < 1:
            raise BadConfig(f"experts of width {expert_width} on a model of width {model_width}: both must be at least 1")
        self.layout = layout
        self.model_width = model_width
        self.expert_width = expert_width
        self.activation = ACTIVATIONS[activation]
        self.recompute: Recompute = recompute
        self.inner = nn.Parameter(torch.zeros(self.shapes(layout)["inner"], dtype=dtype, device=device))
        self.outer = nn.Parameter(torch.zeros(self.shapes(layout)["outer"], dtype=dtype, device=device))
        self.kernel = choose_kernel(self.inner, self.outer) if kernel == "auto" else kernel
        if self.kernel == "grouped" and dtype == torch.float64:
            raise BadConfig("the grouped kernel has no float64; choose kernel 'loop'")

    def forward(self, rows_MD: Tensor, count_S: Tensor) -> Tensor:
        """Each slot's network on its rows: [M, D] -> [M, D].

        rows_MD: sorted by local slot, of the bank's dtype. count_S: [S] int64 on the CPU, the rows of each slot; their sum is M.
        """
        assert count_S.shape == (len(self.inner),), f"counts of shape {tuple(count_S.shape)} for {len(self.inner)} slots"
        return grouped_mlp(rows_MD, self.inner, self.outer, count_S, self.activation, self.kernel, self.recompute)

    def network(self) -> Network:
        """The same as tensors, for schedules that order forward and backward themselves."""
        return Network(((self.inner, self.outer),), self.activation, self.kernel, self.recompute)

    def reset_parameters(self, seed: int, std: float = 0.02, output_scale: float = 1.0) -> None:
        """Normal initial values with mean 0: `std` for the inner matrices, `std * output_scale` for the outer one.

        Values are keyed by (seed, layer, logical expert) and drawn on the CPU in fp32: the same under any ranks, plan, replicas and device.
        output_scale: 1/sqrt(2 * number of layers) as in GPT-2 (Radford 2019) keeps the residual stream's variance from growing with depth.
        """
        with torch.no_grad():
            for slot, expert in enumerate(self.layout.local_experts):
                for name, tensor in self.expert_tensors().items():
                    scale = std * output_scale if name == "outer" else std
                    tensor[slot].copy_(_normal(tensor.shape[1:], f"{seed}/{self.layout.layer}/{expert}/{name}").mul_(scale))

    def expert_tensors(self) -> dict[str, nn.Parameter]:
        """The tensors whose first dimension is the slot, by name: what migration moves and checkpoints key by logical expert."""
        return {"inner": self.inner, "outer": self.outer}

    def shapes(self, layout: "ExpertLayout") -> dict[str, tuple[int, int, int]]:
        """The shape of every expert tensor under `layout`."""
        return {
            "inner": (len(layout.local_experts), self.activation.num_inputs * self.expert_width, self.model_width),
            "outer": (len(layout.local_experts), self.expert_width, self.model_width),
        }

    def replace_layout(self, layout: "ExpertLayout", tensors: Mapping[str, Tensor]) -> None:
        """Adopt `layout` and the values that belong to it, after a migration; gradients are dropped.

        tensors: one per name of `expert_tensors()`, of the shapes that `shapes(layout)` tells. The Parameter objects stay the same ones,
        and so does their memory where the number of slots does; else they take that of `tensors` where its format is theirs. Raises
        `BadData` for missing or extra names, and for other shapes.
        """
        shape_of = self.shapes(layout)
        if set(tensors) != set(shape_of):
            raise BadData(f"expert tensors {sorted(tensors)} given where {sorted(shape_of)} are needed")
        for name, shape in shape_of.items():
            if tuple(tensors[name].shape) != shape:
                raise BadData(f"expert tensor {name!r} has shape {tuple(tensors[name].shape)}; the new layout needs {shape}")
        with torch.no_grad():
            for name, parameter in self.expert_tensors().items():
                parameter.grad = None
                if parameter.shape == tensors[name].shape:
                    parameter.copy_(tensors[name])
                else:
                    parameter.data = tensors[name].detach().to(parameter.device, parameter.dtype).contiguous()
        self.layout = layout

    def extra_repr(self) -> str:
        return (
            f"layer={self.layout.layer}, experts={list(self.layout.local_experts)}, D={self.model_width}, F={self.expert_width}, "
            f"{self.activation.name}, {str(self.inner.dtype).removeprefix('torch.')}, {self.kernel}"
        )


def choose_kernel(inner_SPD: Tensor, outer_SFD: Tensor) -> Literal["loop", "grouped"]:
    """The faster kernel for weights of this device, dtype and shape; see `docs/benchmarks`.

    CUDA's grouped GEMM wants bf16, compute capability 8.0, and rows of 16 bytes' multiple.
    """
    if inner_SPD.device.type != "cuda" or inner_SPD.dtype != torch.bfloat16:
        return "loop"
    aligned = all(width % 8 == 0 for width in (*inner_SPD.shape[1:], *outer_SFD.shape[1:]))
    capable = torch.cuda.get_device_capability(inner_SPD.device) >= (8, 0)
    return "grouped" if aligned and capable else "loop"


def _normal(shape: torch.Size, key: str) -> Tensor:
    """Standard normal fp32 values on the CPU that depend on `key` alone."""
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.randn(shape, generator=generator, dtype=torch.float32)
