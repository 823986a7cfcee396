"""Which devices and which whole nodes are interchangeable, so that an exact method need not look at the same plan twice."""

import itertools

import numpy as np
from numpy.typing import NDArray

from crossdock.placement.solvers.problem import Problem

IntArray = NDArray[np.int64]
Pairs = list[tuple[IntArray, IntArray]]  # (devices of the earlier place, devices of the later one)


def ordered_devices(problem: Problem) -> Pairs:
    """Neighbouring devices of a node that may be exchanged without changing anything."""
    pairs = []
    for devices in _devices_of_nodes(problem):
        for earlier, later in itertools.pairwise(devices):
            if _exchangeable(problem, np.array([earlier]), np.array([later])):
                pairs.append((np.array([earlier]), np.array([later])))
    return pairs


def ordered_nodes(problem: Problem) -> Pairs:
    """Neighbouring nodes that may be exchanged device by device without changing anything."""
    nodes = _devices_of_nodes(problem)
    return [
        (earlier, later)
        for earlier, later in itertools.pairwise(nodes)
        if len(earlier) == len(later) and _exchangeable(problem, earlier, later)
    ]


def _devices_of_nodes(problem: Problem) -> list[IntArray]:
    node_R = np.array(problem.topology.node_of_R)
    return [np.flatnonzero(node_R == node) for node in range(problem.topology.num_nodes)]


def _exchangeable(problem: Problem, earlier: IntArray, later: IntArray) -> bool:
    """Whether speeds, links and slots stay the same when the two lists of devices change places."""
    topology = problem.topology
    order = np.arange(topology.num_devices)
    order[earlier], order[later] = later, earlier
    per_device = (topology.flop_per_s_R, problem.slots_R)
    per_link = (topology.bytes_per_s_RR, topology.latency_s_RR, topology.link_class_RR)
    return all(np.array_equal(values, values[order]) for values in per_device) and all(
        np.array_equal(values, values[np.ix_(order, order)]) for values in per_link
    )
