"""What every rank of `benchmarks.prediction` does: calibrate under a plan of its own, solve, step under all plans in turns, compare."""

import argparse
import functools
import gc
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Spread, bootstrap_interval, in_turns
from benchmarks.netlab import Lab
from benchmarks.on_ranks import MEETING_S, meeting, set_rate, slowest, tell
from benchmarks.prediction_model import Trainee, fit_zipf, model_of
from benchmarks.prediction_parts import PARTS, copy_waits, measured_parts, predicted_parts
from crossdock.launch.config import RunConfig
from crossdock.launch.ranks.jobs import read_corpus
from crossdock.placement.analysis.homing_score import Setting, solve_with_homes
from crossdock.placement.costs.cost import Workload
from crossdock.placement.costs.evaluate import Evaluation
from crossdock.placement.homing.forecast import Forecast
from crossdock.placement.records.affinity import Affinity
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.topology import LINK_CLASSES, OTHER_NODE, Topology
from crossdock.placement.records.trace import Trace
from crossdock.placement.solvers import solve
from crossdock.placement.solvers.problem import Constraints, Problem
from crossdock.placement.strategies.strategy import Strategy
from crossdock.placement.strategies.traffic import evaluate_strategies
from crossdock.runtime.adaptation.calibrate import Calibrated, calibrate
from crossdock.runtime.adaptation.probe import probe
from crossdock.runtime.adaptation.replan import predicted_bytes, workload_of
from crossdock.runtime.adaptation.windows import Measured
from crossdock.runtime.data import Corpus
from crossdock.runtime.training.metrics import RunDirectory
from crossdock.runtime.training.steps import Step
from crossdock.runtime.transport.collectives import all_gather_objects, all_reduce, barrier, broadcast_object
from crossdock.runtime.transport.ledger import bytes_by_class
from crossdock.runtime.transport.mesh import Mesh

WARMUP = 2
LATE = 6.0  # times `--seconds` that one method may take: two integer programs, homes, and a solver that looks at its clock late
CALIBRATION = "random"  # the plan under which the cost model is calibrated; no row's


@dataclass(frozen=True)
class Method:
    """A row: who makes the plan, and what it may use.

    extra_slots: places for further copies of experts, on every device in every layer. homing: experts and homes are planned together, and
    the sequences of each batch go to ranks by a forecast of their experts.
    """

    solver: str
    extra_slots: int = 0
    homing: bool = False


METHODS: dict[str, dict[str, Method]] = {
    "text": {name: Method(name) for name in ("contiguous", "moetuner", "exflow", "auto")} | {"auto_homing": Method("auto", homing=True)},
    "hot": {"contiguous": Method("contiguous"), "auto": Method("auto"), "auto_replicas": Method("auto", extra_slots=2)},
}
"""The rows of each case: routing as the text has it, and with some experts far more popular than others."""


@dataclass(frozen=True, eq=False)
class Answer:
    """A method's plan, the forecast by which sequences are given to ranks where they are, and how long both took to find."""

    plan: Plan
    forecast: Forecast | None
    solve_s: float


@dataclass(frozen=True)
class Turn:
    """One step of one method: this rank's seconds, all ranks' bytes between nodes as the interfaces and as the ledger counted them."""

    step_s: float
    exposed_s: float
    interface_bytes: int
    ledger_bytes: int


@dataclass
class Bench:
    """The trained model on these ranks and links; mutable only in its laboratory's rate."""

    directory: RunDirectory
    config: RunConfig
    corpus: Corpus
    mesh: Mesh
    lab: Lab
    fit: Trace
    bias_LE: torch.Tensor | None = None
    topology: Topology | None = field(default=None)

    def trainee(self, plan: Plan, forecast: Forecast | None = None) -> Trainee:
        """The model under `plan`; with a forecast, sequences go where their experts are."""
        assert self.topology is not None or forecast is None, "homes are chosen by links that were measured"
        homing = None if self.topology is None or forecast is None else (forecast, self.topology)
        return Trainee(self.directory, self.config, self.corpus, self.mesh, plan, self.bias_LE, homing)

    def turn(self, trainee: Trainee) -> Turn:
        """One step that all ranks begin together."""
        gc.collect()
        before = self._interfaces()
        barrier(self.mesh)
        step = trainee.step()
        barrier(self.mesh)
        return Turn(step.step_s, step.exposed_s, self._interfaces() - before, _between_nodes(step))

    def dense_interface_bytes(self, trainee: Trainee) -> int:
        """What one reduction of the dense gradients puts on the interfaces, by doing one of that size."""
        banks = {name for names in trainee.engine.expert_names.values() for name in names}
        size = sum(parameter.numel() for name, parameter in trainee.model.named_parameters() if name not in banks)
        barrier(self.mesh)
        before = self._interfaces()
        barrier(self.mesh)
        all_reduce(torch.zeros(size), self.mesh.dense_group)
        barrier(self.mesh)
        return self._interfaces() - before

    def _interfaces(self) -> int:
        """Bytes that all nodes' interfaces have sent; 0 on ranks that do not look."""
        return sum(self.lab.counters(node).sent_bytes for node in range(self.lab.nodes)) if self.mesh.rank == 0 else 0


def _summed(values: list[int], mesh: Mesh) -> list[int]:
    """Each value, summed over ranks."""
    return [sum(of_ranks) for of_ranks in zip(*all_gather_objects(values, mesh), strict=True)]


def _between_nodes(step: Step) -> int:
    return sum(bytes_by_class(step.flights, kind)[OTHER_NODE] for kind in ("tokens", "metadata", "counts", "weights", "gradients"))


def timed(bench: Bench, trainees: Mapping[str, Trainee], repeats: int) -> dict[str, list[Turn]]:
    """Steps of all trainees in turns, after `WARMUP` rounds that are forgotten."""
    calls = {name: functools.partial(bench.turn, trainee) for name, trainee in trainees.items()}
    in_turns(calls, WARMUP, warmup=0)
    for trainee in trainees.values():
        trainee.forget()
    return in_turns(calls, repeats, warmup=0)


def calibrated_by(bench: Bench, trainee: Trainee, seconds: Sequence[float]) -> Calibrated | None:
    """The cost model as the recorded steps of `trainee` teach it, of which the slowest rank's took `seconds`; on rank 0."""
    assert bench.topology is not None
    measured = trainee.measured()
    if measured is None:
        return None
    measured = replace(measured, step_s=statistics.median(seconds))
    return calibrate(measured, trainee.plan, bench.topology, _workload(trainee), trainee.strategies)


def _workload(trainee: Trainee) -> Workload:
    return workload_of(trainee.model.moe_layers[0], trainee.stepper.tokens_per_rank, trainee.config.train.accumulate)


def problem_of(bench: Bench, method: Method, model: Calibrated) -> Problem:
    """What the method's solver is asked: the fit half on the links and devices as measured."""
    slots = -(-bench.fit.num_experts // model.topology.num_devices) + method.extra_slots
    return Problem(Affinity.from_trace(bench.fit), model.topology, model.workload, constraints=Constraints(slots=slots))


def solved(bench: Bench, method: Method, model: Calibrated, seconds: float) -> Answer:
    """The method's plan for the fit half; `seconds` caps each search."""
    begin_s = time.perf_counter()
    problem = problem_of(bench, method, model)
    solution = solve(problem, method.solver, seconds, seed=0)
    forecast = None
    if method.homing:
        forecast = Forecast.fit(bench.fit)
        solution = solve_with_homes(Setting.of(problem, bench.fit), [solution], forecast, seconds, seed=0)
    return Answer(solution.plan, forecast, time.perf_counter() - begin_s)


def promised(bench: Bench, method: Method, answer: Answer, model: Calibrated, strategies: Sequence[Strategy]) -> Evaluation:
    """What the plan does to the fit half, which was drawn into batches and given homes where the method does so, by a calibrated model."""
    if answer.forecast is None:
        return evaluate_strategies(bench.fit, answer.plan, model.topology, model.workload, strategies)
    setting = Setting.of(problem_of(bench, method, model), bench.fit)
    costs = answer.forecast.costs(answer.plan, setting.costs)
    return setting.evaluated(answer.plan, costs.of_trace(bench.fit, setting.sequence_T))


def recorded(bench: Bench, steps: int) -> Trace:
    """Routing of `steps` steps under contiguous experts, on rank 0: the fit half where the trained run's own trace does not do."""
    layers, experts = bench.config.model.num_moe_layers, bench.config.model.num_experts
    trainee = bench.trainee(Plan.contiguous(layers, experts, bench.mesh.expert_parallel))
    for _ in range(steps):
        trainee.step()
    measured = trainee.measured()
    return measured.trace if measured is not None else bench.fit


def case_rows(bench: Bench, case: str, names: Sequence[str], options: argparse.Namespace, rate: float | None) -> list[dict[str, Any]]:
    """The rows of one case at one rate, on rank 0."""
    mesh, methods = bench.mesh, {name: METHODS[case][name] for name in names}
    blank = Problem(Affinity.from_trace(bench.fit), Topology.uniform(2, mesh.expert_parallel // 2), Workload())
    another = bench.trainee(solve(blank, CALIBRATION, seed=1).plan)
    first = timed(bench, {CALIBRATION: another}, options.window)[CALIBRATION]
    before = calibrated_by(bench, another, slowest(mesh, [turn.step_s for turn in first]))
    answers: dict[str, Answer] = {}
    for name, method in methods.items():  # rank 0 searches while the others wait: for one method at a time
        answers[name] = broadcast_object(None if before is None else solved(bench, method, before, options.seconds), mesh)
    trainees = {name: bench.trainee(answer.plan, answer.forecast) for name, answer in answers.items()}
    turns = timed(bench, {**trainees, CALIBRATION: another}, options.repeats)
    dense_bytes = bench.dense_interface_bytes(another)
    seconds = {name: slowest(mesh, [turn.step_s for turn in done]) for name, done in turns.items()}
    exposed = {name: slowest(mesh, [turn.exposed_s for turn in done]) for name, done in turns.items()}
    ledger = {name: _summed([turn.ledger_bytes for turn in done], mesh) for name, done in turns.items()}
    beside = calibrated_by(bench, another, seconds[CALIBRATION])
    rows = []
    for name, trainee in trainees.items():
        measured, copies_s = trainee.measured(), copy_waits(trainee.steps, mesh)
        if measured is None or before is None or beside is None:
            continue
        head = {"case": case, "link_bit_per_s": rate, "method": name}
        promises = [promised(bench, methods[name], answers[name], model, trainee.strategies) for model in (before, beside)]
        held = held_against(measured, trainee, promises, beside, mesh)
        parts = predicted_parts(promises[1], beside.workload)
        found_parts = measured_parts(measured, statistics.median(seconds[name]), copies_s, beside.workload)
        interface = [turn.interface_bytes for turn in turns[name]]
        rows.append(
            {
                **head,
                **held,
                "interface_bytes": round(statistics.median(interface)),
                "interface_over_expected": statistics.median(
                    found / (told + dense_bytes) for found, told in zip(interface, ledger[name], strict=True)
                ),
                **step_times(name, seconds, held["predicted_s"]),
                **{f"{part}_s": found_parts[part] for part in PARTS},
                **{f"{part}_predicted_s": parts[part] for part in PARTS},
                "communication_share": statistics.median(e / s for e, s in zip(exposed[name], seconds[name], strict=True)),
                "loss": statistics.fmean(step.loss for step in trainee.steps),
                "homing_saved": statistics.fmean(step.metrics.get("homing_saved", 0.0) for step in trainee.steps),
                "solve_s": answers[name].solve_s,
                "repeats": options.repeats,
            }
        )
    return rows


def held_against(measured: Measured, trainee: Trainee, promises: Sequence[Evaluation], model: Calibrated, mesh: Mesh) -> dict[str, Any]:
    """What was promised beside what was counted, by the calibrations before all rounds and in them; `model` is the latter.

    Fails where the evaluator's replay of the very steps is not what was counted.
    """
    plan, strategies = trainee.plan, trainee.strategies
    workload, topology = model.workload, model.topology
    replay = predicted_bytes(measured, plan, topology, workload, strategies, mesh)
    assert replay == measured.counted, f"the evaluator's {replay} are not the ledger's {measured.counted}"
    replayed = evaluate_strategies(measured.trace, plan, topology, workload, strategies)
    forecast = dict(zip(LINK_CLASSES, promises[1].bytes_for(replayed.num_tokens), strict=True))
    columns: dict[str, Any] = {}
    for name in LINK_CLASSES:
        columns |= {f"counted_{name}": measured.counted[name] // measured.steps, f"predicted_{name}": replay[name] // measured.steps}
        columns |= {f"forecast_{name}": round(forecast[name] / measured.steps)}
    return {
        **columns,
        "devices_per_token": replayed.devices_per_token,
        "load_max_over_mean": replayed.load_max_over_mean,
        "promised_s": promises[0].step_s,
        "predicted_s": promises[1].step_s,
        "replayed_s": replayed.step_s,
    }


def step_times(name: str, seconds: Mapping[str, Sequence[float]], predicted_s: float) -> dict[str, Any]:
    """Measured seconds, how far the prediction is off, and the speed-up over contiguous with its 95 % interval."""
    spread = Spread.of(seconds[name])
    ratios = [before / after for before, after in zip(seconds["contiguous"], seconds[name], strict=True)]
    low, high = bootstrap_interval(ratios)
    return {
        **spread.row("step_s"),
        "error_percent": 100.0 * (predicted_s / spread.median - 1.0),
        "speedup": statistics.median(ratios),
        "speedup_low": low,
        "speedup_high": high,
    }


def worker(options: argparse.Namespace) -> None:
    """One rank: measure one case at one rate, and tell the rows."""
    with meeting(options, MEETING_S + LATE * options.seconds) as (mesh, lab):
        directory = RunDirectory(Path(options.model))
        config = model_of(directory)
        (rate,) = options.rates
        set_rate(mesh, lab, rate)
        bench = Bench(directory, config, read_corpus(config), mesh, lab, Trace.load(directory.trace))
        if options.case == "hot":
            layers, experts = config.model.num_moe_layers, config.model.num_experts
            bench.bias_LE = fit_zipf(bench.trainee(Plan.contiguous(layers, experts, mesh.expert_parallel)))
            bench.fit = recorded(bench, options.window)
        bench.topology = probe(mesh, model_width=config.model.model_width, expert_width=config.model.routed_width)
        tell(mesh, case_rows(bench, options.case, options.methods, options, rate))


def told(options: argparse.Namespace, model: Path, case: str) -> list[str]:
    """The arguments that carry options to `worker`, behind those that `on_ranks.started` passes itself."""
    asked = METHODS[case] if options.methods is None else ["contiguous", *options.methods]
    names = [name for name in METHODS[case] if name in asked]
    words = {"--model": model, "--case": case, "--methods": ",".join(names), "--window": options.window, "--seconds": options.seconds}
    return [str(word) for pair in words.items() for word in pair]
