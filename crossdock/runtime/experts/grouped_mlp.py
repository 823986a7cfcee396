"""The arithmetic of one rank's experts: the same two-matrix (GELU) or three-matrix (SwiGLU) network for every slot, each on its own rows.

Forward and backward are written out, so that
- weight gradients are written where they belong, in one [S, ...] tensor (autograd of `weight[slot]` makes a zeroed [S, ...] copy a slot);
- hidden values of one slot live in scratch that stays in the cache and is reused by the next slot;
- what is kept for backward beside the input is chosen (`Recompute`); the rest is computed again, from rows that are here already.

Two kernels do the products, `Looped` and `Grouped`. Their forward and backward are plain functions as well, for whoever orders them itself:
a backward pass may cover some of the rows of a forward pass, and weight gradients of several are summed in place.

Letters here: P is the width before the activation, F for GELU and 2F for SwiGLU (gate, then up); N the rows of one slot.
"""

import itertools
from collections.abc import Callable, Sequence
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


@dataclass(frozen=True, eq=False)
class Network:
    """Experts as tensors: those of an `ExpertBank`, or of a bank and whatever experts stand behind it.

    parts: (inner [S, P, D], outer [S, F, D]) of consecutive slots, each of the rows' dtype. kernel: a key of `KERNELS`.
    """

    parts: tuple[tuple[Tensor, Tensor], ...]
    activation: Activation
    kernel: str
    recompute: Recompute


def grouped_mlp(
    rows_MD: Tensor, inner_SPD: Tensor, outer_SFD: Tensor, count_S: Tensor, activation: Activation, kernel: str, recompute: Recompute
) -> Tensor:
    """activation(rows @ inner[s]^T) @ outer[s] for the rows of every slot s: [M, D] -> [M, D].

    rows_MD: sorted by slot; the first count_S[0] rows are slot 0's, and so on. count_S: [S] int64 on the CPU, sum M; zeros are fine.
    inner_SPD: [S, P, D]; outer_SFD: [S, F, D]; both of the rows' dtype. kernel: "loop" or "grouped".
    recompute: what backward computes again instead of keeping it; bitwise the same gradients in all three cases.
    """
    keeps = torch.is_grad_enabled() and (rows_MD.requires_grad or inner_SPD.requires_grad or outer_SFD.requires_grad)
    kernel_ = KERNELS[kernel](activation, recompute if keeps else "all")
    result: Tensor = _GroupedMLP.apply(rows_MD.contiguous(), inner_SPD, outer_SFD, tuple(count_S.tolist()), kernel_)
    return result


@dataclass(frozen=True, eq=False)
class Kept:
    """What a forward pass leaves for its backward pass; the last two are None where they are to be computed again."""

    rows_MD: Tensor
    counts: tuple[int, ...]
    pre_MP: Tensor | None
    activated_MF: Tensor | None

    @property
    def whole(self) -> "tuple[Run, ...]":
        """All rows, slot by slot."""
        return runs_of(self.counts)


@dataclass(frozen=True)
class Run:
    """Consecutive rows of one slot."""

    begin: int
    count: int


def runs_of(counts: Sequence[int]) -> tuple[Run, ...]:
    """One run for each slot of rows that are sorted by slot."""
    ends = itertools.accumulate(counts)
    return tuple(Run(end - count, count) for end, count in zip(ends, counts, strict=True))


class Gradient:
    """The gradient of a weight [S, ...], summed over any number of backward passes in place; mutable, one for each training step."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self._total: Tensor | None = None
        self._written = [False] * len(weight)

    def add(self, slot: int, left_XN: Tensor, right_NY: Tensor) -> None:
        """Add left @ right to one slot."""
        total = self._memory()
        if self._written[slot]:
            total[slot].addmm_(left_XN, right_NY)
        else:
            torch.mm(left_XN, right_NY, out=total[slot])
            self._written[slot] = True

    def add_all(self, products: Tensor, counts: Sequence[int]) -> None:
        """Add `products` [S, ...] to all slots that have rows; what stands there for the others is not looked at, and may be kept."""
        if self._total is None:
            self._total, self._written = products, [bool(count) for count in counts]
            return
        for slot, count in enumerate(counts):
            if count and self._written[slot]:
                self._total[slot].add_(products[slot])
            elif count:
                self._total[slot].copy_(products[slot])
                self._written[slot] = True

    def finished(self) -> Tensor:
        """The sum; zero in slots that no row came to."""
        total = self._memory()
        for slot, written in enumerate(self._written):
            if not written:
                total[slot].zero_()
        return total

    def _memory(self) -> Tensor:
        if self._total is None:
            self._total = torch.empty_like(self._weight, memory_format=torch.contiguous_format)
        return self._total


class _GroupedMLP(torch.autograd.Function):
    """One forward pass and, later, one backward pass over the same rows."""

    @staticmethod
    def forward(ctx: Any, rows_MD: Tensor, inner_SPD: Tensor, outer_SFD: Tensor, counts: tuple[int, ...], kernel: "Kernel") -> Tensor:
        out_MD, kept = kernel.forward(rows_MD, inner_SPD, outer_SFD, counts)
        ctx.counts, ctx.kernel = counts, kernel
        ctx.save_for_backward(rows_MD, inner_SPD, outer_SFD, kept.pre_MP, kept.activated_MF)
        return out_MD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor | None, ...]:
        rows_MD, inner_SPD, outer_SFD, pre_MP, activated_MF = ctx.saved_tensors
        needs_rows, needs_inner, needs_outer, *_ = ctx.needs_input_grad
        grad_inner = Gradient(inner_SPD) if needs_inner else None
        grad_outer = Gradient(outer_SFD) if needs_outer else None
        kept = Kept(rows_MD, ctx.counts, pre_MP, activated_MF)
        grad_rows_MD = ctx.kernel.backward(grad_MD.contiguous(), kept, kept.whole, inner_SPD, outer_SFD, grad_inner, grad_outer, needs_rows)
        weights = [None if gradient is None else gradient.finished() for gradient in (grad_inner, grad_outer)]
        return grad_rows_MD, *weights, None, None


@dataclass(frozen=True)
class Looped:
    """Slot by slot with `torch.mm(out=...)`: knows every dtype and device.

    Products of a slot may run on into the rows of the slots after it, to a number of rows that is quick to compute (`ROW_MULTIPLE`). They
    come out wrong there, and are overwritten when their own slot's turn comes; behind the last slot there is nothing.
    """

    activation: Activation
    recompute: Recompute

    def forward(self, rows_MD: Tensor, inner_SPD: Tensor, outer_SFD: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, Kept]:
        """Outputs [M, D] of rows sorted by slot."""
        _check(rows_MD, counts)
        num_rows, pre_width, hidden_width = len(rows_MD), inner_SPD.shape[1], outer_SFD.shape[1]
        out_MD = torch.empty_like(rows_MD)
        kept_pre_MP = rows_MD.new_empty(num_rows, pre_width) if self.recompute != "all" else None
        kept_activated_MF = rows_MD.new_empty(num_rows, hidden_width) if self.recompute == "none" else None
        for slot, run in enumerate(runs_of(counts)):
            if not run.count:
                continue
            padded = slice(run.begin, min(num_rows, run.begin + _rounded_up(run.count)))
            length = padded.stop - padded.start
            pre_NP = rows_MD.new_empty(length, pre_width) if kept_pre_MP is None else kept_pre_MP[padded]
            _mm(rows_MD[padded], inner_SPD[slot].t(), pre_NP)
            activated_NF = rows_MD.new_empty(length, hidden_width) if kept_activated_MF is None else kept_activated_MF[padded]
            self.activation.forward(pre_NP, activated_NF)
            _mm(activated_NF, outer_SFD[slot], out_MD[padded])
        return out_MD, Kept(rows_MD, counts, kept_pre_MP, kept_activated_MF)

    def backward(
        self,
        grad_MD: Tensor,
        kept: Kept,
        runs: Sequence[Run],
        inner_SPD: Tensor,
        outer_SFD: Tensor,
        grad_inner: Gradient | None,
        grad_outer: Gradient | None,
        needs_rows: bool,
    ) -> Tensor | None:
        """The rows' gradient [M', D]; the weights' are added to `grad_inner` and `grad_outer`.

        runs: for each slot, which of its kept rows `grad_MD` [M', D], sorted by slot, belongs to; not all of them need have come yet.
        """
        grad_rows_MD = torch.empty_like(grad_MD) if needs_rows else None
        begin = 0
        for slot, run in enumerate(runs):
            if not run.count:
                continue
            length = min(_rounded_up(run.count), len(grad_MD) - begin, len(kept.rows_MD) - run.begin)
            exact, padded = slice(begin, begin + run.count), slice(begin, begin + length)
            begin += run.count
            rows_ND = kept.rows_MD[run.begin : run.begin + length]
            if kept.pre_MP is None:
                pre_NP = grad_MD.new_empty(length, inner_SPD.shape[1])
                _mm(rows_ND, inner_SPD[slot].t(), pre_NP)
            else:
                pre_NP = kept.pre_MP[run.begin : run.begin + length]
            if kept.activated_MF is None:
                activated_NF = grad_MD.new_empty(length, outer_SFD.shape[1])
                self.activation.forward(pre_NP, activated_NF)
            else:
                activated_NF = kept.activated_MF[run.begin : run.begin + length]
            if grad_outer is not None:
                grad_outer.add(slot, activated_NF[: run.count].t(), grad_MD[exact])
            if grad_inner is None and grad_rows_MD is None:
                continue
            grad_NF = torch.empty_like(activated_NF)
            _mm(grad_MD[padded], outer_SFD[slot].t(), grad_NF)
            grad_NP = self.activation.backward(grad_NF, pre_NP)
            if grad_inner is not None:
                grad_inner.add(slot, grad_NP[: run.count].t(), rows_ND[: run.count])
            if grad_rows_MD is not None:
                _mm(grad_NP, inner_SPD[slot], grad_rows_MD[padded])
        return grad_rows_MD


@dataclass(frozen=True)
class Grouped:
    """All slots in one `grouped_mm` per product; offsets live on the device, so that no count is waited for."""

    activation: Activation
    recompute: Recompute

    def forward(self, rows_MD: Tensor, inner_SPD: Tensor, outer_SFD: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, Kept]:
        """See `Looped.forward`."""
        _check(rows_MD, counts)
        if not len(rows_MD):  # a kernel need not know matrices without rows
            return torch.empty_like(rows_MD), Kept(rows_MD, counts, None, None)
        offset_S = _offsets(counts, rows_MD.device)
        pre_MP = _grouped_mm(rows_MD, inner_SPD.transpose(1, 2), offs=offset_S)
        activated_MF = rows_MD.new_empty(len(rows_MD), outer_SFD.shape[1])
        self.activation.forward(pre_MP, activated_MF)
        out_MD = _grouped_mm(activated_MF, outer_SFD, offs=offset_S)
        keeps_pre, keeps_activated = self.recompute != "all", self.recompute == "none"
        return out_MD, Kept(rows_MD, counts, pre_MP if keeps_pre else None, activated_MF if keeps_activated else None)

    def backward(
        self,
        grad_MD: Tensor,
        kept: Kept,
        runs: Sequence[Run],
        inner_SPD: Tensor,
        outer_SFD: Tensor,
        grad_inner: Gradient | None,
        grad_outer: Gradient | None,
        needs_rows: bool,
    ) -> Tensor | None:
        """See `Looped.backward`; a part of the kept rows is copied side by side first."""
        counts = tuple(run.count for run in runs)
        if not len(grad_MD):
            return torch.empty_like(grad_MD) if needs_rows else None
        if counts != kept.counts:
            kept = _selected(kept, runs)
        offset_S = _offsets(counts, grad_MD.device)
        grad_rows_MD = None
        grad_MF = _grouped_mm(grad_MD, outer_SFD.transpose(1, 2), offs=offset_S)
        pre_MP = kept.pre_MP if kept.pre_MP is not None else _grouped_mm(kept.rows_MD, inner_SPD.transpose(1, 2), offs=offset_S)
        if grad_outer is not None:
            activated_MF = kept.activated_MF
            if activated_MF is None:
                activated_MF = torch.empty_like(grad_MF)
                self.activation.forward(pre_MP, activated_MF)
            grad_outer.add_all(_grouped_mm(activated_MF.t(), grad_MD, offs=offset_S), counts)
        grad_MP = self.activation.backward(grad_MF, pre_MP)
        if grad_inner is not None:
            grad_inner.add_all(_grouped_mm(grad_MP.t(), kept.rows_MD, offs=offset_S), counts)
        if needs_rows:
            grad_rows_MD = _grouped_mm(grad_MP, inner_SPD, offs=offset_S)
        return grad_rows_MD


Kernel = Looped | Grouped
KERNELS: dict[str, Callable[[Activation, Recompute], Kernel]] = {"loop": Looped, "grouped": Grouped}


def _check(rows_MD: Tensor, counts: tuple[int, ...]) -> None:
    assert sum(counts) == len(rows_MD), f"{len(rows_MD)} rows for counts {counts}, whose sum is {sum(counts)}"


def _rounded_up(count: int) -> int:
    return -(-count // ROW_MULTIPLE) * ROW_MULTIPLE


def _offsets(counts: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(counts).cumsum(0).to(torch.int32).to(device, non_blocking=True)


def _selected(kept: Kept, runs: Sequence[Run]) -> Kept:
    """Copies of the rows of `runs`, one run after the other."""

    def select(rows: Tensor) -> Tensor:
        return torch.cat([rows[run.begin : run.begin + run.count] for run in runs])

    parts = [None if tensor is None else select(tensor) for tensor in (kept.pre_MP, kept.activated_MF)]
    return Kept(select(kept.rows_MD), tuple(run.count for run in runs), *parts)


def _mm(left_NX: Tensor, right_XY: Tensor, out_NY: Tensor) -> None:
    """out = left @ right; rows beyond a multiple of `ROW_MULTIPLE` (the last slot has such) are done apart: the bulk runs at full speed."""
    bulk = len(left_NX) // ROW_MULTIPLE * ROW_MULTIPLE
    if bulk == len(left_NX) or bulk < 32 * ROW_MULTIPLE:
        torch.mm(left_NX, right_XY, out=out_NY)
    else:
        torch.mm(left_NX[:bulk], right_XY, out=out_NY[:bulk])
        torch.mm(left_NX[bulk:], right_XY, out=out_NY[bulk:])
