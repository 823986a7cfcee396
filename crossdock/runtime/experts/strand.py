"""The routed strand in chunks as explicit autograd Functions, so that its backward pass is ordered by us and has chunks of its own number.

Tokens are cut into pieces, as many as the least common multiple of both numbers of chunks. Every piece is dispatched and combined by
itself, by whatever dispatcher there is, and a chunk of either direction is a run of pieces:

    forward_chunks 2, backward_chunks 4      pieces 0 1 2 3      forward chunks [0 1] [2 3]      backward chunks [3] [2] [1] [0]

A forward chunk is waited for, computed in one call of the experts and sent home as a whole, and so is a backward chunk: of what the
forward pass kept, each slot's rows stand piece by piece, so a backward chunk finds its rows side by side without copying them. Weight
gradients are summed in place over the chunks. Tokens never change rank twice, so the bytes are those of one piece.

The pieces' dispatch and combine are small graphs of autograd's own. Each is run backwards in two steps, up to where its gradients leave for
another rank and on from where they have arrived (`all_to_all.frontier`); between these steps stands whatever else there is to compute:

    Depart      forward: dispatch every piece                             backward: gradients of x and of the weights have come home
    Compute     forward, chunk by chunk: rows here, experts, combine      backward, chunk by chunk: gradients here, experts, gradients leave
    Return      forward: results are home                                 backward: gradients of the results leave
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from crossdock.runtime.dispatch.assignment import Assignment
from crossdock.runtime.dispatch.movement import Dispatched, Prepared
from crossdock.runtime.experts.chunks import cut
from crossdock.runtime.experts.grouped_mlp import KERNELS, Gradient, Kept, Network, Run
from crossdock.runtime.profiler import span
from crossdock.runtime.transport.all_to_all import frontier
from crossdock.runtime.transport.exchange import Pending

Item = TypeVar("Item")


class RoutedExperts(Protocol):
    """The routed strand of a layer: two movements, and what the experts do between them."""

    def prepare(self, pieces: Sequence[Assignment]) -> Sequence[Prepared]:
        """Begin to tell the experts' ranks what will come of each piece."""
        ...

    def start(self, prepared: Prepared, x_TD: Tensor) -> Pending[Dispatched]:
        """Send the tokens of one piece on their way to their experts."""
        ...

    def compute(self, received: Dispatched) -> tuple[Tensor, Any]:
        """Run the local experts on what arrived: outputs [M, D], and the handle by which they find home."""
        ...

    def combine_start(self, computed: tuple[Tensor, Any]) -> Pending[Tensor]:
        """Send the results on their way home."""
        ...

    def network(self) -> Network:
        """The same local experts as tensors, for chunks, whose backward pass is ordered here."""
        ...


class Strand:
    """One forward pass of the routed strand, and the backward pass that follows; mutable, for one use.

    strand = Strand(routed, forward_chunks, backward_chunks, overlap)
    token = strand.depart(x_TD, assignment)
    ... stages ...
    token = strand.compute(token)
    ... stages ...
    y_TD = strand.result(token)

    Tokens are empty tensors that tie the three to each other in autograd's graph.
    """

    def __init__(self, routed: RoutedExperts, forward_chunks: int, backward_chunks: int, overlap: bool) -> None:
        self.routed, self.overlap = routed, overlap
        num_pieces = math.lcm(forward_chunks, backward_chunks)
        self.forward_size, self.backward_size = num_pieces // forward_chunks, num_pieces // backward_chunks
        self.num_pieces = num_pieces
        self.pieces: list[_Piece] = []
        self.chunks: list[_Chunk] = []

    def depart(self, x_TD: Tensor, assignment: Assignment) -> Tensor:
        """Let all pieces of `x_TD` [T, D] leave for their experts; the result is for `compute`."""
        token: Tensor = _Depart.apply(x_TD, assignment.weight_A, assignment, self)
        return token

    def compute(self, token: Tensor) -> Tensor:
        """Chunk by chunk wait for the rows, run the experts and let the outputs leave for home; the result is for `result`."""
        network = self.routed.network()
        weights = [weight for part in network.parts for weight in part]
        computed: Tensor = _Compute.apply(token, network, self, *weights)
        return computed

    def result(self, token: Tensor) -> Tensor:
        """y [T, D], when all of it is home."""
        y_TD: Tensor = _Return.apply(token, self)
        return y_TD


class _Leaf:
    """Where a piece's graph begins: a tensor that autograd knows nothing behind, and its place in the graph."""

    def __init__(self, tensor: Tensor, requires_grad: bool) -> None:
        self.tensor = tensor.detach().requires_grad_(requires_grad)
        self.node = get_gradient_edge(self.tensor).node if requires_grad else None


class _Piece:
    """Some tokens on their way there and back; mutable, each field is filled when its moment comes."""

    def __init__(self, x: _Leaf, weight: _Leaf, dispatching: Pending[Dispatched]) -> None:
        self.x, self.weight = x, weight
        self.dispatching: Pending[Dispatched] = dispatching
        self.rows_edge: GradientEdge | None = None
        self.out: _Leaf | None = None
        self.combining: Pending[Tensor] | None = None
        self.y_edge: GradientEdge | None = None
        self.arrived: dict[Any, Tensor] = {}
        """Gradients of leaves, by node."""
        self.travelling: dict[Any, Tensor] = {}
        """By node, all-to-alls whose gradients are on their way, with what autograd wants to see in their place."""

    def run_back(self, edges: Sequence[GradientEdge], gradients: Sequence[Tensor]) -> None:
        """Go back from `edges` to the leaves, or up to where gradients leave this rank."""
        ends = frontier(edges)
        found = torch.autograd.grad(list(edges), ends, list(gradients)) if ends else ()
        for end, gradient in zip(ends, found, strict=True):
            if end.node.next_functions:
                self.travelling[end.node] = gradient
            else:
                known = self.arrived.get(end.node)
                self.arrived[end.node] = gradient if known is None else known + gradient

    def join(self) -> None:
        """Wait for the gradients that left, and go on from there."""
        if self.travelling:
            travelling, self.travelling = self.travelling, {}
            self.run_back([GradientEdge(node, 0) for node in travelling], list(travelling.values()))

    def gradient_of(self, leaf: _Leaf) -> Tensor:
        """What has arrived at a leaf; zero where nothing leads there."""
        found = self.arrived.pop(leaf.node, None)
        return torch.zeros_like(leaf.tensor) if found is None else found


@dataclass(frozen=True, eq=False)
class _Chunk:
    """A forward chunk at the experts: which rows of which piece stand where, and what its backward pass needs."""

    count_PS: tuple[tuple[int, ...], ...]
    kept: tuple[Kept, ...]
    """One for each part of the network."""


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_A: Tensor, assignment: Assignment, strand: Strand) -> Tensor:
        ctx.strand = strand
        parts = cut(x_TD.detach(), assignment, strand.num_pieces)
        xs = [_Leaf(x, ctx.needs_input_grad[0]) for x, _ in parts]
        weights = [_Leaf(part.weight_A, ctx.needs_input_grad[1]) for _, part in parts]
        with torch.enable_grad():
            mine = [replace(part, weight_A=weight.tensor) for (_, part), weight in zip(parts, weights, strict=True)]
            for prepared, x, weight in zip(strand.routed.prepare(mine), xs, weights, strict=True):
                strand.pieces.append(_Piece(x, weight, begun(strand.routed.start(prepared, x.tensor), strand.overlap)))
        return x_TD.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _token: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        pieces: list[_Piece] = ctx.strand.pieces
        for piece in reversed(pieces):
            piece.join()
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        grad_x_TD = torch.cat([piece.gradient_of(piece.x) for piece in pieces]) if needs_x else None
        grad_weight_A = torch.cat([piece.gradient_of(piece.weight) for piece in pieces]) if needs_weight else None
        return grad_x_TD, grad_weight_A, None, None


class _Compute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, network: Network, strand: Strand, *weights: Tensor) -> Tensor:
        ctx.strand, ctx.network = strand, network
        ctx.save_for_backward(*weights)
        for pieces in _runs(strand.pieces, strand.forward_size):
            received = []
            for piece in pieces:
                with torch.enable_grad():
                    dispatched = piece.dispatching.wait()
                piece.rows_edge = get_gradient_edge(dispatched.rows_MD) if dispatched.rows_MD.requires_grad else None
                received.append(dispatched)
            count_PS = tuple(tuple(dispatched.count_S.tolist()) for dispatched in received)
            rows_MD = _by_slot([dispatched.rows_MD.detach() for dispatched in received], count_PS)
            with span("experts"):
                out_MD, kept = _forward(network, rows_MD, count_PS)
            strand.chunks.append(_Chunk(count_PS, kept))
            for piece, dispatched, out in zip(pieces, received, _by_piece(out_MD, count_PS), strict=True):
                piece.out = _Leaf(out, requires_grad=True)
                with torch.enable_grad():
                    piece.combining = begun(strand.routed.combine_start((piece.out.tensor, dispatched.handle)), strand.overlap)
        return token.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, token: Tensor) -> tuple[Tensor | None, ...]:
        strand: Strand = ctx.strand
        needs_weights = ctx.needs_input_grad[3:]
        gradients = [Gradient(weight) if needed else None for weight, needed in zip(ctx.saved_tensors, needs_weights, strict=True)]
        for pieces in reversed(list(_runs(range(strand.num_pieces), strand.backward_size))):
            _back_through_experts(strand, ctx.network, pieces, gradients)
        strand.chunks.clear()
        return token, None, None, *(None if gradient is None else gradient.finished() for gradient in gradients)


class _Return(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _token: Tensor, strand: Strand) -> Tensor:
        ctx.strand = strand
        home = []
        for piece in strand.pieces:
            assert piece.combining is not None
            with torch.enable_grad():
                y_TD = piece.combining.wait()
            piece.combining, piece.y_edge = None, get_gradient_edge(y_TD) if y_TD.requires_grad else None
            home.append(y_TD.detach())
        ctx.sizes = [len(y_TD) for y_TD in home]
        return torch.cat(home)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        strand: Strand = ctx.strand
        for piece, gradient in reversed(list(zip(strand.pieces, grad_TD.split(ctx.sizes), strict=True))):
            assert piece.y_edge is not None
            piece.run_back([piece.y_edge], [gradient])
            if not strand.overlap:
                piece.join()
        return grad_TD.new_empty(0), None


def _back_through_experts(strand: Strand, network: Network, numbers: Sequence[int], gradients: Sequence[Gradient | None]) -> None:
    """Wait for the gradients of one backward chunk, take them through the experts, and let those of the rows leave."""
    for number in reversed(numbers):
        if strand.overlap:
            strand.pieces[number].join()
    # A backward chunk may cover several forward chunks, or a part of one.
    for chunk_number in range(numbers[-1] // strand.forward_size, numbers[0] // strand.forward_size - 1, -1):
        first = chunk_number * strand.forward_size
        within = range(max(numbers[0], first), min(numbers[-1] + 1, first + strand.forward_size))
        pieces = [strand.pieces[number] for number in within]
        chunk = strand.chunks[chunk_number]
        skipped, count_PS = chunk.count_PS[: within[0] - first], chunk.count_PS[within[0] - first : within[-1] + 1 - first]
        grad_MD = _by_slot([piece.gradient_of(piece.out) for piece in pieces if piece.out is not None], count_PS)
        needs_rows = pieces[0].rows_edge is not None
        with span("experts backward"):
            grad_rows_MD = _backward(network, grad_MD, chunk, skipped, count_PS, gradients, needs_rows)
        if grad_rows_MD is None:
            continue
        for piece, grad in reversed(list(zip(pieces, _by_piece(grad_rows_MD, count_PS), strict=True))):
            assert piece.rows_edge is not None
            piece.run_back([piece.rows_edge], [grad])
            if not strand.overlap:
                piece.join()


def _forward(network: Network, rows_MD: Tensor, count_PS: Sequence[Sequence[int]]) -> tuple[Tensor, tuple[Kept, ...]]:
    """Rows sorted by slot through every part of the network."""
    kernel = KERNELS[network.kernel](network.activation, network.recompute)
    outputs, kept = [], []
    for (inner, outer), counts, rows_ND in _parts(network, _summed(count_PS), rows_MD):
        out_ND, of_part = kernel.forward(rows_ND, inner.detach(), outer.detach(), counts)
        outputs.append(out_ND)
        kept.append(of_part)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs), tuple(kept)


def _backward(
    network: Network,
    grad_MD: Tensor,
    chunk: _Chunk,
    skipped_PS: Sequence[Sequence[int]],
    count_PS: Sequence[Sequence[int]],
    gradients: Sequence[Gradient | None],
    needs_rows: bool,
) -> Tensor | None:
    """Gradients of the rows of some pieces of a forward chunk; `skipped_PS` counts the rows of the pieces before them."""
    kernel = KERNELS[network.kernel](network.activation, network.recompute)
    found, first_slot = [], 0
    skipped = _summed(skipped_PS) or (0,) * len(count_PS[0])
    for part, ((inner, outer), counts, grad_ND) in enumerate(_parts(network, _summed(count_PS), grad_MD)):
        kept = chunk.kept[part]
        skipped_S = skipped[first_slot : first_slot + len(counts)]
        runs = [Run(run.begin + skip, count) for run, skip, count in zip(kept.whole, skipped_S, counts, strict=True)]
        grad_inner, grad_outer = gradients[2 * part : 2 * part + 2]
        found.append(kernel.backward(grad_ND.contiguous(), kept, runs, inner.detach(), outer.detach(), grad_inner, grad_outer, needs_rows))
        first_slot += len(counts)
    rows = [grad for grad in found if grad is not None]
    return torch.cat(rows) if rows else None


def _parts(network: Network, counts: tuple[int, ...], rows_MD: Tensor) -> Iterator[tuple[tuple[Tensor, Tensor], tuple[int, ...], Tensor]]:
    """The weights, counts and rows of each part."""
    slot = row = 0
    for part in network.parts:
        mine = counts[slot : slot + len(part[0])]
        slot += len(part[0])
        yield part, mine, rows_MD[row : row + sum(mine)]
        row += sum(mine)
    assert row == len(rows_MD), "rows for a slot that has no weights"


def _by_slot(rows: Sequence[Tensor], count_PS: Sequence[Sequence[int]]) -> Tensor:
    """Rows of several pieces, each sorted by slot, sorted together by slot, then piece."""
    if len(rows) == 1 or not count_PS[0]:  # without slots there are no rows either
        return rows[0].contiguous()
    blocks = [piece.split(list(counts)) for piece, counts in zip(rows, count_PS, strict=True)]
    return torch.cat([of_piece[slot] for slot in range(len(count_PS[0])) for of_piece in blocks])


def _by_piece(rows_MD: Tensor, count_PS: Sequence[Sequence[int]]) -> list[Tensor]:
    """What `_by_slot` joined, apart again."""
    if len(count_PS) == 1:
        return [rows_MD]
    num_pieces, num_slots = len(count_PS), len(count_PS[0])
    if not num_slots:
        return list(rows_MD.split([0] * num_pieces))
    blocks = rows_MD.split([count_PS[piece][slot] for slot in range(num_slots) for piece in range(num_pieces)])
    return [torch.cat(blocks[piece::num_pieces]) for piece in range(num_pieces)]


def _summed(count_PS: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(sum(counts) for counts in zip(*count_PS, strict=True))


def _runs(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]


def begun(pending: Pending[Any], overlap: bool) -> Pending[Any]:
    """What has started; where it is not to overlap with anything, waited for already."""
    return pending if overlap else _Arrived(pending.wait())


@dataclass(frozen=True, eq=False)
class _Arrived:
    value: Any

    def wait(self) -> Any:
        """What came."""
        return self.value
