"""What if: the same trace on more devices, another topology, with copies of hot experts, under other dispatches; a row for each.

Homes are anywhere alike, since the homes that a trace knows are those of the devices that it was recorded on. Every row is solved anew for
its own devices, dispatch and slots, and scored by the evaluator, except that `contiguous` stands first for what nobody planned.
"""

import textwrap
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

from crossdock.errors import InfeasiblePlan
from crossdock.placement.costs.cost import DISPATCHES, Dispatch, Workload
from crossdock.placement.costs.evaluate import evaluate
from crossdock.placement.costs.hops import devices_per_node
from crossdock.placement.costs.replication import memory_bytes
from crossdock.placement.records.affinity import Affinity
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import Trace
from crossdock.placement.solvers import solve
from crossdock.placement.solvers.problem import Constraints, Problem

DISPATCH_WORDS: dict[Dispatch, str] = {"flat": "expert", "deduplicated": "device", "hierarchical": "node"}
"""What a token sends one copy to."""


@dataclass(frozen=True, eq=False)
class Variant:
    """One question: a topology, a dispatch, slots beyond one copy of each expert, and the method that answers."""

    topology: Topology
    dispatch: Dispatch
    spare_slots: int = 0
    method: str = "auto"


@dataclass(frozen=True)
class Row:
    """One answer. Seconds of a step and of the gradients of copies in it; moved: copies that leave their device, as a fraction of (token,
    expert) pairs; load: busiest device over the mean, mean over layers; memory: experts with optimizer state on the rank with most of them.
    `refused` says why there is no plan; the numbers are then None."""

    topology: str
    devices: int
    dispatch: str
    spare_slots: int
    method: str
    step_s: float | None = None
    tokens_per_s: float | None = None
    gradient_s: float | None = None
    moved: float | None = None
    kept: float | None = None
    load_max_over_mean: float | None = None
    copies: int | None = None
    memory_bytes: float | None = None
    solve_s: float | None = None
    refused: str | None = None

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def variants(topologies: Sequence[Topology], dispatches: Iterable[Dispatch], spare_slots: Iterable[int], method: str) -> list[Variant]:
    """The unplanned first, then every topology under every dispatch that it allows, with each number of spare slots."""
    dispatches, spare_slots = list(dispatches), list(spare_slots)
    without_copies = () if method == "replicas" else (0,)
    found = [Variant(topologies[0], dispatches[0], method="contiguous")]
    for topology in topologies:
        possible = [dispatch for dispatch in dispatches if dispatch != "hierarchical" or _has_two_levels(topology)]
        found += [Variant(topology, dispatch, spare, method) for dispatch in possible for spare in (*without_copies, *spare_slots)]
    return found


def answer(variant: Variant, trace: Trace, workload: Workload, load_cap: float | None, seconds: float, seed: int) -> Row:
    """Solve and score one variant. A question without a feasible plan is answered by a row that says so."""
    topology, unhomed = variant.topology, replace(trace, home_T=None)
    workload = replace(workload, dispatch=variant.dispatch)
    row = Row(topology.name, topology.num_devices, variant.dispatch, variant.spare_slots, variant.method)
    cap = None if variant.method == "contiguous" else load_cap
    constraints = Constraints(load_cap=cap, spare_slots=variant.spare_slots or None)
    began_s = time.perf_counter()
    try:
        problem = Problem(Affinity.from_trace(unhomed), topology, workload, constraints=constraints)
        plan = solve(problem, variant.method, seconds, seed).plan
    except InfeasiblePlan as error:
        return replace(row, refused=str(error))
    solve_s = time.perf_counter() - began_s
    found = evaluate(unhomed, plan, topology, workload)
    return replace(
        row,
        step_s=found.step_s,
        tokens_per_s=workload.tokens_per_rank * workload.micro_batches * topology.num_devices / found.step_s,
        gradient_s=found.gradient_s,
        moved=found.moved,
        kept=found.kept,
        load_max_over_mean=found.load_max_over_mean,
        copies=int((plan.slots_LRS >= 0).sum()) - plan.num_layers * plan.num_experts,
        memory_bytes=float(memory_bytes(plan, workload).max()),
        solve_s=solve_s,
    )


def table(rows: Sequence[Row]) -> list[str]:
    """Rows as lines of at most 80 columns."""
    lines = [
        f"{'topology':<14}{'ranks':>6}{'copy to':>8}{'spare':>6}{'method':>11}{'step ms':>10}{'moved':>7}{'load':>6}{'GiB':>7}{'s':>5}",
    ]
    for row in rows:
        head = f"{row.topology[:14]:<14}{row.devices:>6}{DISPATCH_WORDS[row.dispatch]:>8}{row.spare_slots:>6}{row.method[:10]:>11}"  # type: ignore[index]
        if row.step_s is None or row.moved is None or row.load_max_over_mean is None or row.memory_bytes is None or row.solve_s is None:
            lines.append(f"{head}  no plan: see below")
            continue
        size = f"{row.memory_bytes / 2**30:>7.2f}"
        lines.append(f"{head}{row.step_s * 1e3:>10.2f}{row.moved:>7.1%}{row.load_max_over_mean:>6.2f}{size}{row.solve_s:>5.1f}")
    return lines


def refusals(rows: Sequence[Row]) -> list[str]:
    """Why rows have no plan, each reason once, as lines of at most 80 columns."""
    reasons = dict.fromkeys(row.refused for row in rows if row.refused)
    return [line for reason in reasons for line in ("", *textwrap.wrap(f"no plan: {reason}", 80, break_on_hyphens=False))]


def all_dispatches() -> tuple[Dispatch, ...]:
    """Every dispatch, the plain one first."""
    return tuple(sorted(DISPATCHES, key=list(DISPATCH_WORDS).index))


def _has_two_levels(topology: Topology) -> bool:
    """Whether hierarchical dispatch is something of its own there."""
    return devices_per_node(topology.node_of_R) not in (None, 1, topology.num_devices)
