"""Copies of an expert inside a group: each gets the sum of all copies' gradients, from their holders alone, while backward still runs.

What travels, and why, is told in `placement.costs.replication`, which predicts the bytes that the ledger counts here as "gradients". The
shares of a layer's copies leave for their owners the moment the layer's last gradient is there; owners add them up beside the program and
send the sums back, under the backward pass of the layers below.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crossdock.placement.costs.replication import holders, share_sizes
from crossdock.placement.records.plan import EMPTY, Plan
from crossdock.runtime.experts.expert_bank import ExpertBank
from crossdock.runtime.transport.all_to_all import bytes_sent
from crossdock.runtime.transport.background import Background, Started, Task
from crossdock.runtime.transport.exchange import exchange_start, naming_lost_peers
from crossdock.runtime.transport.ledger import Kind, Mark, Stage
from crossdock.runtime.transport.mesh import Mesh


@dataclass(frozen=True, eq=False)
class _Copy:
    """A copied expert that this rank holds: its gradients [S, ...], its slot, and the share that each holder sums."""

    gradients: tuple[Tensor, ...]
    slot: int
    share_of: Mapping[int, int]
    """Elements by holding rank, in ascending order of rank."""

    def shares(self) -> dict[int, Tensor]:
        """A copy of the expert's gradient, one dimension, cut into the holders' shares."""
        flat = torch.cat([gradient[self.slot].flatten() for gradient in self.gradients])
        return dict(zip(self.share_of, flat.split(list(self.share_of.values())), strict=True))

    def fill(self, flat: Tensor) -> None:
        """Overwrite the gradient."""
        sizes = [gradient[self.slot].numel() for gradient in self.gradients]
        for gradient, values in zip(self.gradients, flat.split(sizes), strict=True):
            gradient[self.slot].copy_(values.view(gradient.shape[1:]))


class _LayerSums:
    """The gradients of one layer's copies, to their owners and back; mutable, once for each step: `start`, `join`."""

    stage: Stage = "combine"
    kind: Kind = "gradients"

    def __init__(self, number: int, layer: int, copies: Sequence[_Copy], dtype: torch.dtype, mesh: Mesh, background: Background) -> None:
        self.layer, self.copies, self.dtype, self.mesh, self.background = layer, copies, dtype, mesh, background
        here, peers = mesh.expert_rank, range(mesh.expert_parallel)
        self.theirs_RC = [[copy.share_of.get(peer, 0) if peer != here else 0 for copy in copies] for peer in peers]
        self.mine_RC = [[copy.share_of[here] if peer in copy.share_of and peer != here else 0 for copy in copies] for peer in peers]
        self.tags = 2 * number + 1, 2 * number + 2  # 0 is that of gathered weights, which share the group
        self.shares: list[dict[int, Tensor]] = []
        self.sums: list[Tensor] = []
        self.launched: Mark = 0.0
        self.task: Task | None = None

    @property
    def is_started(self) -> bool:
        return self.task is not None

    @torch.no_grad()
    def start(self) -> None:
        """Let the shares leave for their owners. The gradients are complete on this rank, and are left alone until `join`."""
        self.shares = [copy.shares() for copy in self.copies]
        parts = self._by_peer([[share.get(peer) for share in self.shares] for peer in range(len(self.theirs_RC))], self.theirs_RC)
        received = parts.new_empty(sum(map(sum, self.theirs_RC)))
        self.launched = self.mesh.ledger.now()
        with naming_lost_peers(self):
            first = exchange_start(parts, _sizes(self.theirs_RC), _sizes(self.mine_RC), self.mesh.weight_group, tag=self.tags[0])
        self.task = self.background.submit(lambda: self._send_sums(first, received))

    @torch.no_grad()
    def _send_sums(self, first: Started, received: Tensor) -> Started:
        """Add up what this rank owns, in ascending order of rank, and let the sums leave: on the background."""
        arrived, here = _cut(first.wait(), self.mine_RC), self.mesh.expert_rank
        for number, (copy, share) in enumerate(zip(self.copies, self.shares, strict=True)):
            terms = [share[here] if peer == here else arrived[peer][number] for peer in copy.share_of]
            self.sums.append(sum(terms[1:], start=terms[0]))
        parts = self._by_peer([self.sums] * len(self.mine_RC), self.mine_RC)
        group = self.mesh.weight_group
        return exchange_start(parts, _sizes(self.mine_RC), _sizes(self.theirs_RC), group, into=received, tag=self.tags[1])

    @torch.no_grad()
    def join(self) -> None:
        """Wait for the sums: every copy's gradient becomes the sum over all copies, the same bits everywhere."""
        assert self.task is not None, "joined before it was started"
        ledger, here = self.mesh.ledger, self.mesh.expert_rank
        wait_begin = ledger.now()
        with naming_lost_peers(self):
            received = self.task.started().wait()
        one = received.new_empty(1)
        hops = [bytes_sent(self.mesh, _sizes(sizes_RC), one.expand(sum(map(sum, sizes_RC)))) for sizes_RC in (self.theirs_RC, self.mine_RC)]
        first, second, third = (there + back for there, back in zip(*hops, strict=True))
        ledger.record(self.layer, self.stage, "backward", self.kind, (first, second, third), self.launched, wait_begin, ledger.now())
        arrived = _cut(received, self.theirs_RC)
        for number, (copy, total) in enumerate(zip(self.copies, self.sums, strict=True)):
            if total.is_cuda:
                total.record_stream(torch.cuda.current_stream())  # it was made on the background's
            copy.fill(torch.cat([total if peer == here else arrived[peer][number] for peer in copy.share_of]))
        self.task, self.shares, self.sums = None, [], []

    def _by_peer(self, tensors_RC: Sequence[Sequence[Tensor | None]], sizes_RC: Sequence[Sequence[int]]) -> Tensor:
        """What goes to each peer in turn, of those copies of which it gets something."""
        parts = [torch.empty(0, dtype=self.dtype, device=self.mesh.device)]
        for tensors_C, sizes_C in zip(tensors_RC, sizes_RC, strict=True):
            parts += [tensor for tensor, size in zip(tensors_C, sizes_C, strict=True) if size and tensor is not None]
        return torch.cat(parts)


class CopySums:
    """Sums the gradients of copies; every rank of the group holds one and calls it alike, copies here or none.

    Order of use: `arm()`, the step's last backward pass, `finish()`; and `close()` at the end. Layers set out in one order on every rank,
    the last one first. Where other groups hold the same slots, their sums come first, and copies wait for `finish`.
    """

    def __init__(self, plan: Plan, banks: Iterable[tuple[ExpertBank, Sequence[nn.Parameter], Sequence[Tensor]]], mesh: Mesh) -> None:
        """`banks`, in the order in which forward uses them: each with its expert tensors and their gradients, the same on every rank."""
        self._layers: list[_LayerSums] = []
        self._missing: list[int] = []
        self._num_tensors: list[int] = []
        self._armed, self._next = False, 0
        self._removers: list[Callable[[], None]] = []
        background = Background(mesh.device)
        for bank, parameters, gradients in reversed(list(banks)):
            found = holders(plan.slot_LRE[bank.layout.layer] != EMPTY)
            if not found:
                continue
            num_elements = sum(gradient.shape[1:].numel() for gradient in gradients)
            copies = []
            for expert, devices in sorted(found.items()):
                if mesh.expert_rank in devices:
                    share_of = dict(zip(devices.tolist(), share_sizes(num_elements, len(devices)).tolist(), strict=True))
                    copies.append(_Copy(tuple(gradients), bank.layout.local_experts.index(expert), share_of))
            number = len(self._layers)
            self._layers.append(_LayerSums(number, bank.layout.layer, copies, gradients[0].dtype, mesh, background))
            self._num_tensors.append(len(parameters))
            if mesh.expert_replica_group is None:
                self._removers += [tensor.register_post_accumulate_grad_hook(self._hook(number)).remove for tensor in parameters]
        self._missing = list(self._num_tensors)

    def _hook(self, number: int) -> Callable[[Tensor], None]:
        def accumulated(_parameter: Tensor) -> None:
            if self._armed:
                self._missing[number] -= 1
                while self._next < len(self._layers) and self._missing[self._next] == 0:
                    self._launch()

        return accumulated

    def _launch(self) -> None:
        self._layers[self._next].start()
        self._next += 1

    def arm(self) -> None:
        """The next backward pass is the step's last."""
        self._armed, self._next, self._missing = True, 0, list(self._num_tensors)

    def finish(self) -> None:
        """Start what has not set out, and wait for all; afterwards every copy's gradient is the sum over all copies."""
        self._armed = False
        while self._next < len(self._layers):
            self._launch()
        for layer in self._layers:
            layer.join()
        self._next = 0

    def close(self) -> None:
        """Take the hooks off."""
        for remove in self._removers:
            remove()
        self._removers.clear()


def _sizes(sizes_RC: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(map(sum, sizes_RC))


def _cut(flat: Tensor, sizes_RC: Sequence[Sequence[int]]) -> list[Sequence[Tensor]]:
    """By peer and copy, empty where nothing was due."""
    return [part.split(list(sizes_C)) for part, sizes_C in zip(flat.split(list(_sizes(sizes_RC))), sizes_RC, strict=True)]
