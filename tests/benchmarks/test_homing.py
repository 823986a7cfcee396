"""The homing benchmark: a small instance has a row for every plan, and planning with homes does not lose to planning without."""

from pathlib import Path

from benchmarks import homing
from benchmarks.measure import commit, machine
from tests.placement.solvers.test_homed import themed_trace


def test_rows_of_a_small_instance() -> None:
    trace = themed_trace(1, num_sequences=64)
    instance = homing.Instance("themes", trace.select(slice(0, 320)), trace.select(slice(320, 640)), None, 8)
    rows = {row["plan"]: row for row in homing.rows_of(instance, 2, 1.0, 2)}
    assert tuple(rows) == homing.PLANS
    assert all(set(homing.COLUMNS) == set(row) for row in rows.values())
    assert rows["auto+homing"]["copies"] <= rows["auto"]["copies"] <= rows["auto"]["copies_read"]
    assert rows["auto+homing"]["saved"] >= rows["auto"]["saved"] > 0
    assert rows["auto"]["recall"] > 0.3
    assert 0 < rows["auto"]["held_of_known"] <= 100


def test_the_page_has_a_table_for_every_instance(tmp_path: Path) -> None:
    rows = [
        {"instance": name, "devices": devices, "plan": plan, "held_saved": 10.0 + devices, "copies": None}
        for name in ("one", "other")
        for devices in (2, 4)
        for plan in homing.PLANS
    ]
    facts = {"machine": machine(), "commit": commit(), "what": "what it saves", "command": "python -m benchmarks.homing"}
    document = {**facts, "homes_s": 0.0067, "lookup_s": 0.152, "rows": rows}
    homing.write_page(tmp_path / "2026-01-01-homing.md", document)
    text = (tmp_path / "2026-01-01-homing.md").read_text()
    assert "python -m benchmarks.homing --out 2026-01-01-homing.json --page 2026-01-01-homing.md" in text
    assert text.count("| devices | plan |") == text.count("by (devices): 12 % at 2, 14 % at 4.") == 2
    assert "took 6.7 ms" in text
    assert "at 8 homes 0.15 s" in text
    assert text.index("## one") < text.index("## other")


def test_times_are_of_work_that_is_done() -> None:
    measured = homing.times(repeats=1)
    assert set(measured) == {"homes_s", "lookup_s"}
    assert min(measured.values()) > 0
