"""Row maps: spread and merge against plain loops, and their gradients against finite differences."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from crossdock.runtime.dispatch.rows import RowMap, count_of, inverse, merge, spread


def map_of(source: list[int], num_narrow: int, order: list[int] | None = None) -> RowMap:
    """A map whose sums run over each narrow row's copies in the order in which `order` lists them."""
    order = list(range(len(source))) if order is None else order
    position = [m for narrow in range(num_narrow) for m in order if source[m] == narrow]
    offset = [sum(s < narrow for s in source) for narrow in range(num_narrow)]
    return RowMap(*(torch.tensor(values, dtype=torch.int64) for values in (source, position, offset)))


@st.composite
def maps(draw: st.DrawFn) -> tuple[RowMap, list[int], int]:
    num_narrow = draw(st.integers(1, 5))
    source = draw(st.lists(st.integers(0, num_narrow - 1), max_size=9))
    order = draw(st.permutations(range(len(source))))
    return map_of(source, num_narrow, list(order)), source, num_narrow


@given(drawn=maps(), weighted=st.booleans())
def test_spread_and_merge_equal_plain_loops(drawn: tuple[RowMap, list[int], int], weighted: bool) -> None:
    row_map, source, num_narrow = drawn
    narrow, wide = torch.randn(num_narrow, 3, dtype=torch.float64), torch.randn(len(source), 3, dtype=torch.float64)
    weight = torch.rand(len(source), dtype=torch.float64) if weighted else None
    assert torch.equal(spread(narrow, row_map, torch.float64), narrow[source].view(-1, 3))
    assert row_map.position_M is not None
    expected = torch.zeros(num_narrow, 3, dtype=torch.float64)
    for entry, m in enumerate(row_map.position_M.tolist()):
        expected[source[m]] += (1.0 if weight is None else weight[entry]) * wide[m]
    torch.testing.assert_close(merge(wide, row_map, torch.float64, weight), expected, rtol=1e-12, atol=1e-12)


@given(drawn=maps())
def test_gradients(drawn: tuple[RowMap, list[int], int]) -> None:
    row_map, source, num_narrow = drawn
    narrow = torch.randn(num_narrow, 2, dtype=torch.float64, requires_grad=True)
    wide = torch.randn(len(source), 2, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(len(source), dtype=torch.float64, requires_grad=True)

    def spreads(x: Tensor) -> Tensor:
        return spread(x, row_map, torch.float64)

    def merges(x: Tensor, w: Tensor | None = None) -> Tensor:
        return merge(x, row_map, torch.float64, w)

    assert torch.autograd.gradcheck(spreads, narrow)
    if source:
        assert torch.autograd.gradcheck(merges, wide)
        assert torch.autograd.gradcheck(merges, (wide, weight))


def test_a_permutation_and_its_inverse() -> None:
    order = torch.tensor([2, 0, 1])
    assert inverse(order).tolist() == [1, 2, 0]
    row_map = RowMap.permutation(order)
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    there = spread(x, row_map, torch.float64)
    assert torch.equal(there, x[order])
    assert torch.equal(merge(there, row_map, torch.float64), x)
    assert torch.autograd.gradcheck(lambda y: merge(spread(y, row_map, torch.float64).tanh(), row_map, torch.float64), x)
    weight = torch.rand(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y, w: merge(y, row_map, torch.float64, w), (x, weight))


def test_identity_copies_nothing() -> None:
    x = torch.randn(3, 2)
    assert spread(x, RowMap.identity(), torch.float32) is x
    assert merge(x, RowMap.identity(), torch.float32) is x


def test_sums_of_sixteen_bit_rows_are_accumulated_in_more() -> None:
    # 1 + 256 * 2^-9 = 1.5; accumulated in bf16, whose next value after 1 is 1 + 2^-7, the sum would stay 1.
    rows = torch.full((257, 4), 2.0**-9).bfloat16()
    rows[0] = 1.0
    row_map = map_of([0] * 257, 1)
    assert merge(rows, row_map, torch.bfloat16).tolist() == [[1.5] * 4]
    grad_of = torch.zeros(1, 4, dtype=torch.bfloat16, requires_grad=True)
    spread(grad_of, row_map, torch.bfloat16).backward(rows)
    assert grad_of.grad is not None
    assert grad_of.grad.tolist() == [[1.5] * 4]


@pytest.mark.parametrize("wide_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("narrow_dtype", [torch.bfloat16, torch.float32])
def test_each_side_keeps_its_dtype_forward_and_backward(wide_dtype: torch.dtype, narrow_dtype: torch.dtype) -> None:
    row_map = map_of([0, 1, 0], 2)
    narrow = torch.randn(2, 4, dtype=narrow_dtype, requires_grad=True)
    wide = spread(narrow, row_map, wide_dtype)
    weight = torch.rand(3, requires_grad=True)
    back = merge(wide, row_map, narrow_dtype, weight)
    back.sum().backward()
    assert (wide.dtype, back.dtype) == (wide_dtype, narrow_dtype)
    assert narrow.grad is not None
    assert narrow.grad.dtype == narrow_dtype
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_count_of() -> None:
    assert count_of(torch.tensor([3, 0, 3]), 5).tolist() == [1, 0, 0, 2, 0]
    assert count_of(torch.zeros(0, dtype=torch.int64), 2).tolist() == [0, 0]
