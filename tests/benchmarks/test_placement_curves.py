"""The curves over devices: more time is never worse, gaps are what bound and plan say, each size in its own process."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks import placement_curves
from benchmarks.measure import publish


def test_rows_hold_together() -> None:
    rows = [row for problem in placement_curves.PROBLEMS for row in placement_curves.rows_of(16, problem, [0.3, 1.5], 0.5, 2, 4000)]
    assert [(row["problem"], row["asked_s"]) for row in rows] == [("hops", 0.3), ("hops", 1.5), ("devices", 0.3), ("devices", 1.5)]
    for row in rows:
        assert set(placement_curves.COLUMNS) <= set(row)
        assert (row["devices"], row["experts"]) == (16, 256)
        assert 0.0 < row["bound"] <= row["objective"] * (1 + 1e-4) <= row["contiguous"] * (1 + 2e-4)
        assert abs(row["gap"] - 100 * (1 - row["bound"] / row["objective"])) < 0.1
        assert row["saved"] > 0.0


def test_the_command_prints_one_document() -> None:
    command = [sys.executable, "-m", "benchmarks.placement_curves", "--short", "--json"]
    document = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=150).stdout)
    assert [row["devices"] for row in document["rows"]] == [8, 8, 32, 32]


def test_the_page_shows_every_row_and_the_command_without_its_files(tmp_path: Path) -> None:
    rows = [
        dict.fromkeys(placement_curves.COLUMNS, 1.5) | {"problem": problem, "memory_mib": 300 + size, "devices": size}
        for problem in placement_curves.PROBLEMS
        for size in (8, 2048)
    ]
    words = ["--devices", "8,2048", "--out", "a.json", "--page=a.md", "--short"]
    command = " ".join(["python -m benchmarks.placement_curves", *placement_curves._without_files(words)])
    assert command == "python -m benchmarks.placement_curves --devices 8,2048 --short"
    document = publish(rows, "planning", None, True, None, {"command": command})
    placement_curves.write_page(tmp_path / "x.md", document)
    page = (tmp_path / "x.md").read_text()
    assert page.count("| 2048 |") == 2
    assert "2,348 MiB" in page
    assert f"    {command} --out x.json --page x.md\n" in page
