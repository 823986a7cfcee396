"""The overlap benchmark: its arithmetic by hand, and a short run that prints what other programs rely on."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import netlab
from benchmarks.overlap import VARIANTS, Compute, Pair, Shape, next_width, row
from crossdock.runtime.mesh import Mesh
from crossdock.runtime.overlap import Overlapped, Sequential

REASON = netlab.unavailable_reason()


def test_a_row_worked_by_hand() -> None:
    """Compute 10, communication 4 in four of 1; windows 2, 0.5, 4, 1: 3.5 fit. A step of 10.7 hides 3.3 of 4."""
    found = row("scmoe_overlapped", 5e8, [10.7, 10.5, 10.9], [10.0, 10.0, 10.0], [4.0, 4.0, 4.0], [0.6, 0.5, 0.7], (2.0, 0.5, 4.0, 1.0))
    assert found["step_s"] == 10.7
    assert found["bound_s"] == 10.0
    assert found["step_over_bound"] == pytest.approx(1.07)
    assert found["hidden"] == pytest.approx(3.3 / 4)
    assert found["fits_s"] == pytest.approx(3.5)
    assert found["hidden_of_fits"] == pytest.approx(3.3 / 3.5)
    assert found["exposed_s"] == 0.6
    assert (found["step_s_low"], found["step_s_high"], found["repeats"]) == (10.5, 10.9, 3)


def test_without_a_window_nothing_fits() -> None:
    found = row("top2", 5e8, [14.0] * 7, [10.0] * 7, [4.0] * 7, [4.0] * 7, (0.0, 0.0, 0.0, 0.0))
    assert (found["hidden"], found["fits_s"], found["hidden_of_fits"]) == (0.0, 0.0, None)


def test_where_the_link_is_slower_it_is_the_bound() -> None:
    assert row("top2", 2e8, [16.0] * 7, [10.0] * 7, [12.0] * 7, [1.0] * 7, (0.0,) * 4)["bound_s"] == 12.0


def test_windows_lie_before_and_after_the_slot_and_grow_backward() -> None:
    compute = Compute((1.0, 2.0, 4.0), 0.5, 2.0)
    assert compute.windows_s(1) == (1.0, 6.0, 2.0, 12.0)
    assert compute.windows_s(3) == (7.0, 0.0, 14.0, 0.0)


def test_the_next_width_solves_an_affine_step() -> None:
    """A step of 2 + width/100 with communication 4 is 8 long, a share of a half, at width 600."""
    communication_s = 4.0
    tried = {width: communication_s / (2 + width / 100) for width in (1000, 800)}
    assert next_width(tried, communication_s, 10.0, 800, share=0.5) == 608  # to a multiple of 32
    assert next_width({1000: 4 / 12}, communication_s, 12.0, 1000, share=0.5) < 1000


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_pair_alone_computes_as_many_rows(variant: str) -> None:
    shape = Shape(tokens=32, sequence=16, model_width=32, mlp_width=64, num_heads=2, num_kv_heads=1, dtype="float32")
    pair = Pair(shape, variant, Mesh.single(), Overlapped(1) if variant == "scmoe_overlapped" else Sequential(0))
    pair.step()
    assert pair.assignment is not None
    assert pair.assignment.num_entries == 32 * (2 if variant == "top2" else 1)
    assert pair.block.moe.bank.layout.num_slots == 2
    assert pair.x_QPD.grad is not None


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
