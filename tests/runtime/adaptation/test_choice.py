"""Adaptive choice in live runs: strategies change between steps and the training does not notice, bytes stay predicted, runs resume."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from crossdock.errors import BadData, CrossdockError, Preempted
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.topology import Topology
from crossdock.placement.strategies.overlap_rule import Interference
from crossdock.placement.strategies.strategy import Choice, Choices, Priced, Strategy
from crossdock.runtime.adaptation import choice
from crossdock.runtime.adaptation.capture import CaptureConfig
from crossdock.runtime.adaptation.choice import AdaptConfig, Watch
from crossdock.runtime.adaptation.choice_costs import interference, row_seconds_per_byte
from crossdock.runtime.adaptation.stage_times import StageTimes
from crossdock.runtime.checkpoints.checkpoint import CheckpointConfig
from crossdock.runtime.experts.overlap import Chunked
from crossdock.runtime.profiler import ProfileConfig
from crossdock.runtime.training.metrics import RunDirectory
from crossdock.runtime.training.train import train
from crossdock.runtime.training.training import Silent, Training
from tests.pool import Pool, mesh_for
from tests.runtime import tiny

NODES = {2: (0, 1), 4: (0, 0, 1, 1)}
LOOKS = AdaptConfig(mode="continuous", window=1, every=1, drift=1.0)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / "text").write_bytes(tiny.text())
    return str(tmp_path)


class Told(Silent):
    def __init__(self) -> None:
        self.tables: list[str] = []

    def table(self, text: str) -> None:
        self.tables.append(text)


class StopAt(Silent):
    """Ask the run to stop at a step, as SIGTERM does."""

    def __init__(self, step: int) -> None:
        self.at = step

    def step(self, row: Mapping[str, Any], line: str) -> None:
        if row["step"] == self.at:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)


def scripted(world_size: int) -> Any:
    """A decision that follows a script instead of prices; the same step gives the same strategies."""
    cycle = [
        Strategy("flat", 0, overlap=False),
        Strategy("deduplicated", 1, 2, 1),
        Strategy("deduplicated", 2, 1, 4, gathered=(1, 6)),
        Strategy("hierarchical" if world_size == 4 else "flat", 3, 2, 2),
    ]

    def decide(_config: AdaptConfig, step: int, _problems: Any, now: Sequence[Strategy]) -> Choices:
        layers = []
        for layer, old in enumerate(now):
            strategy = cycle[(step // 2 + layer) % len(cycle)]
            layers.append(Choice(layer, strategy, "fp64", 1.0, 2.0, (Priced(strategy, 0.5, 0.5), Priced(old, 1.0, 1.0)), 2, "as scripted"))
        return Choices(step, tuple(layers))

    return decide


def run(
    rank: int, world_size: int, folder: str, name: str, adapt: AdaptConfig, follow_script: bool, options: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray], list[str], list[Strategy]]:
    """12 steps in float64: the result, the states, the tables that were told, and the strategies at the end."""
    mesh = mesh_for(rank, world_size, world_size, NODES[world_size])
    model = tiny.build(mesh, Plan.contiguous(2, tiny.NUM_EXPERTS, world_size), torch.float64, dispatch="deduplicated")
    told = options.pop("progress", Told())
    training = Training(
        model,
        mesh,
        Plan.contiguous(2, tiny.NUM_EXPERTS, world_size),
        tiny.corpus(folder),
        tiny.SEQ_LEN,
        RunDirectory(Path(folder) / name),
        config=tiny.TRAIN,
        capture=CaptureConfig(steps=options.pop("capture", 2)),
        adapt=adapt,
        progress=told,
        **options,
    )
    result: dict[str, Any] = {}
    with mock.patch.object(choice, "decide", scripted(world_size)) if follow_script else mock.MagicMock():
        try:
            result = train(training).as_json()
        except CrossdockError as error:
            result = {"error": type(error).__name__, "message": str(error)}
    states = {name: values.detach().numpy().copy() for name, values in model.state_dict().items()}
    return result, states, getattr(told, "tables", []), list(choice.strategies_of(model, tiny.SEQ_LEN))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- the run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 4])
def test_changing_strategies_changes_nothing_but_the_order_of_sums(ranks: Pool, folder: str, world_size: int) -> None:
    adapted = ranks.run(world_size, run, folder, "adapted", LOOKS, True, {})
    plain = ranks.run(world_size, run, folder, "plain", AdaptConfig(), False, {})
    for (_, states, _, strategies), (_, wanted, _, _) in zip(adapted, plain, strict=True):
        tiny.assert_close(states, wanted, 1e-10)
        assert strategies == adapted[0][3]
    decided = [event for event in lines(Path(folder) / "adapted" / "events.jsonl") if event["event"] == "choice"]
    assert len(decided) >= 3
    used = {tuple(layer["new"]["gathered"]) for event in decided for layer in event["layers"]}
    assert used == {(), (1, 6)}
    assert all(
        layer["old"] == after["new"]
        for one, two in zip(decided[1:], decided, strict=False)
        for layer, after in zip(one["layers"], two["layers"], strict=True)
    )
    assert not any(event["event"] == "choice" for event in lines(Path(folder) / "plain" / "events.jsonl"))
    result = adapted[0][0]
    for window in (result, result["before"]):
        assert window["bytes"]["counted"] == window["bytes"]["predicted"]
    last = decided[-1]["layers"]
    assert [dataclasses.asdict(strategy) for strategy in adapted[0][3]] == [
        {**layer["new"], "gathered": tuple(layer["new"]["gathered"])} for layer in last
    ]


def test_a_resumed_run_goes_on_under_its_last_choice_bit_by_bit(ranks: Pool, folder: str) -> None:
    every = AdaptConfig(mode="continuous", window=2, every=4, drift=1.0)
    whole = ranks.run(2, run, folder, "whole", every, True, {"capture": 0})
    for resume in (False, True):
        options = {"capture": 0, "checkpoint": CheckpointConfig(every=0), "resume": resume}
        if not resume:
            options["progress"] = StopAt(7)
        halves = ranks.run(2, run, folder, "halves", every, True, options)
        if not resume:
            assert halves[0][0]["error"] == Preempted.__name__
    for (_, states, _, strategies), (_, wanted, _, wanted_strategies) in zip(halves, whole, strict=True):
        tiny.assert_close(states, wanted, 0.0)
        assert strategies == wanted_strategies
    (resumed,) = [event for event in lines(Path(folder) / "halves" / "events.jsonl") if event["event"] == "choice_resumed"]
    kept = [entry for entry in lines(Path(folder) / "halves" / "choices.jsonl") if entry["step"] == resumed["taken_after"]]
    assert [entry["digest"] for entry in kept] == [resumed["digest"]]


def test_a_real_decision_is_explained_and_priced(ranks: Pool, folder: str) -> None:
    adapt = AdaptConfig(explain=True, window=2, min_saving=0.0, max_chunks=4)
    options = {"profile": ProfileConfig(first=8, last=9)}
    found = ranks.run(4, run, folder, "real", adapt, False, options, timeout_s=100.0)
    result, _, tables, strategies = found[0]
    assert len(tables) == 1
    assert "why:" in tables[0]
    assert max(map(len, tables[0].splitlines())) <= 80
    (event,) = [event for event in lines(Path(folder) / "real" / "events.jsonl") if event["event"] == "choice"]
    assert (event["step"], event["why"]) == (choice.FIRST_STEPS + 2, "start")
    for layer, strategy in zip(event["layers"], strategies, strict=True):
        assert {**layer["new"], "gathered": tuple(layer["new"]["gathered"])} == dataclasses.asdict(strategy)
        totals = [other["total_s"] for other in layer["alternatives"]]
        assert totals == sorted(totals)
        assert 0 < layer["predicted_s"] == totals[0] <= layer["old_predicted_s"]
        assert {other["dispatch"] for other in layer["alternatives"]} == {"flat", "deduplicated", "hierarchical"}
    assert all(other[3] == strategies for other in found)
    assert result["bytes"]["counted"] == result["bytes"]["predicted"]
    assert result["before"]["bytes"]["counted"] == result["before"]["bytes"]["predicted"]
    for rank in range(4):
        trace = json.loads((Path(folder) / "real" / f"trace-rank{rank}.json").read_text())
        names = {event.get("name", "").removeprefix("crossdock::") for event in trace["traceEvents"]}
        assert {"route", "dispatch", "experts", "combine", "attention"} <= names


# ---- its parts -----------------------------------------------------------------------------------------------


def disagree(rank: int, world_size: int) -> str:
    mesh = mesh_for(rank, world_size, world_size, NODES[world_size])
    strategy = Strategy("flat", 0)
    record = Choices(3, (Choice(0, strategy, "fp32", 1.0, 2.0, (), 1, "told by rank 0"),))
    ours = record if rank != 1 else dataclasses.replace(record, step=4)
    assert choice.agreed(record if rank == 0 else None, mesh).layers == record.layers
    with pytest.raises(BadData) as failure:
        choice.checked(ours, record.digest, mesh)
    return str(failure.value)


def test_ranks_that_read_different_records_all_stop(ranks: Pool) -> None:
    for message in ranks.run(4, disagree):
        assert "rank 1 (1 of 4 ranks differ)" in message


def test_looks_come_at_the_start_on_drift_and_now_and_then() -> None:
    watch = Watch(AdaptConfig(mode="continuous", window=2, every=50, drift=0.2))
    even, moved = np.full((2, 4), 10.0), np.array([[10.0, 10, 10, 10], [25, 5, 5, 5]])
    watch.note(even)
    assert watch.due(choice.FIRST_STEPS - 1) is None
    assert watch.due(choice.FIRST_STEPS) == "start"
    watch.looked(4, even)
    assert watch.drift() == 0.0
    assert watch.due(40) is None
    watch.note(moved)  # half of the recent load: moved by 3/16
    assert watch.drift() == pytest.approx(0.1875)
    assert watch.due(40) is None
    watch.note(moved)
    assert watch.drift() == pytest.approx(0.375)
    assert watch.due(5) is None  # the last look is not a window ago
    assert watch.due(6) == "load moved by 0.375"
    watch.looked(8, watch.recent_LE())
    assert watch.due(57) is None  # the same load is one shift, not many
    assert watch.due(58) == "every 50 steps"


@pytest.mark.parametrize(("mode", "explain", "wanted"), [("off", False, None), ("off", True, "start"), ("start", False, "start")])
def test_modes(mode: Any, explain: bool, wanted: str | None) -> None:
    watch = Watch(AdaptConfig(mode=mode, explain=explain, every=5))
    watch.note(np.ones((1, 2)))
    assert watch.due(10) == wanted
    watch.looked(12, np.ones((1, 2)))
    watch.note(np.array([[100.0, 0.0]]))
    assert watch.due(1000) is None


def test_degrees_are_powers_of_two() -> None:
    assert [AdaptConfig(max_chunks=most).chunk_counts for most in (1, 2, 6, 8)] == [(1,), (1, 2), (1, 2, 4), (1, 2, 4, 8)]


def test_a_model_takes_its_strategies_and_keeps_its_weights() -> None:
    model = tiny.build(mesh_for(0, 1, 1), Plan.contiguous(2, 8, 1))
    before = {name: values.clone() for name, values in model.state_dict().items()}
    taken = (Strategy("flat", 2, 4, 2, gathered=(3,)), Strategy("deduplicated", 0, overlap=False))
    choice.apply(model, taken)
    assert choice.strategies_of(model, tiny.SEQ_LEN) == taken
    assert [block.schedule for block in model.blocks] == [Chunked(2, 4, 2), Chunked(0, overlap=False)]
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())


def test_stages_are_timed_in_training_only_and_left_alone_afterwards() -> None:
    slow, fast = torch.nn.Linear(300, 300), torch.nn.Identity()
    ledger = mesh_for(0, 1, 1).ledger
    times = StageTimes([[slow, fast], [fast]], ledger)
    times.begin()
    for training in (True, False, True):
        for stage in (slow, fast):
            stage.train(training)
            stage(torch.ones(4000, 300))
    (first, second), (third,) = times.end()
    assert first > second > 0.0
    assert second == third
    assert not slow._forward_hooks
    assert not slow._forward_pre_hooks


def test_packing_rows_costs_something() -> None:
    assert 1e-13 < row_seconds_per_byte(64, torch.float32, torch.device("cpu")) < 1e-7


def interfere(rank: int, world_size: int) -> Any:
    mesh = mesh_for(rank, world_size, world_size, NODES[world_size])
    mesh.ledger.take()
    found = interference(mesh, Topology.local(world_size), repeats=3)
    assert not mesh.ledger.take()
    return found


def test_interference_is_one_number_for_all_ranks(ranks: Pool) -> None:
    first, second = ranks.run(2, interfere)
    assert first == second
    assert first.slowdown >= 1.0
    assert interference(mesh_for(0, 1, 1), Topology.local(1)) == Interference()


def fail_on_rank_0(rank: int, world_size: int) -> str:
    mesh = mesh_for(rank, world_size, world_size, NODES[world_size])
    with pytest.raises(BadData) as failure:
        choice.agreed(BadData("no trace") if rank == 0 else None, mesh)
    return str(failure.value)


def test_what_stops_rank_0_stops_all(ranks: Pool) -> None:
    assert ranks.run(2, fail_on_rank_0) == ["no trace", "no trace"]
