"""The layer benchmark runs in its short form and prints what other programs rely on."""

import json
import subprocess
import sys


def test_short_form_prints_every_variant_and_dtype() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.layer", "--short", "--json"], capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert set(document) >= {"machine", "commit", "rows"}
    found = {(row["variant"], row["dtype"]) for row in document["rows"]}
    variants = ("floor", "floor_even", "communication", "flat", "deduplicated", "naive")
    assert found == {(variant, dtype) for variant in variants for dtype in ("fp32", "bf16")}
    for row in document["rows"]:
        assert 0 < row["cpu_s_low"] <= row["cpu_s"] <= row["cpu_s_high"]
        assert (row["cpu_over_floor"] == 1.0) == (row["variant"] == "floor")
