"""The benchmark of chunks runs and says what it measured."""

import json
import subprocess
import sys


def test_every_case_is_measured() -> None:
    command = [sys.executable, "-m", "benchmarks.chunks", "--short", "--json", "--degrees", "2:2,1:4"]
    document = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)
    rows = {(row["chunks"], row["recompute"]): row for row in document["rows"]}
    assert list(rows) == [("1:1", "none"), ("1:1", "activation"), ("1:1", "all"), ("2:2", "none"), ("1:4", "none")]
    assert rows["1:1", "none"]["cpu_over_whole"] == 1.0
    assert all(row["cpu_s"] > 0 for row in rows.values())
    assert rows["1:4", "none"]["rows_per_call"] == 32.0
