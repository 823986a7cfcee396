"""Files that `torch.save` wrote, read without running anything: tensors, numbers, text, lists and dictionaries alone."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crossdock import atomic
from crossdock.errors import BadData, MissingInput

MAX_BYTES = 16 * 2**30
"""The most that is read as a .pt file."""


def read(path: Path) -> Any:
    """What the file holds, tensors as numpy arrays. Raises `MissingInput` where it cannot be read, `BadData` for anything else."""
    try:
        num_bytes = path.stat().st_size
        if num_bytes > MAX_BYTES:
            raise BadData(f"{path}: {num_bytes} bytes, and at most {MAX_BYTES} are read as a .pt file; record less")
        with path.open("rb") as file, warnings.catch_warnings(action="ignore"):
            value = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as failure:
        raise MissingInput(f"{path}: cannot read it: {failure.strerror or failure}; check the path") from failure
    except (BadData, MemoryError):
        raise
    except Exception as failure:  # of damaged bytes torch raises anything, from EOFError to UnpicklingError
        why = " ".join(str(failure).split())[:160]
        raise BadData(f"{path}: damaged, or more than tensors, numbers, text, lists and dictionaries ({why}); record it again") from failure
    try:
        return _plain(value, path, num_bytes)
    except RecursionError as failure:
        raise BadData(f"{path}: lists and dictionaries nested too deep to be read; save plain ones") from failure


def write(path: Path, value: Any) -> None:
    """Save `value`, atomically."""
    with atomic.replacing(path) as aside:
        torch.save(value, aside)


def _plain(value: Any, path: Path, num_bytes: int) -> Any:
    if isinstance(value, Tensor):
        # a tensor's strides may show few stored bytes as terabytes
        if value.layout != torch.strided or value.numel() * value.element_size() > num_bytes:
            raise BadData(f"{path}: a tensor of shape {tuple(value.shape)} is not stored in full; save it with .contiguous()")
        try:
            return value.detach().float().numpy() if value.dtype == torch.bfloat16 else value.detach().numpy()
        except (TypeError, RuntimeError, ValueError) as failure:  # float8, quantized, conjugated; of more dimensions than numpy's 64
            raise BadData(
                f"{path}: a tensor of {value.dtype} with {value.ndim} dimensions has no numpy form; save it as float32, with at most 64"
            ) from failure
    if isinstance(value, dict):
        return {key: _plain(item, path, num_bytes) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, path, num_bytes) for item in value]
    return value
