"""Scripted disasters: what a run is told to suffer, at which step and in which phase, on which rank. For tests of survival alone.

`fault.inject` names a file that `Script.save` wrote; without it nothing here is imported. Every fault strikes as often as it says over all
starts of the run: what has struck stands in a log beside the script, one line each, written before the blow.
"""

import json
import os
import resource
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crossdock import atomic
from crossdock.bounded import json_value, read_bytes
from crossdock.errors import BadData
from crossdock.runtime import phases
from crossdock.runtime.phases import Phase

_MAX_BYTES = 1 << 20
_SHORT_FILE_BYTES = 4096


@dataclass(frozen=True)
class Fault:
    """One blow: `act` (a name in `ACTS`) hits `rank` when it is in step `step` (from 1) and comes to `phase` for the `visit`-th time there.

    It strikes `times` times in all. `seconds` is for acts that last. Raises `BadData` for names that do not exist.
    """

    act: str
    rank: int
    phase: str
    step: int = 1
    visit: int = 1
    times: int = 1
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.act not in ACTS or self.phase not in phases.PHASES:
            raise BadData(f"no fault {self.act!r} in phase {self.phase!r}; faults are {', '.join(ACTS)}, phases {', '.join(phases.PHASES)}")


@dataclass(frozen=True)
class Script:
    """All that shall happen to one run."""

    faults: tuple[Fault, ...]

    def save(self, path: Path) -> None:
        """Write it for `fault.inject`."""
        atomic.write_json(path, {"faults": [asdict(fault) for fault in self.faults]})

    @classmethod
    def load(cls, path: Path) -> "Script":
        """Read what `save` wrote. Raises `MissingInput`, `BadData`."""
        value = json_value(read_bytes(path, _MAX_BYTES, "a script of faults", BadData), str(path), BadData)
        try:
            return cls(tuple(Fault(**fault) for fault in value["faults"]))
        except (KeyError, TypeError) as failure:
            raise BadData(f"{path} is no script of faults ({failure}); write it by launch.faults.Script.save") from failure


@dataclass
class Injector:
    """Strikes this rank as the script says; a listener of phases."""

    script: Script
    rank: int
    log: Path
    step: int = 0
    """The step that is being made, from 1."""
    visits: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path, rank: int) -> "Injector":
        """The injector of the script at `path`, its log beside it."""
        return cls(Script.load(path), rank, log_of(path))

    def __call__(self, phase: Phase, what: Any) -> None:
        """Come to `phase`; with the phase `step` comes the number of steps made."""
        if phase == "step":
            self.step, self.visits = int(what) + 1, {}
        self.visits[phase] = self.visits.get(phase, 0) + 1
        for number, fault in enumerate(self.script.faults):
            here = (fault.rank, fault.phase, fault.step, fault.visit) == (self.rank, phase, self.step, self.visits[phase])
            if here and len(struck(self.log, number)) < fault.times:
                self._note(number, fault)
                ACTS[fault.act](fault, what)

    def _note(self, number: int, fault: Fault) -> None:
        line = json.dumps({"fault": number, **asdict(fault), "pid": os.getpid(), "monotonic_s": time.monotonic()}) + "\n"
        with self.log.open("a") as file:
            file.write(line)


def log_of(script: Path) -> Path:
    """Where it stands what has struck."""
    return script.with_name(f"{script.name}.log")


def struck(log: Path, number: int | None = None) -> list[dict[str, Any]]:
    """What has struck so far, in order: rows with a fault's fields, `pid` and `monotonic_s`, which all processes of a host share."""
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [row for row in rows if number is None or row["fault"] == number]


# ---- what can happen -----------------------------------------------------------------------------------------------


def _kill(fault: Fault, what: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop(fault: Fault, what: Any) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _terminate(fault: Fault, what: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _crash(fault: Fault, what: Any) -> None:
    """As a defect in native code."""
    os.kill(os.getpid(), signal.SIGSEGV)


def _hang(fault: Fault, what: Any) -> None:
    """As a loop that never ends: alive, and deaf to what the interpreter would handle."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    end_s = time.monotonic() + fault.seconds
    while time.monotonic() < end_s:
        pass


def _sleep(fault: Fault, what: Any) -> None:
    """A slow rank, which comes back."""
    time.sleep(fault.seconds)


def _poison(fault: Fault, what: Any) -> None:
    assert isinstance(what, Tensor), f"nothing to poison in phase {fault.phase}; choose the phase loss"
    what.detach().fill_(torch.nan)


def _exhaust_memory(fault: Fault, what: Any) -> None:
    """Leave the process 64 MiB of address space, and ask the real allocator for a GiB."""
    used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + (64 << 20), resource.getrlimit(resource.RLIMIT_AS)[1]))
    torch.ones(1 << 28)


def _exhaust_device(fault: Fault, what: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (injected)")


def _fill_disk(fault: Fault, what: Any) -> None:
    raise OSError(28, "No space left on device")


def _shorten_files(fault: Fault, what: Any) -> None:
    """From now on the system refuses this process every byte of a file beyond a few KiB, in the middle of a write."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (_SHORT_FILE_BYTES, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


ACTS: dict[str, Callable[[Fault, Any], None]] = {
    "kill": _kill,
    "stop": _stop,
    "terminate": _terminate,
    "crash": _crash,
    "hang": _hang,
    "sleep": _sleep,
    "poison": _poison,
    "exhaust_memory": _exhaust_memory,
    "exhaust_device": _exhaust_device,
    "fill_disk": _fill_disk,
    "shorten_files": _shorten_files,
}
"""By name, what can happen to a rank."""


def inject(path: Path, rank: int) -> None:
    """From now on this process suffers what the script at `path` has for `rank`. Raises `MissingInput`, `BadData`."""
    phases.listen(Injector.of(path, rank))


def kills(rank_phases: Sequence[tuple[int, Phase, int]]) -> Script:
    """A script of SIGKILLs at (rank, phase, step)."""
    return Script(tuple(Fault("kill", rank, phase, step) for rank, phase, step in rank_phases))
