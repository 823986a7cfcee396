"""Shared by the runtime's tests."""

from pathlib import Path

import pytest

from tests.runtime.tiny import text


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A folder that all ranks see, with the tiny corpus in it."""
    (tmp_path / "text").write_bytes(text())
    return str(tmp_path)
