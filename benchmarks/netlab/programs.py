"""Programs side by side on emulated hosts, to their common end."""

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from crossdock.errors import PeerLost

SHOWN_LINES = 80


@dataclass(frozen=True)
class Program:
    """A command of this machine (which enters a host by itself) and what is added to its environment."""

    arguments: Sequence[str]
    environment: Mapping[str, str]


def together(programs: Sequence[Program], timeout_s: float) -> tuple[str, ...]:
    """Run them side by side to their end; returns each stdout.

    Raises `PeerLost` with the last lines of the one to blame, at the first failure or after `timeout_s`; the rest is then ended.
    """
    with tempfile.TemporaryDirectory(prefix="crossdock-netlab-") as folder, contextlib.ExitStack() as files:
        processes = []
        for number, program in enumerate(programs):
            out = files.enter_context((Path(folder) / f"{number}.out").open("wb"))
            err = files.enter_context((Path(folder) / f"{number}.err").open("wb"))
            environment = {**os.environ, **program.environment}
            processes.append(subprocess.Popen(program.arguments, stdout=out, stderr=err, env=environment))
        try:
            _wait_all(processes, timeout_s, lambda number: _last_lines(Path(folder), number))
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return tuple((Path(folder) / f"{number}.out").read_text(errors="replace") for number in range(len(programs)))


def _wait_all(processes: Sequence["subprocess.Popen[bytes]"], timeout_s: float, describe: Callable[[int], str]) -> None:
    deadline_s = time.monotonic() + timeout_s
    running = dict(enumerate(processes))
    while running:
        for number, process in list(running.items()):
            code = process.poll()
            if code is None:
                continue
            del running[number]
            if code != 0:
                raise PeerLost(f"process {number} of {len(processes)} on the emulated hosts ended with code {code}:\n{describe(number)}")
        if time.monotonic() > deadline_s:
            number = min(running)
            raise PeerLost(
                f"{len(running)} of {len(processes)} processes still ran after {timeout_s:.0f} s; number {number}:\n{describe(number)}"
            )
        time.sleep(0.01)


def _last_lines(folder: Path, number: int) -> str:
    text = "".join((folder / f"{number}.{stream}").read_text(errors="replace") for stream in ("out", "err"))
    return "\n".join(text.splitlines()[-SHOWN_LINES:])
