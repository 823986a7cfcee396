"""How a run looks on a terminal: a log line for every step, above a progress bar where somebody watches."""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from crossdock.launch.config import RunConfig
from crossdock.runtime.training.metrics import readable_bytes
from crossdock.runtime.training.training import Progress as Watcher
from crossdock.runtime.training.training import Silent


class Lines:
    """Prints steps and events on stderr, so that stdout stays free for results; `bar` is drawn below them."""

    def __init__(self, console: Console, bar: Progress, task: TaskID) -> None:
        self.console, self.bar, self.task = console, bar, task

    def step(self, row: Mapping[str, Any], line: str) -> None:
        """A finished step."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)
        self.bar.update(self.task, completed=row["step"], loss=f"loss {row['loss']:.3f}")

    def event(self, event: str, details: Mapping[str, Any]) -> None:
        """An event, where people care for it."""
        if (line := sentence(event, details)) is not None:
            self.console.print(line, style="bold", highlight=False, markup=False, soft_wrap=True)

    def table(self, text: str) -> None:
        """A table that somebody asked for."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _payback(details: Mapping[str, Any]) -> str:
    """When the moves of a re-planning pay back, and what follows."""
    steps = details["payback_steps"]
    when = "never pay back" if steps is None else f"pay back after {steps} steps"
    return f"{details['moves']} moves {when}" + ("" if details["accepted"] else f", not within {details['limit_steps']}: the plan stays")


def sentence(event: str, details: Mapping[str, Any]) -> str | None:
    """An event in words; None for those that only files need."""
    match event:
        case "replan":
            return f"-- planned by {details['method']} in {details['seconds']:.1f} s ({details['stopped_by']}); {_payback(details)}"
        case "plan_applied" if details["step"] or details["moves"]:
            return f"-- {details['moves']} experts moved, {readable_bytes(details['bytes'])} with their optimizer state"
        case "checkpoint_saved":
            return f"-- checkpoint saved in {details['path']}"
        case "checkpoint_passed_over":
            return f"-- damaged checkpoint passed over: {details['message']}"
        case "choice":
            layers = details["layers"]
            changed = sum(layer["changed"] for layer in layers)
            return f"-- strategies chosen after step {details['step']} ({details['why']}), new for {changed} of {len(layers)} layers"
        case "profiled":
            step, asked = details["step"], details["asked_step"]
            early = f"; it ends with step {step}, the run's last, and not with {asked}" if step < asked else ""
            return f"-- profile written to {details['path']}{early}"
        case "resumed":
            return f"-- resumed after step {details['step']} from {details['path']}"
    return None


@contextlib.contextmanager
def watched(config: RunConfig, rank: int) -> Iterator[Watcher]:
    """What rank 0 tells its steps to while the block runs; the other ranks stay silent."""
    if rank != 0:
        yield Silent()
        return
    console = Console(file=sys.stderr)
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield Lines(console, bar, bar.add_task("training", total=config.train.steps, loss=""))
