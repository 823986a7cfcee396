"""The probe: positive numbers, one figure for each link class, the same topology on every rank, and a file that reads back."""

from pathlib import Path

import numpy as np
import pytest
import torch

from crossdock.errors import BadConfig
from crossdock.placement.records.topology import OTHER_NODE, SAME_NODE, Topology
from crossdock.runtime.adaptation import probe as probe_module
from crossdock.runtime.adaptation.probe import Link, probe
from crossdock.runtime.transport.mesh import Mesh
from tests.pool import Pool, mesh_for

SMALL = {"model_width": 32, "expert_width": 64, "rows": 64, "repeats": 2}


def probed(rank: int, world_size: int, expert_parallel: int, node_of_rank: tuple[int, ...], shared_by_node: bool | None) -> Topology:
    return probe(mesh_for(rank, world_size, expert_parallel, node_of_rank), shared_by_node=shared_by_node, **SMALL)


@pytest.mark.parametrize(
    ("world_size", "expert_parallel", "nodes"),
    [(2, 2, (0, 0)), (2, 2, (0, 1)), (4, 4, (0, 0, 1, 1)), (4, 4, (0, 1, 1, 1)), (4, 2, (0, 0, 1, 1)), (4, 2, (3, 5, 3, 5))],
)
def test_every_rank_gets_the_same_sane_topology(
    ranks: Pool, tmp_path: Path, world_size: int, expert_parallel: int, nodes: tuple[int, ...]
) -> None:
    topologies = ranks.run(world_size, probed, expert_parallel, nodes, None)
    topology = topologies[0]
    assert {other.digest for other in topologies} == {topology.digest}
    assert topology.measured
    assert topology.num_devices == expert_parallel
    assert [nodes[i] == nodes[j] for i in range(expert_parallel) for j in range(expert_parallel)] == [
        topology.node_of_R[i] == topology.node_of_R[j] for i in range(expert_parallel) for j in range(expert_parallel)
    ]
    for link_class in (SAME_NODE, OTHER_NODE):
        of_class_RR = topology.link_class_RR == link_class
        assert len(np.unique(topology.bytes_per_s_RR[of_class_RR])) <= 1
        assert len(np.unique(topology.latency_s_RR[of_class_RR])) <= 1
    between_RR = topology.link_class_RR != 0
    assert (topology.bytes_per_s_RR[between_RR] > 1e5).all()
    assert (topology.latency_s_RR[between_RR] > 1e-6).all()
    assert (topology.latency_s_RR[between_RR] < 1).all()
    assert (topology.flop_per_s_R > 1e6).all()
    assert (topology.memory_bytes_R > 1e6).all()
    topology.save(tmp_path / "measured.yaml")
    assert Topology.load(tmp_path / "measured.yaml").digest == topology.digest


@pytest.mark.parametrize("shared", [True, False])
def test_a_declared_network_card_is_believed(ranks: Pool, shared: bool) -> None:
    topology = ranks.run(4, probed, 4, (0, 0, 1, 1), shared)[0]
    assert (topology.node_bytes_per_s is not None) == shared


def test_one_rank_needs_no_links() -> None:
    topology = probe(Mesh.single(), dtype=torch.bfloat16, **SMALL)
    assert topology.num_devices == 1
    assert topology.flop_per_s_R[0] > 1e6


@pytest.mark.parametrize(
    ("alone", "together", "card", "bytes_per_s"),
    [(60e6, 31e6, 62e6, 62e6), (60e6, 58e6, None, 58e6), (100e6, 65e6, 130e6, 100e6)],
    ids=["one device fills the card", "a card each", "two devices fill the card"],
)
def test_a_shared_card_shows_when_all_send(
    monkeypatch: pytest.MonkeyPatch, alone: float, together: float, card: float | None, bytes_per_s: float
) -> None:
    def link(_mesh: Mesh, pairs_RR: np.ndarray, _repeats: int) -> Link:
        return Link(1e-4, together if pairs_RR.sum() == 8 else alone)

    monkeypatch.setattr(probe_module, "_link", link)
    mesh = Mesh(0, 4, 4, (0, 0, 1, 1), torch.device("cpu"))
    _, other_node, node_bytes_per_s = probe_module._links(mesh, None, repeats=1)
    assert (node_bytes_per_s, other_node.bytes_per_s) == (card, bytes_per_s)


@pytest.mark.parametrize("numbers", [{"rows": 1, "slots": 2}, {"repeats": 0}, {"slots": 0}, {"model_width": 0}, {"activation": "relu"}])
def test_senseless_experts_are_refused(numbers: dict[str, int]) -> None:
    with pytest.raises(BadConfig):
        probe(Mesh.single(), **(SMALL | numbers))
