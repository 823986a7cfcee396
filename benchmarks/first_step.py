"""Time from command to first step under each launcher, beside an empty script and a bare meeting of ranks under the same launcher.

    python -m benchmarks.first_step [--repeats 7] [--out X.json] [--page X.md]      all launchers that this machine has
    python -m benchmarks.first_step --short                                         one repeat, without Ray

`empty`: until a script that does nothing has come to its first line on both ranks. `meeting`: until two ranks have imported torch and
summed one number over gloo, which no trainer can be faster than. `first_step`: until `crossdock train configs/tiny.yaml` has written the
metrics of its first step, which therefore includes importing torch, the meeting, reading the corpus and building the model. A Ray
cluster stands already. The kinds take turns; rows hold medians with the lowest and highest repeat.
"""

import argparse
import contextlib
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.first_step_rank import RANKS
from benchmarks.measure import Spread, in_turns, markdown_table, publish
from benchmarks.ray_head import Head, ray_head
from crossdock.atomic import write_text
from crossdock.errors import CrossdockError, PeerLost

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
KINDS = ("empty", "meeting", "first_step")
TIMEOUT_S = 300.0
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


def _ray_job(head: Head, kind: str, folder: Path) -> list[str]:
    what = _train(folder) if kind == "first_step" else ("python", *_rank(kind, folder, "ray"))
    return [str(BIN / "ray"), "job", "submit", "--address", head.address, "--working-dir", str(ROOT), "--", *what]


def seconds(start: Start, kind: str, environment: Mapping[str, str]) -> float:
    """Seconds from the command to the mark of the last rank, or of the first step. Raises `PeerLost` where the command fails or hangs."""
    with tempfile.TemporaryDirectory(prefix="crossdock-first-step-") as text:
        folder = Path(text)
        begin_s = time.time()
        command = start(kind, folder)
        try:
            ended = subprocess.run(command, cwd=ROOT, env=dict(environment), capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired as late:
            raise PeerLost(f"{' '.join(command)} did not end within {TIMEOUT_S:g} s") from late
        if ended.returncode != 0:
            last_lines = "\n".join((ended.stdout + ended.stderr).splitlines()[-20:])
            raise PeerLost(f"{' '.join(command)} ended with code {ended.returncode}: {last_lines}")
        if kind == "first_step":
            return (folder / "run" / "metrics.jsonl").stat().st_mtime - begin_s  # it holds one step
        return max(float((folder / f"rank-{rank}").read_text()) for rank in range(RANKS)) - begin_s


@contextlib.contextmanager
def launchers(names: Sequence[str]) -> Iterator[dict[str, tuple[Start, Mapping[str, str]]]]:
    """How each launcher starts things, and in which environment."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment = {"OMP_NUM_THREADS": "1", **environment}
    with contextlib.ExitStack() as clusters:
        found: dict[str, tuple[Start, Mapping[str, str]]] = {}
        for name in names:
            if name == "ray job":
                head = clusters.enter_context(ray_head(RANKS + 2, with_token=False))
                found[name] = (functools.partial(_ray_job, head), head.environment)
            else:
                found[name] = (PLAIN[name], environment)
        yield found


PLAIN: dict[str, Start] = {"alone": _alone, "torchrun": _torchrun, "mpirun": _mpirun}


def available() -> list[str]:
    """Launchers that this machine has."""
    return ["alone", "torchrun", *(["mpirun"] if (BIN / "mpirun").exists() else []), *(["ray job"] if (BIN / "ray").exists() else [])]


def measure(names: Sequence[str], repeats: int, warmup: int) -> list[dict[str, Any]]:
    """A row for each launcher."""
    with launchers(names) as starts:
        calls = {
            f"{name}/{kind}": functools.partial(seconds, start, kind, environment)
            for name, (start, environment) in starts.items()
            for kind in KINDS
        }
        samples = in_turns(calls, repeats, warmup)
    rows = []
    for name in names:
        spreads = {kind: Spread.of(samples[f"{name}/{kind}"]) for kind in KINDS}
        pairs = zip(samples[f"{name}/first_step"], samples[f"{name}/meeting"], strict=True)
        above = Spread.of(step_s - meeting_s for step_s, meeting_s in pairs)
        row: dict[str, Any] = {"launcher": name, "repeats": repeats}
        for kind, spread in spreads.items():
            row |= spread.row(kind)
        rows.append({**row, "above_meeting": above.median})
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
`above_meeting`: median over the repeats of first step less meeting, what Crossdock itself adds to what no trainer can avoid.
The Ray cluster stands already; `empty` and `meeting` are a driver with {RANKS} tasks there, submitted like the run.

{markdown_table(document["rows"], COLUMNS)}"""


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
        names = [name for name in names if name != "ray job"]
    load_at_start = round(os.getloadavg()[0], 2)
    try:
        rows = measure(names, 1 if options.short else options.repeats, 0 if options.short else options.warmup)
    except CrossdockError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    extra = {"load_at_start": load_at_start, "warmup": options.warmup}
    document = publish(rows, "seconds from command to first step", options.out, options.json, COLUMNS, extra)
    if options.page is not None:
        write_text(options.page, page(document, options.page.stem))
    return 0


if __name__ == "__main__":
    sys.exit(main())
