"""Context-coherent movement, for one expert per token: tokens stay where it ran, and the context comes to them (ExFlow, IPDPS 2024).

    travel_start            residents to the ranks of their next experts: one all-to-all a layer, where tokens that go home need two
    keys_values_start       keys and values of all ranks' residents to every rank, so that attention runs where a token sits

Both are differentiable and their backward passes move the same bytes the other way; gradients of keys and values are summed at the rank
that made them. A token is known by its number in the batch of the expert group: rank of its home x tokens per rank + its place there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crossdock.runtime.dispatch.counts import counts_start
from crossdock.runtime.dispatch.rows import RowMap, count_of, inverse, spread
from crossdock.runtime.transport.all_to_all import Route, all_to_all_start
from crossdock.runtime.transport.exchange import Pending
from crossdock.runtime.transport.ledger import Stage
from crossdock.runtime.transport.mesh import Mesh


@dataclass(frozen=True, eq=False)
class Residents:
    """Who the rows on this rank are, and how many there are on the others."""

    number_T: Tensor
    """int64 [T]: the number of each row's token in the group's batch."""
    count_R: tuple[int, ...]
    """Rows on every rank of the group; their sum is that of the homes."""

    @classmethod
    def at_home(cls, tokens_per_rank: int, mesh: Mesh) -> "Residents":
        """Every token where its sequence came in; all ranks bring equally many."""
        first = mesh.expert_rank * tokens_per_rank
        number_T = torch.arange(first, first + tokens_per_rank, device=mesh.device)
        return cls(number_T, (tokens_per_rank,) * mesh.expert_parallel)

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole group."""
        return sum(self.count_R)


@dataclass(frozen=True, eq=False)
class Arrival:
    """Rows that came to stay."""

    x_TD: Tensor
    """Sorted by local slot, then by the rank they come from."""
    companions: tuple[Tensor, ...]
    """What travelled beside them, in the same order."""
    count_S: Tensor
    """int64 [S] on the CPU: rows of each local slot; zero for those that this rank does not have."""
    residents: Residents


def travel_start(
    x_TD: Tensor, companions: Sequence[Tensor], residents: Residents, slot_T: Tensor, num_slots: int, mesh: Mesh, layer: int, stage: Stage
) -> Pending[Arrival]:
    """Send every row to the rank of global slot `slot_T` (rank x `num_slots` + local slot), for good.

    companions: tensors [T, ...] that go along, counted as metadata; floating ones send their gradients back. The exchange of counts blocks;
    it tells every rank how many rows every rank will have.
    """
    num_ranks = mesh.expert_parallel
    movement = mesh.ledger.next_movement()
    mine = count_of(slot_T, num_ranks * num_slots)
    (counts,) = counts_start([mine.expand(num_ranks, -1).contiguous()], mesh, layer, movement)
    order_T = torch.argsort(slot_T, stable=True)
    leaving = RowMap.permutation(order_T)
    rows, beside = spread(x_TD, leaving, x_TD.dtype), [values[order_T] for values in (residents.number_T, *companions)]
    counted = counts.wait()
    # every rank told every other one all its counts, [source, target, slot]
    sent_RS, told_RRS = counted.sent_cpu[0].view(num_ranks, num_slots), counted.received_cpu.view(num_ranks, num_ranks, num_slots)
    send_R, receive_R = tuple(sent_RS.sum(1).tolist()), tuple(told_RRS[:, mesh.expert_rank].sum(1).tolist())
    tokens = Route(mesh, mesh.token_group, send_R, receive_R, layer, stage, "tokens", movement)
    metadata = Route(mesh, mesh.metadata_group, send_R, receive_R, layer, stage, "metadata", movement)
    return _PendingArrival(
        all_to_all_start(rows, tokens),
        [all_to_all_start(values, metadata) for values in beside],
        told_RRS[:, mesh.expert_rank],
        tuple(told_RRS.sum((0, 2)).tolist()),
    )


@dataclass(frozen=True, eq=False)
class _PendingArrival:
    rows: Pending[Tensor]
    beside: list[Pending[Tensor]]
    count_RS: Tensor
    count_R: tuple[int, ...]

    def wait(self) -> Arrival:
        number_T, *companions = (pending.wait() for pending in self.beside)
        num_ranks, num_slots = self.count_RS.shape
        slot_T = torch.arange(num_slots).repeat(num_ranks).repeat_interleave(self.count_RS.flatten())
        order_T = torch.argsort(slot_T, stable=True).to(number_T.device)
        rows = self.rows.wait()
        x_TD = spread(rows, RowMap.permutation(order_T), rows.dtype)
        return Arrival(
            x_TD, tuple(values[order_T] for values in companions), self.count_RS.sum(0), Residents(number_T[order_T], self.count_R)
        )


def keys_values_start(kv_TX: Tensor, residents: Residents, mesh: Mesh, layer: int) -> Pending[Tensor]:
    """Give every rank the rows [T, X] of all residents of the group; the wait gives them by token number, [tokens of the group, X].

    Backward every rank returns its gradient of every row to the row's rank, where they are summed.
    """
    num_ranks = mesh.expert_parallel
    movement = mesh.ledger.next_movement()
    send_R = (residents.count_R[mesh.expert_rank],) * num_ranks
    keys_values = Route(mesh, mesh.token_group, send_R, residents.count_R, layer, "dispatch", "keys_values", movement)
    numbers = Route(mesh, mesh.metadata_group, send_R, residents.count_R, layer, "dispatch", "metadata", movement)
    to_all = kv_TX.expand(num_ranks, *kv_TX.shape).reshape(-1, kv_TX.shape[1])
    return _PendingKeysValues(all_to_all_start(to_all, keys_values), all_to_all_start(residents.number_T.repeat(num_ranks), numbers))


@dataclass(frozen=True, eq=False)
class _PendingKeysValues:
    rows: Pending[Tensor]
    numbers: Pending[Tensor]

    def wait(self) -> Tensor:
        by_number = inverse(self.numbers.wait())
        rows = self.rows.wait()
        return spread(rows, RowMap.permutation(by_number), rows.dtype)
