"""Files of torch.save: what has no numpy form is refused in one line."""

from pathlib import Path
from typing import Any

import pytest
import torch

from crossdock.errors import BadData
from crossdock.models import torch_files


@pytest.mark.parametrize(
    "value", [torch.ones([1] * 65), [torch.ones(2), {"a": torch.ones([1] * 70)}], torch.ones(1).to(torch.float8_e4m3fn)]
)
def test_tensors_without_a_numpy_form(value: Any, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(BadData, match=r"x.pt: a tensor of torch.* with \d+ dimensions has no numpy form"):
        torch_files.read(tmp_path / "x.pt")


def test_lists_nested_beyond_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    torch.save(1, tmp_path / "x.pt")
    monkeypatch.setattr(torch, "load", lambda *arguments, **options: deep)
    with pytest.raises(BadData, match="nested too deep"):
        torch_files.read(tmp_path / "x.pt")
    while isinstance(deep, list):  # its end would overflow the stack
        deep = deep[0]
