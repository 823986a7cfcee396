"""A start for hops that cost more between nodes: experts to nodes first, as if nodes were devices, then to the devices of their nodes.

With two levels an assignment of all devices at once is slow to find what groups of many experts could keep; nodes alone are few.
"""

import copy
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from crossdock.placement.records.topology import Topology
from crossdock.placement.solvers.problem import Constraints, Problem
from crossdock.placement.solvers.search import starts
from crossdock.placement.solvers.search.chain import Chain, cool, greedy
from crossdock.placement.solvers.search.layer_search import Deadline

IntArray = NDArray[np.int64]

SWEEPS = 40
WARM, COLD = 0.25, 0.03  # noise, as a multiple of what an expert keeps in its node, or on its device, on average
CAP_SHARE = 0.8  # of the room above even load, for nodes: devices within them need some of it


def suits(problem: Problem) -> bool:
    """Whether there are two levels, and nodes that differ in nothing."""
    devices_N = np.bincount(problem.topology.node_of_R)
    return bool(
        problem.node_weight > 1.0
        and len(devices_N) > 1
        and devices_N.min() == devices_N.max() > 1
        and len(set(problem.slots_R.tolist())) == 1
        and not problem.constraints.pins
    )


def start(problem: Problem, seed: int, deadline: Deadline) -> Chain:
    """A chain, not polished; half of the time goes to the nodes. Never worse than without time: noise that no time was left to cool is
    given up."""
    rng, layers = np.random.default_rng([seed, problem.num_devices]), np.arange(problem.num_layers)
    nodes = greedy(_of_nodes(problem))
    begun = _within(problem, nodes.device_LI.copy())
    kept = nodes.kept_per_expert()
    cool(nodes, layers, SWEEPS, (WARM * kept, COLD * kept), rng, deadline.share(2.0))
    if not deadline.passed:
        begun = min(_within(problem, nodes.device_LI), begun, key=Chain.key)
    chain = copy.copy(begun)
    chain.device_LI, chain.price_LR = begun.device_LI.copy(), begun.price_LR.copy()
    kept = chain.kept_per_expert() / problem.node_weight
    cool(chain, layers, SWEEPS, (WARM * kept, COLD * kept), rng, deadline)
    best = min(chain, begun, key=Chain.key)
    best.node_LI = None
    return best


def _within(problem: Problem, node_LI: IntArray) -> Chain:
    """Each layer assigned best behind the one before, every item to a device of its node."""
    chain = Chain(problem, starts.balanced(problem))
    chain.node_LI = node_LI
    for layer in range(problem.num_layers):
        chain.assign(layer, 0.0, np.random.default_rng(0), ahead=False)
    return chain


def _of_nodes(problem: Problem) -> Problem:
    """The same with a device for every node."""
    num_nodes, cap = problem.topology.num_nodes, problem.constraints.load_cap
    slots = int(problem.slots_R.sum()) // num_nodes
    constraints = Constraints(load_cap=None if cap is None else 1.0 + CAP_SHARE * (cap - 1.0), slots=slots)
    return replace(problem, topology=Topology.uniform(1, num_nodes), node_weight=1.0, constraints=constraints)
