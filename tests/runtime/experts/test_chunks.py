"""Chunked schedules: any number of chunks over any tokens equals the reference, moves the same bytes, and overlaps forward and backward."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from crossdock.errors import BadConfig
from crossdock.runtime.dispatch import reference
from crossdock.runtime.dispatch.assignment import Assignment
from crossdock.runtime.dispatch.dispatcher import DISPATCHERS, Dispatched, Dispatcher, Handle, Pending, Prepared
from crossdock.runtime.dispatch.layout import ExpertLayout
from crossdock.runtime.experts.chunks import chunk_bounds, cut
from crossdock.runtime.experts.expert_bank import ExpertBank
from crossdock.runtime.experts.grouped_mlp import Network
from crossdock.runtime.experts.overlap import Chunked, Overlapped, Schedule, Sequential, run
from crossdock.runtime.transport.ledger import Flight, bytes_by_way
from tests.pool import Pool, mesh_for

WIDTH, HIDDEN, EXPERTS = 8, 6, 8
NAMES = ("y", "stream", "grad_x", "grad_weight", "grad_inner", "grad_outer", "grad_stage")


@dataclass(frozen=True)
class Strand:
    """The routed strand of a layer, as `MoELayer` is one, without a gate."""

    dispatcher: Dispatcher
    bank: ExpertBank

    def prepare(self, pieces: Sequence[Assignment]) -> Sequence[Prepared]:
        return self.dispatcher.prepare(pieces)

    def start(self, prepared: Prepared, x_TD: Tensor) -> Pending[Dispatched]:
        return prepared.start(x_TD)

    def compute(self, received: Dispatched) -> tuple[Tensor, Handle]:
        return self.bank(received.rows_MD, received.count_S), received.handle

    def network(self) -> Network:
        return self.bank.network()

    def combine_start(self, computed: tuple[Tensor, Handle]) -> Pending[Tensor]:
        return self.dispatcher.combine_start(*computed)


def inputs(rank: int, num_tokens: int, uniform: bool) -> tuple[Tensor, Assignment, Tensor]:
    """Tokens, choices of 1 to 3 experts (2 where uniform; some none at all otherwise), and the gradient that the loss sends into y."""
    generator = torch.Generator().manual_seed(100 * num_tokens + rank)
    x_TD = torch.randn(num_tokens, WIDTH, generator=generator, dtype=torch.float64)
    expert_TK = torch.rand(num_tokens, EXPERTS, generator=generator).topk(3).indices
    weight_TK = torch.rand(num_tokens, 3, generator=generator, dtype=torch.float64)
    gradient_TD = torch.randn(num_tokens, WIDTH, generator=generator, dtype=torch.float64)
    if uniform:
        assignment = Assignment.from_topk(expert_TK[:, :2], weight_TK[:, :2])
    else:
        assignment = Assignment.from_topk(expert_TK, weight_TK, torch.rand(num_tokens, 3, generator=generator) < 0.5)
    weight_A = assignment.weight_A.detach().requires_grad_()
    whole = Assignment(assignment.token_A, assignment.expert_A, weight_A, num_tokens, assignment.uniform_k)
    return x_TD.requires_grad_(), whole, gradient_TD


def step(
    rank: int,
    world_size: int,
    dispatch: str,
    schedule: Schedule,
    tokens: tuple[int, ...],
    uniform: bool,
    options: dict[str, Any],
    nodes: tuple[int, ...] = (0, 1),
) -> tuple[dict[str, Tensor], tuple[Flight, ...]]:
    """Forward and backward of one layer with two stages in its window: outputs and gradients by name, and the flights."""
    mesh = mesh_for(rank, world_size, world_size, nodes)
    layout = ExpertLayout.contiguous(0, EXPERTS, mesh)
    bank = ExpertBank(layout, WIDTH, HIDDEN, dtype=torch.float64, **options)
    bank.reset_parameters(seed=1, std=0.5)
    x_TD, assignment, gradient_TD = inputs(rank, tokens[rank], uniform)
    stage = torch.full((WIDTH,), 1.5, dtype=torch.float64, requires_grad=True)
    mesh.ledger.take()
    strand = Strand(DISPATCHERS[dispatch](mesh, layout, None), bank)
    stream, y_TD = run(schedule, strand, x_TD, assignment, [lambda x: x * stage, lambda x: x + stage.sin()], x_TD)
    torch.autograd.backward([stream, y_TD], [gradient_TD, gradient_TD])
    leaves = (x_TD, assignment.weight_A, bank.inner, bank.outer, stage)
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    return dict(zip(NAMES, (y_TD.detach(), stream.detach(), *gradients), strict=True)), mesh.ledger.take()


def by_reference(tokens: tuple[int, ...], uniform: bool) -> list[tuple[Tensor, ...]]:
    """y, and the gradients of the routed strand with respect to x and the weights, on each rank."""
    whole = ExpertBank(ExpertLayout(0, torch.arange(EXPERTS), tuple(range(EXPERTS)), EXPERTS, 1), WIDTH, HIDDEN, dtype=torch.float64)
    whole.reset_parameters(seed=1, std=0.5)
    results = []
    for rank, num_tokens in enumerate(tokens):
        x_TD, assignment, gradient_TD = inputs(rank, num_tokens, uniform)
        y_TD = reference.moe(x_TD, assignment, partial(_one_expert, whole))
        if y_TD.requires_grad:
            y_TD.backward(gradient_TD)
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in (x_TD, assignment.weight_A)]
        results.append((y_TD.detach(), *gradients))
    return results


def _one_expert(bank: ExpertBank, expert: int, row_D: Tensor) -> Tensor:
    count_S = torch.zeros(EXPERTS, dtype=torch.int64)
    count_S[expert] = 1
    return bank(row_D.reshape(1, -1), count_S).view_as(row_D)


CASES = [
    ((13, 16), 4, 4, True),  # not divisible
    ((13, 7), 3, 3, False),  # any number of experts, none included
    ((2, 9), 4, 4, True),  # fewer tokens than chunks
    ((0, 5), 2, 2, False),  # a rank without tokens
    ((0, 0), 3, 3, True),
    ((13, 7), 1, 4, False),  # other degrees backward: finer
    ((13, 7), 4, 1, False),  # coarser
    ((13, 16), 2, 4, True),
    ((13, 0), 3, 2, False),  # neither divides the other
    ((3, 16), 4, 6, True),
]


def check(ranks: Pool, dispatch: str, tokens: tuple[int, ...], schedule: Chunked, uniform: bool, nodes: tuple[int, ...]) -> None:
    """Equal to the same chunks waited for at once, to the last bit; to one piece and to the reference, as near as float64 comes."""

    def found(schedule: Schedule) -> list[dict[str, Tensor]]:
        return [named for named, _ in ranks.run(len(tokens), step, dispatch, schedule, tokens, uniform, {}, nodes)]

    overlapped, sequential, in_one_piece = found(schedule), found(replace(schedule, overlap=False)), found(Overlapped(1))
    expected = by_reference(tokens, uniform)
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    for rank, (mine, waiting, whole) in enumerate(zip(overlapped, sequential, in_one_piece, strict=True)):
        for name in NAMES:
            assert torch.equal(mine[name], waiting[name]), f"{name} of rank {rank} depends on when one waits"
            close(mine[name], whole[name])
        y_TD, grad_x_TD, grad_weight_A = expected[rank]
        close(mine["y"], y_TD)
        close(mine["grad_weight"], grad_weight_A)
        _, _, gradient_TD = inputs(rank, tokens[rank], uniform)
        close(mine["grad_x"], grad_x_TD + 1.5 * gradient_TD)  # the stream's share beside the strand's


@pytest.mark.parametrize("dispatch", ["flat", "deduplicated"])
@pytest.mark.parametrize(("tokens", "forward", "backward", "uniform"), CASES, ids=str)
def test_chunks_equal_the_reference(
    ranks: Pool, dispatch: str, tokens: tuple[int, ...], forward: int, backward: int, uniform: bool
) -> None:
    check(ranks, dispatch, tokens, Chunked(1, forward, backward), uniform, (0, 1))


@pytest.mark.parametrize("dispatch", DISPATCHERS)
@pytest.mark.parametrize(("forward", "backward"), [(3, 3), (2, 4), (3, 1)])
def test_chunks_over_two_nodes(ranks: Pool, dispatch: str, forward: int, backward: int) -> None:
    check(ranks, dispatch, (13, 0, 6, 2), Chunked(2, forward, backward), False, (0, 0, 1, 1))


@pytest.mark.parametrize(("forward", "backward"), [(3, 3), (1, 4), (4, 2)])
def test_chunks_on_one_rank(ranks: Pool, forward: int, backward: int) -> None:
    check(ranks, "deduplicated", (11,), Chunked(0, forward, backward), False, (0,))


def without_gradients(rank: int, world_size: int, schedule: Schedule, frozen: str) -> tuple[Tensor, list[bool]]:
    """y where nothing, or not everything, is differentiated; and which leaves got a gradient."""
    mesh = mesh_for(rank, world_size, world_size, tuple(range(world_size)))
    bank = ExpertBank(ExpertLayout.contiguous(0, EXPERTS, mesh), WIDTH, HIDDEN, dtype=torch.float64)
    bank.reset_parameters(seed=1, std=0.5)
    x_TD, assignment, gradient_TD = inputs(rank, 9, True)
    strand = Strand(DISPATCHERS["deduplicated"](mesh, bank.layout, None), bank)
    if frozen == "experts":
        bank.requires_grad_(False)
    elif frozen == "inputs":
        x_TD.requires_grad_(False)
        assignment.weight_A.requires_grad_(False)
    with torch.set_grad_enabled(frozen != "all"):
        _, y_TD = run(schedule, strand, x_TD, assignment, [], None)
    assert y_TD.requires_grad == (frozen != "all")
    if y_TD.requires_grad:
        y_TD.backward(gradient_TD)
    return y_TD.detach(), [leaf.grad is not None for leaf in (x_TD, assignment.weight_A, bank.inner, bank.outer)]


@pytest.mark.parametrize(
    ("frozen", "reached"),
    [("all", [False] * 4), ("experts", [True, True, False, False]), ("inputs", [False, False, True, True]), ("none", [True] * 4)],
)
def test_only_what_is_trained_gets_a_gradient(ranks: Pool, frozen: str, reached: list[bool]) -> None:
    whole = ranks.run(2, without_gradients, Overlapped(0), frozen)
    for (y_TD, mine), (expected, _) in zip(ranks.run(2, without_gradients, Chunked(0, 2, 4), frozen), whole, strict=True):
        torch.testing.assert_close(y_TD, expected)
        assert mine == reached


@pytest.mark.parametrize("dispatch", DISPATCHERS)
def test_chunks_carry_the_same_bytes(ranks: Pool, dispatch: str) -> None:
    whole = ranks.run(2, step, dispatch, Sequential(0), (13, 6), False, {})
    for degrees in ((3, 3), (3, 1), (2, 3)):
        chunked = ranks.run(2, step, dispatch, Chunked(2, *degrees), (13, 6), False, {})
        for (_, before), (_, after) in zip(whole, chunked, strict=True):
            assert bytes_by_way(after) == bytes_by_way(before)
            assert sum(f.kind == "tokens" for f in after) == math.lcm(*degrees) * sum(f.kind == "tokens" for f in before)


@pytest.mark.parametrize("recompute", ["activation", "all"])
@pytest.mark.parametrize("chunks", [1, 3])
def test_recomputing_experts_moves_nothing_again(ranks: Pool, recompute: str, chunks: int) -> None:
    kept = ranks.run(2, step, "deduplicated", Chunked(1, chunks, chunks), (13, 6), False, {})
    again = ranks.run(2, step, "deduplicated", Chunked(1, chunks, chunks), (13, 6), False, {"recompute": recompute})
    for (expected, before), (found, after) in zip(kept, again, strict=True):
        assert all(torch.equal(found[name], expected[name]) for name in NAMES)
        messages = [[(f.kind, f.stage, f.direction, f.bytes_by_class) for f in flights] for flights in (before, after)]
        assert messages[0] == messages[1]


def in_flight_during_experts(flights: tuple[Flight, ...], direction: str) -> list[tuple[set[int], set[tuple[str, int]]]]:
    """For each call of the experts in order: its pieces, and the other pieces' token movements (stage, piece) under way while it ran.

    Forward, a piece is computed between the end of its dispatch's wait and its combine's launch; backward, the other way round. Pieces of
    one chunk are waited for together before any of them leaves.
    """
    first, second = ("dispatch", "combine") if direction == "forward" else ("combine", "dispatch")
    mine = [flight for flight in flights if flight.kind == "tokens" and flight.direction == direction]
    piece_of = {movement: piece for piece, movement in enumerate(sorted({flight.movement for flight in mine}))}
    moments = [(f.wait_end_s, True, piece_of[f.movement]) for f in mine if f.stage == first]
    moments += [(f.launched_s, False, piece_of[f.movement]) for f in mine if f.stage == second]
    calls: list[tuple[set[int], float, float]] = []
    arrived: set[int] = set()
    came_s = 0.0
    for at_s, is_arrival, piece in sorted(moments):
        if is_arrival:
            arrived.add(piece)
            came_s = at_s
        elif arrived:
            calls.append((arrived, came_s, at_s))
            arrived = set()
    return [
        (pieces, {(f.stage, piece_of[f.movement]) for f in mine if f.launched_s < begin_s and f.wait_begin_s > end_s})
        for pieces, begin_s, end_s in calls
    ]


@pytest.mark.parametrize("dispatch", ["flat", "deduplicated"])
def test_other_chunks_travel_while_one_is_computed(ranks: Pool, dispatch: str) -> None:
    for _, flights in ranks.run(2, step, dispatch, Chunked(1, 3, 3), (24, 24), True, {}):
        assert in_flight_during_experts(flights, "forward") == [
            ({0}, {("dispatch", 1), ("dispatch", 2)}),
            ({1}, {("dispatch", 2), ("combine", 0)}),
            ({2}, {("combine", 0), ("combine", 1)}),
        ]
        assert in_flight_during_experts(flights, "backward") == [  # the last chunk comes first
            ({2}, {("combine", 1), ("combine", 0)}),
            ({1}, {("combine", 0), ("dispatch", 2)}),
            ({0}, {("dispatch", 2), ("dispatch", 1)}),
        ]
    for _, flights in ranks.run(2, step, dispatch, Chunked(1, 3, 3, overlap=False), (24, 24), True, {}):
        assert in_flight_during_experts(flights, "forward") == [({0, 1, 2}, set())]
        assert in_flight_during_experts(flights, "backward") == [({0, 1, 2}, set())]


def test_each_direction_has_its_own_chunks(ranks: Pool) -> None:
    for _, flights in ranks.run(2, step, "flat", Chunked(1, 2, 4), (24, 24), True, {}):
        assert in_flight_during_experts(flights, "forward") == [
            ({0, 1}, {("dispatch", 2), ("dispatch", 3)}),
            ({2, 3}, {("combine", 0), ("combine", 1)}),
        ]
        assert [pieces for pieces, _ in in_flight_during_experts(flights, "backward")] == [{3}, {2}, {1}, {0}]
        assert in_flight_during_experts(flights, "backward")[2][1] == {("combine", 0), ("dispatch", 2), ("dispatch", 3)}
    for _, flights in ranks.run(2, step, "flat", Chunked(1, 4, 1), (24, 24), True, {}):
        assert [pieces for pieces, _ in in_flight_during_experts(flights, "forward")] == [{0}, {1}, {2}, {3}]
        assert in_flight_during_experts(flights, "backward") == [({0, 1, 2, 3}, set())]


@given(st.integers(0, 50), st.integers(1, 12))
def test_bounds_are_even_and_complete(num_tokens: int, num_chunks: int) -> None:
    bounds = chunk_bounds(num_tokens, num_chunks)
    sizes = [end - begin for begin, end in itertools.pairwise(bounds)]
    assert (bounds[0], bounds[-1], len(sizes)) == (0, num_tokens, num_chunks)
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(0, 20), st.integers(1, 8), st.booleans())
def test_chunks_together_are_the_whole(num_tokens: int, num_chunks: int, uniform: bool) -> None:
    x_TD, assignment, _ = inputs(0, num_tokens, uniform)
    chunks = cut(x_TD, assignment, num_chunks)
    begins = chunk_bounds(num_tokens, num_chunks)
    assert torch.equal(torch.cat([x for x, _ in chunks]), x_TD)
    assert torch.equal(torch.cat([part.token_A + begin for (_, part), begin in zip(chunks, begins, strict=False)]), assignment.token_A)
    assert torch.equal(torch.cat([part.expert_A for _, part in chunks]), assignment.expert_A)
    assert torch.equal(torch.cat([part.weight_A for _, part in chunks]), assignment.weight_A)
    assert all(part.num_tokens == len(x) for x, part in chunks)


def test_less_than_one_chunk_is_refused() -> None:
    with pytest.raises(BadConfig, match="backward_chunks is 0; choose 1"):
        Chunked(0, 1, 0)
