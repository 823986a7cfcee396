"""Re-planning between two steps: from a measured window to a better plan, decided on rank 0 and the same everywhere."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import pydantic

from crossdock.errors import BadConfig, CrossdockError
from crossdock.placement.affinity import Affinity
from crossdock.placement.choice import Strategy
from crossdock.placement.cost import Dispatch, Window, WireName, Workload
from crossdock.placement.plan import Plan
from crossdock.placement.problem import Constraints, Objective, Problem, Solution
from crossdock.placement.solvers import solve
from crossdock.placement.topology import LINK_CLASSES, Topology
from crossdock.placement.traffic import evaluate_strategies
from crossdock.runtime.adaptation.calibrate import Calibrated
from crossdock.runtime.adaptation.migrate import RoutedLayer
from crossdock.runtime.adaptation.windows import Measured
from crossdock.runtime.transport import collectives
from crossdock.runtime.transport.mesh import Mesh
from crossdock.runtime.transport.wire import wire_of
from crossdock.strict_yaml import StrictModel


class ReplanConfig(StrictModel):
    """One re-planning in the middle of a run."""

    at_step: int | None = pydantic.Field(default=None, ge=1)
    """After this step; never where left out."""
    method: str = "anneal"
    objective: Objective = "seconds"
    seconds: float = pydantic.Field(default=5.0, gt=0.0)
    """Cap on the search; training stands still meanwhile."""
    capture_steps: int | None = pydantic.Field(default=None, ge=1)
    """Steps recorded before and after; `capture.steps` where left out."""
    load_cap: float | None = pydantic.Field(default=None, ge=1.0)
    """The busiest device of a layer gets at most this multiple of the mean load."""


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
        raise BadConfig(
            f"replan.at_step {replan.at_step} of {total_steps} steps leaves no room for {length} recorded steps before and after; "
            f"choose it from {length} to {total_steps - length}, or record fewer"
        )
    return WindowSteps(replan.at_step - length, replan.at_step, replan.at_step + length)


def topology_of(mesh: Mesh, declared: Topology | None) -> Topology:
    """The devices of an expert group: as declared, or this machine with the mesh's nodes and speeds still to be calibrated.

    Raises `BadConfig` where the declared nodes are not those of the mesh.
    """
    nodes = renumbered(mesh.node_of_rank[: mesh.expert_parallel])
    if declared is None:
        return dataclasses.replace(Topology.local(mesh.expert_parallel), node_of_R=nodes, name=f"{max(nodes) + 1}-nodes-local")
    if renumbered(declared.node_of_R) != nodes:
        raise BadConfig(
            f"topology {declared.name} puts devices on nodes {list(declared.node_of_R)}, and the ranks run on nodes {list(nodes)}; "
            "start the ranks as the topology says, or choose the one that fits"
        )
    return declared


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


def decide(config: ReplanConfig, measured: Measured | None, calibrated: Calibrated | None, mesh: Mesh, seed: int) -> Solution:
    """Solve on rank 0 (which has the window) and tell everybody; a solver's error is raised on every rank."""
    answer: Solution | CrossdockError | None = None
    if measured is not None and calibrated is not None:
        try:
            affinity = Affinity.from_trace(measured.trace)
            constraints = Constraints(load_cap=config.load_cap)
            problem = Problem(affinity, calibrated.topology, calibrated.workload, objective=config.objective, constraints=constraints)
            answer = solve(problem, config.method, config.seconds, seed)
        except CrossdockError as error:
            answer = error
    answer = collectives.broadcast_object(answer, mesh)
    if isinstance(answer, CrossdockError):
        raise answer
    assert isinstance(answer, Solution)
    return answer
