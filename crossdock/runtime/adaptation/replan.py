"""Re-planning between two steps: from a measured window to a better plan, decided on rank 0 and the same everywhere."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import pydantic

from crossdock.errors import BadConfig, CrossdockError
from crossdock.placement.costs.cost import Dispatch, Window, WireName, Workload
from crossdock.placement.costs.moving import Move, price_of_move, steps_to_pay_back
from crossdock.placement.records.plan import Objective, Plan
from crossdock.placement.records.topology import LINK_CLASSES, Topology
from crossdock.placement.records.trace import Trace
from crossdock.placement.strategies.strategy import Strategy
from crossdock.placement.strategies.traffic import evaluate_strategies
from crossdock.runtime.adaptation.calibrate import Calibrated
from crossdock.runtime.adaptation.migrate import RoutedLayer
from crossdock.runtime.adaptation.windows import Measured
from crossdock.runtime.optimization.optimizer import master_dtype
from crossdock.runtime.transport import collectives
from crossdock.runtime.transport.mesh import Mesh
from crossdock.runtime.transport.wire import wire_of
from crossdock.strict_yaml import StrictModel

if TYPE_CHECKING:
    from crossdock.placement.solvers.problem import Solution

ALIKE = 0.1
"""Devices whose measured speeds differ by less than this share may stand for one another in a new plan; what that costs is weighed."""

Method = Literal[
    "contiguous",
    "random",
    "balance",
    "eplb",
    "eplb_global",
    "exflow",
    "moetuner",
    "dp",
    "sweep",
    "anneal",
    "columns",
    "ilp",
    "replicas",
    "auto",
]
"""The names in `placement.solvers.SOLVERS`, which cannot be imported here: it loads scipy."""


class ReplanConfig(StrictModel):
    """One re-planning in the middle of a run."""

    at_step: int | None = pydantic.Field(default=None, ge=1)
    """After this step; never where left out."""
    method: Method = "auto"
    objective: Objective = "seconds"
    seconds: float = pydantic.Field(default=5.0, gt=0.0)
    """Cap on the search; training stands still meanwhile."""
    capture_steps: int | None = pydantic.Field(default=None, ge=1)
    """Steps recorded before and after; `capture.steps` where left out."""
    load_cap: float | None = pydantic.Field(default=None, ge=1.0)
    """The busiest device of a layer gets at most this multiple of the mean load."""
    spare_slots: int = pydantic.Field(default=0, ge=0)
    """Slots of each device and layer beyond one copy of each expert, for copies of hot ones; those that are filled take memory."""
    pays_back_within: int | None = pydantic.Field(default=None, ge=0)
    """Experts move only where the predicted gain makes up for the move within so many steps; those left in the run where left out. 0 moves
    them whatever it costs."""


@dataclass(frozen=True)
class WindowSteps:
    """Two windows of equal length: steps [begin, boundary) calibrate, steps [boundary, end) are held against the prediction."""

    begin: int
    boundary: int
    end: int


def window_steps(total_steps: int, capture_steps: int, replan: ReplanConfig) -> WindowSteps | None:
    """Where the windows lie: on both sides of the re-planning, or at the end of the run; None where nothing is to be recorded.

    Raises `BadConfig` where a re-planning leaves no room for its windows.
    """
    if replan.at_step is None:
        length = min(capture_steps, total_steps // 2)
        return WindowSteps(total_steps - 2 * length, total_steps - length, total_steps) if length else None
    length = replan.capture_steps if replan.capture_steps is not None else capture_steps
    if length < 1:
        raise BadConfig("a re-planning needs a recorded window; set capture.steps or replan.capture_steps to 1 or more")
    if not length <= replan.at_step <= total_steps - length:
        choice = f"choose it from {length} to {total_steps - length}, or record fewer (replan.capture_steps)"
        if total_steps < 2 * length:
            choice = f"train for {2 * length} steps or more, record fewer (replan.capture_steps), or set replan.at_step: null"
        raise BadConfig(
            f"replan.at_step {replan.at_step} of {total_steps} steps leaves no room for {length} recorded steps before and after; {choice}"
        )
    return WindowSteps(replan.at_step - length, replan.at_step, replan.at_step + length)


def topology_of(mesh: Mesh, declared: Topology | None) -> Topology:
    """The devices of an expert group: as declared, or this machine with the mesh's nodes and speeds still to be calibrated.

    Nodes are numbered in the order of their devices, as hierarchical dispatch is counted. Raises `BadConfig` where the declared nodes are
    not those of the mesh.
    """
    nodes = renumbered(mesh.node_of_rank[: mesh.expert_parallel])
    if declared is None:
        return dataclasses.replace(Topology.local(mesh.expert_parallel), node_of_R=nodes, name=f"{max(nodes) + 1}-nodes-local")
    if renumbered(declared.node_of_R) != nodes:
        raise BadConfig(
            f"topology {declared.name} puts devices on nodes {list(declared.node_of_R)}, and the ranks run on nodes {list(nodes)}; "
            "start the ranks as the topology says, or choose the one that fits"
        )
    return declared if declared.node_of_R == nodes else dataclasses.replace(declared, node_of_R=nodes)


def renumbered(nodes: Sequence[int]) -> tuple[int, ...]:
    """Nodes numbered 0, 1, ... in order of appearance."""
    number_of: dict[int, int] = {}
    return tuple(number_of.setdefault(node, len(number_of)) for node in nodes)


def workload_of(layer: RoutedLayer, tokens_per_rank: int, accumulate: int) -> Workload:
    """Sizes of the model at hand, taken from one of its MoE layers; times are left to calibration."""
    bank, dispatcher = layer.bank, layer.dispatcher
    return Workload(
        tokens_per_rank=tokens_per_rank,
        model_width=bank.model_width,
        expert_width=bank.expert_width,
        wire=cast(WireName, wire_of(dispatcher.wire, bank.inner.dtype).name),
        expert_matrices=bank.activation.num_inputs + 1,
        gradient_bytes=master_dtype(bank.inner.dtype).itemsize,
        dispatch=cast(Dispatch, dispatcher.name),
        micro_batches=accumulate * layer.turns,  # every turn travels by itself
        turn_windows=(Window(),) * layer.turns if layer.turns > 1 else (),
    )


def predicted_bytes(
    measured: Measured, plan: Plan, topology: Topology, workload: Workload, strategies: Sequence[Strategy], mesh: Mesh
) -> dict[str, int]:
    """The evaluator's bytes by link class of exactly the tokens of a window, every expert group on its own nodes."""
    total = [0, 0, 0]
    for group, trace in enumerate(measured.traces):
        nodes = mesh.node_of_rank[group * mesh.expert_parallel : (group + 1) * mesh.expert_parallel]
        there = dataclasses.replace(topology, node_of_R=renumbered(nodes))
        bytes_by_class = evaluate_strategies(trace, plan, there, workload, strategies).bytes_by_class
        total = [known + int(new) for known, new in zip(total, bytes_by_class, strict=True)]
    return dict(zip(LINK_CLASSES, total, strict=True))


@dataclass(frozen=True, eq=False)
class Decision:
    """What a re-planning came to. `plan` is the one to go on with: the new one, or the old one where moving would not pay.

    solution is the solver's; move is what going from the old plan to its plan takes, under the names that were found best. Seconds of a
    step are predictions. payback_steps: after how many steps the move has paid, None for never; limit_steps: how many it may take.
    """

    solution: "Solution"
    plan: Plan
    is_accepted: bool
    move: Move
    step_before_s: float
    step_after_s: float
    payback_steps: int | None
    limit_steps: int

    def as_event(self) -> dict[str, Any]:
        """What events.jsonl holds of it."""
        return {
            "cost": self.solution.cost,
            "bound": self.solution.bound,
            "seconds": self.solution.seconds,
            "stopped_by": self.solution.stopped_by,
            "accepted": self.is_accepted,
            "moves": self.move.moves,
            "move_bytes": self.move.bytes,
            "move_s": self.move.seconds,
            "step_before_s": self.step_before_s,
            "step_after_s": self.step_after_s,
            "payback_steps": self.payback_steps,
            "limit_steps": self.limit_steps,
        }


def decide(
    config: ReplanConfig,
    measured: Measured | None,
    calibrated: Calibrated | None,
    current: Plan,
    strategies: Sequence[Strategy],
    steps_left: int,
    mesh: Mesh,
    seed: int,
) -> Decision:
    """Solve on rank 0 (which has the window), weigh the move, and tell everybody; a solver's error is raised on every rank."""
    answer: Decision | CrossdockError | None = None
    if measured is not None and calibrated is not None:
        # solvers load scipy's optimisers, half a second that every rank of every run would pay at its start
        from crossdock.placement.records.affinity import Affinity
        from crossdock.placement.solvers import solve
        from crossdock.placement.solvers.problem import Constraints, Problem

        try:
            affinity = Affinity.from_trace(measured.trace)
            constraints = Constraints(load_cap=config.load_cap, spare_slots=config.spare_slots or None)
            problem = Problem(affinity, calibrated.topology, calibrated.workload, objective=config.objective, constraints=constraints)
            solution = solve(problem, config.method, config.seconds, seed)
            limit_steps = steps_left if config.pays_back_within is None else config.pays_back_within
            answer = weigh(solution, current, measured.trace, calibrated, strategies, limit_steps)
        except CrossdockError as error:
            answer = error
    answer = collectives.broadcast_object(answer, mesh)
    if isinstance(answer, CrossdockError):
        raise answer
    assert isinstance(answer, Decision)
    return answer


def weigh(
    solution: "Solution", current: Plan, trace: Trace, calibrated: Calibrated, strategies: Sequence[Strategy], limit_steps: int
) -> Decision:
    """Whether to go from `current` to the solution's plan, and under which names of its devices: what saves most within `limit_steps`.

    With 0 steps it goes, and under the names that take the shortest move.
    """
    from crossdock.placement.analysis.relabel import relabelled

    topology, workload = calibrated.topology, calibrated.workload

    def step_s(plan: Plan) -> float:
        return evaluate_strategies(trace, plan, topology, workload, strategies).step_s

    before_s = step_s(current)
    decisions = []
    for plan in {id(plan): plan for plan in (solution.plan, relabelled(solution.plan, current, topology, tolerance=ALIKE))}.values():
        move, after_s = price_of_move(current, plan, topology, workload), step_s(plan)
        payback_steps = steps_to_pay_back(move.seconds, before_s, after_s)
        pays = limit_steps == 0 or (payback_steps is not None and payback_steps <= limit_steps and after_s <= before_s)
        decision = Decision(solution, plan if pays else current, pays, move, before_s, after_s, payback_steps, limit_steps)
        decisions.append((limit_steps * (before_s - after_s) - move.seconds, decision))
    return max(decisions, key=lambda scored: (scored[1].is_accepted, scored[0]))[1]
