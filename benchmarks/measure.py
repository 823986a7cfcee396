"""What every benchmark program shares: the machine, interleaved repeats, medians with their spread, and one way to print and save rows.

A program builds rows (flat dictionaries, units in the keys), and ends with `publish(rows, ...)`: a table for people on stdout,
or with `json_only` the same as JSON alone; and, where a path is given, the file `{machine, commit, what, rows}` written atomically.

Timing on a shared machine: wall time says what a user waits for, CPU-seconds (this process, all its threads) say what work was done
and hold when others load the machine. Compare only what ran interleaved in one run: A B C, A B C, ..., never AAA BBB.
"""

import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from crossdock.atomic import write_json

Row = Mapping[str, Any]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Sample:
    """One timed call: seconds on the wall clock and CPU-seconds of this process (all threads, user and system)."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class Spread:
    """Median, lowest, highest and quartiles of `count` repeats of one quantity."""

    median: float
    low: float
    high: float
    quartile_1: float
    quartile_3: float
    count: int

    @staticmethod
    def of(values: Iterable[float]) -> "Spread":
        """Summarise `values`; raises `ValueError` when there are none."""
        ordered = sorted(values)
        if not ordered:
            raise ValueError("no repeats were measured; ask for at least one")
        if len(ordered) == 1:
            quartile_1 = quartile_3 = ordered[0]
        else:
            quartile_1, _, quartile_3 = statistics.quantiles(ordered, n=4, method="inclusive")
        return Spread(statistics.median(ordered), ordered[0], ordered[-1], quartile_1, quartile_3, len(ordered))

    def row(self, name: str) -> dict[str, float]:
        """Flat keys for a table: `name` (the median), `name`_low and `name`_high."""
        return {name: self.median, f"{name}_low": self.low, f"{name}_high": self.high}


def timed(call: Callable[[], object]) -> Sample:
    """Run `call` once and return its wall and CPU time; on CUDA the call must synchronise itself."""
    cpu_begin_s = time.process_time()
    wall_begin_s = time.perf_counter()
    call()
    wall_s = time.perf_counter() - wall_begin_s
    return Sample(wall_s, time.process_time() - cpu_begin_s)


def in_turns(calls: Mapping[str, Callable[[], Result]], repeats: int, warmup: int) -> dict[str, list[Result]]:
    """What each call returns, `repeats` times, taking turns, after `warmup` rounds that do not count: what disturbs one disturbs all alike.

    The order within a round rotates by one each round, so that no call always runs after the same neighbour.
    Result i of all calls belongs to one round (paired).
    """
    names = list(calls)
    results: dict[str, list[Result]] = {name: [] for name in names}
    for round_number in range(-warmup, repeats):
        turn = round_number % len(names)
        for name in names[turn:] + names[:turn]:
            result = calls[name]()
            if round_number >= 0:
                results[name].append(result)
    return results


def interleaved(variants: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, list[Sample]]:
    """Time every variant `repeats` times in turns: see `in_turns`."""
    return in_turns({name: functools.partial(timed, call) for name, call in variants.items()}, repeats, warmup)


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Spread of the ratios of two paired series: the median over rounds of a/b, steadier than the ratio of medians."""
    return Spread.of(above / below for above, below in zip(numerator, denominator, strict=True))


def bootstrap_interval(values: Sequence[float], share: float = 0.95, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The interval that holds the medians of `share` of the resamples of `values` (Efron's percentile bootstrap); repeatable by `seed`."""
    drawn = np.random.default_rng(seed).choice(np.asarray(values), size=(resamples, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def machine() -> dict[str, Any]:
    """What a reader needs to judge the numbers: processor, cores, memory, load, versions, threads. No host name, no paths."""
    description: dict[str, Any] = {
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        description["cuda_device"] = torch.cuda.get_device_name()
        description["cuda"] = torch.version.cuda
    return description


def commit() -> str:
    """The commit of the checkout this file lies in, with `+changes` when tracked files differ; "unknown" outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}+changes" if changes else head


def publish(
    rows: Sequence[Row],
    what: str,
    out: Path | None = None,
    json_only: bool = False,
    columns: Sequence[str] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Print `rows` under the title `what`, save them where `out` is given, and return `{machine, commit, what, rows, **extra}`.

    `columns` chooses and orders what the printed table shows (default: every key of the first row); the JSON always holds every key.
    With `json_only` stdout is the JSON document alone.
    """
    document: dict[str, Any] = {
        "machine": machine(),
        "commit": commit(),
        "what": what,
        **(extra or {}),
        "rows": [dict(row) for row in rows],
    }
    if json_only:
        sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")
    else:
        print_table(rows, what, columns)
    if out is not None:
        write_json(out, document)
    return document


def print_table(rows: Sequence[Row], title: str, columns: Sequence[str] | None = None) -> None:
    """Print `rows` as a table with `columns` (default: every key of the first row); numbers with four significant digits."""
    names = list(columns if columns is not None else rows[0] if rows else ())
    table = Table(title=title, title_justify="left")
    for name in names:
        numeric = all(isinstance(row.get(name), int | float | None) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(cell(row.get(name)) for name in names))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def markdown_table(rows: Sequence[Row], columns: Sequence[str] | None = None) -> str:
    """The same table in Markdown, for `docs/benchmarks`."""
    names = list(columns if columns is not None else rows[0] if rows else ())
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(cell(row.get(name)) for name in names) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def cell(value: Any) -> str:
    """One table cell: a float with four significant digits, nothing for None, everything else as it prints."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True).stdout.strip()
