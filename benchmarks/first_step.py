"""Time from command to first step under each launcher, beside an empty script and a bare meeting of ranks under the same launcher.

    python -m benchmarks.first_step [--repeats 7] [--out X.json] [--page X.md]      all launchers that this machine has
    python -m benchmarks.first_step --launchers "alone,launch ray" --repeats 3
    python -m benchmarks.first_step --short                                         one repeat, without Ray

`empty`: until a script that does nothing has come to its first line on both ranks. `meeting`: until two ranks have imported torch and
summed one number over gloo, which no trainer can be faster than. `first_step`: until `crossdock train configs/tiny.yaml` has written the
metrics of its first step, which therefore includes importing torch, the meeting, reading the corpus and building the model. A Ray
cluster stands already: `launch ray` is a command on one of its nodes, `ray job` one that is submitted to it. The kinds take turns; rows
hold medians with the lowest and highest repeat. A command that does not end in time is ended with everything that it started.
"""

import argparse
import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.command_line import one_line_errors
from benchmarks.first_step_rank import RANKS
from benchmarks.measure import Spread, in_turns, markdown_table, publish
from benchmarks.ray_head import Head, ray_head
from crossdock.atomic import write_text
from crossdock.errors import PeerLost

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
KINDS = ("empty", "meeting", "first_step")
TIMEOUT_S, GRACE_S = 300.0, 10.0
TRAIN = ("crossdock", "train", "configs/tiny.yaml", "train.steps=1", "capture.steps=0", "train.eval_batches=0", "checkpoint.at_end=false")
COLUMNS = (
    "launcher",
    *KINDS,
    "empty_low",
    "empty_high",
    "meeting_low",
    "meeting_high",
    "first_step_low",
    "first_step_high",
    "above_empty",
    "above_meeting",
)

Start = Callable[[str, Path], list[str]]
"""(kind, folder) -> the command that starts it; a training run writes into `folder / run`."""


def _rank(kind: str, folder: Path, *where: str) -> tuple[str, ...]:
    return ("-m", "benchmarks.first_step_rank", kind, str(folder), *where)


def _train(folder: Path) -> tuple[str, ...]:
    return (*TRAIN, f"parallel.expert={RANKS}", f"run.dir={folder / 'run'}")


def _alone(kind: str, folder: Path) -> list[str]:
    return [sys.executable, *(("-m", *_train(folder)) if kind == "first_step" else _rank(kind, folder, "here"))]


def _torchrun(kind: str, folder: Path) -> list[str]:
    what = ("-m", *_train(folder)) if kind == "first_step" else _rank(kind, folder)
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), *what]


def _mpirun(kind: str, folder: Path) -> list[str]:
    what = ("-m", *_train(folder)) if kind == "first_step" else _rank(kind, folder)
    return [str(BIN / "mpirun"), "-n", str(RANKS), sys.executable, *what]


def _launch_ray(head: Head, kind: str, folder: Path) -> list[str]:
    if kind != "first_step":
        return [sys.executable, *_rank(kind, folder, "ray")]
    return [sys.executable, "-m", "crossdock", "launch", "ray", *_train(folder)[2:]]


def _ray_job(head: Head, kind: str, folder: Path) -> list[str]:
    what = _train(folder) if kind == "first_step" else ("python", *_rank(kind, folder, "ray"))
    return [str(BIN / "ray"), "job", "submit", "--address", head.address, "--working-dir", str(ROOT), "--", *what]


def seconds(start: Start, kind: str, environment: Mapping[str, str], timeout_s: float = TIMEOUT_S) -> float:
    """Seconds from the command to the mark of the last rank, or of the first step. Raises `PeerLost` where the command fails or hangs."""
    with tempfile.TemporaryDirectory(prefix="crossdock-first-step-") as text:
        folder = Path(text)
        begin_s = time.time()
        code, said = ended(start(kind, folder), environment, folder / "said.log", timeout_s)
        if code != 0:
            raise PeerLost(f"{' '.join(start(kind, folder))} {code}: {said}")
        if kind == "first_step":
            return (folder / "run" / "metrics.jsonl").stat().st_mtime - begin_s  # it holds one step
        return max(float((folder / f"rank-{rank}").read_text()) for rank in range(RANKS)) - begin_s


def ended(command: Sequence[str], environment: Mapping[str, str], log: Path, timeout_s: float) -> tuple[int | str, str]:
    """Run to the end: 0, or in words how else it ended, and its last lines. After `timeout_s` nothing that it started is left.

    Ranks lead sessions of their own, so that ending the command's would miss them; they are its descendants, and known before it ends.
    """
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=dict(environment), stdout=file, stderr=file, start_new_session=True)
        try:
            code: int | str = process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            code = f"did not end within {timeout_s:g} s"
        finally:
            _end(process)
    last_lines = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
    return f"ended with code {code}" if isinstance(code, int) and code else code, last_lines


def _end(process: "subprocess.Popen[bytes]") -> None:
    """In order first: a driver on a cluster takes its actors with it, a submitted job is another's descendant. Then by force."""
    if process.poll() is not None:
        return
    descendants = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=GRACE_S)
    for left in descendants:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
    process.kill()
    process.wait()
    psutil.wait_procs(descendants, timeout=GRACE_S)  # memory takes a moment to go


@contextlib.contextmanager
def stopped_in_order() -> Iterator[None]:
    """Within the block SIGTERM and Ctrl-C end what was started, a Ray head as well, and then this process; further ones are not heard."""

    def stop(number: int, frame: object) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        sys.exit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def launchers(names: Sequence[str]) -> Iterator[dict[str, tuple[Start, Mapping[str, str]]]]:
    """How each launcher starts things, and in which environment."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment = {"OMP_NUM_THREADS": "1", **environment}
    with contextlib.ExitStack() as clusters:
        found: dict[str, tuple[Start, Mapping[str, str]]] = {name: (PLAIN[name], environment) for name in names if name in PLAIN}
        if on_ray := [name for name in names if name in ON_RAY]:
            head = clusters.enter_context(ray_head(RANKS + 2, with_token=False))
            there = {**head.environment, "RAY_ADDRESS": head.cluster}
            found |= {name: (functools.partial(ON_RAY[name], head), there) for name in on_ray}
        yield found


PLAIN: dict[str, Start] = {"alone": _alone, "torchrun": _torchrun, "mpirun": _mpirun}
ON_RAY: dict[str, Callable[[Head, str, Path], list[str]]] = {"launch ray": _launch_ray, "ray job": _ray_job}


def available() -> list[str]:
    """Launchers that this machine has."""
    return ["alone", "torchrun", *(["mpirun"] if (BIN / "mpirun").exists() else []), *(ON_RAY if (BIN / "ray").exists() else [])]


def measure(names: Sequence[str], repeats: int, warmup: int) -> list[dict[str, Any]]:
    """A row for each launcher."""
    with stopped_in_order(), launchers(names) as starts:
        calls = {
            f"{name}/{kind}": functools.partial(seconds, start, kind, environment)
            for name, (start, environment) in starts.items()
            for kind in KINDS
        }
        samples = in_turns(calls, repeats, warmup)
    rows = []
    for name in names:
        spreads = {kind: Spread.of(samples[f"{name}/{kind}"]) for kind in KINDS}
        row: dict[str, Any] = {"launcher": name, "repeats": repeats}
        for kind, spread in spreads.items():
            row |= spread.row(kind)
        for kind in ("empty", "meeting"):
            pairs = zip(samples[f"{name}/first_step"], samples[f"{name}/{kind}"], strict=True)
            row[f"above_{kind}"] = Spread.of(step_s - kind_s for step_s, kind_s in pairs).median
        rows.append(row)
    return rows


def page(document: Mapping[str, Any], name: str) -> str:
    """The results page."""
    host, repeats = document["machine"], document["rows"][0]["repeats"]
    names = ",".join(row["launcher"] for row in document["rows"])
    options = f'--launchers "{names}" --repeats {repeats} --warmup {document["warmup"]}'
    return f"""# From command to first step

    python -m benchmarks.first_step {options} --out {name}.json --page {name}.md

Commit {document["commit"]}. Machine: {host["processor"]}, {host["cores"]} cores, {host["system"]}, Python {host["python"]},
torch {host["torch"]}. Load when it began: {document["load_at_start"]:g}, when it ended: {host["load_average_1min"]:g}; a load near or above
{host["cores"]} means that others computed beside it, and then the columns can be compared with one another, and with nothing else.
Raw numbers: [{name}.json]({name}.json).

Seconds from the command, {RANKS} ranks, medians of {repeats} repeats in turns, with lowest and highest.
`empty`: a script that does nothing has begun on both ranks. `meeting`: both have imported torch and summed a number over gloo.
`first_step`: `crossdock train configs/tiny.yaml` has written the metrics of its first step: corpus read, model built, one step made.
`above_empty`, `above_meeting`: medians over the repeats of first step less the other; the second is what Crossdock itself adds to what
no trainer can avoid. `alone` may come out below 0: the ranks are forks of a process that imports torch once, while the bare meeting
imports it in every rank.
The Ray cluster stands already; `empty` and `meeting` are a driver with {RANKS} tasks there, started (`launch ray`) or submitted (`ray job`)
like the run.

{markdown_table(document["rows"], COLUMNS)}"""


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_step", description=__doc__.splitlines()[0])
    parser.add_argument("--launchers", help="separated by commas; all that this machine has where left out")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=1, help="rounds that do not count")
    parser.add_argument("--short", action="store_true", help="one repeat, and no Ray")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    names = options.launchers.split(",") if options.launchers else available()
    if unknown := set(names) - set(available()):
        parser.error(f"no launcher {', '.join(sorted(unknown))} here; choose from {', '.join(available())}")
    if options.short:
        names = [name for name in names if name in PLAIN]
    load_at_start = round(os.getloadavg()[0], 2)
    rows = measure(names, 1 if options.short else options.repeats, 0 if options.short else options.warmup)
    extra = {"load_at_start": load_at_start, "warmup": options.warmup}
    document = publish(rows, "seconds from command to first step", options.out, options.json, COLUMNS, extra)
    if options.page is not None:
        write_text(options.page, page(document, options.page.stem))
    return 0


if __name__ == "__main__":
    sys.exit(main())
