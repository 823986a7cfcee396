"""Normalisation, rotary positions, causal grouped-query attention and the SwiGLU MLP."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossdock.models.config import ModelConfig
from crossdock.models.gates.base import wide
from crossdock.runtime.profiler import mark_backward, span


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32 or wider (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        precise = wide(x.dtype)
        return F.rms_norm(x.to(precise), self.weight.shape, self.weight.to(precise), self.eps).to(x.dtype)


@lru_cache(maxsize=8)
def rotation(num_positions: int, head_width: int, base: float, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin) [positions, head width / 2] of RoPE's angles position x base^(-2i / head width) (Su et al., arXiv 2104.09864).

    Kept, because every layer of every step asks for the same ones; made outside inference mode, so that training may use them too.
    """
    with torch.inference_mode(False):
        exponent = torch.arange(0, head_width, 2, device=device, dtype=torch.float64) / head_width
        angle = torch.arange(num_positions, device=device, dtype=torch.float64)[:, None] * base**-exponent
        return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + half]) of [..., positions, heads, head width] by its position's angle."""
    left, right = x.to(cos.dtype).chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Pre-norm causal self-attention with fewer key and value heads than query heads (Ainslie et al., arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads, self.kv_heads, self.head_width = config.num_heads, config.kv_heads, config.head_width
        self.rope_base = config.rope_base
        self.norm = RMSNorm(config.model_width, config.norm_eps, dtype)
        rows = (self.num_heads + 2 * self.kv_heads) * self.head_width
        self.qkv = nn.Linear(config.model_width, rows, bias=False, dtype=dtype)
        if config.qk_norm:
            self.query_norm = RMSNorm(self.head_width, config.norm_eps, dtype)
            self.key_norm = RMSNorm(self.head_width, config.norm_eps, dtype)
        self.qk_norm = config.qk_norm
        self.out = nn.Linear(self.num_heads * self.head_width, config.model_width, bias=False, dtype=dtype)

    def forward(self, x_QPD: Tensor) -> Tensor:
        """x + attention(norm(x)) for Q sequences of P positions."""
        with span("attention"):
            normed_QPD = self.norm(x_QPD)
            mixed_QPD = self._mixed(normed_QPD)
        mark_backward("attention", mixed_QPD, normed_QPD)
        return x_QPD + mixed_QPD

    def query_key_value(self, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [..., heads, head width] of normalised inputs [..., D], not yet turned."""
        kinds = (self.num_heads, self.kv_heads, self.kv_heads)
        query, key, value = self.qkv(normed).view(*normed.shape[:-1], sum(kinds), self.head_width).split(kinds, dim=-2)
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        return query, key, value

    def _mixed(self, normed_QPD: Tensor) -> Tensor:
        num_sequences, num_positions, _ = normed_QPD.shape
        query, key, value = self.query_key_value(normed_QPD)
        cos, sin = rotation(num_positions, self.head_width, self.rope_base, normed_QPD.device, wide(normed_QPD.dtype))
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True, enable_gqa=self.kv_heads < self.num_heads
        )
        output_QPD: Tensor = self.out(mixed.transpose(1, 2).reshape(num_sequences, num_positions, -1))
        return output_QPD


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x); gate and up are one matrix, so that one GEMM makes both (Shazeer, arXiv 2002.05202)."""

    def __init__(self, model_width: int, hidden_width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up = nn.Linear(model_width, 2 * hidden_width, bias=False, dtype=dtype)
        self.down = nn.Linear(hidden_width, model_width, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class MLP(nn.Module):
    """Pre-norm SwiGLU layer: x + swiglu(norm(x))."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = RMSNorm(config.model_width, config.norm_eps, dtype)
        self.ffn = SwiGLU(config.model_width, config.dense_width, dtype)

    def forward(self, x_QPD: Tensor) -> Tensor:
        return x_QPD + self.ffn(self.norm(x_QPD))
