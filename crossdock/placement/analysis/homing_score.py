"""Plans with sequence homing: solved from a trace, and scored batch by batch with homes as read, as forecast, and with the routing known.

What homing is worth is measured as it will run: sequences are drawn into global batches, every batch is given homes on its own, and the
evaluator counts what then leaves each device. Homes by the known routing are the limit for any forecast; homes as read are no homing.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossdock.errors import BadData, UsageError
from crossdock.placement.analysis.compare import Candidate
from crossdock.placement.costs.evaluate import Evaluation, evaluate
from crossdock.placement.homing.forecast import Forecast
from crossdock.placement.homing.homes import Batches, CopyCosts, IntArray, known_costs, sequences_of
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.trace import Trace
from crossdock.placement.solvers import homed
from crossdock.placement.solvers.constraints import broken_constraint, check_constraints
from crossdock.placement.solvers.problem import Problem, Solution
from crossdock.placement.solvers.search import starts


def check_tokens_known(trace: Trace) -> None:
    """Raise `BadData` where no forecast can be learnt from the trace."""
    if trace.token_T is None:
        raise BadData(
            "the trace does not know its tokens, and a run finds homes by tokens; record one with `crossdock trace capture`, or look "
            "at what homing would be worth with `crossdock plan compare --homing`"
        )


@dataclass(frozen=True)
class HomesScore:
    """What one choice of homes costs: copies that leave their device, and their node, per token and layer, and predicted seconds."""

    remote_copies: float
    abroad_copies: float
    step_s: float


@dataclass(frozen=True)
class HomingRow:
    """A plan under homing. `forecast` is None where the trace does not know its tokens; `saved` is the part of the copies that leave their
    device as read which the forecast's homes (or, without one, known homes) save."""

    method: str
    read: HomesScore
    forecast: HomesScore | None
    known: HomesScore
    saved: float
    plan: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Setting:
    """A trace with its sequences, drawn into batches, and the problem whose devices they are given to."""

    problem: Problem
    trace: Trace
    sequence_T: IntArray
    batches: Batches
    costs: CopyCosts

    @classmethod
    def of(
        cls, problem: Problem, trace: Trace, sequence_tokens: int | None = None, batch_sequences: int | None = None, seed: int = 0
    ) -> "Setting":
        """Without `batch_sequences` as many as the workload's micro-batch has, or as the trace has. Raises `UsageError`, `BadData`."""
        if problem.mode != "home":
            raise UsageError(f"homing is for tokens that return home, and mode is {problem.mode}; leave --homing out, or use mode home")
        if problem.objective in ("devices", "nodes") and problem.workload.dispatch == "flat":
            raise UsageError(
                f"objective {problem.objective} counts distinct {problem.objective}, and flat dispatch sends a copy to each of a token's "
                "experts: homes would save copies that it does not count; choose objective seconds, or a workload of another dispatch"
            )
        costs = CopyCosts.of(problem.topology, problem.workload, problem.objective)
        sequence_T = sequences_of(trace, sequence_tokens)
        num_sequences, num_devices = int(sequence_T.max()) + 1, problem.num_devices
        if batch_sequences is None:
            length = int((sequence_T == 0).sum())
            asked = problem.workload.tokens_per_rank * num_devices // length
            batch_sequences = max(1, min(asked, num_sequences) // num_devices) * num_devices
        return cls(problem, trace, sequence_T, Batches.draw(num_sequences, batch_sequences, num_devices, seed), costs)

    @property
    def batch_sequences(self) -> int:
        return int(self.batches.sequence_BQ.shape[1])

    @property
    def sequence_tokens(self) -> int:
        return int((self.sequence_T == 0).sum())

    def evaluated(self, plan: Plan, home_cost_QH: NDArray[np.generic] | None) -> Evaluation:
        """The evaluator's replay of all batches, homes at the least cost in each; None: as read."""
        homes_BQ = self.batches.homes(home_cost_QH)
        there = self.batches.trace_at(self.trace, self.sequence_T, homes_BQ)
        return evaluate(there, plan, self.problem.topology, self.problem.workload)

    def row(self, method: str, plan: Plan, forecast: Forecast | None) -> HomingRow:
        """Score a plan."""
        topology = self.problem.topology

        def scored(home_cost_QH: NDArray[np.generic] | None) -> HomesScore:
            evaluation = self.evaluated(plan, home_cost_QH)
            per_token = evaluation.num_tokens * plan.num_layers
            copies_RR, hops_RR = evaluation.copies_LRR.sum(axis=0), evaluation.hops_HLRR.sum(axis=(0, 1))
            remote = copies_RR.sum() - np.trace(copies_RR)
            abroad = hops_RR[np.not_equal.outer(topology.node_of_R, topology.node_of_R)].sum()
            return HomesScore(float(remote / per_token), float(abroad / per_token), evaluation.step_s)

        read = scored(None)
        by_forecast = None
        if forecast is not None and self.trace.token_T is not None:
            by_forecast = scored(forecast.costs(plan, self.costs).of_trace(self.trace, self.sequence_T))
        known = scored(known_costs(self.trace, self.sequence_T, plan, self.costs))
        saved = 1.0 - (by_forecast or known).remote_copies / read.remote_copies if read.remote_copies else 0.0
        return HomingRow(method, read, by_forecast, known, saved, plan.digest)


def solve_with_homes(setting: Setting, begun: Sequence[Solution], forecast: Forecast | None, seconds: float, seed: int) -> Solution:
    """Experts and homes planned together from other methods' plans, if any, and the best of all of these with homes as they will be found.

    The search knows the routing; which of the plans is the best is decided by the evaluator, with the forecast's homes where there is one.
    It searches plans with one copy of each expert; a plan with replicas to begin from is held against what it finds. Plans that break a
    constraint are not taken. Raises `InfeasiblePlan`, naming the constraint, where none is left.
    """
    problem = setting.problem
    devices = [solution.plan.device_of_LE().astype(np.int64) for solution in begun if not solution.plan.has_replicas]
    devices = [starts.balanced(problem), starts.clustered(problem), *devices]
    found = homed.improve(problem, setting.trace, setting.sequence_T, setting.costs, devices, seconds, seed)
    names: dict[str, Any] = {"mode": problem.mode, "objective": problem.objective, "seed": seed, "topology_hash": problem.topology.digest}
    named_after = [solution.plan.method for solution in begun[-1:]]
    names |= {"method": "+".join([*named_after, "homing"]), "trace_hash": problem.affinity.trace_digest}
    joint = Plan.from_devices(found.device_LE, problem.num_devices, problem.constraints.slots, **names)
    met = [Solution(joint, found.value, None, seconds, found.stopped_by), *begun]
    plans = [solution.plan for solution in met if broken_constraint(problem, solution) is None]
    if not plans:
        check_constraints(problem, met[0])
    scores = [_objective(setting, plan, forecast) for plan in plans]
    best = int(np.argmin(scores))
    plan = replace(plans[best], method=str(names["method"]), cost=scores[best], bound=None)
    return Solution(plan, scores[best], None, seconds, found.stopped_by)


def _objective(setting: Setting, plan: Plan, forecast: Forecast | None) -> float:
    """What the problem minimises, with homes: seconds of a step, or copies that leave their device or node per token and layer."""
    costs = known_costs(setting.trace, setting.sequence_T, plan, setting.costs)
    by_forecast = forecast is not None and setting.trace.token_T is not None
    chosen_by = forecast.costs(plan, setting.costs).of_trace(setting.trace, setting.sequence_T) if by_forecast and forecast else costs
    if setting.problem.objective == "seconds":
        return setting.evaluated(plan, chosen_by).step_s
    sequence_X, home_X = setting.batches.sequence_BQ.reshape(-1), setting.batches.homes(chosen_by).reshape(-1)
    return float(costs[sequence_X, home_X].sum() / (len(sequence_X) * setting.sequence_tokens * plan.num_layers))


@dataclass(frozen=True, eq=False)
class PlansWithHomes:
    """What `plan solve` and `plan compare` say with --homing: all candidates, the last of them planned with homes, and their rows."""

    candidates: list[Candidate]
    solution: Solution
    forecast: Forecast | None
    setting: Setting
    rows: tuple[HomingRow, ...]
    eval_rows: tuple[HomingRow, ...]
    accuracy: dict[str, float] | None
    """Of the forecast, on the held-out trace where there is one, else on the trace that it was learnt from."""

    @classmethod
    def of(
        cls,
        problem: Problem,
        trace: Trace,
        eval_trace: Trace | None,
        candidates: Sequence[Candidate],
        sequence_tokens: int | None,
        batch_sequences: int | None,
        seconds: float,
        seed: int,
    ) -> "PlansWithHomes":
        """Learn a forecast where the trace knows its tokens, plan with homes from the candidates that were solved, and score everything."""
        setting = Setting.of(problem, trace, sequence_tokens, batch_sequences, seed)
        forecast = None if trace.token_T is None else Forecast.fit(trace)
        begun = [candidate.solution for candidate in candidates if candidate.solution is not None]
        started_s = time.perf_counter()
        solution = solve_with_homes(setting, begun, forecast, seconds, seed)
        solution = replace(solution, seconds=time.perf_counter() - started_s)
        every = [*candidates, Candidate(solution.plan.method, solution.plan, None, solution.seconds)]
        rows = tuple(setting.row(candidate.label, candidate.plan, forecast) for candidate in every)
        eval_rows: tuple[HomingRow, ...] = ()
        accuracy = None if forecast is None else forecast.accuracy(trace)
        if eval_trace is not None:
            held_out = Setting.of(problem, eval_trace, setting.sequence_tokens, batch_sequences, seed)
            eval_rows = tuple(held_out.row(candidate.label, candidate.plan, forecast) for candidate in every)
            if forecast is not None and eval_trace.token_T is not None:
                accuracy = forecast.accuracy(eval_trace)
        return cls(every, solution, forecast, setting, rows, eval_rows, accuracy)

    def save_forecast(self, plan_path: Path) -> Path:
        """Write the forecast beside the plan: plan.json, plan.forecast.npz. Raises `BadData` where the trace does not know its tokens."""
        check_tokens_known(self.setting.trace)
        assert self.forecast is not None
        path = plan_path.with_name(f"{plan_path.name.removesuffix('.json')}.forecast.npz")
        self.forecast.beside(self.solution.plan).save(path)
        return path

    def as_json(self) -> dict[str, Any]:
        """The key `homing` of the commands' JSON object."""
        known = self.forecast
        facts = None if known is None else {"bytes": known.memory_bytes, "tokens_seen": len(known.token_V), "accuracy": self.accuracy}
        return {
            "homing": {
                "sequence_tokens": self.setting.sequence_tokens,
                "batch_sequences": self.setting.batch_sequences,
                "forecast": facts,
                "rows": [row.as_json() for row in self.rows],
                "eval_rows": [row.as_json() for row in self.eval_rows],
            }
        }


def lines_of(homing: dict[str, Any]) -> list[str]:
    """The same for people, in at most 80 columns."""
    lines = [
        f"homing: batches of {homing['batch_sequences']} sequences of {homing['sequence_tokens']} tokens; copies that leave their",
        "device per token and layer, with homes as read, by the forecast, and by what",
        "is known afterwards",
        *_table(homing["rows"]),
    ]
    if homing["eval_rows"]:
        lines += ["", "held out", *_table(homing["eval_rows"])]
    if homing["forecast"] is not None:
        facts, accuracy = homing["forecast"], homing["forecast"]["accuracy"]
        lines += [
            "",
            f"forecast: {facts['bytes']:,} bytes for {facts['tokens_seen']:,} tokens; {accuracy['recall']:.1%} of choices are",
            f"among the likeliest for their token (by layer {accuracy['recall_by_layer']:.1%}); {accuracy['seen']:.1%} of tokens known",
        ]
    return lines


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [f"{'method':<22}{'as read':>9}{'forecast':>10}{'known':>8}{'saved':>8}{'step ms':>21}"]
    for row in rows:
        forecast = row["forecast"]
        by_forecast = "-" if forecast is None else f"{forecast['remote_copies']:.3f}"
        times = f"{row['read']['step_s'] * 1e3:.2f} > {(forecast or row['known'])['step_s'] * 1e3:.2f}"
        lines.append(
            f"{row['method'][:21]:<22}{row['read']['remote_copies']:>9.3f}{by_forecast:>10}{row['known']['remote_copies']:>8.3f}"
            f"{row['saved']:>8.1%}{times:>21}"
        )
    return lines
