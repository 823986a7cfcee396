"""Sequence homing in training: the loss does not notice, counts are exact, and a stopped run goes on bitwise."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crossdock.placement.homing.forecast import Forecast
from crossdock.placement.homing.homes import CopyCosts, known_costs
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.trace import Trace
from crossdock.runtime.adaptation.capture import CaptureConfig
from crossdock.runtime.adaptation.replan import topology_of
from crossdock.runtime.data import DataState
from crossdock.runtime.optimization.engine import Engine
from crossdock.runtime.training.homing import Homing
from crossdock.runtime.training.metrics import METRICS
from crossdock.runtime.training.steps import Stepper
from tests.pool import Pool, mesh_for
from tests.runtime import tiny
from tests.runtime.training import test_train

STEPS = 4


def byte_forecast(seed: int = 0) -> Forecast:
    """Every byte prefers experts of its own, so that homes differ from the order of reading."""
    rng = np.random.default_rng(seed)
    token_T = np.repeat(np.arange(256), 6)
    score_TLE = rng.random((256, tiny.MODEL.num_moe_layers, tiny.NUM_EXPERTS)).repeat(6, axis=0) ** 3 + 0.3 * rng.random((1536, 1, 1))
    return Forecast.fit(Trace(np.argsort(-score_TLE, axis=2)[:, :, :2], tiny.NUM_EXPERTS, token_T=token_T))


def steps_of(
    rank: int, world_size: int, folder: str, plan: Plan, homed: bool, dispatch: str, accumulate: int, gathered: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Metrics of the first steps, and the sequences that this rank processed in the first."""
    mesh = mesh_for(rank, world_size, plan.num_devices, tuple(number // 2 for number in range(world_size)) if world_size > 1 else None)
    model = tiny.build(mesh, plan, dispatch=dispatch)
    for layer in model.moe_layers:
        layer.set_gathered(gathered)
    config = tiny.TRAIN.model_copy(update={"accumulate": accumulate})
    homing = Homing(byte_forecast(), model, mesh, topology_of(mesh, None)) if homed else None
    stepper = Stepper(model, Engine(model, mesh, plan, config.optimizer), tiny.corpus(folder), tiny.SEQ_LEN, config, mesh, homing)
    state, rows = DataState(), []
    for number in range(STEPS):
        rows.append(stepper.run(number, state, (), stop_asked=False).metrics)
        state = stepper.after(state)
    return rows


@pytest.mark.parametrize(
    ("world_size", "devices", "dispatch", "extra_slots", "accumulate", "gathered"),
    [
        (2, 2, "deduplicated", 0, 1, ()),
        (4, 4, "deduplicated", 0, 1, ()),
        (4, 2, "deduplicated", 0, 2, ()),
        (4, 4, "flat", 0, 2, ()),
        (4, 4, "hierarchical", 0, 1, ()),
        (4, 4, "deduplicated", 3, 1, ()),
        (4, 4, "deduplicated", 0, 1, (2, 5)),
    ],
)
def test_the_loss_does_not_notice_and_the_bytes_of_both_orders_are_known(
    ranks: Pool, folder: str, world_size: int, devices: int, dispatch: str, extra_slots: int, accumulate: int, gathered: tuple[int, ...]
) -> None:
    plan = tiny.random_plan(devices, 4, extra_slots)
    options = (dispatch, accumulate, gathered)
    homed = ranks.run(world_size, steps_of, folder, plan, True, *options)
    plain = ranks.run(world_size, steps_of, folder, plan, False, *options)
    for number, (with_homes, without) in enumerate(zip(homed[0], plain[0], strict=True)):
        for name in ("loss", "grad_norm", *(name for name in without if name.startswith("loss_"))):
            assert with_homes[name] == pytest.approx(without[name], rel=1e-9), (number, name)
        # what the homed step says of the order as read is what the run without homing counted
        assert with_homes["bytes_as_read_same_node"] == without["bytes_same_node"]
        assert with_homes["bytes_as_read_other_node"] == without["bytes_other_node"]
        total = {name: sum(row[f"bytes_{name}"] for row in (with_homes,)) for name in ("same_device", "same_node", "other_node")}
        assert sum(total.values()) > 0
    assert "homing_saved" not in plain[0][0]
    if not gathered:  # the forecast knows nothing of the model, and its homes are others than those as read
        assert any(row["bytes_same_node"] != row["bytes_as_read_same_node"] for row in homed[0])


def saved_by(
    rank: int, world_size: int, folder: str, plan: Plan, options: Mapping[str, Any], extra: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    return test_train.run(rank, world_size, folder, plan, {"forecast": byte_forecast(), **options}, **extra)


def test_a_run_counts_what_the_evaluator_replays_and_its_saving_is_that_of_the_trace(ranks: Pool, folder: str) -> None:
    plan = tiny.random_plan(2, 4)
    ranks.run(2, saved_by, folder, plan, {"capture": CaptureConfig(steps=1)}, {})
    result, rows, _ = test_train.files(folder)
    assert result["bytes"]["counted"] == result["bytes"]["predicted"]
    last = rows[-1]
    assert set(last) <= set(METRICS) | {name for name in last if name.startswith("loss_")}
    trace = Trace.load(Path(folder) / "run" / "trace.npz")
    assert trace.sequence_T is not None
    assert trace.home_T is not None
    # two ranks on two nodes: one link, so that costs are copies
    sequence_T = np.unique(trace.sequence_T, return_inverse=True)[1]
    home_Q = trace.home_T[np.unique(sequence_T, return_index=True)[1]]
    assert np.bincount(home_Q).tolist() == [4, 4]
    from crossdock.placement.costs.cost import Workload
    from crossdock.placement.records.topology import Topology

    cost_QH = known_costs(trace, sequence_T, plan, CopyCosts.of(Topology.uniform(2, 1), Workload(), "devices"))
    homed = cost_QH[np.arange(8), home_Q].sum()
    assert last["bytes_other_node"] == homed * 4 * tiny.MODEL.model_width * 4
    assert last["homing_saved"] == pytest.approx(1 - last["bytes_other_node"] / last["bytes_as_read_other_node"], rel=1e-9)


def test_a_forecast_from_the_runs_own_routing_saves_what_it_promises(ranks: Pool, folder: str) -> None:
    plan = Plan.contiguous(2, 8, 2)
    model = {"config": tiny.TRAIN.model_copy(update={"steps": 40}), "capture": CaptureConfig(steps=12)}
    ranks.run(2, test_train.run_with, folder, plan, model, {"name": "first"})
    forecast = Forecast.fit(Trace.load(Path(folder) / "first" / "trace.npz"))
    ranks.run(2, saved_by, folder, plan, {**model, "forecast": forecast}, {"name": "homed"})
    rows = test_train.files(folder, "homed")[1][-12:]
    saved, promised = (float(np.mean([row[name] for row in rows])) for name in ("homing_saved", "homing_saved_forecast"))
    assert saved > 0.005
    assert promised == pytest.approx(saved, rel=0.6)
    assert abs(float(np.mean([row["homing_error"] for row in rows]))) < 0.15


def test_a_stopped_run_goes_on_bitwise(ranks: Pool, folder: str) -> None:
    plan = tiny.random_plan(2, 4)
    whole = ranks.run(2, saved_by, folder, plan, {}, {"name": "whole"})
    stopped = ranks.run(2, saved_by, folder, plan, {}, {"name": "stopped", "actions": {5: "SIGTERM"}})
    assert stopped[0][0]["error"] == "Preempted"
    resumed = ranks.run(2, saved_by, folder, plan, {"resume": True}, {"name": "stopped"})
    assert resumed[0][0]["loss"] == whole[0][0]["loss"]
    for rank in range(2):
        for name, values in whole[rank][1].items():
            assert np.array_equal(resumed[rank][1][name], values), name
    kept = ["loss", "bytes_same_node", "bytes_other_node", "homing_saved", "homing_saved_forecast"]
    lines = [[{name: row[name] for name in kept} for row in test_train.files(folder, run)[1]] for run in ("whole", "stopped")]
    assert lines[0] == lines[1]


def test_the_same_plan_in_another_object_is_no_reason_to_talk() -> None:
    """Ranks decide by contents whether costs go round again: one that holds an equal plan in a new object must not wait for the others."""
    mesh, plan = mesh_for(0, 1, 1), tiny.random_plan(1, 4)
    homing = Homing(byte_forecast(), tiny.build(mesh, plan), mesh, topology_of(mesh, None))
    homing.begin(plan)
    before = homing._setup
    homing.begin(Plan(plan.slots_LRS.copy(), plan.num_experts))
    assert homing._setup is before is not None
    homing.begin(Plan(plan.slots_LRS[:, :, ::-1].copy(), plan.num_experts))
    assert homing._setup is not before
