"""Whole runs: counted bytes equal predicted ones, the loss does not notice a re-planning, a stopped run continues bitwise."""

import json
import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crossdock.errors import BadConfig, BadData, CrossdockError, NonFiniteLoss, Preempted
from crossdock.models.transformer import Transformer
from crossdock.placement.costs.cost import Workload
from crossdock.placement.costs.evaluate import evaluate
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import Trace
from crossdock.runtime.adaptation.capture import CaptureConfig
from crossdock.runtime.adaptation.replan import ReplanConfig, WindowSteps, topology_of, window_steps
from crossdock.runtime.checkpoints.checkpoint import CheckpointConfig
from crossdock.runtime.phases import Phase, forget, listen
from crossdock.runtime.profiler import ProfileConfig
from crossdock.runtime.training.metrics import METRICS, RunDirectory
from crossdock.runtime.training.steps import TrainConfig
from crossdock.runtime.training.train import train
from crossdock.runtime.training.training import Silent, Training
from tests.pool import Pool, mesh_for
from tests.runtime import tiny

RESULT_KEYS = {
    "status", "exit_code", "reached_step", "target_step", "loss", "eval_loss", "tokens_per_s", "step_s", "exposed_s", "bytes", "step_time",
    "load_max_over_mean", "plan", "world_size", "before", "moves",
}  # fmt: skip


class Scripted(Silent):
    """Progress that does something at a step."""

    def __init__(self, actions: Mapping[int, str]) -> None:
        self.actions = actions
        self.lines: list[str] = []

    def step(self, row: Mapping[str, Any], line: str) -> None:
        self.lines.append(line)
        if self.actions.get(row["step"]) == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)


def run(
    rank: int,
    world_size: int,
    folder: str,
    plan: Plan,
    options: Mapping[str, Any],
    *,
    name: str = "run",
    dispatch: str = "deduplicated",
    dtype: torch.dtype = torch.float32,
    actions: Mapping[int, str] | None = None,
    poison: bool = False,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A run of 12 steps in `folder`/`name`; its result (or its error's) and the states of this rank."""
    mesh = mesh_for(rank, world_size, plan.num_devices, tuple(number % 2 for number in range(world_size)) if world_size > 1 else None)
    model = tiny.build(mesh, plan, dtype, dispatch=dispatch)
    if poison and rank == world_size - 1:
        model.norm.register_forward_pre_hook(lambda _module, inputs: inputs[0] * float("inf"))
    directory = RunDirectory(Path(folder) / name)
    chosen = {"config": tiny.TRAIN, "capture": CaptureConfig(steps=3), **options}
    training = Training(model, mesh, plan, tiny.corpus(folder), tiny.SEQ_LEN, directory, progress=Scripted(actions or {}), **chosen)
    states: dict[str, np.ndarray] = {}
    try:
        result = train(training)
        states = {name: values.detach().numpy().copy() for name, values in model.state_dict().items()}
    except CrossdockError as error:
        return {"error": type(error).__name__, "message": str(error), "exit_code": error.exit_code}, states
    return result.as_json(), states


def run_with(rank: int, world_size: int, folder: str, plan: Plan, options: Mapping[str, Any], extra: Mapping[str, Any]) -> Any:
    return run(rank, world_size, folder, plan, options, **extra)


def files(folder: str, name: str = "run") -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """result.json, the lines of metrics.jsonl and of events.jsonl."""
    directory = RunDirectory(Path(folder) / name)
    paths = [path for path in (directory.metrics, directory.events) if path.exists()]
    lines = {path: [json.loads(line) for line in path.read_text().splitlines()] for path in paths}
    return json.loads(directory.result.read_text()), lines.get(directory.metrics, []), lines[directory.events]


# ---- profiles ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "last", "asked_at", "ended"),
    [(11, 200, 0, 12), (4, 9, 5, 6), (3, 4, 0, 4)],
    ids=["beyond the end", "a run that is stopped", "all of it"],
)
def test_a_profile_is_written_wherever_the_run_ends(folder: str, first: int, last: int, asked_at: int, ended: int) -> None:
    options = {"profile": ProfileConfig(first=first, last=last)}
    run(0, 1, folder, tiny.random_plan(1, 1), options, actions={asked_at: "SIGTERM"})
    (event,) = [event for event in files(folder)[2] if event["event"] == "profiled"]
    assert (event["step"], event["asked_step"]) == (ended, last)
    assert json.loads(Path(event["path"]).read_text())["traceEvents"]


# ---- predicted and counted -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dispatch", ["deduplicated", "flat"])
@pytest.mark.parametrize(
    ("world_size", "expert_parallel", "extra_slots"), [(1, 1, 0), (2, 2, 0), (2, 1, 0), (4, 4, 0), (4, 2, 0), (4, 4, 3)]
)
def test_counted_bytes_are_the_predicted_ones(
    ranks: Pool, folder: str, dispatch: str, world_size: int, expert_parallel: int, extra_slots: int
) -> None:
    plan = tiny.random_plan(expert_parallel, 4, extra_slots)
    config = tiny.TRAIN.model_copy(update={"accumulate": 2})
    ranks.run(world_size, run_with, folder, plan, {"config": config}, {"dispatch": dispatch})
    result, metrics, events = files(folder)
    assert set(result) == RESULT_KEYS
    assert (result["status"], result["exit_code"], result["reached_step"], result["target_step"]) == ("done", 0, 12, 12)
    counted, predicted = result["bytes"]["counted"], result["bytes"]["predicted"]
    assert counted == predicted
    assert result["before"]["bytes"]["counted"] == result["before"]["bytes"]["predicted"]
    assert result["bytes"]["steps"] == 3
    # flat: every token goes twice (K = 2), in 2 layers, four directions, 16 x 4 bytes each; 8 sequences of 16 tokens a step
    assert dispatch == "deduplicated" or sum(counted.values()) == 3 * 8 * 16 * 2 * 2 * 4 * 64
    assert counted == {name: sum(row[f"bytes_{name}"] for row in metrics[-3:]) for name in counted}
    assert (counted["other_node"] > 0) == (expert_parallel > 1)
    assert (counted["same_node"] > 0) == (expert_parallel == 4)
    forecast = result["bytes"]["forecast"]
    for name, size in counted.items():
        assert forecast[name] == pytest.approx(size, rel=0.15, abs=1)
    assert result["plan"] == {"hash": plan.digest, "method": "random"}
    assert Plan.load(Path(folder) / "run" / "plan.json").digest == plan.digest
    assert [event["rank"] for event in events if event["event"] == "rank_started"] == list(range(world_size))
    trace = Trace.load(Path(folder) / "run" / "trace.npz")
    assert (trace.num_tokens, trace.num_layers, trace.num_experts) == (3 * 8 * 16, 2, 8)
    topology, workload = Topology.load(Path(folder) / "run" / "topology.yaml"), Workload.load(Path(folder) / "run" / "workload.json")
    assert evaluate(trace, plan, topology, workload).step_s > 0
    assert (workload.tokens_per_rank, workload.micro_batches, workload.dispatch) == (8 * 16 // world_size // 2, 2, dispatch)


@pytest.mark.parametrize(("world_size", "expert_parallel", "method"), [(2, 2, "anneal"), (4, 2, "anneal"), (4, 4, "balance")])
def test_a_replanning_moves_experts_and_the_loss_does_not_notice(
    ranks: Pool, folder: str, world_size: int, expert_parallel: int, method: str
) -> None:
    plan = Plan.contiguous(2, 8, expert_parallel)
    replan = ReplanConfig(at_step=6, method=method, seconds=1.0, capture_steps=4, pays_back_within=0)
    moved = ranks.run(world_size, run_with, folder, plan, {"replan": replan}, {"name": "moved", "dtype": torch.float64})
    stayed = ranks.run(world_size, run_with, folder, plan, {}, {"name": "stayed", "dtype": torch.float64})
    result, metrics, events = files(folder, "moved")
    _, metrics_stayed, _ = files(folder, "stayed")
    assert moved[0][0]["loss"] == pytest.approx(stayed[0][0]["loss"], rel=1e-9)
    for row, other in zip(metrics, metrics_stayed, strict=True):
        assert (row["loss"], row["grad_norm"]) == pytest.approx((other["loss"], other["grad_norm"]), rel=1e-9)
    (replanned,) = [event for event in events if event["event"] == "replan"]
    assert (replanned["step"], replanned["method"]) == (6, method)
    applied = [event for event in events if event["event"] == "plan_applied"]
    assert [event["step"] for event in applied] == [0, 6]
    new_plan = Plan.load(Path(folder) / "moved" / "plan.json")
    assert applied[1]["plan_hash"] == result["plan"]["hash"] == new_plan.digest
    assert applied[1]["method"] == result["plan"]["method"] == method
    assert applied[1]["moves"] == result["moves"] == len(plan.moves_to(new_plan)) > 0
    assert applied[1]["bytes"] == replanned["move_bytes"] * (world_size // expert_parallel) > 0
    assert replanned["accepted"]
    for window, wanted in ((result, new_plan), (result["before"], plan)):
        assert window["bytes"]["counted"] == window["bytes"]["predicted"]
        assert window["bytes"]["steps"] == 4
        assert window["plan"]["hash"] == wanted.digest
        assert window["step_time"]["measured_s"] > 0
    assert result["step_time"]["predicted_s"] > 0
    assert {row["plan"] for row in metrics[:6]} == {plan.digest[:12]}
    assert {row["plan"] for row in metrics[6:]} == {new_plan.digest[:12]}


def test_every_metric_of_the_table_is_written_and_adds_up(ranks: Pool, folder: str) -> None:
    config = tiny.TRAIN.model_copy(update={"eval_every": 5})
    ranks.run(2, run_with, folder, tiny.random_plan(2, 1), {"config": config}, {})
    result, metrics, _ = files(folder)
    assert [row["step"] for row in metrics] == list(range(1, 13))
    assert [row["step"] for row in metrics if "eval_loss" in row] == [5, 10, 12]
    assert result["bytes"]["counted"] == result["bytes"]["predicted"]  # the evaluation inside the window is not counted
    losses = {name for name in metrics[0] if name.startswith("loss_")}
    assert losses
    of_homing = {name for name in METRICS if "homing" in name or "as_read" in name}
    assert set(metrics[4]) == set(METRICS) - of_homing | losses
    last = metrics[-1]
    assert last["step_s"] == pytest.approx(
        sum(last[name] for name in ("data_s", "forward_s", "backward_s", "reduce_s", "update_s")), rel=0.5
    )
    assert last["tokens"] == 8 * 16
    assert last["tokens_per_s"] == pytest.approx(128 / last["step_s"])
    assert last["loss"] == result["loss"] < metrics[0]["loss"]
    assert last["eval_loss"] == result["eval_loss"]
    assert 1.0 <= last["load_max_over_mean"] <= 2.0
    assert last["load_max_over_mean"] <= last["expert_load_max_over_mean"]
    assert [row["lr"] for row in metrics[:3]] == pytest.approx([1.5e-3, 3e-3, 3e-3])


def test_the_evaluation_loss_does_not_depend_on_the_world(ranks: Pool, folder: str) -> None:
    config = TrainConfig(steps=1, batch_sequences=8, eval_batches=3)
    losses = []
    for world_size, expert_parallel in ((1, 1), (2, 2), (4, 2)):
        results = ranks.run(
            world_size,
            run_with,
            folder,
            tiny.random_plan(expert_parallel, 2),
            {"config": config},
            {"name": f"w{world_size}", "dtype": torch.float64},
        )
        losses += [result["eval_loss"] for result, _ in results]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)  # after one update


# ---- stopping and continuing ---------------------------------------------------------------------------------


def test_a_move_that_does_not_pay_back_is_refused_and_training_goes_on(ranks: Pool, folder: str) -> None:
    plan = Plan.contiguous(2, 8, 2)
    replan = ReplanConfig(at_step=6, method="random", capture_steps=4, pays_back_within=1)
    results = ranks.run(2, run_with, folder, plan, {"replan": replan}, {})
    result, metrics, events = files(folder)
    (replanned,) = [event for event in events if event["event"] == "replan"]
    assert (replanned["accepted"], replanned["limit_steps"]) == (False, 1)
    assert replanned["payback_steps"] is None or replanned["payback_steps"] > 1
    assert (replanned["moves"] > 0, replanned["move_s"] > 0) == (True, True)
    assert [event["step"] for event in events if event["event"] == "plan_applied"] == [0]
    assert (result["plan"]["hash"], result["moves"], len(metrics)) == (plan.digest, 0, 12)
    assert results[0][0]["loss"] == result["loss"]


@pytest.mark.parametrize(("world_size", "expert_parallel", "asked_at"), [(1, 1, 7), (2, 2, 7), (4, 2, 7), (2, 2, 3)])
def test_a_stopped_run_continues_bitwise(ranks: Pool, folder: str, world_size: int, expert_parallel: int, asked_at: int) -> None:
    """The run is asked after the step before it re-plans, or later: what a checkpoint holds at the very step has been re-planned."""
    stopped_at = asked_at + 1
    plan = tiny.random_plan(expert_parallel, 1)
    options = {
        "replan": ReplanConfig(at_step=4, method="contiguous", capture_steps=2, pays_back_within=0),
        "capture": CaptureConfig(steps=2),
    }
    straight = ranks.run(world_size, run_with, folder, plan, options, {"name": "straight"})
    stopped = ranks.run(world_size, run_with, folder, plan, options, {"actions": {asked_at: "SIGTERM"}})
    for result, _ in stopped:
        assert (result["error"], result["exit_code"]) == ("Preempted", Preempted.exit_code)
        assert f"asked to stop after step {stopped_at} of 12" in result["message"]
    written, _, _ = files(folder)
    assert (written["status"], written["exit_code"], written["reached_step"]) == ("preempted", 75, stopped_at)
    with RunDirectory(Path(folder) / "run").metrics.open("a") as file:
        file.write(f'{{"step": {stopped_at + 1}, "loss": 1.0}}\n{{"step": 1')  # as if it had been killed later, while it wrote a line
    resumed = ranks.run(world_size, run_with, folder, plan, {**options, "resume": True, "keep_plan": True}, {})
    for (result, states), (other, wanted) in zip(resumed, straight, strict=True):
        assert (result["status"], result["reached_step"]) == ("done", 12)
        assert (result["loss"], result["eval_loss"]) == (other["loss"], other["eval_loss"])
        for name, values in wanted.items():
            assert np.array_equal(states[name], values), name
    metrics, other_metrics = files(folder)[1], files(folder, "straight")[1]
    assert [(row["step"], row["loss"], row["grad_norm"], row["plan"]) for row in metrics] == [
        (row["step"], row["loss"], row["grad_norm"], row["plan"]) for row in other_metrics
    ]
    assert sum(event["event"] == "replan" for event in files(folder)[2]) == 1


def test_a_run_that_goes_on_inside_a_window_measures_the_rest_of_it(ranks: Pool, folder: str) -> None:
    """Windows lie at steps 6 to 9 and 9 to 12, and the run is stopped after step 10."""
    plan = tiny.random_plan(2, 1)
    ranks.run(2, run_with, folder, plan, {}, {"actions": {9: "SIGTERM"}})
    (result, _), _ = ranks.run(2, run_with, folder, plan, {"resume": True}, {})
    assert (result["status"], result["bytes"]["steps"]) == ("done", 2)
    assert result["bytes"]["counted"] == result["bytes"]["predicted"]
    assert result["step_time"]["measured_s"] > 0


def save_at_the_end_while_asked_to_stop(rank: int, world_size: int, folder: str, asynchronous: bool) -> dict[str, Any]:
    def asked(phase: Phase, _what: Any) -> None:
        if phase == "checkpoint_rename":
            os.kill(os.getpid(), signal.SIGTERM)

    listen(asked)
    try:
        saving = {"checkpoint": CheckpointConfig(at_end=True, asynchronous=asynchronous)}
        result, _ = run(rank, world_size, folder, tiny.random_plan(2, 1), saving)
    finally:
        forget(asked)
    return result


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_signal_does_not_cut_the_last_checkpoint_short(ranks: Pool, folder: str, asynchronous: bool) -> None:
    result, _ = ranks.run(2, save_at_the_end_while_asked_to_stop, folder, asynchronous)
    assert (result["status"], result["exit_code"]) == ("done", 0)
    assert [path.name for path in (Path(folder) / "run" / "checkpoints").iterdir()] == ["step-00000012"]


def test_checkpoints_come_when_they_are_due(ranks: Pool, folder: str) -> None:
    plan = tiny.random_plan(1, 1)
    saving = {"checkpoint": CheckpointConfig(every=3, keep=2, at_end=True)}
    run(0, 1, folder, plan, saving)
    events = [event["step"] for event in files(folder)[2] if event["event"] == "checkpoint_saved"]
    assert events == [3, 6, 9, 12]
    assert sorted(path.name for path in (Path(folder) / "run" / "checkpoints").iterdir()) == ["step-00000009", "step-00000012"]
    refused, _ = run(0, 1, folder, plan, saving)
    assert refused["error"] == "BadConfig"
    assert "holds checkpoints of an earlier run" in refused["message"]
    finished, _ = run(0, 1, folder, plan, {**saving, "resume": True})
    assert (finished["status"], finished["reached_step"]) == ("done", 12)


def test_resuming_with_other_data_or_another_seed_is_refused(ranks: Pool, folder: str) -> None:
    run(0, 1, folder, tiny.random_plan(1, 1), {"checkpoint": CheckpointConfig(every=5)})
    seeded = {"config": tiny.TRAIN.model_copy(update={"seed": 9}), "resume": True}
    assert run(0, 1, folder, tiny.random_plan(1, 1), seeded)[0]["error"] == BadData.__name__
    (Path(folder) / "text").write_bytes(tiny.text()[::-1])
    result, _ = run(0, 1, folder, tiny.random_plan(1, 1), {"resume": True})
    assert "resume with the same seed and files" in result["message"]


def test_a_loss_that_is_not_finite_ends_the_run_on_every_rank(ranks: Pool, folder: str) -> None:
    for result, _ in ranks.run(2, run_with, folder, tiny.random_plan(2, 1), {}, {"poison": True}):
        assert (result["error"], result["exit_code"]) == ("NonFiniteLoss", NonFiniteLoss.exit_code)
    written, metrics, events = files(folder)
    assert (written["status"], written["exit_code"], written["reached_step"], metrics) == ("failed", 79, 0, [])
    assert "not finite on rank" in written["message"]
    assert events[-1]["event"] == "failed"


def dense_run(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    mesh = mesh_for(rank, world_size, 1)
    model = Transformer(tiny.MODEL.model_copy(update={"block": "dense"}), mesh, None, torch.bfloat16, seed=5)
    directory = RunDirectory(Path(folder) / "run")
    saving = CheckpointConfig(at_end=True)
    return train(Training(model, mesh, None, tiny.corpus(folder), tiny.SEQ_LEN, directory, config=tiny.TRAIN, checkpoint=saving)).as_json()


def test_a_model_without_experts_trains_as_well(ranks: Pool, folder: str) -> None:
    for result in ranks.run(2, dense_run, folder):
        assert (result["status"], result["plan"], result["bytes"]["counted"]) == ("done", None, None)
    metrics = files(folder)[1]
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert metrics[0]["bytes_other_node"] == 0


# ---- configurations ------------------------------------------------------------------------------------------


def test_where_windows_lie() -> None:
    never = ReplanConfig()
    assert window_steps(100, 8, never) == WindowSteps(84, 92, 100)
    assert window_steps(7, 8, never) == WindowSteps(1, 4, 7)
    assert window_steps(1, 8, never) is None
    assert window_steps(100, 0, never) is None
    assert window_steps(100, 8, ReplanConfig(at_step=50)) == WindowSteps(42, 50, 58)
    assert window_steps(100, 8, ReplanConfig(at_step=97, capture_steps=3)) == WindowSteps(94, 97, 100)
    for at_step in (7, 93):
        with pytest.raises(BadConfig, match=f"at_step {at_step} of 100 steps leaves no room for 8 recorded steps .*from 8 to 92"):
            window_steps(100, 8, ReplanConfig(at_step=at_step))
    with pytest.raises(BadConfig, match="needs a recorded window"):
        window_steps(100, 0, ReplanConfig(at_step=50))


def unfit_topology(rank: int, world_size: int) -> str:
    mesh = mesh_for(rank, world_size, 2, (0, 1))
    assert topology_of(mesh, None).node_of_R == (0, 1)
    assert topology_of(mesh, replace(Topology.uniform(2, 1), node_of_R=(1, 0))).node_of_R == (0, 1)
    with pytest.raises(BadConfig) as caught:
        topology_of(mesh, Topology.uniform(1, 2))
    return str(caught.value)


def test_a_topology_with_other_nodes_is_refused(ranks: Pool) -> None:
    for message in ranks.run(2, unfit_topology):
        assert "puts devices on nodes [0, 0], and the ranks run on nodes [0, 1]" in message


def test_a_solver_that_fails_fails_every_rank(ranks: Pool, folder: str) -> None:
    options = {"replan": ReplanConfig(at_step=6, method="ilp", objective="hops", capture_steps=2)}
    for result, _ in ranks.run(2, run_with, folder, tiny.random_plan(2, 1), options, {}):
        assert result["error"] == "UsageError"
        assert "method ilp solves objectives seconds, devices and nodes" in result["message"]
