"""One MoE layer on every rank of a world and the same in one process, for the tests of dispatchers and of counted bytes."""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crossdock.placement.records.plan import Plan
from crossdock.runtime.dispatch import reference
from crossdock.runtime.dispatch.assignment import Assignment
from crossdock.runtime.dispatch.dispatcher import DISPATCHERS
from crossdock.runtime.dispatch.layout import ExpertLayout
from crossdock.runtime.transport.ledger import Flight
from crossdock.runtime.transport.mesh import Mesh
from crossdock.runtime.transport.wire import wire_named
from tests.pool import Pool, mesh_for

WIDTH, HIDDEN = 5, 4


@dataclass(frozen=True)
class Case:
    """A layer: who chose what, and where the experts live. Everything numeric follows from `seed`."""

    expert_parallel: int
    num_experts: int
    slots_RS: tuple[tuple[int, ...], ...]
    chosen: tuple[tuple[tuple[int, ...], ...], ...]
    """Experts of each token of each rank of the world."""
    node_of_rank: tuple[int, ...] | None = None
    seed: int = 0
    chunks: int = 1
    """Dispatches in flight at once."""
    prepared: bool = False
    """Whether the counts of all of them are exchanged before the first of them starts."""
    wire: str | None = None
    dtype: torch.dtype = torch.float64

    @property
    def world_size(self) -> int:
        return len(self.chosen)

    @property
    def plan(self) -> Plan:
        return Plan(np.array([self.slots_RS], dtype=np.int32), self.num_experts)


@dataclass(frozen=True)
class Outcome:
    """One rank's outputs and gradients; parameter gradients by logical expert, zero where the rank does not hold the expert."""

    y: Tensor
    grad_x: Tensor
    grad_weight: Tensor
    grad_in_EDF: Tensor
    grad_out_EFD: Tensor
    flights: tuple[Flight, ...] = ()


def parameters(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(case.seed)
    first = torch.randn(case.num_experts, WIDTH, HIDDEN, generator=generator, dtype=torch.float64)
    second = torch.randn(case.num_experts, HIDDEN, WIDTH, generator=generator, dtype=torch.float64)
    return first.to(case.dtype), second.to(case.dtype)


def inputs(case: Case, rank: int) -> tuple[Tensor, Assignment, Tensor]:
    """x_TD, the assignment (its weights a leaf) and the gradient that the loss sends into y."""
    chosen = case.chosen[rank]
    generator = torch.Generator().manual_seed(1000 + 10 * case.seed + rank)
    x = torch.randn(len(chosen), WIDTH, generator=generator, dtype=torch.float64).to(case.dtype)
    grad_y = torch.randn(len(chosen), WIDTH, generator=generator, dtype=torch.float64).to(case.dtype)
    lengths = {len(experts) for experts in chosen}
    num_entries = sum(len(experts) for experts in chosen)
    assignment = Assignment(
        token_A=torch.tensor([t for t, experts in enumerate(chosen) for _ in experts], dtype=torch.int64),
        expert_A=torch.tensor([e for experts in chosen for e in experts], dtype=torch.int64),
        weight_A=torch.rand(num_entries, generator=generator, dtype=torch.float64).to(case.dtype).requires_grad_(),
        num_tokens=len(chosen),
        uniform_k=lengths.pop() if len(lengths) == 1 else None,
    )
    return x.requires_grad_(), assignment, grad_y


def one_expert(rows: Tensor, first_DF: Tensor, second_FD: Tensor) -> Tensor:
    return torch.tanh(rows @ first_DF) @ second_FD


def part(assignment: Assignment, begin: int, end: int) -> Assignment:
    """The entries of tokens begin..end-1."""
    mine = (assignment.token_A >= begin) & (assignment.token_A < end)
    k = assignment.uniform_k
    return Assignment(assignment.token_A[mine] - begin, assignment.expert_A[mine], assignment.weight_A[mine], end - begin, k)


def run_layer(rank: int, world_size: int, name: str, case: Case) -> Outcome:
    """The layer on one rank, through dispatcher `name`."""
    return run_layer_on(mesh_for(rank, world_size, case.expert_parallel, case.node_of_rank), name, case)


def run_layer_on(mesh: Mesh, name: str, case: Case) -> Outcome:
    """The same on a given mesh."""
    layout = ExpertLayout.from_plan(case.plan, 0, mesh)
    dispatcher = DISPATCHERS[name](mesh, layout, wire_named(case.wire))
    first_EDF, second_EFD = (p.requires_grad_() for p in parameters(case))
    x, assignment, grad_y = inputs(case, mesh.rank)
    mesh.ledger.take()

    bounds = torch.linspace(0, len(x), case.chunks + 1).long().tolist()
    chunks = list(itertools.pairwise(bounds))
    if case.prepared:
        ready = dispatcher.prepare([part(assignment, begin, end) for begin, end in chunks])
        arriving = [prepared.start(x[begin:end]) for prepared, (begin, end) in zip(ready, chunks, strict=True)]
    else:
        arriving = [dispatcher.dispatch_start(x[begin:end], part(assignment, begin, end)) for begin, end in chunks]
    leaving = []
    for pending in arriving:
        rows, count_S, handle = pending.wait()
        assert count_S.device.type == "cpu"
        assert int(count_S.sum()) == len(rows)
        blocks = zip(rows.split(count_S.tolist()), layout.local_experts, strict=True)
        outputs = [one_expert(block, first_EDF[e], second_EFD[e]) for block, e in blocks]
        leaving.append(dispatcher.combine_start(torch.cat([rows[:0], *outputs]), handle))  # a rank may hold no expert
    y = torch.cat([pending.wait() for pending in leaving])
    y.backward(grad_y)
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in (x, assignment.weight_A, first_EDF, second_EFD)]
    return Outcome(y.detach(), *grads, flights=mesh.ledger.take())


def in_one_process(case: Case) -> list[Outcome]:
    """The same by the reference, one `Outcome` a rank; the parameter gradients of the whole world stand in the first."""
    first_EDF, second_EFD = (p.requires_grad_() for p in parameters(case))
    outcomes = []
    for rank in range(case.world_size):
        x, assignment, grad_y = inputs(case, rank)
        y = reference.moe(x, assignment, lambda e, row: one_expert(row, first_EDF[e], second_EFD[e]))
        if y.requires_grad:
            y.backward(grad_y)
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in (x, assignment.weight_A)]
        outcomes.append(Outcome(y.detach(), *grads, torch.zeros_like(first_EDF), torch.zeros_like(second_EFD)))
    totals = [p.grad if p.grad is not None else torch.zeros_like(p) for p in (first_EDF, second_EFD)]
    first = outcomes[0]
    return [Outcome(first.y, first.grad_x, first.grad_weight, *totals), *outcomes[1:]]


def assert_equals_one_process(ranks: Pool, name: str, case: Case, tolerance: float = 1e-12) -> list[Outcome]:
    got = ranks.run(case.world_size, run_layer, name, case)
    wanted = in_one_process(case)
    close = {"rtol": tolerance, "atol": tolerance}
    for mine, reference_ in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine.y, reference_.y, **close)
        torch.testing.assert_close(mine.grad_x, reference_.grad_x, **close)
        torch.testing.assert_close(mine.grad_weight, reference_.grad_weight, **close)
    torch.testing.assert_close(sum(o.grad_in_EDF for o in got), wanted[0].grad_in_EDF, **close)
    torch.testing.assert_close(sum(o.grad_out_EFD for o in got), wanted[0].grad_out_EFD, **close)
    return got


def random_slots(rng: np.random.Generator, num_experts: int, num_devices: int, num_slots: int, copies: int) -> NDArray[np.int64]:
    """[R, S] with every expert somewhere, up to `copies` further copies, no expert twice on a device, the rest empty."""
    slots_RS = np.full((num_devices, num_slots), -1)
    free = [(r, s) for r in range(num_devices) for s in range(num_slots)]
    order = rng.permutation(len(free))
    for expert in range(num_experts):
        slots_RS[free[order[expert]]] = expert
    for place in order[num_experts : num_experts + copies]:
        device, slot = free[place]
        absent = sorted(set(range(num_experts)) - set(slots_RS[device].tolist()))
        if absent:
            slots_RS[device, slot] = rng.choice(absent)
    return slots_RS


def as_slots(slots_RS: NDArray[np.int64]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(e) for e in row) for row in slots_RS)
