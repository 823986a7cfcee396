"""Wire: the format of token rows between ranks, apart from the format in which anything is computed; gradients travel in it as well.

    fp64, fp32, bf16    elements of that dtype
    int8                blocks of 128 elements that share one scale: 8 bits for each element, 16 for each block

int8, for one block of a row: scale = bf16(max |x| / 127), code = round(x / scale). The code of the largest element is always 127 or -127,
so that a row which is decoded and encoded again keeps its bits. The error of an element is at most half a scale, 1/253 of the largest in
its block; for normally distributed elements it is 0.65 % of their deviation (root mean square; bf16 makes 0.17 %). A block with an infinity
or a NaN arrives without any finite element. What arrives is decoded to fp32, and sums are made in fp32.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from crossdock.errors import BadConfig

BLOCK = 128
"""Elements that share a scale."""
_LARGEST_CODE = 127
_LEAST_SCALE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Wire:
    """One format. `dtype` is that of an element on the wire; `is_scaled` says whether blocks have scales."""

    name: str
    dtype: torch.dtype
    is_scaled: bool = False

    @property
    def row_dtype(self) -> torch.dtype:
        """Of rows before they are encoded and after they are decoded."""
        return torch.float32 if self.is_scaled else self.dtype

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of `width` elements."""
        scales_bytes = _num_blocks(width) * torch.bfloat16.itemsize if self.is_scaled else 0
        return width * self.dtype.itemsize + scales_bytes

    def encode(self, rows_CD: Tensor) -> Tensor:
        """Rows [C, D] of `row_dtype` as they travel: of `dtype`, or where blocks have scales uint8 [C, `row_bytes(D)`], scales first."""
        if not self.is_scaled:
            return rows_CD.to(self.dtype)
        num_rows, width = rows_CD.shape
        if num_rows == 0:
            return rows_CD.new_empty((0, self.row_bytes(width)), dtype=torch.uint8)
        num_blocks = _num_blocks(width)
        blocks = F.pad(rows_CD.float(), (0, num_blocks * BLOCK - width)).view(num_rows, num_blocks, BLOCK)
        scale = (blocks.abs().amax(-1) / _LARGEST_CODE).bfloat16()
        codes = (blocks * scale.float().clamp(min=_LEAST_SCALE).reciprocal().unsqueeze(-1)).round_()
        codes = codes.clamp_(-_LARGEST_CODE, _LARGEST_CODE).to(torch.int8).view(num_rows, num_blocks * BLOCK)
        return torch.cat((scale.view(torch.uint8), codes[:, :width].view(torch.uint8)), 1)

    def decode(self, packed: Tensor, width: int) -> Tensor:
        """What `encode` packed, as rows of `row_dtype`."""
        if not self.is_scaled:
            return packed
        if packed.shape[0] == 0:
            return packed.new_empty((0, width), dtype=self.row_dtype)
        num_blocks = _num_blocks(width)
        scales_bytes = num_blocks * torch.bfloat16.itemsize
        scale = packed[:, :scales_bytes].reshape(-1).view(torch.bfloat16).view(-1, num_blocks).float()
        codes = packed[:, scales_bytes:].view(torch.int8).float()
        if width % BLOCK:
            return codes.mul_(scale.repeat_interleave(BLOCK, 1)[:, :width])
        return codes.view(-1, num_blocks, BLOCK).mul_(scale.unsqueeze(-1)).view(-1, width)


WIRES: dict[str, Wire] = {
    "fp64": Wire("fp64", torch.float64),
    "fp32": Wire("fp32", torch.float32),
    "bf16": Wire("bf16", torch.bfloat16),
    "int8": Wire("int8", torch.int8, is_scaled=True),
}
"""Formats by the name they have in a configuration."""


def wire_named(name: str | None) -> Wire | None:
    """The format of that name; None, which stands for that of the tokens, stays None. Raises `BadConfig` for an unknown name."""
    if name is not None and name not in WIRES:
        raise BadConfig(f"no wire format is called {name!r}; choose from {', '.join(WIRES)}")
    return None if name is None else WIRES[name]


def wire_of(wire: Wire | None, dtype: torch.dtype) -> Wire:
    """The format for tokens of `dtype`: `wire`, or where that is None the tokens' own. Raises `BadConfig` where they have none (fp16)."""
    if wire is not None:
        return wire
    for own in WIRES.values():
        if own.dtype == dtype:
            return own
    name = str(dtype).removeprefix("torch.")
    raise BadConfig(f"tokens of {name} have no wire format of their own; choose from {', '.join(WIRES)}, or compute in bf16")


def _num_blocks(width: int) -> int:
    return -(-width // BLOCK)
