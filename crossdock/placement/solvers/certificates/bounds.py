"""Proven lower bounds that cost milliseconds, for any number of experts: no plan without replicas is better, whatever solver made it.

Distinct devices. A token whose set u has n experts on the device of expert e owes 1/n of a copy to e, so the copies of a layer are the sum
over e and over the tokens that use e of 1 / (1 + partners), where partners counts e's fellow experts of the token on e's device. Because
1 / (1 + m) >= 2 / (j + 2) - m / ((j + 1) (j + 2)) for all whole m and every whole j >= 0 (the chord through m = j and j + 1), and because e
has at most S - 1 fellows on its device,

    copies owed to e >= 2 load_e / (j + 2) - (sum of the S - 1 largest co-activations of e) / ((j + 1) (j + 2))      for every j.

Seconds follow from the copies by a linear program over the ports; hops from the S largest transitions of each expert.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from crossdock.placement.records.trace import NO_EXPERT
from crossdock.placement.solvers import coherent
from crossdock.placement.solvers.problem import Problem
from crossdock.placement.solvers.search.price import BlockSeconds, Ports

FloatArray = NDArray[np.float64]
EXACT = 1e-8  # relative; the bound of means is the best spread's value where the even spread comes as near
MOST_ENTRIES = 2_000_000  # of a linear program over ports; larger ones take minutes, for 2,000 devices and more


def lower_bound(problem: Problem) -> float:
    """A lower bound on the problem's objective over all plans with one copy of each expert; homes anywhere alike."""
    if problem.objective == "hops":
        return _hops(problem)
    if coherent.is_about(problem):
        return coherent.lower_bound(problem)
    if problem.objective == "seconds":
        return problem.workload.other_s + float(layer_seconds(problem).sum())
    copies_L = copies_to_nodes(problem) if problem.objective == "nodes" else copies_to_devices(problem)
    return float(copies_L.sum() / (problem.affinity.num_tokens * problem.num_layers))


def copies_to_devices(problem: Problem) -> FloatArray:
    """[L]: copies of the whole trace to distinct devices, at least."""
    return _copies(problem, int(problem.slots_R.max()))


def copies_to_nodes(problem: Problem) -> FloatArray:
    """[L]: copies of the whole trace to distinct nodes, at least."""
    return _copies(problem, _node_capacity(problem))


def layer_seconds(problem: Problem, device_copies_L: FloatArray | None = None, node_copies_L: FloatArray | None = None) -> FloatArray:
    """[L]: seconds that each layer adds to the step, at least, from the copies that are proven; from those of this file where left out."""
    seconds = BlockSeconds.of(problem)
    load_LE, flop_per_s_R = problem.affinity.load_LE, problem.topology.flop_per_s_R
    flat = problem.workload.dispatch == "flat"
    if device_copies_L is None:
        device_copies_L = copies_to_devices(problem)
    sent_L = load_LE.sum(axis=1).astype(np.float64) if flat else device_copies_L
    groups = [(np.arange(problem.num_devices), sent_L)]  # counts of the ports, and what they sum to at least
    if len(seconds.dispatch) > 1:
        groups.append(
            (
                problem.num_devices + np.arange(problem.topology.num_nodes),
                copies_to_nodes(problem) if node_copies_L is None else node_copies_L,
            )
        )
    scale = problem.tokens_per_trace_token
    slowest_L = (
        np.maximum(load_LE.sum(axis=1) / flop_per_s_R.sum(), load_LE.max(axis=1) / flop_per_s_R.max()) * scale * problem.workload.row_flop
    )
    times = [
        [
            sum(_least_busiest(hop, [(columns, float(sum_L[layer]) * scale) for columns, sum_L in groups]) for hop in hops)
            for layer in range(len(sent_L))
        ]
        for hops in (seconds.dispatch, seconds.combine)
    ]
    return seconds.from_times(np.array(times[0]), np.array(times[1]), slowest_L)


def _copies(problem: Problem, capacity: int) -> FloatArray:
    """Copies to groups that hold `capacity` experts each: the better of the bound above and of ceil(experts of the token / capacity)."""
    affinity = problem.affinity
    together_LEE = affinity.coactivation_LEE.astype(np.float64)
    load_LE = affinity.load_LE.astype(np.float64)
    together_LEE[:, np.arange(problem.num_experts), np.arange(problem.num_experts)] = 0.0
    fellows = min(capacity - 1, problem.num_experts - 1)
    most_LE = np.sort(together_LEE, axis=2)[:, :, problem.num_experts - fellows :].sum(axis=2)
    chords = [2.0 / (j + 2) * load_LE - most_LE / ((j + 1) * (j + 2)) for j in range(max(1, affinity.top_k - 1))]
    by_fellows_L = np.max(chords, axis=0).sum(axis=1)
    by_size_L = [float((-(-(sets.experts_UK != NO_EXPERT).sum(axis=1) // capacity) * sets.count_U).sum()) for sets in affinity.sets]
    return np.maximum(by_fellows_L, by_size_L)


def _least_busiest(ports: Ports, groups: list[tuple[NDArray[np.int64], float]]) -> float:
    """The busiest port's seconds when the counts of each group, of given sum, are spread in the best way, fractions allowed."""
    num_counts = ports.seconds_JX.shape[1]
    even_X, sums = np.zeros(num_counts), np.zeros((len(groups), num_counts + 1))
    for number, (columns, least) in enumerate(groups):
        even_X[columns] = least / len(columns)
        sums[number, columns] = 1.0
    least_s, even_s = _least_mean(ports, groups, even_X), float(ports.busiest(even_X[None])[0])
    if ports.num_entries > MOST_ENTRIES or even_s - least_s <= EXACT * even_s:
        return least_s
    unit, size = max(even_s, 1e-300), max(max(least for _, least in groups), 1e-300)
    seconds_JX, latency_J = ports.table()
    answer = linprog(
        np.append(np.zeros(num_counts), 1.0),
        A_ub=np.column_stack([seconds_JX * size / unit, -np.ones(len(latency_J))]),
        b_ub=-latency_J / unit,
        A_eq=sums,
        b_eq=[least / size for _, least in groups],
        method="highs",
    )
    return float(answer.fun) * unit * (1.0 - 1e-9) if answer.fun is not None else 0.0


def _least_mean(ports: Ports, groups: list[tuple[NDArray[np.int64], float]], even_X: FloatArray) -> float:
    """A lower bound on the same without a program: the mean of the ports that are busiest under even counts, which no spread lowers below
    what the cheapest count of each group makes of it. Exact where devices and links are all alike."""
    busy_J = ports.seconds_JX @ even_X + ports.latency_J
    busy_CX = ports.own_s_CX * even_X + ports.own_latency_C[:, None]
    least_busy = max(busy_J.max(), busy_CX.max(initial=0.0)) * (1.0 - 1e-9)
    among_J, among_CX = busy_J >= least_busy, busy_CX >= least_busy
    number = np.count_nonzero(among_J) + np.count_nonzero(among_CX)
    mean_X = (ports.seconds_JX[among_J].sum(axis=0) + np.where(among_CX, ports.own_s_CX, 0.0).sum(axis=0)) / number
    latency_s = float(ports.latency_J[among_J].sum() + (among_CX.sum(axis=1) * ports.own_latency_C).sum()) / number
    return (sum(least * float(mean_X[columns].min()) for columns, least in groups) + latency_s) * (1.0 - 1e-9)


def _hops(problem: Problem) -> float:
    """Hops between devices, and again, weighed by what a node costs more, between nodes; each expert keeps at most its largest flows."""
    to_device = _least_hops(problem, int(problem.slots_R.max()))
    if problem.node_weight == 1.0:
        return to_device
    return to_device + (problem.node_weight - 1.0) * _least_hops(problem, _node_capacity(problem))


def _least_hops(problem: Problem, capacity: int) -> float:
    transitions_LEE = problem.affinity.transitions_LEE
    if not transitions_LEE.sum():
        return 0.0
    kept = 0
    for transitions_EE in transitions_LEE:
        leaving = np.sort(transitions_EE, axis=1)[:, -capacity:].sum()
        arriving = np.sort(transitions_EE, axis=0)[-capacity:].sum()
        kept += min(int(leaving), int(arriving))
    return 1.0 - kept / int(transitions_LEE.sum())


def _node_capacity(problem: Problem) -> int:
    """Experts of one layer that the largest node may hold."""
    return int(np.bincount(problem.topology.node_of_R, problem.slots_R).max())
