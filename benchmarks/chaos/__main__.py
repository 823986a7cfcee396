"""The command line: which faults, how often, and where the table goes. See the package."""

import argparse
import importlib.util
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.chaos import local_faults, node_faults, ray_faults, saving_faults
from benchmarks.chaos.clock import unavailable_reason as no_clock
from benchmarks.chaos.journal import Journal, Portion
from benchmarks.chaos.page import publish, show
from benchmarks.chaos.runs import Row, Trial, Workshop, without_places
from benchmarks.measure import commit
from benchmarks.netlab import Lab
from benchmarks.netlab import unavailable_reason as no_lab

Suffering = Callable[[Workshop, int, int], list[Row]]


def _on_lab(rows: Callable[[Workshop, Lab, int, int], list[Row]], workshop: Workshop, trials: int, seed: int) -> list[Row]:
    with Lab(node_faults.NODES) as lab:
        return rows(workshop, lab, trials, seed)


@dataclass(frozen=True)
class Kind:
    """A fault of the command line: what suffers it, trials of the long and of the short form, and of one portion; seconds of one trial."""

    suffer: Suffering
    long: int
    short: int
    portion: int
    trial_s: float = 0.0
    """About, on four idle cores: what a long call begins by telling."""


FAULTS = {
    "corrupt": Kind(local_faults.corruptions, 1000, 100, 100, 0.1),
    "kill": Kind(local_faults.kills, 200, 20, 10, 4.0),
    "save": Kind(saving_faults.kills_while_saving, 40, 4, 20, 4.0),
    "crash": Kind(local_faults.crashes, 10, 2, 10, 4.0),
    "stop": Kind(local_faults.stops, 10, 2, 10, 6.0),
    "hang": Kind(local_faults.hangs, 10, 1, 5, 8.0),
    "terminate": Kind(local_faults.terminations, 10, 1, 5, 12.0),
    "poison": Kind(local_faults.poisons, 6, 1, 2, 14.0),
    "memory": Kind(local_faults.exhaustions, 8, 2, 4, 14.0),
    "write": Kind(local_faults.writes, 8, 2, 2, 14.0),
    "disk": Kind(local_faults.full_disks, 5, 1, 1, 14.0),
    "loop": Kind(local_faults.crash_loops, 5, 1, 1, 10.0),
    "clock": Kind(local_faults.clocks, 5, 1, 1, 10.0),
    "plan": Kind(local_faults.plans, 6, 2, 2, 8.0),
    "torchrun": Kind(node_faults.kills_under_torchrun, 5, 1, 1, 40.0),
    "node": Kind(partial(_on_lab, node_faults.node_losses), 4, 1, 1, 70.0),
    "partition": Kind(partial(_on_lab, node_faults.partitions), 4, 1, 1, 40.0),
    "slow": Kind(partial(_on_lab, node_faults.slow_links), 4, 1, 1, 20.0),
    "ray": Kind(ray_faults.node_losses, 4, 2, 1, 50.0),
}
"""By name, in the order in which they are brought about."""


def impossible(name: str) -> str | None:
    """Why a fault cannot be brought about here, or None."""
    if name in ("node", "partition", "slow"):
        return no_lab()
    if name == "ray" and importlib.util.find_spec("ray") is None:
        return "ray is not installed"
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
    parser.add_argument("--out", type=Path, help="rows as JSON; beside it the table in words as .md, and every trial as .jsonl")
    parser.add_argument("--resume", action="store_true", help="go on with a call that was cut off: trials that stand in .jsonl are done")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.only if name not in FAULTS]
    if unknown:
        parser.error(f"no fault {unknown[0]!r}; choose from {', '.join(FAULTS)}")
    if options.resume and options.out is None:
        parser.error("--resume goes on with what stands beside --out; name it")
    given = sys.argv[1:] if arguments is None else arguments
    command = without_places(shlex.join(["python", "-m", "benchmarks.chaos", *given]).replace(" --resume", ""))
    left_out = {name: reason for name in options.only if (reason := impossible(name)) is not None}
    for name, reason in left_out.items():
        print(f"{name}: left out, {reason}", file=sys.stderr)
    asked = {name: options.trials or (FAULTS[name].short if options.short else FAULTS[name].long) for name in options.only}
    asked = {name: trials for name, trials in asked.items() if name not in left_out}
    tell_times(asked)
    journal = Journal.read(None if options.out is None else options.out.with_suffix(".jsonl"))
    kept = True
    try:
        with tempfile.TemporaryDirectory(prefix="crossdock-chaos-") as folder:
            workshop = Workshop(Path(folder))
            for name, total in asked.items():
                journal = journal if options.resume else journal.without(name)
                for first, trials in portions(total, FAULTS[name].portion):
                    if journal.has(name, options.seed, first, trials):
                        continue
                    begin_s, made_with = time.monotonic(), commit()
                    rows = tuple(suffered(name, workshop, trials, options.seed + first))
                    seconds = round(time.monotonic() - begin_s, 1)
                    journal = journal.with_portion(Portion(name, options.seed, first, trials, made_with, command, rows, seconds))
                    if options.out is not None:
                        publish(journal, options.out, left_out)
                found = journal.rows(name)
                kept = kept and all(row.is_kept for row in found)
                show(found, options.json)
                print(f"{name}: {sum(len(row.trials) for row in found)} trials in {journal.seconds_of(name):.0f} s", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 0 if kept else 1


def tell_times(asked: Mapping[str, int]) -> None:
    """Say beforehand how long it will take."""
    seconds = {name: trials * FAULTS[name].trial_s for name, trials in asked.items()}
    parts = ", ".join(f"{name} {trials} in {seconds[name]:.0f} s" for name, trials in asked.items())
    print(f"about {sum(seconds.values()) / 60:.0f} minutes on four idle cores: {parts}", file=sys.stderr)


def portions(trials: int, size: int) -> list[tuple[int, int]]:
    """(first, how many) of each portion."""
    return [(first, min(size, trials - first)) for first in range(0, trials, size)]


def suffered(name: str, workshop: Workshop, trials: int, seed: int) -> list[Row]:
    """The rows of some trials; where one could not be carried through, a row that says so: it must not cost the others."""
    try:
        return FAULTS[name].suffer(workshop, trials, seed)
    except Exception as failure:
        note = f"{type(failure).__name__}: {str(failure)[:600]}"
        print(f"{name}: {note}", file=sys.stderr)
        return [Row(f"{name}: trials that could not be carried through", "none", [Trial(False, note=note)])]


if __name__ == "__main__":
    sys.exit(main())
