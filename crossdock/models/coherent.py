"""The context-coherent way through a stack of top-1 blocks: same parameters, same numbers, other traffic (ExFlow, IPDPS 2024).

Tokens stay where their expert ran. A block begins with its residents, whoever they are: attention gathers the keys and values of the whole
expert group and answers the residents' queries under the causal mask of their own sequences; the dense layer and the gate run on what is
there; then every token moves to its expert's rank with its residual, where the routed output is added. Behind the last block tokens go
home, to the loss. Per layer that is one all-to-all forward and one backward where `MoEBlock` needs two and two, and a gather of keys and
values for every attention. Ranks with popular experts also run more attention and dense layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from crossdock.models.attention import Attention, rotate, rotation
from crossdock.models.blocks import MoEBlock
from crossdock.models.gates.base import Routing, wide
from crossdock.runtime.dispatch.assignment import Assignment
from crossdock.runtime.dispatch.coherent import Residents, keys_values_start, travel_start
from crossdock.runtime.training.context import StepContext
from crossdock.runtime.transport.mesh import Mesh


@dataclass(frozen=True, eq=False)
class Here:
    """The tokens on this rank between two stages."""

    x_TD: Tensor
    residents: Residents
    experts_TL: Tensor
    """int32 [T, layers so far]: the expert that each token had in every layer, for listeners at home."""


def run_blocks(blocks: Sequence[MoEBlock], x_QPD: Tensor, context: StepContext) -> tuple[Tensor, list[Routing]]:
    """All blocks over the sequences that came in on this rank: (output at home [Q, P, D], what each gate chose for its residents).

    Every rank of the group must bring equally many sequences of one length, and ranks must hold consecutive tokens of the batch.
    """
    mesh, positions = blocks[0].moe.mesh, x_QPD.shape[1]
    x_TD = x_QPD.flatten(0, 1)
    first_token = context.first_token - mesh.expert_rank * len(x_TD)
    here = Here(x_TD, Residents.at_home(len(x_TD), mesh), torch.empty(len(x_TD), 0, dtype=torch.int32, device=x_TD.device))
    routings = []
    for block in blocks:
        numbered = replace(context, number_T=first_token + here.residents.number_T, listeners=())
        here, routing = run_block(block, here, numbered, positions)
        routings.append(routing)
    here = _home(here, len(x_TD), blocks[-1].moe.layer, mesh)
    for block, expert_T in zip(blocks, here.experts_TL.long().unbind(1), strict=True):
        assignment = Assignment.from_topk(expert_T[:, None], torch.ones_like(expert_T, dtype=x_TD.dtype)[:, None])
        for listener in context.listeners:
            listener(block.moe.layer, assignment)
    return here.x_TD.view_as(x_QPD), routings


def run_block(block: MoEBlock, here: Here, context: StepContext, positions: int) -> tuple[Here, Routing]:
    """One block over the residents; `context` numbers them. Afterwards tokens are where their experts are."""
    moe, x_TD = block.moe, here.x_TD
    for stage in block.stages:
        x_TD = attend(stage, x_TD, here.residents, positions, moe.mesh, moe.layer) if isinstance(stage, Attention) else stage(x_TD)
    routing = moe.route(block.routed_norm(x_TD), context, tokens_per_sequence=1)
    expert_T, weight_T = routing.assignment.expert_A, routing.assignment.weight_A
    companions = (weight_T, torch.cat((here.experts_TL, expert_T[:, None].int()), 1))
    slot_T, num_slots = moe.layout.slot_of_expert_E[expert_T], moe.layout.num_slots
    arrived = travel_start(x_TD, companions, here.residents, slot_T, num_slots, moe.mesh, moe.layer, "dispatch").wait()
    weight_T, experts_TL = arrived.companions
    routed_TD = moe.bank(block.routed_norm(arrived.x_TD), moe.layout.own_counts(arrived.count_S))
    x_TD = arrived.x_TD + weight_T[:, None].to(routed_TD.dtype) * routed_TD
    return Here(x_TD, arrived.residents, experts_TL), routing


def attend(attention: Attention, x_TD: Tensor, residents: Residents, positions: int, mesh: Mesh, layer: int) -> Tensor:
    """`attention` for the residents' queries [T, D] over everybody's keys and values: x + attention(norm(x)), as `Attention.forward`."""
    query, key, value = attention.query_key_value(attention.norm(x_TD))
    cos, sin = rotation(positions, attention.head_width, attention.rope_base, x_TD.device, wide(x_TD.dtype))
    position_T = residents.number_T % positions
    query, key = rotate(query, cos[position_T], sin[position_T]), rotate(key, cos[position_T], sin[position_T])
    pending = keys_values_start(torch.cat((key, value), 1).flatten(1), residents, mesh, layer)
    shared = _Queries.of(residents, positions)
    query_QHNW = shared.padded(query).transpose(1, 2)
    key_QPHW, value_QPHW = pending.wait().view(-1, positions, 2, attention.kv_heads, attention.head_width).unbind(2)
    mixed_QHNW = F.scaled_dot_product_attention(
        query_QHNW,
        key_QPHW.transpose(1, 2),
        value_QPHW.transpose(1, 2),
        attn_mask=shared.mask_Q1NP,
        enable_gqa=attention.kv_heads < attention.num_heads,
    )
    return x_TD + attention.out(shared.unpadded(mixed_QHNW.transpose(1, 2)).flatten(1))


@dataclass(frozen=True, eq=False)
class _Queries:
    """The residents by sequence, each sequence padded to as many of them as any has: N. Padding asks at position 0, and nobody listens."""

    place_T: Tensor
    """int64 [T]: sequence x N + place in it, of each resident."""
    mask_Q1NP: Tensor
    """bool: whether a query may look at a position."""

    @classmethod
    def of(cls, residents: Residents, positions: int) -> "_Queries":
        """On CUDA this waits for the device once: N depends on who is here."""
        number_T, num_sequences = residents.number_T, residents.num_tokens // positions
        order_T = torch.argsort(number_T)
        sequence_T = number_T[order_T] // positions
        count_Q = torch.bincount(sequence_T, minlength=num_sequences)
        longest = max(1, int(count_Q.max()))
        first_Q = count_Q.cumsum(0) - count_Q
        sorted_place_T = sequence_T * longest + torch.arange(len(number_T), device=number_T.device) - first_Q[sequence_T]
        place_T = torch.empty_like(number_T).scatter_(0, order_T, sorted_place_T)
        position_QN = torch.zeros(num_sequences * longest, dtype=torch.int64, device=number_T.device)
        position_QN[place_T] = number_T % positions
        mask = position_QN.view(num_sequences, 1, longest, 1) >= torch.arange(positions, device=number_T.device)
        return cls(place_T, mask)

    def padded(self, rows: Tensor) -> Tensor:
        """[T, ...] -> [Q, N, ...]."""
        num_sequences, _, longest, _ = self.mask_Q1NP.shape
        empty = rows.new_zeros((num_sequences * longest, *rows.shape[1:]))
        return empty.index_copy(0, self.place_T, rows).view(num_sequences, longest, *rows.shape[1:])

    def unpadded(self, rows: Tensor) -> Tensor:
        """[Q, N, ...] -> [T, ...]."""
        return rows.flatten(0, 1).index_select(0, self.place_T)


def _home(here: Here, tokens_per_rank: int, layer: int, mesh: Mesh) -> Here:
    """Every token back where its sequence came in, in order."""
    home_T = here.residents.number_T // tokens_per_rank
    arrived = travel_start(here.x_TD, (here.experts_TL,), here.residents, home_T, 1, mesh, layer, "combine").wait()
    order_T = torch.argsort(arrived.residents.number_T)
    residents = Residents(arrived.residents.number_T[order_T], arrived.residents.count_R)
    return Here(arrived.x_TD.index_select(0, order_T), residents, arrived.companions[0][order_T])
