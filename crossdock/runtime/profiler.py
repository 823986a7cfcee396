"""Profiling: named spans in PyTorch's profiler, and a Chrome trace of some steps with every flight of tokens drawn beside the operators.

    with span("experts"):                      free while nobody profiles
        y = bank(rows, counts)
    mark_backward("experts", y, rows)          the same span in the backward pass

Spans are route, dispatch, experts, combine and attention; in a trace they stand as `crossdock::<name>` and `crossdock::<name> backward`.

`crossdock train CONFIG --profile-steps 3:5` writes `trace-rank<r>.json` into the run directory, one file a rank; open it in Perfetto or
chrome://tracing. The flights come from the ledger: what was in flight, beside what was computed meanwhile.
"""

import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import pydantic
import torch
import torch.autograd.profiler as torch_profiler
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from crossdock import atomic
from crossdock.errors import BadConfig
from crossdock.runtime.transport.exchange import Pending, T_co
from crossdock.runtime.transport.ledger import Flight
from crossdock.runtime.transport.mesh import Mesh
from crossdock.strict_yaml import StrictModel

_NOTHING = contextlib.nullcontext()


class ProfileConfig(StrictModel):
    """Which steps to profile; none where left out."""

    first: int | None = pydantic.Field(default=None, ge=1)
    """First profiled step, counted from 1 as in metrics.jsonl."""
    last: int | None = pydantic.Field(default=None, ge=1)
    """Last profiled step; the first alone where left out. Where it comes after the end of the run, the profile ends with that."""

    @pydantic.model_validator(mode="after")
    def _cross_check(self) -> Self:
        if self.last is not None and (self.first is None or self.last < self.first):
            raise BadConfig(f"profile.first {self.first} and profile.last {self.last} name no steps; choose first <= last, both from 1")
        return self

    @property
    def last_step(self) -> int | None:
        """The last profiled step, or None."""
        return self.first if self.last is None else self.last

    def until(self, step: int) -> "ProfileConfig":
        """The same steps, as far as `step`, the last that there is."""
        return self if self.last_step is None or self.last_step <= step else self.model_copy(update={"last": step})


def is_profiling() -> bool:
    """Whether a profiler of this process is recording; one look at a flag that torch keeps."""
    return bool(torch_profiler._is_profiler_enabled)


def span(name: str) -> contextlib.AbstractContextManager[Any]:
    """A named span of the trace around a `with` block; nothing at all while nobody profiles."""
    return record_function(f"crossdock::{name}") if is_profiling() else _NOTHING


def spanned(pending: Pending[T_co], name: str) -> Pending[T_co]:
    """`pending`, whose wait is a span of that name while somebody profiles."""
    return _Spanned(pending, name) if is_profiling() else pending


def mark_backward(name: str, output: Tensor, source: Tensor) -> None:
    """Span `<name> backward` from the moment at which the gradient of `output` is known to that of `source`, where both have one.

    Call it after the forward computation from `source` to `output`. `source` must have no other use, or the span ends with the last.
    """
    if not (is_profiling() and output.requires_grad and source.requires_grad):
        return
    open_spans: list[Any] = []

    def begin(_grad: Tensor) -> None:
        entered = record_function(f"crossdock::{name} backward")
        entered.__enter__()
        open_spans.append(entered)

    def end(_grad: Tensor) -> None:
        if open_spans:
            open_spans.pop().__exit__(None, None, None)

    output.register_hook(begin)
    source.register_hook(end)


class _Spanned:
    def __init__(self, pending: Pending[Any], name: str) -> None:
        self._pending, self._name = pending, name

    def wait(self) -> Any:
        with span(self._name):
            return self._pending.wait()


class Profiler:
    """Profiles the steps of a `ProfileConfig` on this rank; mutable. Call `before` and `after` around every step."""

    def __init__(self, config: ProfileConfig, mesh: Mesh, folder: Path) -> None:
        self.config, self.mesh = config, mesh
        self.path = folder / f"trace-rank{mesh.rank}.json"
        self._torch: Any = None
        self._flights: list[Flight] = []
        self._unix_s = 0.0

    def before(self, step: int) -> None:
        """Begin, where `step` (from 1) is the first to be profiled, or the first of them that a resumed run comes to."""
        first, last = self.config.first, self.config.last_step
        if self._torch is not None or first is None or last is None or not first <= step <= last:
            return
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self.mesh.device.type == "cuda" else [])
        self._torch = profile(activities=activities)
        self._torch.start()
        self._unix_s = time.time() - time.perf_counter()

    def after(self, step: int, flights: Sequence[Flight]) -> Path | None:
        """Note the step's flights; after the last one write the trace and say where. Raises `IoFailure`."""
        if self._torch is None:
            return None
        self._flights.extend(flights)
        return self.close() if step == self.config.last_step else None

    def close(self) -> Path | None:
        """End a profile that is under way and write what there is; also for a run that is stopped early. Raises `IoFailure`."""
        if self._torch is None:
            return None
        running, self._torch = self._torch, None
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize(self.mesh.device)
        running.stop()
        with atomic.replacing(self.path) as aside:
            running.export_chrome_trace(str(aside))
            trace = json.loads(aside.read_text())
            trace["traceName"] = self.path.name
            if self.mesh.device.type == "cpu":  # on CUDA the collectives' kernels are in the trace, and flights have another clock
                trace["traceEvents"] += _flight_events(self._flights, self._unix_s, trace.get("baseTimeNanoseconds", 0), self.mesh.rank)
            aside.write_text(json.dumps(trace))
        return self.path


def _flight_events(flights: Sequence[Flight], unix_s: float, base_ns: int, rank: int) -> list[dict[str, Any]]:
    """Chrome's asynchronous events, one track for each direction: launched to arrived, and in it what was waited."""
    events: list[dict[str, Any]] = []
    for number, flight in enumerate(flights):
        if flight.kind != "tokens":
            continue
        common = {"cat": "crossdock flight", "id": number, "pid": f"rank {rank} flights", "tid": flight.direction}
        name = f"crossdock::{flight.stage} {flight.direction} in flight"
        sizes = dict(zip(("same_device_bytes", "same_node_bytes", "other_node_bytes"), flight.bytes_by_class, strict=True))
        marks = ((name, "b", flight.launched_s), ("waited for", "b", flight.wait_begin_s), ("waited for", "e", flight.wait_end_s))
        for label, phase, seconds in (*marks, (name, "e", flight.wait_end_s)):
            args = {"layer": flight.layer, **sizes} if phase == "b" else {}
            events.append({**common, "name": label, "ph": phase, "ts": (seconds + unix_s) * 1e6 - base_ns / 1e3, "args": args})
    return events
