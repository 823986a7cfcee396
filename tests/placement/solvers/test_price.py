"""The ports of all-to-alls against the cost model on every link, which knows nothing of counts."""

import tracemalloc

import numpy as np
import pytest

from crossdock.placement.costs.cost import transfer_seconds
from crossdock.placement.costs.hops import two_hops
from crossdock.placement.records.topology import MAX_DEVICES, Topology
from crossdock.placement.solvers.search.price import Ports, hierarchical_ports


def uneven(node_of_R: tuple[int, ...], node_bytes_per_s: float | None) -> Topology:
    """Every link and the way back of a speed and latency of its own, to itself as well."""
    rng, R = np.random.default_rng(len(node_of_R)), len(node_of_R)
    speed_RR, latency_s_RR = rng.uniform(1e8, 1e10, (R, R)), rng.uniform(0, 1e-6, (R, R))
    return Topology("uneven", node_of_R, np.full(R, 1e12), np.full(R, 1e9), speed_RR, latency_s_RR, node_bytes_per_s)


TOPOLOGIES = {
    "even": Topology.uniform(2, 2),
    "even, cards": Topology.uniform(4, 3, shared_by_node=True),
    "uneven": uneven((0, 0, 0, 1, 1, 1), None),
    "uneven, cards": uneven((0, 0, 1, 1, 2, 2, 3, 3), 3e8),
    "nodes in another order": uneven((2, 2, 0, 0, 1, 1), 3e8),
}


def dense(topology: Topology, copy_bytes: float) -> np.ndarray:
    """[2, X, R, R]: the bytes on every link in each hop for one count, homes anywhere alike: to each device, and to each node."""
    R, N = topology.num_devices, topology.num_nodes
    copies, node_copies = np.zeros((R + N, R, R)), np.zeros((R + N, R, N))
    copies[np.arange(R), :, np.arange(R)] = 1 / R
    node_copies[R + np.arange(N), :, np.arange(N)] = 1 / R
    return two_hops(copies, node_copies, topology.node_of_R) * copy_bytes


@pytest.mark.parametrize("combine", [False, True])
@pytest.mark.parametrize("topology", TOPOLOGIES.values(), ids=TOPOLOGIES)
def test_the_ports_of_two_hops_equal_the_cost_of_every_link(topology: Topology, combine: bool) -> None:
    rng, num_counts = np.random.default_rng(0), topology.num_devices + topology.num_nodes
    count_PX = rng.integers(0, 10_000, (60, num_counts)) * (rng.random((60, num_counts)) < 0.6)
    for ports, bytes_XRR in zip(hierarchical_ports(topology, 512.0, combine), dense(topology, 512.0), strict=True):
        sent_PRR = np.einsum("px,xij->pij", count_PX, bytes_XRR)
        expected_P = transfer_seconds(np.swapaxes(sent_PRR, 1, 2) if combine else sent_PRR, topology)
        np.testing.assert_allclose(ports.busiest(count_PX), expected_P, rtol=1e-12)
        seconds_JX, latency_J = ports.table()
        assert seconds_JX.size == ports.num_entries
        np.testing.assert_allclose((count_PX @ seconds_JX.T + latency_J).max(axis=1), expected_P, rtol=1e-12)


def held_bytes(ports: Ports) -> int:
    return ports.seconds_JX.nbytes + ports.own_s_CX.nbytes


@pytest.mark.slow
def test_two_hops_of_as_many_devices_as_a_topology_may_have() -> None:
    """Every link for every count would take 618 GiB in each hop."""
    topology = Topology.uniform(MAX_DEVICES // 8, 8, shared_by_node=True)
    assert topology.is_symmetric
    tracemalloc.start()
    try:
        assert sum(map(held_bytes, hierarchical_ports(topology, 512.0, False))) < 2**28
        assert tracemalloc.get_traced_memory()[1] < 2**30
    finally:
        tracemalloc.stop()
