"""The sweep over communication shares: its rows by hand, its proposals; and the timeline: what a watched step records, and the drawing."""

import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from benchmarks import netlab
from benchmarks.block_pair import Memory, Pair, Shape
from benchmarks.overlap import main
from benchmarks.overlap_bench import Timing
from benchmarks.overlap_page import write_page
from benchmarks.overlap_sweep import proposals, row
from benchmarks.timeline import COLOURS, LEFT, RIGHT, WIDTH, Moment, Recorded, Transfer, draw, record, transfers_of
from crossdock.placement.strategies.pipeline import BlockTimes
from crossdock.runtime.experts.overlap import Chunked, Overlapped, Schedule, Sequential
from crossdock.runtime.transport.ledger import Flight
from tests.pool import Pool, mesh_for

REASON = netlab.unavailable_reason()
SMALL = Shape(tokens=64, sequence=16, model_width=32, mlp_width=64, num_heads=2, num_kv_heads=1)


def timings(forward_s: float, backward_s: float, exposed_s: float = 0.0) -> list[Timing]:
    return [Timing(forward_s + backward_s, {"dispatch forward tokens": exposed_s}, None, forward_s, backward_s)] * 7


def samples(step: tuple[float, float]) -> dict[str, list[Timing]]:
    """Compute 3 + 6, communication 4 (2 in each direction); sequential it takes 13."""
    return {
        "scmoe/sequential": timings(5.0, 8.0, exposed_s=4.0),
        "scmoe/chosen": timings(*step),
        "scmoe/compute": timings(3.0, 6.0),
        "scmoe/communication": timings(4.0, 0.0),
    }


def test_a_row_worked_by_hand() -> None:
    """A window of 1 + 1 and experts of 0.5: forward 2 of 2 fit at slot 1 (dispatch 1, combine 1), backward as well."""
    ideal = BlockTimes((1.0, 1.0), 1.0, 0.5, 1.0, backward_over_forward=2.0)
    found = row(samples((3.5, 6.0)), "scmoe", "chosen", ideal)
    assert (found["step_s"], found["compute_s"], found["communication_s"], found["bound_s"]) == (9.5, 9.0, 4.0, 9.0)
    assert found["step_over_bound"] == pytest.approx(9.5 / 9)
    assert (found["hidden_forward"], found["hidden_backward"]) == (0.75, 1.0)
    assert (found["fits_forward"], found["fits_backward"]) == (1.0, 1.0)
    assert found["hidden_of_fits"] == pytest.approx(3.5 / 4)
    assert found["over_sequential"] == pytest.approx(9.5 / 13)


def test_directions_are_bound_apart() -> None:
    """Communication 5 a direction beside compute of 3 forward and 6 backward: 5 + 6, where the joint bound says 10."""
    of = samples((6.0, 6.0)) | {"scmoe/communication": timings(10.0, 0.0)}
    found = row(of, "scmoe", "chosen", BlockTimes((), 2.5, 3.0, 2.5))
    assert (found["bound_s"], found["direction_bound_s"]) == (10.0, 11.0)
    assert found["step_over_direction_bound"] == pytest.approx(12 / 11)


def test_what_waits_at_once_has_nothing_that_fits() -> None:
    found = row(samples((5.0, 8.0)), "scmoe", "sequential", None)
    assert (found["hidden_forward"], found["hidden_of_fits"], found["exposed_s"]) == (0.0, None, 4.0)


def test_proposals_hold_chunks_one_piece_and_waiting_at_once() -> None:
    found = proposals(BlockTimes((1.0, 1.0, 1.0), 2.0, 1.0, 2.0, message_s=0.01, chunk_s=0.01))
    assert any(isinstance(schedule, Overlapped) for schedule in found)
    assert {schedule.forward_chunks for schedule in found if isinstance(schedule, Chunked)} >= {2, 4, 8}
    assert isinstance(found[-1], Sequential)
    assert len(found) == len(set(found))


def recorded_by(rank: int, world_size: int, schedule: Schedule) -> Recorded:
    pair = Pair(SMALL, "scmoe_overlapped", mesh_for(rank, world_size, world_size), schedule)
    pair.step()
    recorded = record(pair)
    assert isinstance(pair.mesh.token_group, Memory)
    assert not hasattr(pair.mesh.token_group.group, "arrivals_s"), "the watching ends with the step"
    return recorded


@pytest.mark.parametrize(("schedule", "chunks"), [(Overlapped(1), 1), (Chunked(1, 2, 2), 2)])
def test_a_watched_step_shows_every_stage_and_every_transfer(ranks: Pool, schedule: Schedule, chunks: int) -> None:
    for recorded in ranks.run(2, recorded_by, schedule):
        assert recorded.begin_s < recorded.turn_s < recorded.end_s
        for direction, begin_s, end_s in (
            ("forward", recorded.begin_s, recorded.turn_s),
            ("backward", recorded.turn_s, recorded.end_s),
        ):
            seen = {moment.what for moment in recorded.moments if moment.detail.endswith(f" {direction}")}
            assert seen >= {"attention", "mlp", "shared", "experts"}, f"{direction}: {seen}"
            transfers = [transfer for transfer in recorded.transfers if f" {direction} " in transfer.detail]
            assert sorted(transfer.what for transfer in transfers) == ["combine"] * chunks + ["dispatch"] * chunks
            for transfer in transfers:
                assert begin_s < transfer.launched_s <= transfer.arrived_s < end_s
        at_s = [moment.at_s for moment in recorded.moments]
        assert at_s == sorted(at_s)
        assert {moment.what for moment in recorded.moments} <= set(COLOURS)
        assert Recorded.of_plain(json.loads(json.dumps(recorded.plain()))) == recorded


def test_messages_belong_to_the_flight_that_asked_for_them() -> None:
    """Two dispatches asked for at 1 and at 2; the messages of the first are there at 3 and 5, those of the second at 4; counts are none."""
    first, second = (
        Flight(0, "dispatch", "forward", "tokens", (0, 0, 0), at_s, 6.0, 7.0, movement) for movement, at_s in ((1, 1.0), (2, 2.0))
    )
    counts = Flight(0, "dispatch", "forward", "counts", (0, 0, 0), 1.5, 6.0, 7.0, 1)
    found = transfers_of([second, counts, first], [(0.5, 0.6), (1.1, 3.0), (1.2, 5.0), (2.1, 4.0)])
    assert [(transfer.launched_s, transfer.arrived_s) for transfer in found] == [(1.0, 5.0), (2.0, 4.0)]


def test_the_drawing_puts_everything_in_its_place() -> None:
    """Ten seconds: attention for two, rows for two, waiting for one; a transfer from 1 to 3, and one behind it in the queue to 6."""
    moments = (Moment(0.0, "attention", "a"), Moment(2.0, "rows", ""), Moment(4.0, "wait", "w"), Moment(5.0, "experts", "e"))
    transfers = (Transfer("dispatch", "first", 1.0, 3.0), Transfer("combine", "second", 2.0, 6.0))
    svg = draw([Recorded(0.0, 5.0, 10.0, moments, transfers)], "a title & more")
    boxes = {}
    for rect in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}rect"):
        tip = rect.findtext("{http://www.w3.org/2000/svg}title")
        if tip is not None and float(rect.get("fill-opacity", "1")) == 1.0:
            boxes[tip.partition(":")[0]] = (float(rect.get("x", "")), float(rect.get("width", "")))
    second = (WIDTH - LEFT - RIGHT) / 10
    expected = {"a": (0, 2), "rows, norms, sums": (2, 2), "w": (4, 1), "e": (5, 5), "first": (1, 2), "second": (3, 3)}
    assert boxes == {tip: pytest.approx((LEFT + begin * second, long * second), abs=0.02) for tip, (begin, long) in expected.items()}
    assert "a title &amp; more" in svg


def page_of(rows: list[dict[str, Any]], folder: Path) -> str:
    host = {"processor": "p", "cores": 4, "system": "s", "python": "3", "torch": "2"}
    write_page(folder / "page.md", {"machine": host, "commit": "c", "what": "w", "rows": rows}, folder / "step.svg")
    return (folder / "page.md").read_text()


def test_the_page_states_the_range(tmp_path: Path) -> None:
    ideal = BlockTimes((1.0, 1.0), 1.0, 0.5, 1.0, backward_over_forward=2.0)
    rows = [
        {"share": share, "variant": "scmoe_overlapped", "schedule": "s", "link_bit_per_s": 1e9, "over_shared": 0.7}
        | row(samples((forward_s, 6.0)), "scmoe", "chosen", ideal)
        for share, forward_s in ((0.1, 3.0), (0.2, 3.5))
    ]
    text = page_of(rows, tmp_path)
    assert "max(compute, communication): 1.000 to 1.056" in text
    assert "Hidden of what fits: 87.5% to 100.0%" in text
    assert "(step.svg)" in text


def test_parts_make_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    host = {"processor": "p", "cores": 4, "system": "s", "python": "3", "torch": "2"}
    common = {"variant": "scmoe_overlapped", "schedule": "s", "link_bit_per_s": 1e9, "over_shared": 0.7}
    for part, share in enumerate((0.5, 0.1)):
        line = {"share_asked": share, "share": share} | common | row(samples((3.5, 6.0)), "scmoe", "chosen", None)
        (tmp_path / f"{part}.json").write_text(json.dumps({"machine": host, "commit": "c", "what": "w", "rows": [line]}))
    parts = [str(tmp_path / "0.json"), str(tmp_path / "1.json")]
    assert main(["--sweep", "--merge", *parts, "--out", str(tmp_path / "all.md")]) == 0
    assert [line["share"] for line in json.loads((tmp_path / "all.json").read_text())["rows"]] == [0.1, 0.5]
    assert main(["--sweep", "--merge", str(tmp_path / "2.json"), "--out", str(tmp_path / "all.md")]) == 66
    assert main(["--sweep", "--merge", *parts]) == 2
    (tmp_path / "1.json").write_text(json.dumps({"what": "other", "commit": "c", "rows": []}))
    assert main(["--sweep", "--merge", *parts, "--out", str(tmp_path / "all.md")]) == 65
    assert "different blocks" in capsys.readouterr().err


@pytest.mark.netns
@pytest.mark.skipif(REASON is not None, reason=f"no emulated hosts: {REASON}")
def test_a_short_sweep(tmp_path: Path) -> None:
    options = ["--sweep", "--short", "--json", "--timeline", str(tmp_path / "step.svg"), "--out", str(tmp_path / "page.md")]
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.overlap", *options], capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=150
    )
    assert ended.returncode == 0, ended.stderr
    document = json.loads(ended.stdout)
    variants = ["shared_expert_sequential", "top2_sequential", "top2_overlapped", "scmoe_sequential", "scmoe_overlapped"]
    assert [line["variant"] for line in document["rows"]] == variants
    for line in document["rows"]:
        assert 0 < line["share"] < 1
        assert line["step_s"] > 0
        assert line["bound_s"] == max(line["compute_s"], line["communication_s"])
        assert math.isfinite(line["hidden_forward"])
    assert (tmp_path / "step.svg").read_text().count("computes") == 2
    assert "(step.svg)" in (tmp_path / "page.md").read_text()
    assert json.loads((tmp_path / "page.json").read_text())["rows"] == document["rows"]
