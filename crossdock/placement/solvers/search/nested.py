"""A start for hops that cost more between nodes: experts to nodes first, as if nodes were devices, then to the devices of their nodes.

With two levels an assignment of all devices at once is slow to find what groups of many experts could keep; nodes alone are few.
"""

from dataclasses import replace

import numpy as np

from crossdock.placement.records.topology import Topology
from crossdock.placement.solvers.problem import Constraints, Problem
from crossdock.placement.solvers.search import starts
from crossdock.placement.solvers.search.chain import Chain, cool, greedy
from crossdock.placement.solvers.search.layer_search import Deadline

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
    """A chain, not polished; half of the time goes to the nodes."""
    rng, layers = np.random.default_rng([seed, problem.num_devices]), np.arange(problem.num_layers)
    nodes = greedy(_of_nodes(problem))
    kept = nodes.kept_per_expert()
    cool(nodes, layers, SWEEPS, (WARM * kept, COLD * kept), rng, deadline.share(2.0))
    chain = Chain(problem, starts.balanced(problem))
    chain.node_LI = nodes.device_LI
    for layer in layers.tolist():
        chain.assign(layer, 0.0, rng, ahead=False)
    kept = chain.kept_per_expert() / problem.node_weight
    cool(chain, layers, SWEEPS, (WARM * kept, COLD * kept), rng, deadline)
    chain.node_LI = None
    return chain


def _of_nodes(problem: Problem) -> Problem:
    """The same with a device for every node."""
    num_nodes, cap = problem.topology.num_nodes, problem.constraints.load_cap
    slots = int(problem.slots_R.sum()) // num_nodes
    constraints = Constraints(load_cap=None if cap is None else 1.0 + CAP_SHARE * (cap - 1.0), slots=slots)
    return replace(problem, topology=Topology.uniform(1, num_nodes), node_weight=1.0, constraints=constraints)
