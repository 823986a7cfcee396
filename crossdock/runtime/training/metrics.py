"""What a run writes down: the metrics and their units, one JSON line and one console line per step, events, the run directory."""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossdock import atomic
from crossdock.errors import IoFailure


@dataclass(frozen=True)
class Metric:
    """A number of one step: its unit and its meaning."""

    unit: str
    meaning: str


METRICS: dict[str, Metric] = {
    "step": Metric("1", "number of the optimizer step, from 1"),
    "epoch": Metric("1", "epoch that the step's first sequence belongs to, from 0"),
    "tokens": Metric("1", "tokens of the global batch"),
    "loss": Metric("nat", "mean cross-entropy per token over the global batch"),
    "grad_norm": Metric("1", "global gradient norm over dense and expert parameters, before clipping"),
    "lr": Metric("1", "learning rate of the update"),
    "tokens_per_s": Metric("1/s", "tokens of the global batch over the step's seconds"),
    "step_s": Metric("s", "the whole step on rank 0: data, forward, backward, reduction, update"),
    "data_s": Metric("s", "reading the batch, mean over ranks"),
    "forward_s": Metric("s", "forward passes, mean over ranks"),
    "backward_s": Metric("s", "backward passes, mean over ranks"),
    "reduce_s": Metric("s", "blocked in gradient reduction after the backward pass, mean over ranks"),
    "update_s": Metric("s", "norm, clipping and optimizer update on rank 0"),
    "exposed_s": Metric("s", "blocked in waits for dispatched and combined tokens, mean over ranks"),
    "bytes_same_device": Metric("B", "payload of token rows whose expert lives on their own device, all ranks, four directions"),
    "bytes_same_node": Metric("B", "payload of token rows sent inside a node, all ranks, four directions"),
    "bytes_other_node": Metric("B", "payload of token rows sent between nodes, all ranks, four directions"),
    "load_max_over_mean": Metric("1", "assignments of the busiest device over the mean device, mean over layers"),
    "expert_load_max_over_mean": Metric("1", "assignments of the busiest expert over the mean expert, mean over layers"),
    "dropped": Metric("1", "share of assignments dropped for capacity"),
    "bytes_as_read_same_node": Metric("B", "with homing: bytes_same_node, had every rank kept the sequences that it reads without homing"),
    "bytes_as_read_other_node": Metric(
        "B", "with homing: bytes_other_node, had every rank kept the sequences that it reads without homing"
    ),
    "homing_saved": Metric("1", "share of the cost of copies (link seconds) that homes saved against sequences as read, counted"),
    "homing_saved_forecast": Metric("1", "the same by the forecast, before the step"),
    "homing_error": Metric("1", "cost of copies by the forecast over the counted cost, less 1"),
    "memory_bytes": Metric("B", "peak memory of rank 0: allocated on CUDA, resident on CPU"),
    "plan": Metric("-", "first twelve digits of the plan's hash"),
    "eval_loss": Metric("nat", "mean cross-entropy per token on held-out text; on evaluation steps"),
}
"""Every metric but the auxiliary losses, which are named `loss_<name>` (nat, scaled as they enter the total)."""


def describe(name: str) -> Metric:
    """The unit and meaning of a metric; `KeyError` for names that no table knows."""
    if name not in METRICS and name.startswith("loss_"):
        return Metric("nat", f"auxiliary loss {name.removeprefix('loss_')}, scaled by its coefficient, mean over ranks and layers summed")
    return METRICS[name]


class RunDirectory:
    """A run's folder, written by rank 0 alone; appends are whole lines, every other file is replaced atomically."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise IoFailure(f"cannot make the run directory {path}: {error.strerror}; set run.dir to a place that is writable") from error

    @property
    def config(self) -> Path:
        return self.path / "config.resolved.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "env.json"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def choices(self) -> Path:
        return self.path / "choices.jsonl"

    @property
    def trace(self) -> Path:
        return self.path / "trace.npz"

    @property
    def topology(self) -> Path:
        return self.path / "topology.yaml"

    @property
    def workload(self) -> Path:
        return self.path / "workload.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def stacks(self) -> Path:
        """Where ranks stood when one was lost."""
        return self.path / "stacks"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def write_metrics(self, row: Mapping[str, Any]) -> None:
        """Append one step; unknown names are our own bug (`KeyError`)."""
        for name in row:
            describe(name)
        _append(self.metrics, row)

    def write_event(self, event: str, **details: Any) -> None:
        """Append one event with the wall-clock time (s since 1970)."""
        _append(self.events, {"time": round(time.time(), 3), "event": event, **details})

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Replace `result.json`."""
        atomic.write_json(self.result, finite(result))

    def start_anew(self, keep_history: bool) -> None:
        """Take away the result of an earlier start, and unless `keep_history` its metrics, traces and events, but for those of losses:
        they tell why this start is not the first."""
        history = [self.metrics, self.choices, self.trace, self.topology, self.workload, self.report]
        stale = [self.result] if keep_history else [self.result, *history]
        for path in stale:
            path.unlink(missing_ok=True)
        if not keep_history and self.events.exists():
            losses = [line for line, row in _rows(self.events) if row.get("event") in ("restart", "rank_lost")]
            atomic.write_text(self.events, "".join(line + "\n" for line in losses))

    def forget_after(self, step: int) -> None:
        """Drop the metric lines of steps after `step`: a resumed run writes them anew, and a torn last line goes too."""
        if not self.metrics.exists():
            return
        kept = [line for line, row in _rows(self.metrics) if row.get("step", 0) <= step]
        atomic.write_text(self.metrics, "".join(line + "\n" for line in kept))


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a file of JSON objects, each with its object; torn ones are left out."""
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield line, row


def finite(value: Any) -> Any:
    """The same JSON value with NaN and infinities as null, which JSON cannot say otherwise."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _append(path: Path, value: Mapping[str, Any]) -> None:
    line = json.dumps(finite(value), allow_nan=False) + "\n"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            before_bytes = os.fstat(descriptor).st_size
            written = os.write(descriptor, line.encode())  # one write, so that readers never see half a line of a living run
            if written != len(line.encode()):
                os.ftruncate(descriptor, before_bytes)  # a full disk took a part of it
        finally:
            os.close(descriptor)
    except OSError as error:
        raise IoFailure(f"cannot write {path}: {error.strerror}; free space or choose another run.dir") from error
    if written != len(line.encode()):
        raise IoFailure(f"cannot write {path}: {written} of {len(line)} bytes fitted; free space or choose another run.dir")


def console_line(row: Mapping[str, Any], total_steps: int) -> str:
    """One step for people: loss, speed, moved bytes, balance, exposed communication."""
    remote_bytes = row["bytes_same_node"] + row["bytes_other_node"]
    parts = [
        f"step {row['step']:>{len(str(total_steps))}}/{total_steps}",
        f"loss {row['loss']:.4f}",
        f"norm {row['grad_norm']:.2f}",
        f"lr {row['lr']:.2e}",
        f"{row['tokens_per_s']:,.0f} tokens/s",
        f"moved {readable_bytes(remote_bytes)} ({readable_bytes(row['bytes_other_node'])} between nodes)",
        f"load {row['load_max_over_mean']:.2f}",
        f"exposed {row['exposed_s'] * 1e3:.1f} of {row['step_s'] * 1e3:.0f} ms",
    ]
    if row.get("dropped"):
        parts.append(f"dropped {row['dropped']:.2%}")
    if "eval_loss" in row:
        parts.append(f"held-out loss {row['eval_loss']:.4f}")
    return "  ".join(parts)


def readable_bytes(number: float) -> str:
    """`1.5 MiB`; for people, never for files."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number) < 1024 or unit == "GiB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    raise AssertionError
