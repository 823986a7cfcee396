"""Hands mutants to a child process, watches its time, and gathers what went wrong; the same seed gives the same inputs."""

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.fuzz.kinds import KINDS

START_S = 180.0
CPU_LIMIT_S = 10.0
"""What one input may take of the processor; waiting for a busy machine does not count."""
WALL_LIMIT_S = 120.0
_POLL_S = 0.5


@dataclass(frozen=True)
class Finding:
    """An input that did what none may do; `python -m tests.fuzz --replay KIND SEED` shows it."""

    kind: str
    seed: int
    problem: str


@dataclass
class Tally:
    """What came of the inputs: how many of each kind ended with which exit code, and the slowest."""

    codes: Counter[tuple[str, int]] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")

    @property
    def inputs(self) -> int:
        return sum(self.codes.values())


class Child:
    """The reading process, started anew when an input has ended it."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONHASHSEED": "0"}
        command = [sys.executable, "-m", "tests.fuzz.child", str(folder)]
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
        self._process: subprocess.Popen[str] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True, env=environment
        )
        self._answer(START_S, START_S)

    def examine(self, kind: str, seed: int) -> dict[str, Any]:
        """The answer to one mutant; its `problem` tells of a hang and of an end of the process as well."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{kind} {seed}\n")
        self._process.stdin.flush()
        return self._answer(CPU_LIMIT_S, WALL_LIMIT_S)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._stderr):
            assert pipe is not None
            pipe.close()

    def _answer(self, cpu_limit_s: float, wall_limit_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        watched, begin_s = psutil.Process(self._process.pid), time.monotonic()
        before_s = _cpu_s(watched)
        while not select.select([self._process.stdout], [], [], _POLL_S)[0]:
            if _cpu_s(watched) - before_s > cpu_limit_s or time.monotonic() - begin_s > wall_limit_s:
                return {"code": -2, "problem": f"no answer within {cpu_limit_s:g} s of CPU time", "dead": True}
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._stderr.seek(0)
            last = self._stderr.read().decode("utf-8", "replace")[-2000:]
            return {"code": -3, "problem": f"the process ended with {self._process.returncode}: {last}", "dead": True}
        answer: dict[str, Any] = json.loads(line)
        return answer


def campaign(num_inputs: int, seed: int, kinds: Sequence[str] = tuple(KINDS)) -> Tally:
    """`num_inputs` mutants, the kinds in turn, numbered from `seed` on."""
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="crossdock-fuzz-") as folder:
        child = Child(Path(folder))
        try:
            for number in range(num_inputs):
                kind, this_seed = kinds[number % len(kinds)], seed + number
                answer = child.examine(kind, this_seed)
                tally.codes[kind, answer["code"]] += 1
                tally.slowest = max(tally.slowest, (answer.get("seconds", CPU_LIMIT_S), f"{kind} {this_seed}"))
                if answer["problem"]:
                    tally.findings.append(Finding(kind, this_seed, answer["problem"]))
                if answer.get("dead"):
                    child.close()
                    child = Child(Path(folder))
        finally:
            child.close()
    return tally


def _cpu_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:  # it has ended: the pipe tells
        return 0.0
    return float(times.user + times.system)
