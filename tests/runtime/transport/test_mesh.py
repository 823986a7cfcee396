"""Ranks, nodes and groups; joining and leaving the world."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from crossdock.errors import BadConfig, PeerLost, Unavailable
from crossdock.runtime.transport import mesh as mesh_module
from crossdock.runtime.transport.mesh import Mesh, backend_for, check_expert_parallel, initialise, shutdown
from tests.pool import Pool, mesh_for


def test_a_single_rank_needs_no_process_group() -> None:
    mesh = Mesh.single()
    assert (mesh.rank, mesh.world_size, mesh.expert_parallel, mesh.expert_rank, mesh.replica, mesh.num_replicas) == (0, 1, 1, 0, 0, 1)
    assert mesh.link_class_of_peer == (0,)
    groups = ("token_group", "metadata_group", "count_group", "expert_replica_group", "dense_group", "control_group")
    assert all(getattr(mesh, group) is None for group in groups)


def describe(rank: int, world_size: int, expert_parallel: int) -> dict[str, Any]:
    mesh = mesh_for(rank, world_size, expert_parallel, (0, 0, 1, 1))

    def members(group: Any) -> list[int] | None:
        return None if group is None else dist.get_process_group_ranks(group)

    return {
        "place": (mesh.expert_rank, mesh.replica, mesh.num_replicas),
        "nodes": mesh.node_of_expert_rank,
        "classes": mesh.link_class_of_peer,
        "token": members(mesh.token_group),
        "metadata": members(mesh.metadata_group),
        "count": members(mesh.count_group),
        "replica": members(mesh.expert_replica_group),
        "dense": members(mesh.dense_group),
        "control": members(mesh.control_group),
        "distinct": len({mesh.token_group, mesh.metadata_group, mesh.count_group, mesh.dense_group, mesh.control_group}),
    }


def test_groups_of_two_pairs(ranks: Pool) -> None:
    answers = ranks.run(4, describe, 2)
    assert [a["place"] for a in answers] == [(0, 0, 2), (1, 0, 2), (0, 1, 2), (1, 1, 2)]
    assert [a["nodes"] for a in answers] == [(0, 0), (0, 0), (1, 1), (1, 1)]
    assert [a["classes"] for a in answers] == [(0, 1), (1, 0), (0, 1), (1, 0)]
    for kind in ("token", "metadata", "count"):
        assert [a[kind] for a in answers] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [a["replica"] for a in answers] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert all(a["dense"] == a["control"] == [0, 1, 2, 3] for a in answers)
    assert all(a["distinct"] == 5 for a in answers)


def test_one_group_over_two_nodes(ranks: Pool) -> None:
    answers = ranks.run(4, describe, 4)
    assert [a["classes"] for a in answers] == [(0, 1, 2, 2), (1, 0, 2, 2), (2, 2, 0, 1), (2, 2, 1, 0)]
    assert all(a["token"] == [0, 1, 2, 3] and a["replica"] is None for a in answers)


def rails(rank: int, world_size: int, expert_parallel: int, nodes: tuple[int, ...]) -> tuple[Any, ...]:
    mesh = mesh_for(rank, world_size, expert_parallel, nodes)
    groups = (mesh.node_group, mesh.rail_group)
    return mesh.ranks_per_node, mesh.has_rails, *(None if group is None else dist.get_process_group_ranks(group) for group in groups)


def test_nodes_and_rails(ranks: Pool) -> None:
    assert ranks.run(4, rails, 4, (0, 0, 1, 1)) == [(2, True, [r // 2 * 2, r // 2 * 2 + 1], [r % 2, r % 2 + 2]) for r in range(4)]
    assert ranks.run(4, rails, 4, (7, 7, 3, 3))[0] == (2, True, [0, 1], [0, 2])
    for expert_parallel, nodes, per_node in (
        (2, (0, 0, 1, 1), 2),  # an expert group within a node
        (4, (0, 1, 2, 3), 1),  # a rank a node
        (4, (0, 0, 0, 1), None),  # unequal
        (4, (0, 1, 0, 1), None),  # not in blocks
    ):
        assert ranks.run(4, rails, expert_parallel, nodes) == [(per_node, False, None, None)] * 4


def test_no_expert_parallelism_is_replicas_only(ranks: Pool) -> None:
    answers = ranks.run(4, describe, 1)
    assert all(a["token"] is None and a["replica"] == [0, 1, 2, 3] for a in answers)


@pytest.mark.parametrize(("expert_parallel", "world_size", "choices"), [(3, 4, "1, 2, 4"), (8, 6, "1, 2, 3, 6"), (0, 2, "1, 2")])
def test_expert_parallel_must_divide_the_world(expert_parallel: int, world_size: int, choices: str) -> None:
    message = rf"parallel.expert {expert_parallel} .* does not divide {world_size} ranks; choose it from {choices}, or start a multiple of"
    with pytest.raises(BadConfig, match=message):
        check_expert_parallel(expert_parallel, world_size)


def test_a_node_for_every_rank() -> None:
    with pytest.raises(BadConfig, match="2 nodes are named for 4 ranks"):
        Mesh(0, 4, 2, (0, 1), torch.device("cpu"))


def test_backends() -> None:
    assert backend_for("cpu") == "gloo"
    assert "nccl" in backend_for("cuda:0")


def test_a_world_that_never_comes_together_ends_in_time(tmp_path: Path) -> None:
    with pytest.raises(PeerLost, match=r"rank 0 of 2 could not join the others within 1 s"):
        initialise(0, 2, init_method=f"file://{tmp_path}/store", timeout_s=1)
    assert not dist.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused() -> None:
    with pytest.raises(Unavailable, match="choose device cpu"):
        initialise(0, 1, device="cuda", init_method="env://")


@pytest.mark.parametrize(("device", "chosen"), [("cuda", 3), ("cuda:1", 1)])
def test_a_cuda_device_is_made_the_current_one(monkeypatch: pytest.MonkeyPatch, device: str, chosen: int) -> None:
    """The word cuda alone means the current one, and torch's own `set_device` would refuse it."""
    set_to: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", set_to.append, raising=False)
    monkeypatch.setattr(dist, "init_process_group", lambda *_arguments, **_options: None)
    initialise(0, 1, device=device)
    assert set_to == [chosen]


def test_joining_through_a_store_and_leaving() -> None:
    store = dist.HashStore()
    initialise(0, 1, store=store, timeout_s=10)
    assert dist.is_initialized()
    shutdown()
    assert not dist.is_initialized()
    shutdown()  # once more does no harm


def test_shutdown_gives_up_on_a_peer_that_blocks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    monkeypatch.setattr(mesh_module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(mesh_module.dist, "destroy_process_group", never.wait)
    shutdown(timeout_s=0.05)
    never.set()
