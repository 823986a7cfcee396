"""The loss benchmark: equal tokens and equal wall time worked by hand, its picture, and a short run in local ranks."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks import netlab
from benchmarks.curves import Curve, figure
from benchmarks.losses import VARIANTS, Run, picture, rows_of

REASON = netlab.unavailable_reason()

# Two steps a second against one: 8 steps take 4 s and 8 s; held-out loss falls by one with every step.
FAST = Run((0.0,) * 8, (0.5,) * 8, (0.1,) * 8, ((4, 6.0), (8, 2.0)), tokens_per_step=100)
SLOW = Run((0.0,) * 8, (1.0,) * 8, (0.6,) * 8, ((4, 6.0), (8, 2.0)), tokens_per_step=100)


def test_equal_tokens_and_equal_wall_time_by_hand() -> None:
    fast, slow = rows_of({"fast": [FAST, FAST], "slow": [SLOW]}, timed=True)
    assert (fast["eval_loss"], slow["eval_loss"], slow["tokens"]) == (2.0, 2.0, 800)
    assert (fast["wall_s"], slow["wall_s"]) == (4.0, 4.0)
    assert (fast["eval_loss_equal_wall"], slow["eval_loss_equal_wall"]) == (2.0, 6.0)
    assert (fast["tokens_equal_wall"], slow["tokens_equal_wall"]) == (800, 400)
    assert "wall_s" not in rows_of({"fast": [FAST]}, timed=False)[0]


def test_between_evaluations_the_loss_lies_on_a_line() -> None:
    assert SLOW.eval_loss_at(6.0) == pytest.approx(4.0)
    assert SLOW.tokens_at(2.5) == pytest.approx(250)


@pytest.mark.parametrize(("timed", "panels"), [(True, 2), (False, 1)])
def test_the_picture_draws_every_curve(timed: bool, panels: int) -> None:
    root = ElementTree.fromstring(picture({"fast": [FAST], "slow": [SLOW]}, timed, 5e8))
    lines = root.findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 2 * panels
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for line in lines:
        points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
        assert len(points) == 2
        assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
        assert points[0][0] < points[1][0]
        assert points[0][1] < points[1][1], "a falling loss goes down, where y grows"


def test_a_curve_holds_mean_and_band() -> None:
    curve = Curve.of([1, 2], [[1.0, 5.0], [3.0, 7.0]])
    assert (curve.middle, curve.low, curve.high) == ((2.0, 6.0), (1.0, 5.0), (3.0, 7.0))
    assert "nat &amp; more" in figure({"x": {"a": curve}}, "nat & more")


@pytest.mark.slow
@pytest.mark.netns
@pytest.mark.skipif(REASON is not None, reason=f"no emulated hosts: {REASON}")
def test_a_short_run_trains_all_variants(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.losses", "--short", "--json", "--svg", str(tmp_path / "losses.svg")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=150)
    assert ended.returncode == 0, ended.stderr
    document = json.loads(ended.stdout)
    assert [line["variant"] for line in document["rows"]] == list(VARIANTS)
    for line in document["rows"]:
        curve = document["curves"][line["variant"]][0]
        assert len(curve["loss"]) == 12
        assert curve["loss"][-1] < curve["loss"][0]
        assert line["step_s"] > 0
        assert line["tokens_equal_wall"] <= line["tokens"] * 1.0001
    assert (tmp_path / "losses.svg").read_text().startswith("<svg")
