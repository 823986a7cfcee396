"""The process that reads mutants: bounded memory, one answer a line. `python -m tests.fuzz.child FOLDER`, with lines `KIND SEED` on stdin.

An answer is `{code, problem, seconds}`: the exit code, and what was wrong with how it ended, empty where nothing was.
"""

import contextlib
import io
import json
import os
import re
import resource
import shutil
import sys
import time
import traceback
from pathlib import Path
from random import Random

from crossdock.errors import CrossdockError, OutOfMemory
from crossdock.launch.cli import run
from tests.fuzz.kinds import KINDS, good_files

HEADROOM_BYTES = 2 * 2**30
"""What an input of some KB may make the program ask for, beyond what it has when everything is loaded."""
MAX_MESSAGE = 2000
GOOD_CODES = {0, *(kind.exit_code for kind in CrossdockError.__subclasses__())} - {OutOfMemory.exit_code}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def command(kind: str, seed: int) -> tuple[tuple[str, ...], dict[str, bytes]]:
    """The command line and the files of one mutant."""
    rng = Random(f"{kind} {seed}")
    files = KINDS[kind].make(rng)
    return (*rng.choice(KINDS[kind].commands), *KINDS[kind].arguments(rng)), files


def write(files: dict[str, bytes]) -> None:
    """Write the files under the working directory, which is emptied before."""
    for entry in Path().iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for name, data in {**good_files(), **files}.items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def examine(kind: str, seed: int) -> dict[str, object]:
    """Run one mutant through the command line in this process."""
    arguments, files = command(kind, seed)
    write(files)
    out, err = _stream("strict"), _stream("backslashreplace")
    begin_s = time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = run(arguments)
            out.flush()
        except BaseException:
            code, _ = -1, err.write(traceback.format_exc())
    err.flush()
    said = err.buffer.getvalue().decode("utf-8", "replace")
    told = _told(Path(arguments[-1])) if arguments[0] == "status" else None
    return {"code": code, "problem": problem(code, said, told), "seconds": time.process_time() - begin_s}


def problem(code: int, said: str, told: int | None = None) -> str:
    """What is wrong with an ending: a traceback, an exit code that says a bug, no message or one that is unfit for a terminal.

    `told` is the exit code of a run that the command was asked about, and ends with: it may be any.
    """
    lines = [line for line in said.splitlines() if line.startswith("crossdock: error: ")]
    if "Traceback" in said or code not in GOOD_CODES | {told}:
        return f"exit code {code}\n{said[-3000:]}"
    if code not in (0, 67, told) and len(lines) != 1 and not (code in GOOD_CODES and not said):
        return f"exit code {code} with {len(lines)} error lines: {said[-500:]}"
    if len(said) > MAX_MESSAGE:
        return f"a message of {len(said)} characters: {said[:300]}"
    if unfit := _CONTROL.search(said):
        return f"the message holds the control character {unfit[0]!r}: {said[:300]!r}"
    return ""


def _told(run: Path) -> int | None:
    """The exit code that a run's result names, None where it does not."""
    try:
        code = json.loads((run / "result.json").read_bytes())["exit_code"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return code if isinstance(code, int) else None


def _stream(errors: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=errors, write_through=True)


def main(folder: Path) -> None:
    """Answer until stdin ends."""
    os.chdir(folder)
    answers = os.fdopen(os.dup(1), "w", buffering=1)  # what the program prints shall not mix with the answers
    os.dup2(2, 1)
    for kind in KINDS:  # loads everything that any of them needs, so that the limit is one of data alone
        examine(kind, 0)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + HEADROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    answers.write(json.dumps({"ready": os.getpid()}) + "\n")
    for line in sys.stdin:
        kind, seed = line.split()
        answers.write(json.dumps(examine(kind, int(seed))) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
