"""SIGKILL while a checkpoint is written behind training, at any moment of the writing: what has a checkpoint's name is whole."""

import contextlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path

from benchmarks.chaos.runs import EVERY, NUM_RANKS, STEPS, Aftermath, Row, Trial, Workshop, ended, errors_of, lines, result_of
from crossdock.launch.ranks.faults import Fault
from crossdock.runtime.checkpoints.checkpoint import finished, verify

BLOWS = 4  # of one run
WRITING_S = 0.01
"""About as long as the shards of the small model take; a blow falls within twice that, before or behind the rename as well."""
PAUSE_S = 0.1
"""Of rank 0 in the step after each save, so that a blow that was meant for the writing falls into it."""


def kills_while_saving(workshop: Workshop, trials: int, seed: int) -> list[Row]:
    """A random rank, a random moment after the folder of a save has appeared; keep-last-2 goes on all the while."""
    draw = random.Random(seed)
    promise = "folders of checkpoints whole at that moment, named, detected in 2 s, goes on in 15 s, bitwise"
    row = Row("SIGKILL of a rank while a checkpoint is written behind training", promise, [], 2.0, 15.0)
    while len(row.trials) < trials:
        row.trials.extend(_one_run(workshop, draw, min(BLOWS, trials - len(row.trials))))
    return [row]


def _one_run(workshop: Workshop, draw: random.Random, blows: int) -> list[Trial]:
    directory = workshop.directory()
    pauses = [Fault("sleep", 0, "backward", step + 1, times=BLOWS + 1, seconds=PAUSE_S) for step in range(EVERY, STEPS, EVERY)]
    script = workshop.script(directory, pauses)
    process = workshop.start(directory, script, "checkpoint.asynchronous=true", "fault.max_restarts=20")
    struck: list[tuple[int, float, str]] = []
    try:
        for number in range(blows):
            # a save later than the last one that was struck, and never the first: there is something to resume from
            if not _saving(directory / "checkpoints" / f".step-{EVERY * (number + 2):08d}.tmp", process, since_s=time.time()):
                break
            time.sleep(draw.random() * 2 * WRITING_S)
            rank = draw.randrange(NUM_RANKS)
            blow_s = time.monotonic()
            os.kill(_pids(directory)[rank], signal.SIGKILL)
            struck.append((rank, blow_s, _torn(directory / "checkpoints")))
            while process.poll() is None and len(_restarts(directory)) <= number:
                time.sleep(0.005)
    finally:
        code = ended(process)
    survived = code == 0 and result_of(directory).get("status") == "done"
    bitwise = survived and workshop.is_undisturbed(directory)
    if not struck:  # a row of trials that never strike would never be full
        return [Trial(False, note=f"ended with {code} before there was a save to strike: {errors_of(directory)}")]
    return [_trial(directory, rank, blow_s, torn, survived, bitwise) for rank, blow_s, torn in struck]


def _trial(directory: Path, rank: int, blow_s: float, torn: str, survived: bool, bitwise: bool) -> Trial:
    after = Aftermath.of(directory, blow_s)
    named = f"rank {rank} " in after.blame
    blamed = f"{torn} blamed: {after.blame[:300] or 'nobody'} {'' if survived else errors_of(directory)}"
    note = "" if survived and named and not torn else blamed
    return Trial(survived and not torn, named, bitwise, after.detection_s, after.recovery_s, note)


def _saving(aside: Path, process: "subprocess.Popen[str]", since_s: float) -> bool:
    """Wait until a save has made its folder, that of an earlier start does not count; False where the run ends before."""
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            if aside.stat().st_mtime > since_s:
                return True
        time.sleep(0.0005)
    return False


def _torn(checkpoints: Path) -> str:
    """What is wrong with folders that have the name of a checkpoint; one that is taken away while it is read does not count."""
    problems = [(folder, verify(folder)) for folder in finished(checkpoints)]
    return "; ".join(f"{folder.name} is torn: {problem}" for folder, problem in problems if problem and folder.is_dir())


def _pids(directory: Path) -> dict[int, int]:
    """Of the ranks of the latest start."""
    return {event["rank"]: event["pid"] for event in lines(directory / "events.jsonl") if event["event"] == "rank_started"}


def _restarts(directory: Path) -> list[str]:
    return [event["cause"] for event in lines(directory / "events.jsonl") if event["event"] == "restart"]
