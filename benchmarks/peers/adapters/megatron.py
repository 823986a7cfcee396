"""Megatron-Core's MoELayer with sequential experts, on CPUs."""

import contextlib
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.case import Case, LayerWeights

VARIANTS = {
    "megatron alltoall": "patched: CUDA streams, events and devices; a name of Transformer Engine; split sizes as numbers. SequentialMLP",
}


class _Stream:
    """A CUDA stream where there is none: everything has happened already."""

    def wait_stream(self, _other: Any) -> None: ...

    def record_event(self) -> Any:
        return SimpleNamespace(synchronize=lambda: None)


_STREAM = _Stream()


def _on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def join() -> None:
    """Megatron's groups over gloo; what it asks of CUDA is answered for the CPU."""
    cuda: Any = torch.cuda
    cuda.Stream = lambda *_, **__: _STREAM
    cuda.current_stream = lambda *_: _STREAM
    cuda.stream = lambda _stream: contextlib.nullcontext()
    cuda.current_device = lambda: "cpu"
    dist.init_process_group("gloo")

    from megatron.core import parallel_state
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    moe_utils.te_general_gemm = None  # read without Transformer Engine as well, and then not defined
    token_dispatcher.maybe_move_tensor_to_cpu = _on_cpu  # leaves tensors of the CPU as tensors, also where it is asked for numbers
    parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())


def build(variant: str, case: Case, weights: LayerWeights, rank: int) -> nn.Module:
    """The layer of this rank."""
    sizes = case.sizes
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    dtype = weights.down_EDF.dtype
    config = TransformerConfig(
        num_layers=1, hidden_size=sizes.model_width, num_attention_heads=1,
        ffn_hidden_size=sizes.expert_width, moe_ffn_hidden_size=sizes.expert_width,
        num_moe_experts=sizes.num_experts, moe_router_topk=sizes.top_k, moe_token_dispatcher_type=variant.split()[1],
        moe_router_load_balancing_type="none", moe_aux_loss_coeff=0.0, expert_model_parallel_size=sizes.ranks,
        gated_linear_unit=True, activation_func=F.silu, add_bias_linear=False, bias_activation_fusion=False,
        params_dtype=dtype, bf16=dtype == torch.bfloat16, moe_router_dtype="fp32",
        use_cpu_initialization=True, gradient_accumulation_fusion=False,
    )  # fmt: skip
    moe = build_module(get_moe_module_spec(use_te=False, num_experts=sizes.num_experts), config=config).to(dtype)
    mine = weights.of_rank(rank, sizes)
    with torch.no_grad():
        moe.router.weight.copy_(weights.router_ED)
        for slot, expert in enumerate(moe.experts.local_experts):
            expert.linear_fc1.weight.copy_(torch.cat([mine.gate_EFD[slot], mine.up_EFD[slot]]))
            expert.linear_fc2.weight.copy_(mine.down_EDF[slot])
    return SequenceFirst(moe)


def down_gradient(layer: nn.Module) -> Tensor | None:
    """Gradient of this rank's `down`, [S, D, F]."""
    return torch.stack([expert.linear_fc2.weight.grad for expert in cast(Any, layer).moe.experts.local_experts])


class SequenceFirst(nn.Module):
    """x [T, D] -> y [T, D] through a layer that wants [T, 1, D]."""

    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x_TD: Tensor) -> Tensor:
        y: Tensor = self.moe(x_TD.unsqueeze(1))[0]
        return y.squeeze(1)
