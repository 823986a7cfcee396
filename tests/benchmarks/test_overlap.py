"""The overlap benchmark: its arithmetic by hand, and a short run that prints what other programs rely on."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import netlab
from benchmarks.block_pair import VARIANTS, Pair, Shape
from benchmarks.overlap import next_width, row
from benchmarks.overlap_bench import Timing
from crossdock.runtime.experts.overlap import Overlapped, Sequential
from crossdock.runtime.transport.mesh import Mesh
from tests.pool import Pool, mesh_for

REASON = netlab.unavailable_reason()


def timings(step_s: list[float], wait_s: float = 0.0, windows_s: tuple[float, ...] | None = None) -> list[Timing]:
    return [Timing(seconds, {"dispatch forward tokens": wait_s}, windows_s) for seconds in step_s]


def test_a_row_worked_by_hand() -> None:
    """Compute 10, communication 4 in four of 1; windows 2, 0.5, 4, 1: 3.5 fit. A step of 10.7 hides 3.3 of 4."""
    steps = timings([10.7, 10.5, 10.9], wait_s=0.6)
    computes = timings([10.0, 10.0, 10.0], windows_s=(2.0, 0.5, 4.0, 1.0))
    found = row("scmoe_overlapped", 5e8, steps, computes, timings([4.0, 4.0, 4.0]))
    assert found["step_s"] == 10.7
    assert found["bound_s"] == 10.0
    assert found["step_over_bound"] == pytest.approx(1.07)
    assert found["hidden"] == pytest.approx(3.3 / 4)
    assert found["fits_s"] == pytest.approx(3.5)
    assert found["hidden_of_fits"] == pytest.approx(3.3 / 3.5)
    assert found["exposed_s"] == 0.6
    assert (found["step_s_low"], found["step_s_high"], found["repeats"]) == (10.5, 10.9, 3)


def test_what_waits_at_once_has_no_window() -> None:
    found = row("top2", 5e8, timings([14.0] * 7), timings([10.0] * 7, windows_s=(9.0,) * 4), timings([4.0] * 7))
    assert (found["hidden"], found["fits_s"], found["hidden_of_fits"]) == (0.0, 0.0, None)


def test_where_the_link_is_slower_it_is_the_bound() -> None:
    assert row("top2", 2e8, timings([16.0] * 7), timings([10.0] * 7), timings([12.0] * 7))["bound_s"] == 12.0


def test_the_next_width_solves_an_affine_step() -> None:
    """A step of 2 + width/100 with communication 4 is 8 long, a share of a half, at width 600."""
    communication_s = 4.0
    tried = {width: communication_s / (2 + width / 100) for width in (1000, 800)}
    assert next_width(tried, communication_s, 10.0, 800, share=0.5) == 608  # to a multiple of 32
    assert next_width({1000: 4 / 12}, communication_s, 12.0, 1000, share=0.5) < 1000


SMALL = Shape(tokens=64, sequence=16, model_width=32, mlp_width=64, num_heads=2, num_kv_heads=1)


def stepped_and_replayed(rank: int, world_size: int, variant: str) -> tuple[list[Tensor], list[Tensor], int, int]:
    """Gradients of a recorded and of a replayed step, and the messages that each sent; the replay starts from other gradients' ruins."""
    pair = Pair(SMALL, variant, mesh_for(rank, world_size, world_size), Overlapped(1) if variant == "scmoe_overlapped" else Sequential(0))
    found, sent = [], []
    for run in (pair.record, pair.replay):
        for parameter in pair.block.parameters():
            parameter.grad = torch.zeros_like(parameter)
        counter = SendCounter(pair)
        run()
        sent.append(counter.total())
        assert pair.x_QPD.grad is not None
        found.append(
            [pair.x_QPD.grad.clone(), *(parameter.grad.clone() for parameter in pair.block.parameters() if parameter.grad is not None)]
        )
    return found[0], found[1], sent[0], sent[1]


class SendCounter:
    """Counts what a pair's groups really send."""

    def __init__(self, pair: Pair) -> None:
        self.count = 0
        for memory in pair._memories:
            memory.group = self._counting(getattr(memory.group, "real", memory.group))

    def _counting(self, group: Any) -> Any:
        def send(*arguments: Any) -> Any:
            self.count += 1
            return group.send(*arguments)

        return SimpleNamespace(real=group, rank=group.rank, size=group.size, recv=group.recv, send=send)

    def total(self) -> int:
        return self.count


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_replayed_step_is_the_same_step_and_sends_nothing(ranks: Pool, variant: str) -> None:
    for live, replayed, sent, sent_in_replay in ranks.run(2, stepped_and_replayed, variant):
        assert sent > 0
        assert sent_in_replay == 0
        assert all(torch.equal(one, other) for one, other in zip(live, replayed, strict=True))
        assert any(gradient.abs().sum() > 0 for gradient in live)


def test_top2_routes_twice_the_rows() -> None:
    def entries(variant: str) -> int:
        pair = Pair(SMALL, variant, Mesh.single())
        pair.step()
        assert pair.assignment is not None
        return pair.assignment.num_entries

    assert [entries(variant) for variant in VARIANTS] == [128, 64, 64, 64]


@pytest.mark.netns
@pytest.mark.skipif(REASON is not None, reason=f"no emulated hosts: {REASON}")
def test_a_short_run_prints_its_rows_as_json(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.overlap", "--short", "--json", "--out", str(tmp_path / "rows.json")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=150)
    assert ended.returncode == 0, ended.stderr
    document = json.loads(ended.stdout)
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == document["rows"]
    assert {"machine", "commit", "rows"} <= set(document)
    assert [line["variant"] for line in document["rows"]] == list(VARIANTS)
    for line in document["rows"]:
        assert line["link_bit_per_s"] == 5e8
        assert line["repeats"] >= 7
        assert all(line[name] > 0 and math.isfinite(line[name]) for name in ("step_s", "compute_s", "communication_s", "bound_s"))
        assert math.isfinite(line["hidden"])
        assert line["bound_s"] == max(line["compute_s"], line["communication_s"])
