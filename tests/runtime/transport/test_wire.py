"""Wire formats: sizes, errors, exactness of what is passed on, and what happens to numbers that are none."""

import math

import pytest
import torch

from crossdock.errors import BadConfig
from crossdock.placement.costs.cost import WIRE_NAMES, row_bytes
from crossdock.runtime.transport.wire import BLOCK, WIRES, wire_named, wire_of

INT8 = WIRES["int8"]


@pytest.mark.parametrize("name", WIRE_NAMES)
@pytest.mark.parametrize("width", [1, 127, 128, 129, 512, 1000])
def test_rows_have_the_size_that_is_announced_and_that_the_planner_predicts(name: str, width: int) -> None:
    wire = WIRES[name]
    packed = wire.encode(torch.randn(3, width, dtype=wire.row_dtype))
    assert packed.element_size() * packed[0].numel() == wire.row_bytes(width) == row_bytes(wire.name, width)  # type: ignore[arg-type]
    decoded = wire.decode(packed, width)
    assert (decoded.shape, decoded.dtype) == ((3, width), wire.row_dtype)


def test_by_hand() -> None:
    # The largest is 127 halves: a scale of 0.5, exact in bf16.
    row = torch.tensor([[63.5, -0.5, 0.6, 0.2, 0.0, -63.5]])
    packed = INT8.encode(row)
    assert packed[:, 2:].view(torch.int8).tolist() == [[127, -1, 1, 0, 0, -127]]
    assert INT8.decode(packed, 6).tolist() == [[63.5, -0.5, 0.5, 0.0, 0.0, -63.5]]


@pytest.mark.parametrize("width", [512, 300])
def test_int8_is_as_close_as_its_docstring_says(width: int) -> None:
    rows = torch.randn(500, width, generator=torch.Generator().manual_seed(0)) * torch.logspace(-15, 15, 500).unsqueeze(1)
    error = INT8.decode(INT8.encode(rows), width) - rows
    for begin in range(0, width, BLOCK):
        largest = rows[:, begin : begin + BLOCK].abs().amax(1)
        assert bool((error[:, begin : begin + BLOCK].abs().amax(1) <= largest / 253).all())
    relative = (error.square().mean(1) / rows.square().mean(1)).sqrt().mean()
    assert 0.005 < relative < 0.007
    rounded = (rows.bfloat16().float() - rows).square().mean(1) / rows.square().mean(1)
    assert rounded.sqrt().mean() < 0.0019


def test_what_is_decoded_and_encoded_again_keeps_its_bits() -> None:
    for seed, width in enumerate((128, 200, 640)):
        rows = torch.randn(2000, width, generator=torch.Generator().manual_seed(seed)).exp()
        packed = INT8.encode(rows)
        assert torch.equal(INT8.encode(INT8.decode(packed, width)), packed)
        assert int(packed[:, 2 * -(-width // BLOCK) :].view(torch.int8).abs().amax()) == 127


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_does_not_arrive_as_a_number(bad: float) -> None:
    rows = torch.randn(2, 2 * BLOCK)
    rows[0, 3] = bad
    decoded = INT8.decode(INT8.encode(rows), 2 * BLOCK)
    assert not decoded[0, :BLOCK].isfinite().any()
    assert decoded[0, BLOCK:].isfinite().all()
    assert decoded[1].isfinite().all()


def test_zeros_tiny_numbers_and_no_rows() -> None:
    assert INT8.decode(INT8.encode(torch.zeros(2, 5)), 5).tolist() == [[0.0] * 5] * 2
    assert INT8.decode(INT8.encode(torch.full((1, 5), 1e-42)), 5).abs().max() < 1e-40
    assert INT8.decode(INT8.encode(torch.zeros(0, 5)), 5).shape == (0, 5)


def test_names() -> None:
    assert set(WIRES) == set(WIRE_NAMES)
    assert wire_named(None) is None
    assert wire_named("int8") is INT8
    with pytest.raises(BadConfig, match="no wire format is called 'fp8'; choose from fp64, fp32, bf16, int8"):
        wire_named("fp8")
    assert wire_of(None, torch.bfloat16) is WIRES["bf16"]
    assert wire_of(INT8, torch.float64) is INT8
