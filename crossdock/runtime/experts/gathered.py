"""Expert-gather: the weights of hot experts travel to every rank, so that their tokens stay at home; the gradients travel back.

`layout.with_gathered(experts, mesh)` tells dispatchers where tokens go meanwhile, and `placement.strategies.gather` who sends what to
whom, which every rank knows without asking. Weights are known before a step begins, so they may set out before the layer's input is there
and travel under whatever computes until then. Backward is the mirror image: the gradients of the travelling weights leave when the experts
are done, leaders sum those of their node, and the owner joins them with its own when the work that hid the weights has been
differentiated. Every rank of the group makes the same calls, also where it sends and receives nothing.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from crossdock.runtime.dispatch.layout import ExpertLayout
from crossdock.runtime.experts.expert_bank import ExpertBank
from crossdock.runtime.experts.grouped_mlp import Network, grouped_mlp
from crossdock.runtime.transport.all_to_all import Route, all_to_all_start
from crossdock.runtime.transport.exchange import Pending
from crossdock.runtime.transport.mesh import Mesh


@dataclass(frozen=True, eq=False)
class Weights:
    """The expert tensors of `ExpertBank` for some experts, [G, P, D] and [G, F, D], differentiable back to their owners."""

    inner: Tensor
    outer: Tensor


@dataclass(frozen=True, eq=False)
class Leg:
    """One rank's part in one hop of the weights."""

    send_R: tuple[int, ...]
    receive_R: tuple[int, ...]
    place_A: Tensor
    """int64: where the experts that it sends stand among those that it has, grouped by receiving rank."""


def legs_of(layout: ExpertLayout, own: ExpertLayout, mesh: Mesh) -> tuple[Leg, ...]:
    """This rank's parts in bringing the gathered experts of `layout` to everybody, from the slots of `own`, the plan's layout.

    The second hop, from a leader to its neighbours on the node, is left out where no rank of the group takes part in one.
    """
    place_of = {expert: slot for slot, expert in enumerate(own.local_experts)}
    legs = []
    for hop in layout.hops if layout.hops[1] else layout.hops[:1]:
        here, ranks = mesh.expert_rank, range(mesh.expert_parallel)
        sent, arriving = ([transfer for transfer in hop if getattr(transfer, side) == here] for side in ("source", "target"))
        to, come_from = Counter(transfer.target for transfer in sent), Counter(transfer.source for transfer in arriving)
        place_A = torch.tensor([place_of[transfer.expert] for transfer in sent], dtype=torch.int64, device=mesh.device)
        legs.append(Leg(tuple(to[rank] for rank in ranks), tuple(come_from[rank] for rank in ranks), place_A))
        place_of = {transfer.expert: place for place, transfer in enumerate(arriving)}
    return tuple(legs)


def gather_start(bank: ExpertBank, legs: tuple[Leg, ...], mesh: Mesh) -> "Pending[tuple[Weights, ...]]":
    """Send this rank's part of the gathered experts; the wait gives, leg by leg, the weights of the slots behind the bank's own."""
    return _PendingWeights(legs, mesh, bank.layout.layer, mesh.ledger.next_movement(), Weights(bank.inner, bank.outer))


class _PendingWeights:
    def __init__(self, legs: tuple[Leg, ...], mesh: Mesh, layer: int, movement: int, own: Weights) -> None:
        self.legs, self.mesh, self.layer, self.movement = legs, mesh, layer, movement
        self.pending = self._start(own, legs[0])

    def wait(self) -> tuple[Weights, ...]:
        arrived = [Weights(*(tensor.wait() for tensor in self.pending))]
        for leg in self.legs[1:]:  # a leader cannot pass on what it does not have yet
            self.pending = self._start(arrived[-1], leg)
            arrived.append(Weights(*(tensor.wait() for tensor in self.pending)))
        return tuple(arrived)

    def _start(self, weights: Weights, leg: Leg) -> list[Pending[Tensor]]:
        route = Route(self.mesh, self.mesh.weight_group, leg.send_R, leg.receive_R, self.layer, "dispatch", "weights", self.movement)
        return [all_to_all_start(tensor.index_select(0, leg.place_A), route) for tensor in (weights.inner, weights.outer)]


class GatheringBank:
    """A bank and the gathered experts beside it, called like the bank alone; one for each MoE layer, and mutable.

    A forward pass is: `start` as early as one likes, `enter` when routing begins (which starts what nobody started), `arrive` before the
    experts run, and then a call, or several where chunks of tokens come one after another.
    """

    def __init__(self, bank: ExpertBank, layout: ExpertLayout, mesh: Mesh) -> None:
        self.bank, self.layout, self.mesh = bank, layout, mesh
        self.legs = legs_of(layout, bank.layout, mesh)
        self._next: Pending[tuple[Weights, ...]] | None = None
        self._current: Pending[tuple[Weights, ...]] | None = None
        self._arrived: tuple[Weights, ...] = ()

    def start(self) -> None:
        """Let the weights of the next forward pass set out."""
        assert self._next is None, "started twice for one forward pass"
        self._next = gather_start(self.bank, self.legs, self.mesh)

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
        """Each slot's network on its rows, [M, D] -> [M, D]; `count_S` counts own slots, then those of arrived experts."""
        bank = self.bank
        weights = [Weights(bank.inner, bank.outer), *self._arrived]
        counts = count_S.split([len(part.inner) for part in weights])
        rows = rows_MD.split([int(part.sum()) for part in counts])
        outputs: list[Tensor] = []
        for rows_ND, part, count_G in zip(rows, weights, counts, strict=True):
            if len(part.inner):
                outputs.append(grouped_mlp(rows_ND, part.inner, part.outer, count_G, bank.activation, bank.kernel, bank.recompute))
            else:
                # Nothing came here, but the gradients that others send back through this rank's part of the exchanges do, of tokens and of
                # weights: no rows, attached.
                outputs += [rows_ND, part.inner.flatten(0, 1), part.outer.flatten(0, 1)]
        return torch.cat(outputs)
