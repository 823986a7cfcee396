"""All-to-alls with explicit waits and their gradients, sums over the world, gathers, and what a lost peer looks like."""

import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import crossdock
from crossdock.errors import PeerLost
from crossdock.runtime.transport import collectives
from crossdock.runtime.transport.all_to_all import Route, all_to_all_start, bytes_sent
from crossdock.runtime.transport.ledger import Flight
from tests.pool import Pool, RankFailed, mesh_for

SENT = [[1, 2, 0, 3], [0, 0, 4, 1], [2, 0, 1, 0], [0, 0, 0, 0]]
"""SENT[r][p]: rows that rank r sends to rank p; the last rank sends nothing, and to itself least of all."""


MOVERS = {"runtime/transport/exchange.py", "runtime/transport/collectives.py"}
NO_MOVEMENT = {"new_group", "init_process_group", "destroy_process_group", "is_initialized", "is_gloo_available", "is_nccl_available"}
NO_MOVEMENT |= {"get_process_group_ranks"}


def test_two_modules_alone_move_data() -> None:
    package = Path(crossdock.__file__).parent
    uses = {
        path.relative_to(package).as_posix(): set(re.findall(r"\bdist\.([a-z]\w+)\(|\b\w*group\.(send|recv)\b", path.read_text()))
        for path in package.rglob("*.py")
    }
    moving = {name for name, calls in uses.items() if {first or second for first, second in calls} - NO_MOVEMENT}
    assert moving == MOVERS


def route_of(rank: int, world_size: int, **fields: Any) -> Route:
    mesh = mesh_for(rank, world_size, world_size, (0, 0, 1, 1)[:world_size])
    receive = tuple(row[rank] for row in SENT[:world_size])
    names = {"layer": 3, "stage": "dispatch", "kind": "tokens", "movement": 7}
    return Route(mesh, mesh.token_group, tuple(SENT[rank][:world_size]), receive, **{**names, **fields})


def value_of(source: int, target: int, row: int) -> float:
    return 100.0 * source + 10.0 * target + row


def exchange(rank: int, world_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, tuple[Flight, ...]]:
    route = route_of(rank, world_size)
    rows = torch.tensor([[value_of(rank, p, i)] * 2 for p in range(world_size) for i in range(SENT[rank][p])], dtype=dtype).view(-1, 2)
    rows.requires_grad_(dtype.is_floating_point)
    route.mesh.ledger.take()
    received = all_to_all_start(rows, route).wait()
    if rows.requires_grad:
        (received * (rank + 1)).sum().backward()
    return received.detach(), rows.grad, route.mesh.ledger.take()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int32, torch.int64])
def test_uneven_rows_arrive_by_source_and_gradients_return(ranks: Pool, dtype: torch.dtype) -> None:
    for rank, (received, grad, flights) in enumerate(ranks.run(4, exchange, dtype)):
        expected = [[value_of(source, rank, i)] * 2 for source in range(4) for i in range(SENT[source][rank])]
        assert torch.equal(received, torch.tensor(expected, dtype=dtype).view(-1, 2))
        assert received.dtype == dtype
        if grad is not None:
            scale = [[float(target + 1)] * 2 for target in range(4) for _ in range(SENT[rank][target])]
            assert torch.equal(grad, torch.tensor(scale, dtype=dtype).view(-1, 2))
        ways = [(f.stage, f.direction, f.kind, f.layer, f.movement) for f in flights]
        assert ways[0] == ("dispatch", "forward", "tokens", 3, 7)
        assert ways[1:] == ([("dispatch", "backward", "tokens", 3, 7)] if dtype.is_floating_point else [])
        size = 2 * dtype.itemsize
        neighbour = rank ^ 1
        far = [p for p in range(4) if p // 2 != rank // 2]
        assert flights[0].bytes_by_class == (SENT[rank][rank] * size, SENT[rank][neighbour] * size, sum(SENT[rank][p] for p in far) * size)


class Stamp(torch.autograd.Function):
    """Notes when its backward runs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, times: list[float]) -> Tensor:
        ctx.times = times
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.times.append(time.perf_counter())
        return grad * 2, None


def work_between(rank: int, world_size: int) -> tuple[float, tuple[Flight, ...]]:
    route = route_of(rank, world_size)
    rows = torch.ones(sum(route.send_R), 2, requires_grad=True)
    other = torch.ones(3, requires_grad=True)
    times: list[float] = []
    route.mesh.ledger.take()
    pending = all_to_all_start(rows * 1, route)
    done_meanwhile = Stamp.apply(other, times)
    (pending.wait().sum() + done_meanwhile.sum()).backward()
    return times[0], route.mesh.ledger.take()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_backward_runs_what_stood_between_start_and_wait_while_gradients_travel(ranks: Pool, world_size: int) -> None:
    for stamp, flights in ranks.run(world_size, work_between):
        (backward,) = [f for f in flights if f.direction == "backward"]
        assert backward.launched_s < stamp < backward.wait_begin_s <= backward.wait_end_s


def several_at_once(rank: int, world_size: int) -> list[Tensor]:
    route = route_of(rank, world_size)
    rows = [torch.full((sum(route.send_R), 1), float(n), requires_grad=True) for n in range(3)]
    pending = [all_to_all_start(r, route) for r in rows]
    outputs = [pending[n].wait() for n in (2, 0, 1)]
    sum((o * (n + 1)).sum() for n, o in enumerate(outputs)).backward()  # type: ignore[union-attr]
    assert all(bool((o == n).all()) for n, o in zip((2, 0, 1), outputs, strict=True))
    return [r.grad for r in rows]  # type: ignore[misc]


def test_several_in_flight_may_be_waited_for_in_any_order(ranks: Pool) -> None:
    for grads in ranks.run(4, several_at_once):
        assert [set(g.flatten().tolist()) - {w} for g, w in zip(grads, (2.0, 3.0, 1.0), strict=True)] == [set()] * 3


def test_waiting_twice_is_a_bug() -> None:
    route = Route(mesh_for(0, 1, 1), None, (2,), (2,), 0, "dispatch", "tokens", 0)
    pending = all_to_all_start(torch.ones(2, 1), route)
    pending.wait()
    with pytest.raises(AssertionError, match="twice"):
        pending.wait()


def test_alone_nothing_is_copied_and_bytes_stay_on_the_device() -> None:
    mesh = mesh_for(0, 1, 1)
    mesh.ledger.take()
    rows = torch.ones(2, 3, requires_grad=True)
    received = all_to_all_start(rows, Route(mesh, None, (2,), (2,), 0, "dispatch", "tokens", 1)).wait()
    assert received.data_ptr() == rows.data_ptr()
    received.sum().backward()
    assert [(f.direction, f.bytes_by_class) for f in mesh.ledger.take()] == [("forward", (24, 0, 0)), ("backward", (24, 0, 0))]
    assert torch.equal(rows.grad, torch.ones(2, 3))  # type: ignore[arg-type]


def test_no_rows_are_no_bytes() -> None:
    assert bytes_sent(mesh_for(0, 1, 1), (0,), torch.zeros(0, 5)) == (0, 0, 0)


def switched_off(rank: int, world_size: int) -> tuple[Flight, ...]:
    route = route_of(rank, world_size)
    route.mesh.ledger.take()
    route.mesh.ledger.enabled = False
    try:
        all_to_all_start(torch.ones(sum(route.send_R), 2), route).wait()
    finally:
        route.mesh.ledger.enabled = True
    return route.mesh.ledger.take()


def test_a_ledger_that_is_off_records_nothing(ranks: Pool) -> None:
    assert ranks.run(2, switched_off) == [(), ()]


def balance(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    mesh = mesh_for(rank, world_size, world_size, None)
    value = torch.tensor([rank + 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    total = collectives.sum_over_world(value, mesh)
    total.square().sum().backward()
    return total.detach(), value.grad  # type: ignore[return-value]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_averaged_gradients_of_a_loss_of_the_sum_are_right(ranks: Pool, world_size: int) -> None:
    answers = ranks.run(world_size, balance)
    values = [torch.tensor([r + 1.0, 2.0], dtype=torch.float64, requires_grad=True) for r in range(world_size)]
    sum(values).square().sum().backward()  # type: ignore[union-attr]
    for (total, grad), value in zip(answers, values, strict=True):
        assert torch.equal(total, sum(values).detach())  # type: ignore[union-attr]
        assert torch.equal(grad / world_size, value.grad)  # type: ignore[arg-type]


def control(rank: int, world_size: int) -> tuple[Any, ...]:
    mesh = mesh_for(rank, world_size, world_size, None)
    rows = torch.full((rank, 2), float(rank))
    gathered = collectives.all_gather_rows(rows, mesh.dense_group)
    collectives.barrier(mesh)
    return (
        [g.tolist() for g in gathered],
        collectives.gather_objects({"rank": rank}, mesh),
        collectives.all_gather_objects(rank, mesh),
        collectives.broadcast_object(f"from {rank}", mesh, source_rank=world_size - 1),
        collectives.broadcast(torch.tensor([rank]), 0, mesh.dense_group).item(),
        collectives.all_reduce(torch.tensor([rank]), mesh.dense_group).item(),
        collectives.all_reduce_start(torch.tensor([rank]), mesh.dense_group).wait().item(),
    )


@pytest.mark.parametrize("world_size", [1, 2])
def test_control_records(ranks: Pool, world_size: int) -> None:
    everyone = list(range(world_size))
    for rank, (rows, gathered, numbers, text, number, total, later) in enumerate(ranks.run(world_size, control)):
        assert rows == [[[float(r)] * 2] * r for r in everyone]
        assert gathered == ([{"rank": r} for r in everyone] if rank == 0 else None)
        assert numbers == everyone
        assert text == f"from {world_size - 1}"
        assert number == 0
        assert total == later == sum(everyone)


def lose_a_peer(rank: int, world_size: int, directory: str) -> None:
    route = route_of(rank, world_size)
    if rank == 1:
        os._exit(3)
    try:
        for _ in range(100):
            all_to_all_start(torch.ones(sum(route.send_R), 2), route).wait()
    except PeerLost as error:
        (Path(directory) / "message").write_text(str(error))


def test_a_lost_peer_is_named_as_such(ranks: Pool, tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="exit code 3"):
        ranks.run(2, lose_a_peer, str(tmp_path))
    message = (tmp_path / "message").read_text()
    assert "layer 3" in message
    assert "another rank is gone" in message
