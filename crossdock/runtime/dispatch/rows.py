"""Row maps: how rows fan out to their copies and how copies are summed back, as two differentiable operations without any scatter.

A map joins a narrow side of C rows with a wide side of M rows; every wide row comes from exactly one narrow row:

    narrow (tokens)  0   1   2          spread: wide[m] = narrow[source_M[m]]
                     |\\  |  /|          merge:  narrow[c] = sum of weight * wide[position] over the entries of c, in their order
    wide (copies)    0 2 1  3 4

Each operation is the other's gradient, so forward and backward alike are index gathers: deterministic on every device, one pass over memory
(`torch.embedding_bag` fuses gather, weighting and sum, and accumulates 16-bit rows in fp32).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, eq=False)
class RowMap:
    """Which wide rows belong to which narrow row. With all three tensors None, both sides are the same rows in the same order."""

    source_M: Tensor | None
    """int64 [M]: narrow row of each wide row."""
    position_M: Tensor | None
    """int64 [M]: the wide rows in summation order, grouped by narrow row."""
    offset_C: Tensor | None
    """int64 [C]: where the entries of each narrow row begin in `position_M`; None where every narrow row has exactly one."""

    @property
    def is_identity(self) -> bool:
        """Whether both sides are the same rows in the same order, so that nothing need be copied."""
        return self.source_M is None

    @classmethod
    def identity(cls) -> "RowMap":
        """The map that changes nothing."""
        return cls(None, None, None)

    @classmethod
    def permutation(cls, source_M: Tensor) -> "RowMap":
        """Every narrow row has one wide row: wide[m] = narrow[source_M[m]]."""
        return cls(source_M, inverse(source_M), None)

    @classmethod
    def from_source(cls, source_M: Tensor, num_narrow: int) -> "RowMap":
        """wide[m] = narrow[source_M[m]]; wide rows are summed in ascending order."""
        position_M = torch.argsort(source_M, stable=True)
        offset_C = torch.searchsorted(source_M[position_M], torch.arange(num_narrow, device=source_M.device))
        return cls(source_M, position_M, offset_C)


def inverse(order_A: Tensor) -> Tensor:
    """The permutation that undoes `order_A`, int64 [A]."""
    return torch.empty_like(order_A).scatter_(0, order_A, torch.arange(order_A.numel(), device=order_A.device))


def count_of(values_A: Tensor, num_values: int) -> Tensor:
    """How often each of 0..num_values-1 occurs, int64 [num_values]; unlike `bincount` it never synchronises a CUDA device."""
    counts = torch.zeros(num_values, dtype=torch.int64, device=values_A.device)
    return counts.scatter_add_(0, values_A, torch.ones_like(values_A))


def spread(rows_CD: Tensor, row_map: RowMap, dtype: torch.dtype) -> Tensor:
    """Copy narrow rows to the wide side, in `dtype`: [C, D] -> [M, D]. The gradient is summed in the wider of both dtypes."""
    if row_map.is_identity:
        return rows_CD.to(dtype)
    return _Spread.apply(rows_CD, row_map, dtype)


def merge(rows_MD: Tensor, row_map: RowMap, dtype: torch.dtype, weight_M: Tensor | None = None) -> Tensor:
    """Sum wide rows into their narrow row, in `dtype`: [M, D] -> [C, D].

    `weight_M` (float, in the order of `position_M`) multiplies each wide row; its gradient is the dot product of row and output gradient.
    The order of summation is that of `position_M`. A narrow row without entries is zero.
    """
    if row_map.is_identity and weight_M is None:
        return rows_MD.to(dtype)
    assert not row_map.is_identity, "weights need an explicit map"
    return _Merge.apply(rows_MD, weight_M, row_map, dtype)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_CD: Tensor, row_map: RowMap, dtype: torch.dtype) -> Tensor:
        ctx.row_map, ctx.dtype = row_map, rows_CD.dtype
        # Rounding first moves fewer bytes, and a copy of a rounded row is the rounded copy of the row.
        return gather(rows_CD.detach().to(dtype), row_map)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None]:
        work = torch.promote_types(grad_MD.dtype, ctx.dtype)
        return sum_rows(grad_MD.to(work), ctx.row_map, None).to(ctx.dtype), None, None


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_MD: Tensor, weight_M: Tensor | None, row_map: RowMap, dtype: torch.dtype) -> Tensor:
        work = torch.promote_types(rows_MD.dtype, dtype)
        ctx.row_map, ctx.dtype, ctx.work = row_map, rows_MD.dtype, work
        rows_MD = rows_MD.detach().to(work)
        ctx.save_for_backward(rows_MD if ctx.needs_input_grad[1] else None, weight_M)
        return sum_rows(rows_MD, row_map, None if weight_M is None else weight_M.detach().to(work)).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_CD: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows_MD, weight_M = ctx.saved_tensors
        row_map: RowMap = ctx.row_map
        grad_rows = grad_weight = None
        if weight_M is None:
            return gather(grad_CD.to(ctx.dtype), row_map), None, None, None
        grad_CD = grad_CD.to(ctx.work)
        if ctx.needs_input_grad[0]:
            grad_rows = _scaled_gather(grad_CD, row_map, weight_M.to(ctx.work)).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = _dots(grad_CD, rows_MD, row_map).to(weight_M.dtype)
        return grad_rows, grad_weight, None, None


def gather(rows_CD: Tensor, row_map: RowMap) -> Tensor:
    """Each wide row's narrow row, [C, D] -> [M, D]."""
    assert row_map.source_M is not None
    return rows_CD.index_select(0, row_map.source_M)


def sum_rows(rows_MD: Tensor, row_map: RowMap, weight_M: Tensor | None) -> Tensor:
    """Rows summed by narrow row, [M, D] -> [C, D]."""
    position_M, offset_C = row_map.position_M, row_map.offset_C
    assert position_M is not None
    if offset_C is None:
        if weight_M is None:
            return rows_MD.index_select(0, position_M)
        offset_C = torch.arange(position_M.numel(), device=position_M.device)
    return torch.embedding_bag(rows_MD.contiguous(), position_M, offset_C, mode=0, per_sample_weights=weight_M)[0]


def _scaled_gather(grad_CD: Tensor, row_map: RowMap, weight_M: Tensor) -> Tensor:
    """weight * grad of each wide row's narrow row, [C, D] -> [M, D]: bags of one row each, so that gathering and scaling are one pass."""
    source_M, position_M = row_map.source_M, row_map.position_M
    assert source_M is not None
    assert position_M is not None
    weight_wide_M = torch.empty_like(weight_M).scatter_(0, position_M, weight_M)
    one_M = torch.arange(source_M.numel(), device=source_M.device)
    return torch.embedding_bag(grad_CD.contiguous(), source_M, one_M, mode=0, per_sample_weights=weight_wide_M)[0]


def _dots(grad_CD: Tensor, rows_MD: Tensor, row_map: RowMap) -> Tensor:
    """Dot product of every wide row with the gradient of its narrow row, in the order of `position_M`, [M]."""
    source_M, position_M, offset_C = row_map.source_M, row_map.position_M, row_map.offset_C
    assert source_M is not None
    assert position_M is not None
    if offset_C is None:
        offset_C = torch.arange(position_M.numel(), device=position_M.device)
    # The kernel behind embedding_bag's own gradient: one pass, nothing of shape [M, D] is made.
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad_CD.contiguous(), rows_MD.contiguous(), position_M, offset_C, source_M[position_M], 0
    )
