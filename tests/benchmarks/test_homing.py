"""The homing benchmark: a small instance has a row for every plan, and planning with homes does not lose to planning without."""

from benchmarks import homing
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
