"""A rank that does as it is told, for the tests of `local/children.py`: `python -m tests.launch.scripted_rank DIR SCRIPT OUTCOME`.

SCRIPT names, for every rank, one act: `ok`, `wait` (until it is ended), `hang` (deaf to SIGINT and SIGTERM), `save` (exit 75 on SIGTERM),
or a number: `-9` (kills itself so), `79` (reports that exit code), `76` (waits for another to go, then says that it lost its peer).
With `!` behind it, it reports and does not end.
"""

import os
import signal
import sys
import time
from pathlib import Path

from crossdock.launch.local.children import tie_to_parent, write_outcome
from crossdock.launch.ranks.worker_env import worker_env


def main(folder: Path, script: str, outcome: Path) -> int:
    tie_to_parent()
    env = worker_env()
    assert env is not None
    assert env.launcher == "local"
    act = script.split(",")[env.rank]
    stays, act = act.endswith("!"), act.rstrip("!")
    if act == "hang":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if act == "save":
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(_report(outcome, 75, "saved")))
    (folder / f"rank-{env.rank}").write_text(f"{os.getpid()} {os.environ['OMP_NUM_THREADS']}")
    while len(list(folder.glob("rank-*"))) < env.world_size:
        time.sleep(0.01)
    if act in ("wait", "hang", "save"):
        time.sleep(60)
    code = 0 if act == "ok" else int(act)
    if code < 0:
        os.kill(os.getpid(), -code)
    if code == 76:
        time.sleep(0.5)
    _report(outcome, code, "" if code == 0 else f"rank {env.rank} reports {code}")
    if stays:
        time.sleep(60)
    return code


def _report(outcome: Path, code: int, message: str) -> int:
    write_outcome(outcome, int(os.environ["CROSSDOCK_RANK"]), code, message)
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])))
