"""Profiling: the spans of a real step stand in the trace of each rank, forward and backward, and cost nothing when nobody looks."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from crossdock.models.moe import MoELayer
from crossdock.runtime.profiler import ProfileConfig, Profiler, is_profiling, mark_backward, span, spanned
from tests.pool import Pool, mesh_for


def profiled_steps(rank: int, world_size: int, folder: str, first: int, last: int, num_steps: int) -> list[str | None]:
    """`num_steps` steps of one MoE layer with a profiler beside them; where each step wrote a trace."""
    mesh = mesh_for(rank, world_size, world_size)
    layer = MoELayer(8, 16, 4, 2, mesh=mesh)
    profiler = Profiler(ProfileConfig(first=first, last=last), mesh, Path(folder))
    written = []
    for step in range(1, num_steps + 1):
        profiler.before(step)
        x_TD = torch.randn(6, 8, requires_grad=True)
        layer(x_TD).square().sum().backward()
        path = profiler.after(step, mesh.ledger.take())
        written.append(None if path is None else path.name)
    return written


def events_of(path: Path) -> list[dict[str, Any]]:
    return [event for event in json.loads(path.read_text())["traceEvents"] if "crossdock::" in event.get("name", "")]


def test_every_rank_writes_the_spans_of_the_chosen_steps(ranks: Pool, tmp_path: Path) -> None:
    written = ranks.run(2, profiled_steps, str(tmp_path), 2, 3, 4)
    assert written == [[None, None, f"trace-rank{rank}.json", None] for rank in range(2)]
    for rank in range(2):
        events = events_of(tmp_path / f"trace-rank{rank}.json")
        spans = [event["name"].removeprefix("crossdock::") for event in events if event["ph"] == "X"]
        # two steps; a combine is a start and a wait, a dispatch is prepared before
        wanted = {"route": 2, "dispatch": 6, "experts": 2, "combine": 4, "experts backward": 2}
        assert {name: spans.count(name) for name in set(spans)} == wanted


def test_flights_lie_on_the_clock_of_the_operators(ranks: Pool, tmp_path: Path) -> None:
    ranks.run(2, profiled_steps, str(tmp_path), 1, 1, 1)
    events = events_of(tmp_path / "trace-rank0.json")
    begins = {event["name"]: event["ts"] for event in events if event["ph"] == "b"}
    ends = {event["name"]: event["ts"] for event in events if event["ph"] == "e"}
    ways = [f"crossdock::{stage} {direction} in flight" for stage in ("dispatch", "combine") for direction in ("forward", "backward")]
    assert set(begins) == set(ends) == set(ways)
    span_of = {event["name"]: (event["ts"], event["ts"] + event["dur"]) for event in events if event["ph"] == "X"}
    slack_us = 200.0  # two clocks are read one after the other
    assert ends["crossdock::dispatch forward in flight"] <= span_of["crossdock::experts"][0] + slack_us
    assert begins["crossdock::combine forward in flight"] >= span_of["crossdock::experts"][1] - slack_us
    assert ends["crossdock::combine backward in flight"] <= span_of["crossdock::experts backward"][0] + slack_us
    assert begins["crossdock::dispatch backward in flight"] >= span_of["crossdock::experts backward"][1] - slack_us


def test_nothing_happens_while_nobody_profiles() -> None:
    class Arrived:
        def wait(self) -> int:
            return 1

    arrived = Arrived()
    assert not is_profiling()
    assert isinstance(span("route"), contextlib.nullcontext)
    assert spanned(arrived, "dispatch") is arrived
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    mark_backward("experts", y, x)
    assert y._backward_hooks is None


def test_a_run_that_ends_early_keeps_what_was_profiled(tmp_path: Path) -> None:
    profiler = Profiler(ProfileConfig(first=1, last=9), mesh_for(0, 1, 1), tmp_path)
    profiler.before(1)
    with span("route"):
        torch.ones(2) + 1
    assert profiler.after(1, ()) is None
    path = profiler.close()
    assert path is not None
    assert [event["name"] for event in events_of(path)] == ["crossdock::route"]
    assert profiler.close() is None
    assert [file.name for file in tmp_path.iterdir()] == ["trace-rank0.json"]


@pytest.mark.parametrize(("first", "last"), [(None, 3), (4, 3)])
def test_steps_that_are_none_are_refused(first: int | None, last: int) -> None:
    with pytest.raises(ValueError, match="first <= last"):
        ProfileConfig(first=first, last=last)
