"""Cores that a process may use: by its mask, by its control group, and where a platform has neither."""

import os
from pathlib import Path

import pytest

from crossdock import cores


@pytest.fixture(autouse=True)
def no_control_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(cores, "CONTROL_GROUP_QUOTA", quota)
    return quota


def test_the_mask_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert cores.available_cores() == 3


@pytest.mark.parametrize(("number", "expected"), [(6, 6), (None, 1)])
def test_a_platform_without_masks(monkeypatch: pytest.MonkeyPatch, number: int | None, expected: int) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: number)
    assert cores.available_cores() == expected


@pytest.mark.parametrize(("text", "expected"), [("200000 100000\n", 2), ("50000 100000\n", 1), ("900000 100000\n", 4), ("max 100000\n", 4)])
def test_the_control_group_may_allow_less(monkeypatch: pytest.MonkeyPatch, no_control_group: Path, text: str, expected: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    no_control_group.write_text(text)
    assert cores.available_cores() == expected
