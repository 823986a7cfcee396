"""`crossdock demo`: `crossdock train demo` with a table at the end that holds predictions against what was counted and measured."""

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from crossdock.errors import UsageError
from crossdock.launch import start
from crossdock.launch.config import read_config
from crossdock.launch.local.nursery import Nursery
from crossdock.launch.request import Request
from crossdock.placement.records.topology import LINK_CLASSES
from crossdock.runtime.training.metrics import RunDirectory, readable_bytes


def run_demo(out: Path, overrides: Sequence[str], as_json: bool, nursery: Nursery | None = None) -> int:
    """Run the demo into the directory `out`, in place of any earlier run there; returns the exit code."""
    config = read_config(Path("demo"), (f"run.dir={json.dumps(str(out))}", *overrides))
    _remove_earlier(out)
    result = start.run(Request("train", config), nursery)
    if as_json or result.exit_code != 0:
        print(json.dumps(result.as_json()), flush=True)
        return result.exit_code
    show(result.fields, RunDirectory(out), Console(file=sys.stdout))
    return 0


def _remove_earlier(out: Path) -> None:
    """Raises `UsageError` for a folder that is not a run's: nothing else is ever deleted."""
    if not out.exists() or not any(out.iterdir() if out.is_dir() else [out]):
        return
    if not (out / "config.resolved.yaml").is_file():
        raise UsageError(f"{out} exists and holds no run of Crossdock; choose another place with --out")
    shutil.rmtree(out)


def show(fields: Mapping[str, Any], directory: RunDirectory, console: Console) -> None:
    """Print what the run's two recorded windows say: before the experts moved, and after."""
    before, after = fields["before"], fields
    table = Table(title="What was predicted, and what came true", title_justify="left", caption_justify="left")
    for heading in ("", "", "before", "after"):
        table.add_column(heading, justify="right" if heading else "left")
    steps = after["bytes"]["steps"]
    for name in LINK_CLASSES:
        kinds = {"counted": "bytes counted", "predicted": "replayed (must be equal)", "forecast": "forecast by the plan"}
        for kind, words in kinds.items():
            cells = ["" if window["bytes"][kind] is None else f"{window['bytes'][kind][name]:,}" for window in (before, after)]
            table.add_row(name.replace("_", " ") if kind == "counted" else "", words, *cells, end_section=kind == "forecast")
    for kind, words in (("measured_s", "seconds measured"), ("predicted_s", "predicted before the move")):
        cells = ["" if window["step_time"][kind] is None else f"{window['step_time'][kind]:.4f}" for window in (before, after)]
        table.add_row("step" if kind == "measured_s" else "", words, *cells, end_section=kind == "predicted_s")
    table.add_row("load", "busiest device over mean", f"{before['load_max_over_mean']:.3f}", f"{after['load_max_over_mean']:.3f}")
    table.add_row("plan", "", before["plan"]["method"], after["plan"]["method"])
    console.print()
    console.print(table)
    console.print(_verdict(before, after, steps), highlight=False)
    console.print(
        f"Loss {fields['loss']:.3f} after {fields['reached_step']} steps, {fields['eval_loss']:.3f} on held-out text; "
        f"{fields['tokens_per_s']:,.0f} tokens/s, {fields['moves']} experts moved.",
        highlight=False,
    )
    files = sorted(path.name for path in directory.path.iterdir() if not path.name.startswith("."))
    console.print(f"Files: {', '.join(files)} in {directory.path}", highlight=False, soft_wrap=True)
    console.print(
        f"Next: crossdock plan compare --trace {directory.trace} --topology 2x1-local --workload {directory.config}",
        soft_wrap=True,
    )


def _verdict(before: Mapping[str, Any], after: Mapping[str, Any], steps: int) -> str:
    equal = all(window["bytes"]["counted"] == window["bytes"]["predicted"] for window in (before, after))
    counted, forecast = (sum(after["bytes"][kind][name] for name in LINK_CLASSES[1:]) for kind in ("counted", "forecast"))
    time = after["step_time"]
    return (
        f"Over {steps} recorded steps: counted bytes {'equal' if equal else 'DIFFER from'} the replayed ones to the byte; "
        f"the forecast of moved bytes ({readable_bytes(counted)}) is off by {abs(forecast / counted - 1):.1%}, "
        f"that of the step's time by {abs(time['predicted_s'] / time['measured_s'] - 1):.1%}."
    )
