"""Capture: a listener that records every routed assignment of a live model, and gathers the records of all ranks into traces."""

import itertools
from dataclasses import dataclass

import numpy as np
import pydantic
import torch
from torch import Tensor

from crossdock.placement.records.trace import NO_EXPERT, Trace
from crossdock.runtime.dispatch.assignment import Assignment
from crossdock.runtime.transport import collectives
from crossdock.runtime.transport.mesh import Mesh
from crossdock.strict_yaml import StrictModel


class CaptureConfig(StrictModel):
    """The windows in which routing is recorded, and counted bytes are held against predicted ones."""

    steps: int = pydantic.Field(default=8, ge=0)
    """Optimizer steps of each of two windows: the first calibrates the cost model, the second is held against what it predicts.
    They lie on both sides of a re-planning, or at the end of the run. 0 records nothing."""
    weights: bool = False
    """Keep the gate's weights in the trace as well."""


def dense_TK(assignment: Assignment, top_k: int) -> tuple[Tensor, Tensor]:
    """The list as a table: experts int32 [T, top_k], padded with NO_EXPERT, and weights float16 [T, top_k], padded with 0.

    Entries keep their order within a token. Stays on the assignment's device and never waits for it.
    """
    num_tokens, device = assignment.num_tokens, assignment.expert_A.device
    if assignment.uniform_k == top_k:
        return assignment.expert_A.view(num_tokens, top_k).int(), assignment.weight_A.detach().view(num_tokens, top_k).half()
    place_A = torch.arange(assignment.num_entries, device=device) - assignment.offset_T[assignment.token_A]
    flat_A = assignment.token_A * top_k + place_A
    expert_TK = torch.full((num_tokens * top_k,), NO_EXPERT, dtype=torch.int32, device=device).index_copy_(
        0, flat_A, assignment.expert_A.int()
    )
    weight_TK = torch.zeros(num_tokens * top_k, dtype=torch.float16, device=device).index_copy_(
        0, flat_A, assignment.weight_A.detach().half()
    )
    return expert_TK.view(num_tokens, top_k), weight_TK.view(num_tokens, top_k)


@dataclass(frozen=True, eq=False)
class _Record:
    """One micro-batch of this rank: its assignments by layer, and who its tokens are.

    Most blocks route a token once in a layer, some in several turns (DGMoE); then every turn of a token is a row of the trace of its own,
    because its rows travel apart and share no copy.
    """

    turns_of_layer: dict[int, list[Assignment]]
    token_T: Tensor
    sequence_T: Tensor

    @property
    def num_turns(self) -> int:
        """The same for every layer."""
        return len(next(iter(self.turns_of_layer.values()), [None]))


class Capture:
    """Mutable recorder of one window; add `listener` to the context of every micro-batch, and call `begin` before each."""

    def __init__(self, num_layers: int, num_experts: int, weights: bool = False, source: str = "") -> None:
        self.num_layers, self.num_experts, self.weights, self.source = num_layers, num_experts, weights, source
        self._records: list[_Record] = []

    def begin(self, token_T: Tensor, sequence_T: Tensor) -> None:
        """Announce a micro-batch: token ids and the sequence number of each of this rank's tokens, int64 [T]."""
        self._records.append(_Record({}, token_T, sequence_T))

    def listener(self, layer: int, assignment: Assignment) -> None:
        """Note the assignment of `layer`; keeps references only, and no graph."""
        detached = Assignment(
            assignment.token_A,
            assignment.expert_A,
            assignment.weight_A.detach(),
            assignment.num_tokens,
            assignment.uniform_k,
            assignment.num_dropped,
        )
        self._records[-1].turns_of_layer.setdefault(layer, []).append(detached)

    @property
    def num_tokens(self) -> int:
        """Tokens of this rank recorded so far, each once."""
        return sum(len(record.token_T) for record in self._records)

    def gather(self, mesh: Mesh) -> list[Trace]:
        """On rank 0 one trace per expert group, homes numbered in the group; elsewhere nothing. All ranks call it.

        A token that a layer routes in several turns is as many rows. Every rank must have recorded as many tokens. `sequence` numbers a
        sequence of the corpus and keeps its number in every trace.
        """
        records, self._records = self._records, []
        top_k = max(collectives.all_gather_objects(max(_widest(record) for record in records), mesh))
        tables = [
            [dense_TK(record.turns_of_layer[layer][turn], top_k) for layer in range(self.num_layers)]
            for record in records
            for turn in range(record.num_turns)
        ]
        expert_TLK = torch.cat([torch.stack([experts for experts, _ in table], dim=1) for table in tables])
        known = {
            "experts": expert_TLK,
            "sequence": torch.cat([record.sequence_T for record in records for _ in range(record.num_turns)]),
            "token": torch.cat([record.token_T for record in records for _ in range(record.num_turns)]),
        }
        if self.weights:
            known["weights"] = torch.cat([torch.stack([weights for _, weights in table], dim=1) for table in tables])
        gathered = collectives.gather_objects({name: values.cpu().numpy() for name, values in known.items()}, mesh)
        if gathered is None:
            return []
        parts = {name: [of_rank[name] for of_rank in gathered] for name in known}
        return [self._trace(parts, group * mesh.expert_parallel, mesh.expert_parallel) for group in range(mesh.num_replicas)]

    def _trace(self, parts: dict[str, list[np.ndarray]], first_rank: int, num_ranks: int) -> Trace:
        mine = {name: np.concatenate(ranks[first_rank : first_rank + num_ranks]) for name, ranks in parts.items()}
        return Trace(
            mine["experts"].astype(np.uint16),
            self.num_experts,
            mine.get("weights"),
            sequence_T=mine["sequence"].astype(np.int32),
            home_T=np.repeat(np.arange(num_ranks, dtype=np.int32), len(parts["experts"][first_rank])),
            token_T=mine["token"].astype(np.int32),
            source=self.source,
        )


def _widest(record: _Record) -> int:
    """The largest number of entries that a token has in any layer, at least 1."""
    widest = 1
    for assignment in itertools.chain.from_iterable(record.turns_of_layer.values()):
        if assignment.uniform_k is not None:
            widest = max(widest, assignment.uniform_k)
        elif assignment.num_entries:
            widest = max(widest, int(torch.bincount(assignment.token_A, minlength=1).max()))
    return widest
