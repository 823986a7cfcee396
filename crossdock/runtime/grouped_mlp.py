"""The arithmetic of one rank's experts: the same two-matrix (GELU) or three-matrix (SwiGLU) network for every slot, each on its own rows.

One autograd Function does forward and backward explicitly, so that
- weight gradients are written where they belong, in one [S, ...] tensor (autograd of `weight[slot]` makes a zeroed [S, ...] copy a slot);
- hidden values of one slot live in scratch that stays in the cache and is reused by the next slot;
- what is kept for backward beside the input is chosen (`Recompute`); the rest is computed again, from rows that are here already.

Two kernels do the products: `loop` calls `torch.mm(out=...)` slot by slot and knows every dtype and device; `grouped` is one
`grouped_mm` for all slots, with offsets on the device, so that no count is waited for.

Letters here: P is the width before the activation, F for GELU and 2F for SwiGLU (gate, then up); N the rows of one slot.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ROW_MULTIPLE = 8
"""Matrix kernels on the CPU lose up to a third of their speed where the number of rows has no small factor: rows are rounded up to this."""

Recompute = Literal["none", "activation", "all"]
"""What backward computes again: nothing; the activated values (keeps P instead of P + F values a row); those and the ones before the
activation (keeps none, and does the first product twice). The input rows are always kept, so that nothing travels again."""

_gelu = torch.ops.aten.gelu.out
_gelu_backward = torch.ops.aten.gelu_backward.grad_input
_silu = torch.ops.aten.silu.out
_silu_backward = torch.ops.aten.silu_backward.grad_input
_grouped_mm: Callable[..., Tensor] = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm


@dataclass(frozen=True)
class Activation:
    """What stands between the two products of an expert.

    forward(pre_NP, out_NF) writes the activated values; backward(grad_NF, pre_NP) returns the gradient before the activation, [N, P],
    and may use grad_NF as scratch.
    """

    name: str
    num_inputs: int  # P = num_inputs * F
    forward: Callable[[Tensor, Tensor], None]
    backward: Callable[[Tensor, Tensor], Tensor]


def _gelu_forward(pre_NF: Tensor, out_NF: Tensor) -> None:
    _gelu(pre_NF, out=out_NF)


def _gelu_gradient(grad_NF: Tensor, pre_NF: Tensor) -> Tensor:
    gradient: Tensor = _gelu_backward(grad_NF, pre_NF, grad_input=grad_NF)
    return gradient


def _swiglu_forward(pre_NP: Tensor, out_NF: Tensor) -> None:
    gate_NF, up_NF = pre_NP.chunk(2, dim=1)
    _silu(gate_NF, out=out_NF)
    out_NF.mul_(up_NF)


def _swiglu_gradient(grad_NF: Tensor, pre_NP: Tensor) -> Tensor:
    gate_NF, up_NF = pre_NP.chunk(2, dim=1)
    grad_NP = torch.empty_like(pre_NP)
    grad_gate_NF, grad_up_NF = grad_NP.chunk(2, dim=1)
    _silu(gate_NF, out=grad_up_NF)
    grad_up_NF.mul_(grad_NF)
    _silu_backward(grad_NF.mul_(up_NF), gate_NF, grad_input=grad_gate_NF)
    return grad_NP


ACTIVATIONS = {
    "gelu": Activation("gelu", 1, _gelu_forward, _gelu_gradient),
    "swiglu": Activation("swiglu", 2, _swiglu_forward, _swiglu_gradient),
}


def grouped_mlp(
    rows_MD: Tensor, inner_SPD: Tensor, outer_SFD: Tensor, count_S: Tensor, activation: Activation, kernel: str, recompute: Recompute
) -> Tensor:
    """activation(rows @ inner[s]^T) @ outer[s] for the rows of every slot s: [M, D] -> [M, D].

    rows_MD: sorted by slot; the first count_S[0] rows are slot 0's, and so on. count_S: [S] int64 on the CPU, sum M; zeros are fine.
    inner_SPD: [S, P, D]; outer_SFD: [S, F, D]; both of the rows' dtype. kernel: "loop" or "grouped".
    recompute: what backward computes again instead of keeping it; bitwise the same gradients in all three cases.
    """
    counts = tuple(count_S.tolist())
    assert sum(counts) == len(rows_MD), f"{len(rows_MD)} rows for counts {counts}, whose sum is {sum(counts)}"
    keep = torch.is_grad_enabled() and (rows_MD.requires_grad or inner_SPD.requires_grad or outer_SFD.requires_grad)
    spec = _Spec(counts, activation, keep and recompute != "all", keep and recompute == "none")
    function: Any = _Grouped if kernel == "grouped" else _Looped
    result: Tensor = function.apply(rows_MD.contiguous(), inner_SPD, outer_SFD, spec)
    return result


@dataclass(frozen=True)
class _Spec:
    """What a call needs beside tensors."""

    counts: tuple[int, ...]
    activation: Activation
    keeps_pre: bool
    keeps_activated: bool


@dataclass(frozen=True)
class _Span:
    """The rows of one slot: [begin, end), and [begin, padded_end) where its products may run on into rows of the slots after it."""

    slot: int
    begin: int
    end: int
    padded_end: int


def _spans(counts: Sequence[int]) -> Iterator[_Span]:
    """Spans of the slots that have rows, ascending.

    The padded rows are real rows of later slots: their products come out wrong, and are overwritten when their own slot's turn comes.
    The last slot has nothing after it; it stays as it is.
    """
    total, begin = sum(counts), 0
    for slot, count in enumerate(counts):
        if count:
            yield _Span(slot, begin, begin + count, min(total, begin + -(-count // ROW_MULTIPLE) * ROW_MULTIPLE))
        begin += count


class _Looped(torch.autograd.Function):
    """Slot by slot with `torch.mm(out=...)`."""

    @staticmethod
    def forward(ctx: Any, rows_MD: Tensor, inner_SPD: Tensor, outer_SFD: Tensor, spec: _Spec) -> Tensor:
        out_MD = torch.empty_like(rows_MD)
        kept: list[Tensor] = []
        for span in _spans(spec.counts):
            rows_ND = rows_MD[span.begin : span.padded_end]
            pre_NP = rows_MD.new_empty(len(rows_ND), inner_SPD.shape[1])
            _mm(rows_ND, inner_SPD[span.slot].t(), pre_NP)
            activated_NF = rows_MD.new_empty(len(rows_ND), outer_SFD.shape[1])
            spec.activation.forward(pre_NP, activated_NF)
            _mm(activated_NF, outer_SFD[span.slot], out_MD[span.begin : span.padded_end])
            kept += [pre_NP] if spec.keeps_pre else []
            kept += [activated_NF] if spec.keeps_activated else []
        ctx.spec = spec
        ctx.save_for_backward(rows_MD, inner_SPD, outer_SFD, *kept)
        return out_MD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        spec: _Spec = ctx.spec
        rows_MD, inner_SPD, outer_SFD, *kept = ctx.saved_tensors
        needs_rows, needs_inner, needs_outer, _ = ctx.needs_input_grad
        grad_MD = grad_MD.contiguous()
        grad_rows_MD = torch.empty_like(rows_MD) if needs_rows else None
        grad_inner_SPD = _weight_gradient(inner_SPD, spec.counts) if needs_inner else None
        grad_outer_SFD = _weight_gradient(outer_SFD, spec.counts) if needs_outer else None
        saved = iter(kept)
        for span in _spans(spec.counts):
            exact, padded = slice(span.begin, span.end), slice(span.begin, span.padded_end)
            count = span.end - span.begin
            if spec.keeps_pre:
                pre_NP = next(saved)
            else:
                pre_NP = grad_MD.new_empty(span.padded_end - span.begin, inner_SPD.shape[1])
                _mm(rows_MD[padded], inner_SPD[span.slot].t(), pre_NP)
            if spec.keeps_activated:
                activated_NF = next(saved)
            else:
                activated_NF = grad_MD.new_empty(len(pre_NP), outer_SFD.shape[1])
                spec.activation.forward(pre_NP, activated_NF)
            if grad_outer_SFD is not None:
                torch.mm(activated_NF[:count].t(), grad_MD[exact], out=grad_outer_SFD[span.slot])
            if not (needs_rows or needs_inner):
                continue
            grad_NF = torch.empty_like(activated_NF)
            _mm(grad_MD[padded], outer_SFD[span.slot].t(), grad_NF)
            grad_NP = spec.activation.backward(grad_NF, pre_NP)
            if grad_inner_SPD is not None:
                torch.mm(grad_NP[:count].t(), rows_MD[exact], out=grad_inner_SPD[span.slot])
            if grad_rows_MD is not None:
                _mm(grad_NP, inner_SPD[span.slot], grad_rows_MD[padded])
        return grad_rows_MD, grad_inner_SPD, grad_outer_SFD, None


class _Grouped(torch.autograd.Function):
    """All slots in one `grouped_mm` per product."""

    @staticmethod
    def forward(ctx: Any, rows_MD: Tensor, inner_SPD: Tensor, outer_SFD: Tensor, spec: _Spec) -> Tensor:
        offset_S = torch.tensor(spec.counts).cumsum(0).to(torch.int32).to(rows_MD.device, non_blocking=True)
        pre_MP = _grouped_mm(rows_MD, inner_SPD.transpose(1, 2), offs=offset_S)
        activated_MF = rows_MD.new_empty(len(rows_MD), outer_SFD.shape[1])
        spec.activation.forward(pre_MP, activated_MF)
        kept = ([pre_MP] if spec.keeps_pre else []) + ([activated_MF] if spec.keeps_activated else [])
        ctx.spec = spec
        ctx.save_for_backward(rows_MD, inner_SPD, outer_SFD, offset_S, *kept)
        return _grouped_mm(activated_MF, outer_SFD, offs=offset_S)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        spec: _Spec = ctx.spec
        rows_MD, inner_SPD, outer_SFD, offset_S, *kept = ctx.saved_tensors
        saved = iter(kept)
        pre_MP = next(saved) if spec.keeps_pre else _grouped_mm(rows_MD, inner_SPD.transpose(1, 2), offs=offset_S)
        needs_rows, needs_inner, needs_outer, _ = ctx.needs_input_grad
        grad_MD = grad_MD.contiguous()
        grad_rows_MD = grad_inner_SPD = grad_outer_SFD = None
        grad_MF = _grouped_mm(grad_MD, outer_SFD.transpose(1, 2), offs=offset_S)
        if needs_outer:
            if spec.keeps_activated:
                activated_MF = next(saved)
            else:
                activated_MF = torch.empty_like(grad_MF)
                spec.activation.forward(pre_MP, activated_MF)
            grad_outer_SFD = _without_rows_zeroed(_grouped_mm(activated_MF.t(), grad_MD, offs=offset_S), spec.counts)
        grad_MP = spec.activation.backward(grad_MF, pre_MP)
        if needs_inner:
            grad_inner_SPD = _without_rows_zeroed(_grouped_mm(grad_MP.t(), rows_MD, offs=offset_S), spec.counts)
        if needs_rows:
            grad_rows_MD = _grouped_mm(grad_MP, inner_SPD, offs=offset_S)
        return grad_rows_MD, grad_inner_SPD, grad_outer_SFD, None


def _mm(left_NX: Tensor, right_XY: Tensor, out_NY: Tensor) -> None:
    """out = left @ right; rows beyond a multiple of `ROW_MULTIPLE` (the last slot has such) are done apart: the bulk runs at full speed."""
    bulk = len(left_NX) // ROW_MULTIPLE * ROW_MULTIPLE
    if bulk == len(left_NX) or bulk < 32 * ROW_MULTIPLE:
        torch.mm(left_NX, right_XY, out=out_NY)
    else:
        torch.mm(left_NX[:bulk], right_XY, out=out_NY[:bulk])
        torch.mm(left_NX[bulk:], right_XY, out=out_NY[bulk:])


def _weight_gradient(weight: Tensor, counts: Sequence[int]) -> Tensor:
    """A tensor for the weights' gradient, zero where a slot has no rows; the other slots are written whole."""
    return _without_rows_zeroed(torch.empty_like(weight, memory_format=torch.contiguous_format), counts)


def _without_rows_zeroed(gradient: Tensor, counts: Sequence[int]) -> Tensor:
    """`gradient` [S, ...], in place, with zeros for the slots without rows (a product over no rows is left undefined by some kernels)."""
    for slot, count in enumerate(counts):
        if not count:
            gradient[slot].zero_()
    return gradient
