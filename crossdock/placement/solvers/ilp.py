"""Method ilp: each layer as a mixed-integer linear program, solved by HiGHS (`scipy.optimize.milp`), with a proven bound.

For small layers. Variables of one layer, e experts, r devices, n nodes, u distinct token sets:

    x[e, r] in {0, 1}   expert e lives on device r
    z[u, r] in [0, 1]   a copy of the tokens with set u goes to device r
    y[u, n] in [0, 1]   ... to node n                                         (objective nodes)
    dispatch, combine   seconds of the two all-to-alls                        (objective seconds)
    slowest             seconds of the busiest device's experts, forward      (objective seconds)
    stage[1..4]         max(window, transfer) of the four transfers           (objective seconds)

The search of method anneal runs first: its plan is the cut-off of the program, and the answer where the time ends before a better one is
found.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from crossdock.errors import InfeasiblePlan, UsageError
from crossdock.placement.costs.cost import BACKWARD_FLOP_RATIO
from crossdock.placement.records.plan import EMPTY
from crossdock.placement.solvers import anneal
from crossdock.placement.solvers.problem import Problem, Solution
from crossdock.placement.solvers.search.layer_search import Deadline, Placed
from crossdock.placement.solvers.search.price import BlockSeconds, Layer, has_two_hops, layer_of
from crossdock.placement.solvers.search.symmetry import ordered_devices, ordered_nodes
from crossdock.placement.solvers.solution import solution_of

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

MAX_COPY_VARIABLES = 4000  # z[u, r] of the largest layer; beyond it HiGHS proves nothing in minutes
SEARCH_SHARE = 0.2  # of the time, for the plan to start from
CUTOFF_SLACK = 1e-7
INFEASIBLE = 2  # status of scipy's milp
OBJECTIVE_SIZE = 1e3  # the start's cost in the program's unit: HiGHS stops at an absolute gap of 1e-6


def solve(problem: Problem, seconds: float, seed: int) -> Solution:
    """Solve layer after layer; time that a layer leaves goes to the next ones.

    Raises `UsageError` for objective hops and for layers beyond MAX_COPY_VARIABLES, `InfeasiblePlan` where HiGHS proves that no plan keeps
    to the constraints or no plan was found.
    """
    check(problem)
    deadline = Deadline(seconds)
    placed_L, _ = anneal.search_layers(problem, seed, deadline.share(1.0 / SEARCH_SHARE))
    device_LE, bounds, proven = [], [], True
    for layer, placed in enumerate(placed_L):
        device_E, bound, finished = _solve_layer(problem, layer, placed, deadline.share(problem.num_layers - layer))
        device_LE.append(device_E)
        bounds.append(bound)
        proven = proven and finished
    constant = problem.workload.other_s if problem.objective == "seconds" else 0.0
    return solution_of(
        problem,
        np.stack(device_LE),
        method="ilp",
        seed=seed,
        seconds=deadline.elapsed_s,
        stopped_by="optimal" if proven else "seconds",
        bound=sum(bounds) + constant,
    )


@dataclass(frozen=True)
class Program:
    """Columns of one layer's program: where each family of variables begins."""

    num_experts: int
    num_devices: int
    num_sets: int
    num_nodes: int  # 0 without node variables
    has_times: bool

    @property
    def z(self) -> int:
        return self.num_experts * self.num_devices

    @property
    def y(self) -> int:
        return self.z + self.num_sets * self.num_devices

    @property
    def times(self) -> int:
        """dispatch, combine, slowest, stage[1..4]"""
        return self.y + self.num_sets * self.num_nodes

    @property
    def num_columns(self) -> int:
        return self.times + 7 * self.has_times


class Rows:
    """Constraints under construction: low <= sum of coefficient * column <= high, one named family at a time."""

    def __init__(self, num_columns: int) -> None:
        self.num_columns = num_columns
        self.families: dict[str, LinearConstraint] = {}

    def add(self, name: str, row: IntArray, column: IntArray, coefficient: FloatArray, low: FloatArray, high: FloatArray) -> None:
        """A family of len(low) constraints from triplets."""
        if len(low):
            matrix = sparse.csr_array((coefficient, (row, column)), shape=(len(low), self.num_columns))
            self.families[name] = LinearConstraint(matrix, low, high)


def build(problem: Problem, layer: Layer, unit: float) -> tuple[Program, Rows, FloatArray, FloatArray]:
    """The program of one layer: columns, constraints, costs [columns], and lower bounds of the columns [columns].

    Costs and times are in units of `unit`, so that the solver's tolerances (1e-6) are small beside them.
    """
    topology, R, E = problem.topology, problem.num_devices, layer.num_experts
    U = len(layer.member_UK)
    node_R = np.array(topology.node_of_R)
    by_node, by_time = problem.objective == "nodes", problem.objective == "seconds"
    program = Program(E, R, U, topology.num_nodes if by_node else 0, by_time)
    rows = Rows(program.num_columns)
    device, expert = np.arange(R), np.arange(E)
    x_ER = expert[:, None] * R + device
    z_UR = program.z + np.arange(U)[:, None] * R + device

    # home: every expert lives on exactly one device
    rows.add("home", np.repeat(expert, R), x_ER.ravel(), np.ones(E * R), np.ones(E), np.ones(E))

    # slots: a device holds at most as many experts as it has slots
    rows.add("slots", np.tile(device, E), x_ER.ravel(), np.ones(E * R), np.full(R, -np.inf), problem.slots_R.astype(float))

    # copy: a set with an expert on a device sends a copy there, z[u, r] >= x[e, r]
    set_A, choice_A = np.nonzero(layer.member_UK < E)
    member_A = layer.member_UK[set_A, choice_A]
    A = len(set_A) * R
    pair = np.arange(A)
    rows.add(
        "copy",
        np.concatenate([pair, pair]),
        np.concatenate([z_UR[set_A].ravel(), x_ER[member_A].ravel()]),
        np.concatenate([np.ones(A), -np.ones(A)]),
        np.zeros(A),
        np.full(A, np.inf),
    )

    # spread: a set of more experts than a device has slots goes to several devices
    size_U = np.bincount(set_A, minlength=U)
    least_U = -(-size_U // int(problem.slots_R.max()))
    rows.add("spread", np.repeat(np.arange(U), R), z_UR.ravel(), np.ones(U * R), least_U.astype(float), np.full(U, np.inf))

    if by_node:
        # node: a copy to a device is a copy to its node, y[u, n] >= z[u, r]
        y_UR = program.y + np.arange(U)[:, None] * topology.num_nodes + node_R
        pair = np.arange(U * R)
        rows.add(
            "node",
            np.concatenate([pair, pair]),
            np.concatenate([y_UR.ravel(), z_UR.ravel()]),
            np.concatenate([np.ones(U * R), -np.ones(U * R)]),
            np.zeros(U * R),
            np.full(U * R, np.inf),
        )

    if problem.constraints.load_cap is not None:
        # cap: no device gets more than the capped multiple of the mean load
        load_E = layer.load_I[:E]
        most = problem.constraints.load_cap * load_E.sum() / R * (1.0 + 1e-12)
        rows.add("cap", np.tile(device, E), x_ER.ravel(), np.repeat(load_E, R) / max(most, 1e-300), np.full(R, -np.inf), np.ones(R))

    cost = np.zeros(program.num_columns)
    low = np.zeros(program.num_columns)
    per_token = 1.0 / (unit * problem.affinity.num_tokens * problem.num_layers)
    if problem.objective == "devices":
        cost[z_UR] = layer.count_U[:, None] * per_token
    elif by_node:
        cost[program.y : program.times] = np.repeat(layer.count_U * per_token, topology.num_nodes)
    else:
        _add_times(problem, layer, program, unit, rows, cost, low, x_ER, z_UR)
    _add_order(problem, layer, rows, x_ER)
    pinned = np.flatnonzero(layer.pinned_I != EMPTY)
    low[x_ER[pinned, layer.pinned_I[pinned]]] = 1.0
    return program, rows, cost, low


def _add_times(
    problem: Problem,
    layer: Layer,
    program: Program,
    unit: float,
    rows: Rows,
    cost: FloatArray,
    low: FloatArray,
    x_ER: IntArray,
    z_UR: IntArray,
) -> None:
    """Times of the block: every maximum of `cost.block_cost` becomes a variable that is at least each of its arguments."""
    workload, window, R = problem.workload, problem.workload.window, problem.num_devices
    scale, load_E = problem.tokens_per_trace_token, layer.load_I[: layer.num_experts]
    seconds = BlockSeconds.of(problem)
    dispatch, combine, slowest, *stages = range(program.times, program.times + 7)
    if workload.dispatch != "flat":
        column, device, copies = z_UR.ravel(), np.tile(np.arange(R), len(z_UR)), np.repeat(layer.count_U * scale, R)
    else:
        column, device, copies = x_ER.ravel(), np.tile(np.arange(R), len(x_ER)), np.repeat(load_E * scale, R)

    # port: an all-to-all takes at least as long as each of its ports
    for name, ports, time in (("port_dispatch", seconds.dispatch[0], dispatch), ("port_combine", seconds.combine[0], combine)):
        seconds_JX, latency_J = ports.table()
        J = len(latency_J)
        table_JX = -seconds_JX[:, device] * (copies / unit)
        row_J, column_X = np.nonzero(table_JX)
        rows.add(
            name,
            np.concatenate([row_J, np.arange(J)]),
            np.concatenate([column[column_X], np.full(J, time)]),
            np.concatenate([table_JX[row_J, column_X], np.ones(J)]),
            latency_J / unit,
            np.full(J, np.inf),
        )

    # slowest: the experts take at least as long as each device's rows
    row_s_R = scale * workload.row_flop / unit / problem.topology.flop_per_s_R
    rows.add(
        "slowest",
        np.concatenate([np.tile(np.arange(R), len(x_ER)), np.arange(R)]),
        np.concatenate([x_ER.ravel(), np.full(R, slowest)]),
        np.concatenate([-(load_E[:, None] * row_s_R).ravel(), np.ones(R)]),
        np.zeros(R),
        np.full(R, np.inf),
    )

    # stage: each of the four transfers takes at least its window, and at least its all-to-all; where turns have windows of their own, their
    # mean, which keeps the bound a bound
    low[stages] = (
        np.array([window.dispatch_forward_s, window.combine_forward_s, window.combine_backward_s, window.dispatch_backward_s]) / unit
    )
    rows.add(
        "stage",
        np.tile(np.arange(4), 2),
        np.array([*stages, dispatch, combine, dispatch, combine]),
        np.repeat([1.0, -1.0], 4),
        np.zeros(4),
        np.full(4, np.inf),
    )
    cost[stages] = workload.micro_batches
    cost[slowest] = workload.micro_batches * (1.0 + BACKWARD_FLOP_RATIO)


def _add_order(problem: Problem, layer: Layer, rows: Rows, x_ER: IntArray) -> None:
    """Of plans that differ only by the names of equal devices or equal nodes, keep one: smallest experts in ascending order."""
    if (layer.pinned_I != EMPTY).any():
        return

    # order: expert e may live on the later of two equal places only if a smaller expert lives on the earlier one
    for name, pairs in (("order_devices", ordered_devices(problem)), ("order_nodes", ordered_nodes(problem))):
        row, column, coefficient, number = [], [], [], 0
        for earlier, later in pairs:
            for expert in range(layer.num_experts):
                smaller = x_ER[:expert, earlier].ravel()
                own = x_ER[expert, later]
                row += [number] * (len(smaller) + len(own))
                column += [*smaller.tolist(), *own.tolist()]
                coefficient += [1.0] * len(smaller) + [-1.0] * len(own)
                number += 1
        rows.add(
            name, np.array(row, dtype=int), np.array(column, dtype=int), np.array(coefficient), np.zeros(number), np.full(number, np.inf)
        )


def _solve_layer(problem: Problem, number: int, start: Placed, deadline: Deadline) -> tuple[IntArray, float, bool]:
    """Devices of one layer's experts, a lower bound on what the layer adds to the objective, and whether the program was finished."""
    layer = layer_of(problem, number)
    fixed = _fixed_cost(problem)
    start_E = start.device_I[: problem.num_experts]
    if start.value - fixed <= 0.0:
        return start_E, fixed, True  # nothing is chosen in this layer
    unit = (start.value - fixed) / OBJECTIVE_SIZE
    program, rows, cost, low = build(problem, layer, unit)
    high = np.ones(program.num_columns)
    high[program.times :] = np.inf
    # cutoff: no dearer than the plan of the search
    cutoff = LinearConstraint(cost[None], -np.inf, OBJECTIVE_SIZE * (1.0 + CUTOFF_SLACK))
    constraints = list(rows.families.values())
    answer = None
    for attempt in ([*constraints, cutoff], constraints) if start.excess == 0.0 else (constraints,):
        answer = milp(
            cost,
            integrality=(np.arange(program.num_columns) < program.z).astype(np.int64),
            bounds=Bounds(low, high),
            constraints=attempt,
            options={"time_limit": max(deadline.left_s, 0.05), "mip_rel_gap": 0.0},
        )
        if answer.status != INFEASIBLE:
            break
    assert answer is not None
    if answer.status == INFEASIBLE:
        assert start.excess > 0.0, "the program forbids a plan that keeps to every constraint"
        raise InfeasiblePlan(
            f"HiGHS proved that no plan of layer {number} keeps to load cap {problem.constraints.load_cap}, slots and pins; relax one"
        )
    proven = answer.mip_dual_bound
    bound = fixed + (max(float(proven), 0.0) if proven is not None and np.isfinite(proven) else 0.0) * unit
    assert start.excess > 0.0 or bound <= start.value * (1.0 + 1e-6), "the program's bound is above a plan that keeps to every constraint"
    if answer.x is None:
        if start.excess > 0.0:
            raise InfeasiblePlan(
                f"no plan of layer {number} within load cap {problem.constraints.load_cap} was found in time; give more seconds"
            )
        return start_E, bound, False
    found_E = answer.x[: program.z].reshape(problem.num_experts, problem.num_devices).argmax(axis=1)
    cheaper = start.excess > 0.0 or answer.fun < OBJECTIVE_SIZE * (1.0 - 1e-9)
    return (found_E if cheaper else start_E), bound, answer.status == 0


def _fixed_cost(problem: Problem) -> float:
    """What every plan's layer costs and the program leaves out: the fixed cost of the experts, forward and backward."""
    return 2.0 * problem.workload.expert_overhead_s * problem.workload.micro_batches if problem.objective == "seconds" else 0.0


def check(problem: Problem) -> None:
    """Raise `UsageError` where the method cannot take the problem."""
    if problem.objective == "hops":
        raise UsageError(
            "method ilp solves objectives seconds, devices and nodes, whose layers are independent; for hops use method anneal"
        )
    if problem.objective == "seconds" and has_two_hops(problem):
        raise UsageError("method ilp does not know the two hops of hierarchical dispatch; use method auto")
    sizes = [len(sets.count_U) * problem.num_devices for sets in problem.affinity.sets]
    if max(sizes) > MAX_COPY_VARIABLES:
        layer = int(np.argmax(sizes))
        raise UsageError(
            f"method ilp is for small layers: layer {layer} has {sizes[layer] // problem.num_devices} distinct expert sets x "
            f"{problem.num_devices} devices = {sizes[layer]} copy variables, above {MAX_COPY_VARIABLES}; use method anneal"
        )
