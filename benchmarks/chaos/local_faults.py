"""Faults that one host can suffer, each as a row of trials on local ranks."""

import contextlib
import importlib
import itertools
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.chaos.clock import unsteady_clock
from benchmarks.chaos.runs import (
    EVERY,
    MIGRATION_STEP,
    NUM_RANKS,
    STEPS,
    Row,
    Trial,
    Workshop,
    answers,
    ended,
    errors_of,
    result_of,
    wait_for_steps,
)
from crossdock.launch.ranks.faults import Fault
from crossdock.placement.records.plan import Plan
from crossdock.runtime.phases import PHASES, Phase

BATCH = 5  # faults of one run
TIMEOUT_S = 2.0
ENDURING = "fault.max_restarts=20"
RESUMED_WITHIN_S = 15.0
DEADLY = ("kill", "crash")
"""What leaves no process of which anybody could tell where it stands."""


def disasters(draw: random.Random, act: str, phases: list[Phase], seconds: float = 0.0) -> list[Fault]:
    """A fault in each of the phases, at random steps and ranks where that phase occurs.

    Two steps at least lie between any two, so that no two ranks are hit at once: a rank may be a step ahead of one that was lost.
    """
    while True:
        steps = [draw.choice(steps_with(phase)) for phase in phases]
        if all(abs(one - other) > 1 for one, other in itertools.combinations(steps, 2)):
            break
    ranks = [0 if phase == "checkpoint_rename" else draw.randrange(NUM_RANKS) for phase in phases]  # rank 0 commits
    return [Fault(act, rank, phase, step, seconds=seconds) for rank, phase, step in zip(ranks, phases, steps, strict=True)]


def steps_with(phase: Phase) -> Sequence[int]:
    """The steps in which a run comes to a phase, but for its first one."""
    if phase == "migration":
        return (MIGRATION_STEP,)
    if phase in ("checkpoint_write", "checkpoint_rename"):
        return range(EVERY, STEPS + 1, EVERY)
    return range(2, STEPS + 1)


def lost_ranks(
    workshop: Workshop, what: str, act: str, trials: int, seed: int, detected_within_s: float, seconds: float = 0.0
) -> list[Row]:
    """Ranks lost in all phases in turn, several in one run; a row for each phase."""
    draw = random.Random(seed)
    promise = f"named, detected in {detected_within_s:g} s, goes on in {RESUMED_WITHIN_S:g} s, bitwise"
    promise += "" if act in DEADLY else ", stacks of all ranks"
    rows = {phase: Row(f"{what}: {phase}", promise, [], detected_within_s, RESUMED_WITHIN_S) for phase in PHASES}
    waiting = [PHASES[number % len(PHASES)] for number in range(trials)]
    while waiting:
        batch, waiting = waiting[:BATCH], waiting[BATCH:]
        directory, code = workshop.suffer(disasters(draw, act, batch, seconds), ENDURING, f"parallel.timeout_s={TIMEOUT_S}")
        bitwise = code == 0 and workshop.is_undisturbed(directory)
        stacks = None if act in DEADLY else has_all_stacks(directory)
        for blow, restart, recovery_s in answers(directory):
            note = "" if code == 0 else f"exit code {code}: {result_of(directory).get('message', errors_of(directory))[:300]}"
            if restart is None:
                rows[blow["phase"]].trials.append(Trial(False, False, bitwise, note=note or "no restart"))
                continue
            detection_s = restart["time"] - blow["monotonic_s"] - (time.time() - time.monotonic())
            lost = blow["step"] - restart["step"]
            if lost > EVERY:
                note += f" {lost} steps lost with a checkpoint every {EVERY}"
            named = restart["rank"] == blow["rank"]
            note += "" if named else f" rank {blow['rank']} was lost, and the cause was said to be: {restart['cause'][:200]}"
            rows[blow["phase"]].trials.append(Trial(code == 0 and lost <= EVERY, named, bitwise, detection_s, recovery_s, note, stacks))
        shutil.rmtree(directory)
    return [row for row in rows.values() if row.trials]


def has_all_stacks(directory: Path) -> bool:
    """Whether a run in which a rank hung left word of where each rank stood: its own, or the system's of one that could not speak."""
    files = [path for rank in range(NUM_RANKS) for path in (directory / "stacks").glob(f"rank-{rank:05d}.*") if path.stat().st_size]
    return len({path.name.partition(".")[0] for path in files}) == NUM_RANKS


def kills(workshop: Workshop, trials: int, seed: int) -> list[Row]:
    """SIGKILL."""
    return lost_ranks(workshop, "SIGKILL of a rank", "kill", trials, seed, 2.0)


def crashes(workshop: Workshop, trials: int, seed: int) -> list[Row]:
    """SIGSEGV, as of a defect in native code."""
    return lost_ranks(workshop, "SIGSEGV of a rank", "crash", trials, seed, 2.0)


def stops(workshop: Workshop, trials: int, seed: int) -> list[Row]:
    """SIGSTOP: the rank is there, and will never answer."""
    return lost_ranks(workshop, "SIGSTOP of a rank", "stop", trials, seed, TIMEOUT_S + 3.0)


def hangs(workshop: Workshop, trials: int, seed: int) -> list[Row]:
    """An endless loop that is deaf to signals."""
    return lost_ranks(workshop, "endless loop on a rank", "hang", trials, seed, TIMEOUT_S + 3.0, seconds=120.0)


def terminations(workshop: Workshop, trials: int, seed: int) -> list[Row]:
    """SIGTERM at any moment: the state is saved, exit code 75, and the same command goes on."""
    draw, row = random.Random(seed), Row("SIGTERM", "saves, exits 75, the same command goes on, bitwise")
    phases: list[Phase] = ["step", "dispatch", "backward", "optimizer", "in_flight"]
    for number in range(trials):
        fault = Fault("terminate", draw.randrange(NUM_RANKS), phases[number % len(phases)], draw.randint(2, STEPS - 1))
        directory, code = workshop.suffer([fault])
        result = result_of(directory)
        saved = (code, result.get("status")) == (75, "preempted") and (directory / "checkpoints").is_dir()
        begin_s = time.monotonic()
        again = workshop.run(directory)
        recovery_s = time.monotonic() - begin_s
        # a request that comes after the ranks have asked one another in this step is answered in the next
        survived = saved and result["reached_step"] in (fault.step, fault.step + 1) and again == 0
        note = "" if survived else f"exit codes {code}, {again}; {result}"
        row.trials.append(Trial(survived, None, again == 0 and workshop.is_undisturbed(directory), None, recovery_s, note))
    return [row]


def _refused(workshop: Workshop, row: Row, fault: Fault, exit_code: int, word: str) -> None:
    """A fault after which a run must end with this code, naming rank and reason, its checkpoints whole; then the same command goes on."""
    directory, code = workshop.suffer([fault], "fault.max_restarts=2")
    result = result_of(directory)
    told = f"rank {fault.rank}" in result.get("message", "") or result.get("rank") == fault.rank
    ended_so = (code, result.get("exit_code")) == (exit_code, exit_code) and word in result.get("message", "")
    again = workshop.run(directory)
    note = "" if ended_so and told and again == 0 else f"exit codes {code}, {again}; {result.get('message')}"
    row.trials.append(Trial(ended_so and again == 0, told, again == 0 and workshop.is_undisturbed(directory), note=note))


def poisons(workshop: Workshop, trials: int, seed: int) -> list[Row]:
    """NaN in the loss of one rank."""
    draw, row = random.Random(seed), Row("non-finite loss on one rank", "nothing updated, exits 79 naming it, goes on bitwise")
    for _ in range(trials):
        _refused(
            workshop, row, Fault("poison", draw.randrange(NUM_RANKS), "loss", draw.randint(EVERY + 1, STEPS)), 79, "not finite on rank"
        )
    return [row]


def exhaustions(workshop: Workshop, trials: int, seed: int) -> list[Row]:
    """Address space taken away (a real failure of the allocator), and the error of a device."""
    draw, row = random.Random(seed), Row("out of memory", "exits 80 naming rank and remedy, goes on bitwise")
    for number in range(trials):
        act = ("exhaust_memory", "exhaust_device")[number % 2]
        fault = Fault(act, draw.randrange(NUM_RANKS), ("loss", "backward")[number // 2 % 2], draw.randint(EVERY + 1, STEPS))
        _refused(workshop, row, fault, 80, "out of memory")
    return [row]


def writes(workshop: Workshop, trials: int, seed: int) -> list[Row]:
    """A disk that is full when a shard is begun, and one that takes the first KiB of it."""
    draw, promise = random.Random(seed), "exits 74, older checkpoints whole, goes on bitwise"
    rows = {"fill_disk": Row("disk full", promise), "shorten_files": Row("short write", promise)}
    for number in range(trials):
        act = list(rows)[number % 2]
        step = EVERY * draw.randint(2, STEPS // EVERY)
        # metrics and events are files of rank 0 as well: only its peer's files can be shortened without ending more than the checkpoint
        rank = 1 if act == "shorten_files" else draw.randrange(NUM_RANKS)
        _refused(workshop, rows[act], Fault(act, rank, "checkpoint_write", step), 74, "the checkpoint was not written")
    return [row for row in rows.values() if row.trials]


def full_disks(workshop: Workshop, trials: int, seed: int) -> list[Row]:
    """A file system with no room left, in a run that began on it; then it gets room."""
    row = Row("file system full", "exits 74, older checkpoints whole, goes on bitwise")
    for number in range(trials):
        directory = workshop.directory()
        with _small_disk(directory):
            pause = Fault("sleep", 0, "backward", EVERY * (1 + number % 4) + 1, seconds=3.0)
            process = workshop.start(directory, workshop.script(directory, [pause]))
            wait_for_steps(directory, pause.step - 1, [process])
            with contextlib.suppress(OSError), (directory / "ballast").open("wb", buffering=0) as ballast:
                while True:
                    ballast.write(bytes(1 << 12))
            code = ended(process)
            (directory / "ballast").unlink()
            again = workshop.run(directory)
            survived = code == 74 and again == 0
            note = "" if survived else f"exit codes {code}, {again}; {errors_of(directory)}"
            row.trials.append(Trial(survived, None, again == 0 and workshop.is_undisturbed(directory), note=note))
    return [row]


@contextlib.contextmanager
def _small_disk(place: Path) -> Iterator[Path]:
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def crash_loops(workshop: Workshop, trials: int, seed: int) -> list[Row]:
    """A rank that dies in the same step every time."""
    draw, row = random.Random(seed), Row("crash loop", "given up after 2 fruitless restarts, exits 76 naming the rank")
    for _ in range(trials):
        fault = Fault("kill", draw.randrange(NUM_RANKS), "backward", draw.randint(EVERY + 2, STEPS), times=1000)
        directory, code = workshop.suffer([fault], "fault.max_restarts=2")
        result = result_of(directory)
        named = result.get("rank") == fault.rank
        gave_up = code == 76 and "given up after 2 restarts" in result.get("message", "")
        row.trials.append(Trial(gave_up, named, note="" if gave_up else f"exit code {code}; {result.get('message')}"))
    return [row]


def clocks(workshop: Workshop, trials: int, seed: int) -> list[Row]:
    """The clock of every rank jumps by an hour, to and fro, four times a second, while a rank is killed as well."""
    row = Row("clock jumps by an hour, to and fro", "no difference, bitwise")
    library = unsteady_clock(workshop.folder)
    draw = random.Random(seed)
    for _ in range(trials):
        directory, code = workshop.suffer(disasters(draw, "kill", ["backward"]), ENDURING, environment={"LD_PRELOAD": str(library)})
        survived = code == 0
        bitwise = survived and workshop.is_undisturbed(directory)
        row.trials.append(Trial(survived, None, bitwise, note="" if survived else errors_of(directory)))
    return [row]


def plans(workshop: Workshop, trials: int, seed: int) -> list[Row]:
    """Ranks that were given different plans, or different configurations, under torchrun."""
    row = Row("a plan or setting that differs between ranks", "refused before the first step, naming the rank")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(NUM_RANKS), "--no-python"]
    for number in range(trials):
        directory = workshop.directory()
        own = ("plan=$PLAN", "train.optimizer.lr=0.00$((RANK+1))")[number % 2]
        plan = f"{workshop.folder}/plan-$RANK.json"
        _write_plans(workshop.folder)
        script = f'PLAN={plan}; exec {sys.executable} -m crossdock "$@" {own}'
        process = workshop.start(directory, command=[*torchrun, "sh", "-c", script, "sh"])
        code, result = ended(process), result_of(directory)
        refused = code != 0 and result.get("exit_code") == 78 and result.get("reached_step") == 0
        named = "rank 1" in result.get("message", "")
        note = "" if refused and named else f"exit code {code}; {result.get('message')} {errors_of(directory)}"
        row.trials.append(Trial(refused, named, note=note))
    return [row]


def _write_plans(folder: Path) -> None:
    for rank in range(NUM_RANKS):
        slots_LRS = np.array([[[0, 1], [2, 3]] if rank == 0 else [[3, 1], [2, 0]]])
        Plan(slots_LRS, 4).save(folder / f"plan-{rank}.json")


def corruptions(workshop: Workshop, trials: int, seed: int) -> list[Row]:
    """Flipped bits, truncated, swapped, missing and foreign files: what is loaded is what was saved, or nothing is."""
    injector: Any = importlib.import_module("tests.runtime.checkpoints.test_corruption")  # the same that CI runs
    folder = workshop.folder / f"corruptions-{seed}"
    folder.mkdir()
    (folder / "text").write_bytes(importlib.import_module("tests.runtime.tiny").text())
    bench = injector.Bench(str(folder))
    promise = "the newest whole one is loaded, or none"
    rows = {damage.__name__: Row(f"damaged checkpoint: {damage.__name__}", promise) for damage in injector.DAMAGES}
    for number in range(trials):
        name, newer, older = injector.damaged(bench, folder / "damaged", seed + number)
        wanted = injector.NEWER if not newer else injector.OLDER if not older else None
        try:
            found, note = bench.load(folder / "damaged"), ""
        except AssertionError as difference:
            found, note = "other values", str(difference)[:200]
        rows[name].trials.append(Trial(found == wanted, None, found == wanted, note=note))
    return [row for row in rows.values() if row.trials]


def is_root() -> bool:
    """Whether file systems can be mounted."""
    return os.geteuid() == 0
