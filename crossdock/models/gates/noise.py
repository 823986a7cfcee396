"""Random numbers keyed by what they are for, so that a token draws the same ones on however many ranks the batch is spread.

A counter-based generator: the bits of (seed, step, layer, purpose and turn, global token, column) are mixed by the finaliser of SplitMix64
(Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014). No state, no order of drawing.
"""

import torch
from torch import Tensor

from crossdock.runtime.training.context import StepContext

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the increment of SplitMix64
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1

SECOND_EXPERT, JITTER, LOGIT_NOISE = 1, 2, 3  # purposes: two draws of one gate never share their bits
NUM_PURPOSES = 16  # room for more of them before the next turn's begin


def uniform_TC(context: StepContext, layer: int, purpose: int, turn: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Uniform numbers in the open interval (0, 1): float64 of `shape` (T, columns), row t for the rank's t-th token."""
    num_tokens, num_columns = shape
    key = 0
    for word in (context.seed, context.step, layer, purpose + turn * NUM_PURPOSES):
        key = _mix_integer(key + GOLDEN + (word & _MASK))
    token_T = context.number_T
    if token_T is None:
        token_T = torch.arange(context.first_token, context.first_token + num_tokens, device=device)
    column_C = torch.arange(1, num_columns + 1, device=device)
    bits_T = _mix(token_T * _signed(GOLDEN) + _signed(key))
    bits_TC = _mix(bits_T[:, None] + column_C * _signed(GOLDEN))
    return (_shift(bits_TC, 12).to(torch.float64) + 0.5) * 2.0**-52  # 52 bits and a half: never 0, never 1, every value exact


def normal_TC(context: StepContext, layer: int, purpose: int, turn: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Standard normal numbers: float64 of `shape` (T, columns), by inversion of `uniform_TC`."""
    return torch.special.ndtri(uniform_TC(context, layer, purpose, turn, shape, device))


def _mix(bits: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 tensors, whose products wrap modulo 2^64 as unsigned ones do."""
    bits = (bits ^ _shift(bits, 30)) * _signed(_FIRST)
    bits = (bits ^ _shift(bits, 27)) * _signed(_SECOND)
    return bits ^ _shift(bits, 31)


def _mix_integer(bits: int) -> int:
    bits &= _MASK
    bits = ((bits ^ (bits >> 30)) * _FIRST) & _MASK
    bits = ((bits ^ (bits >> 27)) * _SECOND) & _MASK
    return bits ^ (bits >> 31)


def _shift(bits: Tensor, count: int) -> Tensor:
    """Logical right shift (torch shifts int64 arithmetically)."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
