"""A run's figures as Ray metrics, which Prometheus collects and Grafana draws (`configs/grafana-dashboard.json`)."""

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GAUGES = {
    "step": "Optimizer steps done",
    "loss": "Training loss, mean over the ranks",
    "tokens_per_s": "Tokens per second of the whole run",
    "step_s": "Seconds of an optimizer step",
    "exposed_s": "Seconds of a step in which movement was waited for",
    "bytes_same_node": "Bytes moved within nodes in a step",
    "bytes_other_node": "Bytes moved between nodes in a step",
    "load_max_over_mean": "Tokens on the busiest device over the mean",
    "expert_load_max_over_mean": "Tokens of the busiest expert over the mean",
    "dropped": "Share of the choices that capacity dropped",
    "memory_bytes": "Resident memory of rank 0",
}
"""Keys of `metrics.jsonl` that become `crossdock_KEY`, and what they mean. One label, the run: nothing per rank or expert."""

_LONGEST_ROW_BYTES = 65_536


@contextlib.contextmanager
def told_to_ray(directory: Path, every_s: float = 2.0) -> Iterator[None]:
    """While the block runs, the newest line of the run's `metrics.jsonl` is Ray's."""
    from ray.util.metrics import Gauge

    gauges = {name: Gauge(f"crossdock_{name}", description=about, tag_keys=("run",)) for name, about in GAUGES.items()}
    ended = threading.Event()

    def tell() -> None:
        for name, value in last_row(directory / "metrics.jsonl").items():
            if name in gauges and isinstance(value, int | float):
                gauges[name].set(float(value), tags={"run": directory.name})

    def follow() -> None:
        while not ended.wait(every_s):
            tell()
        tell()

    thread = threading.Thread(target=follow, daemon=True, name="metrics")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def last_row(path: Path) -> dict[str, Any]:
    """The last line of a growing file of JSON objects, of which only the end is read; empty where it is not there, or half written."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LONGEST_ROW_BYTES))
            lines = file.read().splitlines()
        value = json.loads(lines[-1]) if lines else {}
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
