"""The result of a run as `result.json` holds it: how far it came, how fast it went, and what was predicted beside what was counted."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from crossdock.placement.records.plan import Plan
from crossdock.placement.records.topology import LINK_CLASSES, Topology
from crossdock.placement.strategies.strategy import Strategy
from crossdock.placement.strategies.traffic import evaluate_strategies
from crossdock.runtime.adaptation.calibrate import Calibrated
from crossdock.runtime.adaptation.replan import predicted_bytes
from crossdock.runtime.adaptation.windows import Measured
from crossdock.runtime.transport.mesh import Mesh


@dataclass(frozen=True)
class WindowReport:
    """A recorded window held against the evaluator. Bytes are totals over its steps by link class; seconds are medians.

    predicted: the evaluator's replay of exactly the window's tokens under the window's plan. forecast and predicted_s: what the earlier
    window, replayed under this window's plan, promised before the first step of this one; None for the earlier window itself.
    """

    steps: int
    counted: dict[str, int]
    predicted: dict[str, int]
    forecast: dict[str, int] | None
    measured_s: float
    predicted_s: float | None
    load_max_over_mean: float
    plan: dict[str, str]

    def bytes_json(self) -> dict[str, Any]:
        return {"steps": self.steps, "counted": self.counted, "predicted": self.predicted, "forecast": self.forecast}

    def as_json(self) -> dict[str, Any]:
        return {
            "bytes": self.bytes_json(),
            "step_time": {"measured_s": self.measured_s, "predicted_s": self.predicted_s},
            "load_max_over_mean": self.load_max_over_mean,
            "plan": self.plan,
        }


def report_window(
    measured: Measured,
    plan: Plan,
    topology: Topology,
    calibrated: Calibrated,
    earlier: Measured | None,
    strategies: Sequence[Strategy],
    mesh: Mesh,
) -> WindowReport:
    """Hold a window that ran under `plan`, each layer by its strategy, against the evaluator and what an earlier one promised."""
    workload = calibrated.workload
    replayed = evaluate_strategies(measured.trace, plan, topology, workload, strategies)
    forecast = predicted_s = None
    if earlier is not None:
        promise = evaluate_strategies(earlier.trace, plan, calibrated.topology, workload, strategies)
        forecast_bytes = promise.bytes_for(replayed.num_tokens)
        forecast = {name: round(size) for name, size in zip(LINK_CLASSES, forecast_bytes, strict=True)}
        predicted_s = promise.step_s
    return WindowReport(
        steps=measured.steps,
        counted=measured.counted,
        predicted=predicted_bytes(measured, plan, topology, workload, strategies, mesh),
        forecast=forecast,
        measured_s=measured.step_s,
        predicted_s=predicted_s,
        load_max_over_mean=replayed.load_max_over_mean,
        plan=plan_json(plan),
    )


def plan_json(plan: Plan) -> dict[str, str]:
    """How results and events name a plan."""
    return {"hash": plan.digest, "method": plan.method}


@dataclass(frozen=True)
class TrainResult:
    """How a run ended; the same keys on every rank, values that only rank 0 has are None elsewhere."""

    status: str
    exit_code: int
    reached_step: int
    target_step: int
    world_size: int
    loss: float | None = None
    eval_loss: float | None = None
    tokens_per_s: float | None = None
    step_s: float | None = None
    exposed_s: float | None = None
    window: WindowReport | None = None
    before: WindowReport | None = None
    plan: Plan | None = None
    message: str = ""
    moves: int | None = None

    def as_json(self) -> dict[str, Any]:
        """The object of `result.json`."""
        nothing: dict[str, Any] = {"steps": 0, "counted": None, "predicted": None, "forecast": None}
        window = self.window
        value: dict[str, Any] = {
            "status": self.status,
            "exit_code": self.exit_code,
            "reached_step": self.reached_step,
            "target_step": self.target_step,
            "loss": self.loss,
            "eval_loss": self.eval_loss,
            "tokens_per_s": self.tokens_per_s,
            "step_s": self.step_s,
            "exposed_s": self.exposed_s,
            "bytes": nothing if window is None else window.bytes_json(),
            "step_time": {
                "measured_s": None if window is None else window.measured_s,
                "predicted_s": None if window is None else window.predicted_s,
            },
            "load_max_over_mean": None if window is None else window.load_max_over_mean,
            "plan": None if self.plan is None else plan_json(self.plan),
            "world_size": self.world_size,
            "before": None if self.before is None else self.before.as_json(),
            "moves": self.moves,
        }
        return value | ({"message": self.message} if self.message else {})


@dataclass
class Speeds:
    """Seconds of the steps of this process, for medians; mutable."""

    tokens_per_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    exposed_s: list[float] = field(default_factory=list)


def median(values: Sequence[float]) -> float | None:
    """The median, or None of nothing."""
    return statistics.median(values) if values else None
