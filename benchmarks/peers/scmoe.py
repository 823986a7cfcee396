"""ScMoE beside top-2 and a shared expert of equal FLOPs: the rows of `benchmarks.overlap`, whose program is run for them.

Changed mathematics, so rows of their own: two routed experts a token, or one routed and one shared, waited for; or the same one and one
with the routed one's tokens on their way under attention, MLP and shared expert. Every row is ours, blocks with all their stages.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.peers.crew import ROOT
from crossdock.errors import PeerLost

COLUMNS = ["row", "link_bit_per_s", "step_s", "step_s_low", "step_s_high", "share", "bound_s", "scmoe_speedup", "aim"]
AIMS = {"top2": 1.49, "shared_expert": 1.3}
"""How many times ScMoE's time each should take, at the middle rate."""


def run_overlap(rates: Sequence[float], short: bool, timeout_s: float = 1200.0) -> list[dict[str, Any]]:
    """Run the program on two emulated nodes and return its rows; raises `PeerLost` with its last line."""
    wanted = ["--short"] if short else ["--rates", ",".join(f"{rate:.0f}" for rate in rates)]
    command = [sys.executable, "-m", "benchmarks.overlap", "--json", *wanted]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=timeout_s)
    if ended.returncode:
        lines = [line for line in ended.stderr.splitlines() if line.strip()]
        raise PeerLost(lines[-1] if lines else f"benchmarks.overlap ended with code {ended.returncode}")
    rows: list[dict[str, Any]] = json.loads(ended.stdout)["rows"]
    return rows


def scmoe_rows(measured: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each rate and variant.

    scmoe_speedup: the variant's step over the overlapped ScMoE's at the same rate, both medians. share: communication alone over the step.
    The aim stands where the middle one of the rates is.
    """
    rates = sorted({row["link_bit_per_s"] for row in measured})
    middle = rates[len(rates) // 2]
    best_s = {row["link_bit_per_s"]: row["step_s"] for row in measured if row["variant"] == "scmoe_overlapped"}
    return [
        {
            "hosts": "2x2",
            "case": "block pair",
            "row": row["variant"],
            **{key: row[key] for key in ("link_bit_per_s", "step_s", "step_s_low", "step_s_high", "bound_s")},
            "share": row["communication_s"] / row["step_s"],
            "scmoe_speedup": row["step_s"] / best_s[row["link_bit_per_s"]],
            "aim": AIMS.get(row["variant"]) if row["link_bit_per_s"] == middle else None,
        }
        for row in measured
    ]
