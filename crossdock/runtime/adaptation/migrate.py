"""Migration: from plan A to plan B between two steps; weights and optimizer state travel, keyed by logical expert, bit by bit.

Every new slot takes its expert from the nearest rank that holds it under A (`choose_replica`; often from itself). Each expert group moves
its own copies; all ranks know both plans, so nobody has to be asked what to send. All ranks of the world call `migrate` together, between
two steps.

A rank may hold more or fewer experts afterwards. Gradients go before anything moves, tensors go one by one, and each gives up its old
memory as soon as its new one is filled; so beside what stays, a move takes a layer's weights and one tensor with its rows in flight.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crossdock.placement.records.plan import EMPTY, Plan, choose_replica
from crossdock.runtime.dispatch.dispatcher import Dispatcher
from crossdock.runtime.dispatch.layout import ExpertLayout
from crossdock.runtime.experts.expert_bank import ExpertBank
from crossdock.runtime.optimization.engine import Engine
from crossdock.runtime.phases import reached
from crossdock.runtime.transport import collectives
from crossdock.runtime.transport.all_to_all import Route, all_to_all_start
from crossdock.runtime.transport.mesh import Mesh


class RoutedLayer(Protocol):
    """What migration and re-planning need of a MoE layer; `turns`: how often a forward pass routes each token in it."""

    bank: ExpertBank
    dispatcher: Dispatcher
    turns: int

    def set_layout(self, layout: ExpertLayout, tensors: dict[str, Tensor]) -> None:
        """Adopt a new placement and this rank's tensors under it."""


@dataclass(frozen=True, eq=False)
class Exchange:
    """One rank's part in moving one layer.

    send_slot_A and send_count_R: local slots under the old plan, grouped by receiving rank, and how many go to each.
    receive_slot_A and receive_count_R: local slots under the new plan that the arriving rows fill, all of them, grouped by sending rank.
    Rows between one pair of ranks travel in ascending order of the receiver's slot.
    """

    send_slot_A: NDArray[np.int64]
    send_count_R: NDArray[np.int64]
    receive_slot_A: NDArray[np.int64]
    receive_count_R: NDArray[np.int64]


@dataclass(frozen=True)
class Migration:
    """What a migration did: experts that changed device (per expert group), and bytes that left a rank, over the whole world."""

    moves: int
    bytes: int


def exchange_of(before: Plan, after: Plan, layer: int, rank: int, node_of_R: Sequence[int]) -> Exchange:
    """What device `rank` of an expert group sends and receives when `layer` goes from plan `before` to plan `after`."""
    after.check_model(before.num_layers, before.num_experts, before.num_devices)
    source_RE = choose_replica(before, node_of_R)[layer]
    device_H, slot_H = np.nonzero(after.slots_LRS[layer] != EMPTY)  # every filled place, by device and then slot
    expert_H = after.slots_LRS[layer][device_H, slot_H]
    source_device_H, source_slot_H = np.divmod(source_RE[device_H, expert_H].astype(np.int64), before.slots_per_device)
    sends = source_device_H == rank
    receives = device_H == rank
    by_source = np.argsort(source_device_H[receives], kind="stable")
    return Exchange(
        send_slot_A=source_slot_H[sends],
        send_count_R=np.bincount(device_H[sends], minlength=before.num_devices),
        receive_slot_A=slot_H[receives][by_source],
        receive_count_R=np.bincount(source_device_H[receives], minlength=before.num_devices),
    )


@torch.no_grad()
def migrate(engine: Engine, layers: Sequence[RoutedLayer], after: Plan, mesh: Mesh) -> Migration:
    """Move experts and their optimizer state from `engine.plan` to `after`, and hand layers and engine their new layouts.

    Values stay bitwise what they were. Raises `BadData` where `after` is for another model, and `BadConfig` on every rank, before anything
    moves, where ranks hold different plans.
    """
    before = engine.plan
    assert before is not None
    after.check_model(before.num_layers, before.num_experts, before.num_devices)
    collectives.check_same({"plans to migrate to": after.digest}, mesh)
    sent_bytes = 0
    bank_names = {bank: name for name, bank in engine.banks.items()}
    states = engine.release()
    for layer in layers:
        number = layer.bank.layout.layer
        exchange = exchange_of(before, after, number, mesh.expert_rank, mesh.node_of_expert_rank)
        moved = int(exchange.send_count_R.sum() - exchange.send_count_R[mesh.expert_rank])
        state_of = {tensor: states[f"{bank_names[layer.bank]}.{tensor}"] for tensor in layer.bank.expert_tensors()}
        for state in state_of.values():
            for key in state:
                state[key] = _moved(state[key], exchange, number, mesh)
                sent_bytes += moved * state[key].shape[1:].numel() * state[key].element_size()
            reached("migration")
        layer.set_layout(ExpertLayout.from_plan(after, number, mesh), {tensor: state["weight"] for tensor, state in state_of.items()})
        for tensor, parameter in layer.bank.expert_tensors().items():
            if parameter.dtype == state_of[tensor]["weight"].dtype:  # it is its own master, and is not kept twice
                state_of[tensor]["weight"] = parameter.detach()
    engine.adopt(after, states)
    return Migration(len(before.moves_to(after)), sum(collectives.all_gather_objects(sent_bytes, mesh)))


def _moved(values_S: Tensor, exchange: Exchange, layer: int, mesh: Mesh) -> Tensor:
    """One tensor [S, ...] under the old plan -> the same under the new one, of as many slots as that fills here."""
    send_A = values_S[torch.as_tensor(exchange.send_slot_A, device=values_S.device)]
    send_R, receive_R = tuple(exchange.send_count_R.tolist()), tuple(exchange.receive_count_R.tolist())
    # the token group is idle between steps, and "metadata" keeps these bytes apart from the tokens' in the ledger
    route = Route(mesh, mesh.token_group, send_R, receive_R, layer, "dispatch", "metadata", 0)
    receive_A = all_to_all_start(send_A, route).wait()
    arrival_S = np.argsort(exchange.receive_slot_A)  # every slot of the new plan is filled by one row
    return receive_A.index_select(0, torch.as_tensor(arrival_S, device=values_S.device))
