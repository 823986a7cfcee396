"""Expert-gather: the weights of hot experts travel to every rank, so that their tokens stay at home; the gradients travel back.

`layout.with_gathered(experts, mesh)` tells dispatchers where tokens go meanwhile, and `placement.gather` who sends what to whom, which
every rank knows without asking. Weights are known before a step begins, so they may set out before the layer's input is there and travel
under whatever computes until then. Backward is the mirror image: the gradients of the travelling weights leave when the experts are done,
leaders sum those of their node, and the owner joins them with its own when the work that hid the weights has been differentiated. Every
rank of the group makes the same calls, also where it sends and receives nothing.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from crossdock.placement.gather import WeightTransfer
from crossdock.runtime.collectives import Pending, Route, all_to_all_start
from crossdock.runtime.experts import ExpertBank
from crossdock.runtime.grouped_mlp import Network, grouped_mlp
from crossdock.runtime.layout import ExpertLayout
from crossdock.runtime.mesh import Mesh


@dataclass(frozen=True, eq=False)
class Weights:
    """The expert tensors of `ExpertBank` for some experts, [G, P, D] and [G, F, D], differentiable back to their owners."""

    inner: Tensor
    outer: Tensor


def gather_start(bank: ExpertBank, layout: ExpertLayout, mesh: Mesh) -> "Pending[tuple[Weights, ...]]":
    """Send this rank's part of the gathered experts of `layout`; the wait gives, hop by hop, the weights of the slots after the bank's own.

    `layout` is one with gathered experts, `bank` holds the plan's.
    """
    movement = mesh.ledger.next_movement()
    own = {expert: slot for slot, expert in enumerate(bank.layout.local_experts) if expert >= 0}
    pending = _hop_start(Weights(bank.inner, bank.outer), own, layout.hops[0], layout.layer, movement, mesh)
    return _PendingWeights(pending, layout, movement, mesh)


@dataclass(frozen=True, eq=False)
class _PendingHop:
    inner: Pending[Tensor]
    outer: Pending[Tensor]

    def wait(self) -> Weights:
        return Weights(self.inner.wait(), self.outer.wait())


@dataclass(frozen=True, eq=False)
class _PendingWeights:
    first: _PendingHop
    layout: ExpertLayout
    movement: int
    mesh: Mesh

    def wait(self) -> tuple[Weights, ...]:
        first = self.first.wait()
        if not self.layout.hops[1]:
            return (first,)
        # From a leader to its neighbours the way is short, and it cannot begin before the first hop ends.
        led = {expert: place for place, expert in enumerate(_arriving(self.layout.hops[0], self.mesh.expert_rank))}
        second = _hop_start(first, led, self.layout.hops[1], self.layout.layer, self.movement, self.mesh)
        return first, second.wait()


def _hop_start(
    weights: Weights, place_of: dict[int, int], hop: tuple[WeightTransfer, ...], layer: int, movement: int, mesh: Mesh
) -> _PendingHop:
    """Send what `hop` asks of this rank; `place_of` tells where in `weights` an expert stands."""
    here, ranks = mesh.expert_rank, range(mesh.expert_parallel)
    sent = [transfer for transfer in hop if transfer.source == here]
    to, come_from = Counter(t.target for t in sent), Counter(t.source for t in hop if t.target == here)
    send_R, receive_R = tuple(to[rank] for rank in ranks), tuple(come_from[rank] for rank in ranks)
    route = Route(mesh, mesh.weight_group, send_R, receive_R, layer, "dispatch", "weights", movement)
    place_A = torch.tensor([place_of[transfer.expert] for transfer in sent], dtype=torch.int64, device=mesh.device)
    return _PendingHop(*(all_to_all_start(tensor.index_select(0, place_A), route) for tensor in (weights.inner, weights.outer)))


def _arriving(hop: tuple[WeightTransfer, ...], rank: int) -> list[int]:
    """The experts that `hop` brings to `rank`, in order of arrival."""
    return [transfer.expert for transfer in hop if transfer.target == rank]


class GatheringBank:
    """A bank and the gathered experts beside it, called like the bank alone; one for each MoE layer, and mutable.

    A forward pass is: `start` as early as one likes, `enter` when routing begins (which starts what nobody started), `arrive` before the
    experts run, and then a call, or several where chunks of tokens come one after another.
    """

    def __init__(self, bank: ExpertBank, layout: ExpertLayout, mesh: Mesh) -> None:
        self.bank, self.layout, self.mesh = bank, layout, mesh
        self._next: Pending[tuple[Weights, ...]] | None = None
        self._current: Pending[tuple[Weights, ...]] | None = None
        self._arrived: tuple[Weights, ...] = ()

    def start(self) -> None:
        """Let the weights of the next forward pass set out."""
        assert self._next is None, "started twice for one forward pass"
        self._next = gather_start(self.bank, self.layout, self.mesh)

    def enter(self) -> None:
        """Take the weights that set out last for the forward pass that begins."""
        if self._next is None:
            self.start()
        self._current, self._next = self._next, None

    def arrive(self) -> None:
        """Wait for this forward pass's weights, if nobody has."""
        if self._current is not None:
            self._arrived, self._current = self._current.wait(), None

    def network(self) -> Network:
        """The bank's experts and those that have arrived, as tensors."""
        parts = ((self.bank.inner, self.bank.outer), *((part.inner, part.outer) for part in self._arrived))
        return Network(parts, self.bank.activation, self.bank.kernel, self.bank.recompute)

    def __call__(self, rows_MD: Tensor, count_S: Tensor) -> Tensor:
        """Each slot's network on its rows, [M, D] -> [M, D]; `count_S` [S + G] counts own slots, then gathered ones."""
        bank = self.bank
        weights = [Weights(bank.inner, bank.outer), *self._arrived]
        counts = count_S.split([len(part.inner) for part in weights] + [len(count_S) - sum(len(part.inner) for part in weights)])
        assert int(counts[-1].sum()) == 0, "rows for a slot that stayed empty"
        rows = rows_MD.split([int(part.sum()) for part in counts[:-1]])
        outputs: list[Tensor] = []
        for rows_ND, part, count_G in zip(rows, weights, counts, strict=False):
            if len(part.inner):
                outputs.append(grouped_mlp(rows_ND, part.inner, part.outer, count_G, bank.activation, bank.kernel, bank.recompute))
            else:
                # Nothing came here, but the gradients that others send back through this rank's part of the exchange do: no rows, attached.
                outputs += [part.inner.flatten(0, 1), part.outer.flatten(0, 1)]
        return torch.cat(outputs)
