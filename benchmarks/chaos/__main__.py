"""The command line: which faults, how often, and where the table goes. See the package."""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.chaos import local_faults, node_faults
from benchmarks.chaos.clock import unavailable_reason as no_clock
from benchmarks.chaos.page import publish
from benchmarks.chaos.runs import Row, Workshop
from benchmarks.netlab import Lab
from benchmarks.netlab import unavailable_reason as no_lab

Suffering = Callable[[Workshop, int, int], list[Row]]


def _on_lab(rows: Callable[[Workshop, Lab, int, int], list[Row]], workshop: Workshop, trials: int, seed: int) -> list[Row]:
    with Lab(node_faults.NODES) as lab:
        return rows(workshop, lab, trials, seed)


FAULTS: dict[str, tuple[Suffering, int, int]] = {
    "kill": (local_faults.kills, 200, 20),
    "crash": (local_faults.crashes, 20, 2),
    "stop": (local_faults.stops, 20, 2),
    "hang": (local_faults.hangs, 10, 1),
    "terminate": (local_faults.terminations, 10, 1),
    "poison": (local_faults.poisons, 6, 1),
    "memory": (local_faults.exhaustions, 6, 2),
    "write": (local_faults.writes, 6, 2),
    "disk": (local_faults.full_disks, 5, 1),
    "loop": (local_faults.crash_loops, 4, 1),
    "clock": (local_faults.clocks, 5, 1),
    "plan": (local_faults.plans, 4, 2),
    "torchrun": (node_faults.kills_under_torchrun, 5, 1),
    "node": (partial(_on_lab, node_faults.node_losses), 5, 1),
    "partition": (partial(_on_lab, node_faults.partitions), 5, 1),
    "slow": (partial(_on_lab, node_faults.slow_links), 5, 1),
    "corrupt": (local_faults.corruptions, 1000, 100),
}
"""By name: what suffers, and how many trials in the long and in the short form."""


def impossible(name: str) -> str | None:
    """Why a fault cannot be brought about here, or None."""
    if name in ("node", "partition", "slow"):
        return no_lab()
    if name == "disk" and not local_faults.is_root():
        return "file systems are mounted by root alone"
    return no_clock() if name == "clock" else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Suffer, tell, and say by the exit code whether every promise was kept."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description="Scripted disasters, and what becomes of a run.")
    parser.add_argument("--short", action="store_true", help="a few trials of each")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(FAULTS), help=f"of {','.join(FAULTS)}")
    parser.add_argument("--trials", type=int, help="of each fault; otherwise as many as its form has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help="rows as JSON; the table in words beside it, as .md. Rows of earlier calls in it stay")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.only if name not in FAULTS]
    if unknown:
        parser.error(f"no fault {unknown[0]!r}; choose from {', '.join(FAULTS)}")
    kept = True
    try:
        with tempfile.TemporaryDirectory(prefix="crossdock-chaos-") as folder:
            workshop = Workshop(Path(folder))
            for name in options.only:
                if (reason := impossible(name)) is not None:
                    print(f"{name}: left out, {reason}", file=sys.stderr)
                    continue
                suffer, long, short = FAULTS[name]
                begin_s = time.monotonic()
                rows = suffer(workshop, options.trials or (short if options.short else long), options.seed)
                kept = kept and all(row.is_kept for row in rows)
                publish([row.as_json() for row in rows], options.out, options.json)
                print(f"{name}: {sum(len(row.trials) for row in rows)} trials in {time.monotonic() - begin_s:.0f} s", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
