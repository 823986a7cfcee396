"""Recombination of plans for objective hops: of every layer one plan's groups of experts, chosen and matched so that most tokens stay.

Where all devices are interchangeable a layer's assignment is a partition of its experts, and the devices are names. What two partitions of
consecutive layers can keep is a linear assignment of groups to groups; the best choice of one partition per layer from a pool is then a
shortest path.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from crossdock.placement.solvers.problem import Problem

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def interchangeable(problem: Problem) -> bool:
    """Whether every permutation of the devices leaves all plans as good and as feasible under objective hops."""
    hop_cost_RR, slots_R = problem.hop_cost_RR, problem.slots_R
    off_diagonal = hop_cost_RR[~np.eye(problem.num_devices, dtype=bool)]
    return bool((slots_R == slots_R[0]).all() and not problem.constraints.pins and len(np.unique(off_diagonal)) <= 1)


def recombined(problem: Problem, pool_PLE: IntArray) -> IntArray:
    """[L, E]: the best plan that takes every layer's partition from one of the pool's P plans. Needs interchangeable devices."""
    num_plans, num_layers, _ = pool_PLE.shape
    one_hot = np.eye(problem.num_devices)
    kept_P = np.zeros(num_plans)
    came_from, relabels = [], []
    for layer in range(1, num_layers):
        transitions_EE = problem.affinity.transitions_LEE[layer - 1].astype(np.float64)
        before_PER, after_PER = one_hot[pool_PLE[:, layer - 1]], one_hot[pool_PLE[:, layer]]
        groups = np.einsum("per,qes->pqrs", before_PER, transitions_EE @ after_PER, optimize=True)
        matched_PQR = np.array([[linear_sum_assignment(groups_RR, maximize=True)[1] for groups_RR in row] for row in groups])
        kept_PQ = kept_P[:, None] + np.take_along_axis(groups, matched_PQR[..., None], axis=3)[..., 0].sum(axis=2)
        came_from.append(kept_PQ.argmax(axis=0))
        relabels.append(matched_PQR)
        kept_P = kept_PQ.max(axis=0)
    choice = int(kept_P.argmax())
    chosen = [choice]
    for source_P in reversed(came_from):
        choice = int(source_P[choice])
        chosen.append(choice)
    chosen.reverse()
    device_LE = [pool_PLE[chosen[0], 0]]
    name_R = np.arange(problem.num_devices)  # group of the layer's partition -> device
    for layer in range(1, num_layers):
        matched_R = relabels[layer - 1][chosen[layer - 1], chosen[layer]]
        next_name_R = np.empty_like(name_R)
        next_name_R[matched_R] = name_R
        name_R = next_name_R
        device_LE.append(name_R[pool_PLE[chosen[layer], layer]])
    return np.stack(device_LE)
