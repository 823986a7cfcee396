"""Copies of an expert inside a group: after the backward pass each gets the sum of all copies' gradients, from their holders alone.

What travels, and why, is told in `placement.replication`, which predicts the bytes that the ledger counts here as "gradients".
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crossdock.placement.costs.replication import holders, share_sizes
from crossdock.placement.records.plan import EMPTY, Plan
from crossdock.runtime.experts.expert_bank import ExpertBank
from crossdock.runtime.transport.all_to_all import Route, all_to_all_start
from crossdock.runtime.transport.mesh import Mesh

ALL_LAYERS = -1
"""The layer of a flight that serves all layers together."""


@dataclass(frozen=True, eq=False)
class _Copy:
    """A copied expert that this rank holds: its gradients [S, ...], its slot, and the share that each holder sums."""

    gradients: tuple[Tensor, ...]
    slot: int
    share_of: Mapping[int, int]
    """Elements by holding rank, in ascending order of rank."""

    def flat(self) -> Tensor:
        """A copy of the expert's gradient, one dimension."""
        return torch.cat([gradient[self.slot].flatten() for gradient in self.gradients])

    def fill(self, flat: Tensor) -> None:
        """Overwrite the gradient."""
        sizes = [gradient[self.slot].numel() for gradient in self.gradients]
        for gradient, values in zip(self.gradients, flat.split(sizes), strict=True):
            gradient[self.slot].copy_(values.view(gradient.shape[1:]))


class CopySums:
    """Sums the gradients of copies; every rank of the group holds one and calls it alike, copies here or none."""

    def __init__(self, plan: Plan, banks: Iterable[tuple[ExpertBank, Sequence[Tensor]]], mesh: Mesh) -> None:
        """`banks`: each with the gradients of its expert tensors, in the same order on every rank."""
        self.mesh = mesh
        self._copies: dict[torch.dtype, list[_Copy]] = {}
        for bank, gradients in banks:
            copies = self._copies.setdefault(gradients[0].dtype, [])
            num_elements = sum(gradient[0].numel() for gradient in gradients)
            for expert, devices in sorted(holders(plan.slot_LRE[bank.layout.layer] != EMPTY).items()):
                if mesh.expert_rank in devices:
                    share_of = dict(zip(devices.tolist(), share_sizes(num_elements, len(devices)).tolist(), strict=True))
                    copies.append(_Copy(tuple(gradients), bank.layout.local_experts.index(expert), share_of))

    @torch.no_grad()
    def __call__(self) -> None:
        """Every copy's gradient becomes the sum over all copies, added in ascending order of rank: the same bits everywhere."""
        for dtype in sorted(self._copies, key=str):
            self._sum(self._copies[dtype], dtype)

    def _sum(self, copies: list[_Copy], dtype: torch.dtype) -> None:
        here = self.mesh.expert_rank
        shares = [dict(zip(copy.share_of, copy.flat().split(list(copy.share_of.values())), strict=True)) for copy in copies]
        theirs = [[copy.share_of.get(peer, 0) for copy in copies] for peer in range(self.mesh.expert_parallel)]
        mine = [[copy.share_of[here] if peer in copy.share_of else 0 for copy in copies] for peer in range(self.mesh.expert_parallel)]
        theirs[here] = mine[here] = [0] * len(copies)
        parts = [[share[peer] for share, size in zip(shares, theirs[peer], strict=True) if size] for peer in range(len(theirs))]
        arrived = self._exchanged(parts, theirs, mine, dtype)
        sums = []
        for number, copy in enumerate(copies):
            terms = [shares[number][here] if peer == here else arrived[peer][number] for peer in copy.share_of]
            sums.append(sum(terms[1:], start=terms[0]))
        parts = [[total for total, size in zip(sums, mine[peer], strict=True) if size] for peer in range(len(mine))]
        arrived = self._exchanged(parts, mine, theirs, dtype)
        for number, copy in enumerate(copies):
            copy.fill(torch.cat([sums[number] if peer == here else arrived[peer][number] for peer in copy.share_of]))

    def _exchanged(
        self, parts: list[list[Tensor]], send: list[list[int]], receive: list[list[int]], dtype: torch.dtype
    ) -> list[list[Tensor]]:
        """Send `parts` by peer and copy; the tensors that came, by peer and copy, empty where nothing was due."""
        flat = torch.cat([torch.empty(0, dtype=dtype, device=self.mesh.device), *(part for of_peer in parts for part in of_peer)])
        send_R, receive_R = tuple(map(sum, send)), tuple(map(sum, receive))
        # the token group is idle by now: the backward pass is over
        route = Route(self.mesh, self.mesh.token_group, send_R, receive_R, ALL_LAYERS, "combine", "gradients", 0)
        received = all_to_all_start(flat, route).wait()
        return [list(of_peer.split(sizes)) for of_peer, sizes in zip(received.split(list(receive_R)), receive, strict=True)]
