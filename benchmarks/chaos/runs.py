"""One small run, many times: started in the background, disturbed, read afterwards and held against the undisturbed one."""

import contextlib
import itertools
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crossdock.launch.ranks.faults import Fault, Script, log_of, struck

STEPS = 24
EVERY = 4
"""Steps between checkpoints."""
MIGRATION_STEP = 11
NUM_RANKS = 2
TEXT = "the quick brown fox jumps over the lazy dog. " * 200
RUN = (
    "model.model_width=32",
    "model.num_heads=2",
    "model.expert_width=32",
    "data.kind=text",
    "data.seq_len=16",
    "device=cpu",
    f"train.steps={STEPS}",
    "train.batch_sequences=4",
    "train.eval_batches=0",
    f"checkpoint.every={EVERY}",
    "checkpoint.at_end=true",
    # a plan that follows from the seed alone, so that a run is the same run whatever it has measured on the way
    "topology=2x1-local",
    f"replan={{at_step: {MIGRATION_STEP}, method: random, objective: devices, seconds: 1.0, capture_steps: 2, pays_back_within: 0}}",
)
LIMIT_S = 300.0
_FOLDERS = re.compile(r"(?<![\w:/.])/(?:[\w.+@-]+/)+")


def without_places(text: str) -> str:
    """What may be published of a message: no folders and no name of this machine, only the last part of a path."""
    return _FOLDERS.sub("", text).replace(platform.node(), "HOST") if platform.node() else _FOLDERS.sub("", text)


@dataclass(frozen=True)
class Trial:
    """One blow and what became of it; None where a thing cannot be said of this fault."""

    survived: bool
    """The run ended as promised: on target, or with the right exit code and what it had saved."""
    named: bool | None = None
    bitwise: bool | None = None
    detection_s: float | None = None
    recovery_s: float | None = None
    note: str = ""
    stacks: bool | None = None
    """Whether those of all ranks were kept, or what the system says of one that could not write them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "note", without_places(self.note))

    @property
    def is_kept(self) -> bool:
        """Whether every promise was, but for the seconds."""
        return self.survived and False not in (self.named, self.bitwise, self.stacks)


@dataclass
class Row:
    """A fault and its trials; the seconds are those that the promise names, None where it names none."""

    fault: str
    promise: str
    trials: list[Trial] = field(default_factory=list)
    detected_within_s: float | None = None
    resumed_within_s: float | None = None

    @property
    def is_kept(self) -> bool:
        """Whether every promise was, but for the seconds: those also depend on what else the machine does."""
        return bool(self.trials) and all(trial.is_kept for trial in self.trials)

    def is_in_time(self, trial: Trial) -> bool:
        """Whether a trial took no longer than promised; one that was promised and did not come is late."""
        taken = ((trial.detection_s, self.detected_within_s), (trial.recovery_s, self.resumed_within_s))
        return all(limit_s is None or (seconds is not None and seconds <= limit_s) for seconds, limit_s in taken)

    def as_json(self) -> dict[str, Any]:
        """Counts, medians and worst cases, and what went wrong."""

        def share(said: Sequence[bool | None]) -> str | None:
            known = [word for word in said if word is not None]
            return f"{sum(known)}/{len(known)}" if known else None

        def seconds(name: str) -> dict[str, float | None]:
            found = [getattr(trial, name) for trial in self.trials if getattr(trial, name) is not None]
            return {name: round(statistics.median(found), 3) if found else None, f"{name}_max": round(max(found), 3) if found else None}

        is_timed = self.detected_within_s is not None or self.resumed_within_s is not None
        return {
            "fault": self.fault,
            "trials": len(self.trials),
            **{name: share([getattr(trial, name) for trial in self.trials]) for name in ("survived", "named", "stacks")},
            **seconds("detection_s"),
            **seconds("recovery_s"),
            "in_time": share([self.is_in_time(trial) for trial in self.trials]) if is_timed else None,
            "bitwise": share([trial.bitwise for trial in self.trials]),
            "promise": self.promise,
            "notes": sorted({trial.note for trial in self.trials if trial.note})[:5],
        }


@dataclass(frozen=True)
class Curve:
    """What a run computed: losses and gradient norms by step, and the checksums of its last checkpoint."""

    rows: tuple[tuple[int, float, float], ...]
    shards: tuple[str, ...]

    @classmethod
    def of(cls, directory: Path) -> "Curve":
        rows = tuple((row["step"], row["loss"], row["grad_norm"]) for row in lines(directory / "metrics.jsonl"))
        folders = sorted((directory / "checkpoints").glob("step-*"))
        manifest = json.loads((folders[-1] / "manifest.json").read_text()) if folders else {"shards": []}
        return cls(rows, tuple(shard["sha256"] for shard in manifest["shards"]))


class Workshop:
    """A folder for runs, with the data and the undisturbed run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number = 0
        (folder / "text.txt").write_text(TEXT)
        self._undisturbed: dict[tuple[str, ...], Curve] = {}

    def directory(self) -> Path:
        """For a new run."""
        self.number += 1
        return self.folder / f"run-{self.number:04d}"

    def arguments(self, directory: Path, *overrides: str) -> list[str]:
        """`train` and its arguments; a later override wins."""
        data, ranks = f"data.path={self.folder / 'text.txt'}", f"parallel.expert={NUM_RANKS}"
        return ["train", "tiny", *RUN, ranks, data, f"run.dir={directory}", *overrides]

    def start(
        self, directory: Path, *overrides: str, command: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[str]":
        """`crossdock train`, alone or under the launcher `command`; see `start_command`."""
        full = [*(command or (sys.executable, "-m", "crossdock")), *self.arguments(directory, *overrides)]
        return self.start_command(full, directory, environment)

    def start_command(
        self, command: Sequence[str], directory: Path, environment: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[str]":
        """A command that runs in `directory`; its output is in `<directory>.out` and `.err`."""
        with directory.with_suffix(".out").open("w") as out, directory.with_suffix(".err").open("a") as err:
            variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
            return subprocess.Popen(command, stdout=out, stderr=err, text=True, env=variables, start_new_session=True)

    def run(self, directory: Path, *overrides: str, environment: Mapping[str, str] | None = None) -> int:
        """The exit code of a run to its end."""
        return ended(self.start(directory, *overrides, environment=environment))

    def undisturbed(self, *overrides: str) -> Curve:
        """The curve of the run that nobody disturbs."""
        if overrides not in self._undisturbed:
            directory = self.directory()
            assert self.run(directory, *overrides) == 0, errors_of(directory)
            self._undisturbed[overrides] = Curve.of(directory)
            assert [row[0] for row in self._undisturbed[overrides].rows] == list(range(1, STEPS + 1))
        return self._undisturbed[overrides]

    def is_undisturbed(self, directory: Path, *overrides: str) -> bool:
        """Whether a run computed what the undisturbed one did, bit by bit."""
        return Curve.of(directory) == self.undisturbed(*overrides)

    def script(self, directory: Path, faults: Sequence[Fault]) -> str:
        """`faults` written down for the run in `directory`; the override that makes it suffer them."""
        Script(tuple(faults)).save(script_of(directory))
        return f"fault.inject={script_of(directory)}"

    def suffer(self, faults: Sequence[Fault], *overrides: str, environment: Mapping[str, str] | None = None) -> tuple[Path, int]:
        """(run directory, exit code) of a run that suffers `faults`; every one of them must have struck, or one have ended the run."""
        directory = self.directory()
        code = self.run(directory, self.script(directory, faults), *overrides, environment=environment)
        missed = [fault for number, fault in enumerate(faults) if not struck(log_of(script_of(directory)), number)]
        assert not missed or (code and len(missed) < len(faults)), f"never struck: {missed}\n{errors_of(directory)}"
        return directory, code


def ended(process: "subprocess.Popen[str]", limit_s: float = LIMIT_S) -> int:
    """The exit code; a process that outlives the limit is ended with its session, and its code is that of the signal."""
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        return process.wait()
    except KeyboardInterrupt:  # which a session of its own does not hear
        os.killpg(process.pid, 9)
        raise


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a torn last line is left out."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1] if line]


def script_of(directory: Path) -> Path:
    """Where the faults of a run stand: beside its directory."""
    return directory.with_suffix(".faults.json")


def result_of(directory: Path) -> dict[str, Any]:
    """`result.json`, empty where there is none."""
    path = directory / "result.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def errors_of(directory: Path) -> str:
    """The last of what a run said."""
    path = directory.with_suffix(".err")
    return path.read_text(errors="replace")[-1500:] if path.exists() else ""


def wait_for_steps(directory: Path, steps: int, processes: "Sequence[subprocess.Popen[str]]", limit_s: float = LIMIT_S) -> None:
    """Until a run has made so many steps. Raises `TimeoutError`, also where one of its processes has ended before."""
    deadline_s = time.monotonic() + limit_s
    while len(lines(directory / "metrics.jsonl")) < steps:
        if time.monotonic() > deadline_s or any(process.poll() is not None for process in processes):
            raise TimeoutError(f"{directory} made no {steps} steps in {limit_s:g} s, or before it ended: {errors_of(directory)}")
        time.sleep(0.02)


@dataclass(frozen=True)
class Aftermath:
    """What a run's events say of one blow: who is to blame, and seconds until that was said and until training went on."""

    blame: str = ""
    detection_s: float | None = None
    recovery_s: float | None = None

    @classmethod
    def of(cls, directory: Path, blow_s: float, back_s: float | None = None) -> "Aftermath":
        """After a blow at `blow_s` on the monotonic clock; the recovery counts from `back_s` where that is given."""
        to_monotonic_s = time.monotonic() - time.time()
        later = [(event["time"] + to_monotonic_s, event) for event in lines(directory / "events.jsonl")]
        later = [(moment_s, event) for moment_s, event in later if moment_s > blow_s - 0.01]
        said = next(((moment_s, event) for moment_s, event in later if event["event"] in ("rank_lost", "restart")), None)
        going_s = next((moment_s for moment_s, event in later if event["event"] == "resumed"), None)
        recovery_s = None if going_s is None else going_s - (blow_s if back_s is None else back_s)
        if said is None:
            return cls(recovery_s=recovery_s)
        return cls(str(said[1].get("message") or said[1].get("cause")), said[0] - blow_s, recovery_s)


def answers(directory: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None, float | None]]:
    """For each blow in order: the blow, the restart that answered it, and seconds until training went on."""
    events = lines(directory / "events.jsonl")
    restarts: list[int | None] = [number for number, event in enumerate(events) if event["event"] == "restart"]
    to_wall_s = time.time() - time.monotonic()
    for blow, number in zip(struck(log_of(script_of(directory))), itertools.chain(restarts, itertools.repeat(None)), strict=False):
        if number is None:
            yield blow, None, None
            continue
        # a restart resumes, unless there was no checkpoint yet: then the ranks that start are the sign of life
        sign = "resumed" if events[number]["step"] else "rank_started"
        going = next((event["time"] - blow["monotonic_s"] - to_wall_s for event in events[number:] if event["event"] == sign), None)
        yield blow, events[number], going


def judged(workshop: Workshop, directory: Path, is_done: bool, named: bool, after: Aftermath, *overrides: str) -> Trial:
    """A blow that a run was to survive: it reached its target, the right rank was named, and all is as in a run that nobody disturbed."""
    survived = is_done and result_of(directory).get("status") == "done"
    note = "" if survived and named else f"blamed: {after.blame[:300] or 'nobody'} {'' if survived else errors_of(directory)}"
    bitwise = survived and workshop.is_undisturbed(directory, *overrides)
    return Trial(survived, named, bitwise, after.detection_s, after.recovery_s, note)


def end_session(process: "subprocess.Popen[str]") -> None:
    """Leave nothing of its session, however the trial went."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
