"""Method moetuner: MoETuner's two integer programs (arXiv 2502.06643) with HiGHS: even clusters first, then clusters to devices.

The first program, for each layer, puts experts e into clusters c, as many as devices:

    x[e, c] in {0, 1}, deviation[c] >= |sum over e of load[e] * x[e, c] - mean load|
    one cluster, for each e        sum over c of x[e, c] = 1            (printed as >= 1)
    equal clusters, for each c     sum over e of x[e, c] = E / G        (not printed; needed, or clusters would not fit their devices)
    minimise                       sum over c of deviation[c]

The second puts the clusters on devices g, where C[l, c, d] tokens go from cluster c of layer l to cluster d of the next:

    y[l, c, g] in {0, 1}, slowest[l] >= C[l, c, d] / B[g, h] * (y[l, c, g] + y[l + 1, d, h] - 1)        for all c, d, g, h with g != h
    one device for each cluster, one cluster for each device, in every layer
    minimise                       sum over l of slowest[l]

It has L * G^4 rows. Beyond MAX_ROWS the layers are solved in turn, each behind the one before. Tokens are counted between first choices;
the paper counts all pairs of the top 2. The problem's objective, load cap and pins play no part.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from crossdock.errors import UsageError
from crossdock.placement.solvers.problem import Problem, Solution
from crossdock.placement.solvers.search import starts
from crossdock.placement.solvers.search.layer_search import Deadline
from crossdock.placement.solvers.solution import solution_of

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

MAX_ROWS = 40_000  # of the second program for all layers at once
TOLERANCE = 0.025  # the paper's relative gap


def check(problem: Problem) -> None:
    """Raise `UsageError` where devices have unequal slots."""
    if len(set(problem.slots_R.tolist())) > 1:
        raise UsageError("method moetuner makes clusters of equal size and needs equally many slots on every device; use method auto")


def solve(problem: Problem, seconds: float, seed: int) -> Solution:
    """Half of the time for each program. Raises `UsageError` where devices have unequal slots."""
    check(problem)
    deadline = Deadline(seconds)
    first, balanced_LE = deadline.share(2.0), starts.balanced(problem)
    clusters = [
        _clusters(problem, layer, balanced_LE[layer], first.share(problem.num_layers - layer)) for layer in range(problem.num_layers)
    ]
    cluster_LE, proven = np.stack([cluster_E for cluster_E, _ in clusters]), all(done for _, done in clusters)
    G, flows = problem.num_devices, _flows(problem, cluster_LE)
    if (problem.num_layers - 1) * G**4 <= MAX_ROWS:
        device_LC, mapped = _mapped_at_once(problem, flows, deadline)
    else:
        device_LC, mapped = _mapped_in_turn(problem, flows, deadline)
    device_LE = np.take_along_axis(device_LC, cluster_LE, axis=1)
    stopped_by = "done" if proven and mapped else "seconds"
    return solution_of(problem, device_LE, method="moetuner", seed=seed, seconds=deadline.elapsed_s, stopped_by=stopped_by)


def _clusters(problem: Problem, layer: int, fallback_E: IntArray, deadline: Deadline) -> tuple[IntArray, bool]:
    """The first program: the cluster of each expert, and whether it was solved; greedy packing where HiGHS found nothing in time."""
    load_E = problem.affinity.load_LE[layer].astype(np.float64)
    E, G = problem.num_experts, problem.num_devices
    mean = load_E.sum() / G
    load_E, mean = load_E / max(mean, 1e-300), 1.0 if mean else 0.0  # in mean loads, beside the solver's tolerances
    column_EG = np.arange(E * G).reshape(E, G)
    load_rows = sparse.csr_array((np.repeat(load_E, G), (np.tile(np.arange(G), E), column_EG.ravel())), shape=(G, E * G))
    identity = sparse.eye_array(G)
    one_cluster = sparse.csr_array((np.ones(E * G), (np.repeat(np.arange(E), G), column_EG.ravel())), shape=(E, E * G + G))
    size = sparse.csr_array((np.ones(E * G), (np.tile(np.arange(G), E), column_EG.ravel())), shape=(G, E * G + G))
    answer = milp(
        np.concatenate([np.zeros(E * G), np.ones(G)]),
        constraints=[
            LinearConstraint(sparse.hstack([load_rows, identity]), mean, np.inf),
            LinearConstraint(sparse.hstack([load_rows, -identity]), -np.inf, mean),
            LinearConstraint(one_cluster, 1.0, 1.0),
            LinearConstraint(size, E // G, min(-(-E // G), int(problem.slots_R[0]))),
        ],
        integrality=np.concatenate([np.ones(E * G, dtype=np.int64), np.zeros(G, dtype=np.int64)]),
        bounds=Bounds(0.0, np.concatenate([np.ones(E * G), np.full(G, np.inf)])),
        options={"time_limit": max(deadline.left_s, 0.05), "mip_rel_gap": TOLERANCE},
    )
    if answer.x is None:
        return fallback_E, False
    return answer.x[: E * G].reshape(E, G).argmax(axis=1), bool(answer.status == 0)


def _flows(problem: Problem, cluster_LE: IntArray) -> FloatArray:
    """[L-1, G, G]: tokens from each cluster to each cluster of the next layer."""
    one_hot = np.eye(problem.num_devices)
    return np.array(
        [
            one_hot[before_E].T @ transitions_EE @ one_hot[after_E]
            for transitions_EE, before_E, after_E in zip(problem.affinity.transitions_LEE, cluster_LE, cluster_LE[1:], strict=False)
        ]
    ).reshape(-1, problem.num_devices, problem.num_devices)


def _seconds_per_token(problem: Problem) -> FloatArray:
    """[G, G]: 1 / B, in units of the slowest link; 0 on a device itself."""
    slowness = 1.0 / problem.topology.bytes_per_s_RR
    np.fill_diagonal(slowness, 0.0)
    return np.asarray(slowness / max(slowness.max(), 1e-300))


def _one_to_one(num_layers: int, G: int, num_columns: int) -> LinearConstraint:
    """Every cluster on one device, every device with one cluster, in every layer; y[l, c, g] is column (l * G + c) * G + g."""
    column_LCG = np.arange(num_layers * G * G).reshape(num_layers, G, G)
    by_cluster = np.repeat(np.arange(num_layers * G), G)
    by_device = np.swapaxes(np.broadcast_to(np.arange(num_layers * G).reshape(num_layers, G)[:, :, None], (num_layers, G, G)), 1, 2).ravel()
    rows = np.concatenate([by_cluster, num_layers * G + by_device])
    columns = np.tile(column_LCG.ravel(), 2)
    return LinearConstraint(sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=(2 * num_layers * G, num_columns)), 1.0, 1.0)


def _mapped_at_once(problem: Problem, flows: FloatArray, deadline: Deadline) -> tuple[IntArray, bool]:
    """The second program for all layers: [L, G] device of each cluster, and whether it was solved; cluster c on device c if not."""
    L, G = problem.num_layers, problem.num_devices
    cost = _seconds_per_token(problem)
    layer, c, d, g, h = (axis.ravel() for axis in np.meshgrid(np.arange(L - 1), *(np.arange(G),) * 4, indexing="ij"))
    weight = flows[layer, c, d] * cost[g, h] / max(flows.max(initial=0.0), 1e-300)
    layer, c, d, g, h, weight = (values[weight > 0] for values in (layer, c, d, g, h, weight))
    num_y, row = L * G * G, np.arange(len(weight))
    columns = np.concatenate([(layer * G + c) * G + g, ((layer + 1) * G + d) * G + h, num_y + layer])
    values = np.concatenate([-weight, -weight, np.ones(len(weight))])
    matrix = sparse.csr_array((values, (np.tile(row, 3), columns)), shape=(len(weight), num_y + L - 1))
    answer = milp(
        np.concatenate([np.zeros(num_y), np.ones(L - 1)]),
        constraints=[LinearConstraint(matrix, -weight, np.inf), _one_to_one(L, G, num_y + L - 1)],
        integrality=np.concatenate([np.ones(num_y, dtype=np.int64), np.zeros(L - 1, dtype=np.int64)]),
        bounds=Bounds(0.0, np.concatenate([np.ones(num_y), np.full(L - 1, np.inf)])),
        options={"time_limit": max(deadline.left_s, 0.05), "mip_rel_gap": TOLERANCE},
    )
    if answer.x is None:
        return np.tile(np.arange(G), (L, 1)), False
    return answer.x[:num_y].reshape(L, G, G).argmax(axis=2), bool(answer.status == 0)


def _mapped_in_turn(problem: Problem, flows: FloatArray, deadline: Deadline) -> tuple[IntArray, bool]:
    """The same, layer after layer: slowest >= sum over d of C[c, d] / B[g(c), h] * y[d, h] for all c, h."""
    G, cost = problem.num_devices, _seconds_per_token(problem)
    device_LC, proven = [np.arange(G)], True
    for number, flow_CC in enumerate(flows):
        time_CDH = flow_CC[:, :, None] / max(flow_CC.max(), 1e-300) * cost[device_LC[-1]][:, None, :]  # [cluster before, cluster, device]
        row = np.repeat(np.arange(G * G).reshape(G, G)[:, None, :], G, axis=1)  # row c * G + h
        column = np.broadcast_to((np.arange(G)[:, None] * G + np.arange(G))[None], (G, G, G))
        matrix = sparse.csr_array((-time_CDH.ravel(), (row.ravel(), column.ravel())), shape=(G * G, G * G + 1)).tolil()
        matrix[:, G * G] = 1.0
        answer = milp(
            np.append(np.zeros(G * G), 1.0),
            constraints=[LinearConstraint(matrix.tocsr(), 0.0, np.inf), _one_to_one(1, G, G * G + 1)],
            integrality=np.append(np.ones(G * G, dtype=np.int64), 0),
            bounds=Bounds(0.0, np.append(np.ones(G * G), np.inf)),
            options={"time_limit": max(deadline.share(len(flows) - number).left_s, 0.05), "mip_rel_gap": TOLERANCE},
        )
        device_LC.append(device_LC[-1] if answer.x is None else answer.x[: G * G].reshape(G, G).argmax(axis=1))
        proven = proven and bool(answer.status == 0)
    return np.stack(device_LC), proven
