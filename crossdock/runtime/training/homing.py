"""Sequence homing in training: this rank's share of each batch by a forecast of its experts, and what that saved.

Every rank reads the whole micro-batch, finds the same homes (costs are integers that rank 0 has sent round once for each plan), and keeps
its own sequences: no communication in a step, and nothing to remember between steps, so that any batch can still be found at once. Which
sequences form a micro-batch does not change, and a token draws its random numbers by its place in the global batch, wherever it is
processed: the loss is that of the same run without homing, up to the order of floating-point sums.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from crossdock.placement.costs.cost import NUM_DIRECTIONS
from crossdock.placement.costs.hops import hops_of_copies
from crossdock.placement.homing.forecast import Forecast, TokenCosts
from crossdock.placement.homing.homes import CopyCosts, assign_homes, homes_as_read
from crossdock.placement.records.plan import Plan, choose_replica
from crossdock.placement.records.topology import LINK_CLASSES, SAME_NODE, Topology
from crossdock.placement.strategies.gather import gathered_plan
from crossdock.runtime.adaptation.replan import renumbered, workload_of
from crossdock.runtime.data import Batch, DataState, Sampler, sequences_per_rank
from crossdock.runtime.dispatch.assignment import Assignment
from crossdock.runtime.transport import collectives
from crossdock.runtime.transport.mesh import Mesh

UNMEASURED_RATIO = 8.0
"""How much faster links inside a node are taken to be where no topology has measured them."""


class Movable(Protocol):
    """A model whose MoE layers say how their tokens travel."""

    @property
    def moe_layers(self) -> Sequence[Any]:
        """The MoE layers in the order of a plan's layers."""
        ...


@dataclass(frozen=True, eq=False)
class _Setup:
    """What follows from a plan and from how each layer's tokens travel: costs of copies, of tokens, and who uses which copy."""

    plan: Plan
    travel: tuple[Any, ...]
    costs_L: tuple[CopyCosts, ...]
    token_costs: TokenCosts
    device_LRE: Tensor
    copy_bytes: int
    topology: Topology
    has_copies: bool


@dataclass
class _Tally:
    """Sums over one step; mutable. Costs are by forecast, over the whole batch; visits are of this rank's tokens."""

    forecast_cost: float = 0.0
    forecast_cost_read: float = 0.0
    records: list["_Record"] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class _Record:
    """One micro-batch of this rank: the rank that would have read each sequence, and visits by layer, [B, R + N], here and there."""

    reader_B: np.ndarray
    reader_T: Tensor
    visits: dict[tuple[int, bool], Tensor] = field(default_factory=dict)


class Homing:
    """One per rank and run; mutable. `begin` before each step, `batch` for each micro-batch, `metrics` once its sums are known."""

    def __init__(self, forecast: Forecast, model: Movable, mesh: Mesh, topology: Topology) -> None:
        self.forecast, self.model, self.mesh, self.topology = forecast, model, mesh, topology
        if not topology.measured:
            faster_RR = np.where(topology.link_class_RR == SAME_NODE, UNMEASURED_RATIO, 1.0)
            self.topology = replace(topology, bytes_per_s_RR=topology.bytes_per_s_RR * faster_RR)
        self._setup: _Setup | None = None
        self._tally = _Tally()

    def begin(self, plan: Plan) -> None:
        """Before a step: costs for the plan and the strategies at hand. All ranks call it, and talk only where these have changed.

        Whether they have is a question of the plan's contents, on which all ranks agree; a rank may hold them in an object of its own.
        """
        self._tally = _Tally()
        layers = self.model.moe_layers
        travel = tuple((layer.dispatch, layer.gathered_experts) for layer in layers)
        if self._setup is not None and self._setup.plan.digest == plan.digest and self._setup.travel == travel:
            return
        seen = gathered_plan(plan, [gathered for _, gathered in travel]) if any(gathered for _, gathered in travel) else plan
        workload = workload_of(layers[0], 1, 1)
        costs_L = tuple(CopyCosts.of(self.topology, replace(workload, dispatch=dispatch)) for dispatch, _ in travel)
        mine = self.forecast.costs(seen, costs_L) if self.mesh.rank == 0 else None
        token_costs = collectives.broadcast_object(mine, self.mesh)  # to the last bit the same on all machines
        device_LRE = choose_replica(seen, self.mesh.node_of_expert_rank) // seen.slots_per_device
        self._setup = _Setup(
            plan,
            travel,
            costs_L,
            token_costs,
            torch.as_tensor(device_LRE, dtype=torch.int64, device=self.mesh.device),
            workload.copy_bytes,
            self.topology,
            seen.has_replicas,
        )

    def batch(self, sampler: Sampler, state: DataState, batch_sequences: int, *, micro: int, accumulate: int) -> Batch:
        """This rank's sequences of a micro-batch, in the order of their places. Raises `BadConfig` where the batch does not divide."""
        setup, mesh = self._setup, self.mesh
        assert setup is not None, "begin comes before the first batch"
        share = sequences_per_rank(batch_sequences, mesh.world_size, accumulate)
        whole = sampler.batch(state, batch_sequences, micro=micro, accumulate=accumulate)
        cost_BH = setup.token_costs.of(whole.token_BQ)
        home_B = assign_homes(cost_BH)
        group, place = divmod(mesh.rank, mesh.expert_parallel)
        mine = np.flatnonzero(home_B == place)[group * share : (group + 1) * share]
        everyone = np.arange(len(home_B))
        reader_B = homes_as_read(len(home_B), mesh.world_size)
        self._tally.forecast_cost += setup.token_costs.unit * float(cost_BH[everyone, home_B].sum())
        self._tally.forecast_cost_read += setup.token_costs.unit * float(cost_BH[everyone, reader_B % mesh.expert_parallel].sum())
        reader_T = torch.as_tensor(reader_B[mine], device=mesh.device).repeat_interleave(sampler.seq_len)
        self._tally.records.append(_Record(reader_B[mine], reader_T))
        first_place = whole.first_token // sampler.seq_len
        return Batch(whole.token_BQ[mine], whole.target_BQ[mine], whole.sequence_B[mine], whole.first_token, first_place + mine)

    def listener(self, layer: int, assignment: Assignment) -> None:
        """Count where the layer's copies go from here, and would have gone from the ranks that read the sequences."""
        setup, record = self._setup, self._tally.records[-1]
        assert setup is not None
        device_RE = setup.device_LRE[layer]
        here = self._visits(layer, assignment, device_RE[self.mesh.expert_rank][assignment.expert_A], record)
        there = here
        if setup.has_copies:  # another home uses another copy
            home_A = record.reader_T[assignment.token_A] % self.mesh.expert_parallel
            there = self._visits(layer, assignment, device_RE[home_A, assignment.expert_A], record)
        for is_read, visits in ((False, here), (True, there)):
            known = record.visits.get((layer, is_read))
            record.visits[layer, is_read] = visits if known is None else known + visits

    def _visits(self, layer: int, assignment: Assignment, device_A: Tensor, record: _Record) -> Tensor:
        """int64 [B, R + N]: copies of each sequence to every device, and to every node."""
        assert self._setup is not None
        costs = self._setup.costs_L[layer]
        num_devices, num_nodes = len(costs.node_R), max(costs.node_R) + 1
        node_R = torch.as_tensor(costs.node_R, device=device_A.device)
        columns_A = torch.stack([device_A, num_devices + node_R[device_A]])
        visit_TX = torch.zeros((assignment.num_tokens, num_devices + num_nodes), dtype=torch.int64, device=device_A.device)
        one = torch.ones((), dtype=torch.int64, device=device_A.device)
        visit_TX.index_put_((assignment.token_A.expand(2, -1), columns_A), one, accumulate=True)
        if costs.distinct:
            visit_TX = visit_TX.clamp(max=1)
        return visit_TX.view(len(record.reader_B), -1, visit_TX.shape[1]).sum(1)

    def sums(self) -> dict[str, float]:
        """This rank's part of what `metrics` needs, to be added up over all ranks."""
        setup = self._setup
        assert setup is not None
        total = {"homing_cost": 0.0, "homing_cost_read": 0.0, **{f"read_{name}": 0.0 for name in LINK_CLASSES}}
        group_size = self.mesh.expert_parallel
        for record in self._tally.records:
            for (layer, is_read), visits in record.visits.items():
                costs = setup.costs_L[layer]
                copies_BX = visits.cpu().numpy()
                device_BR, node_BN = copies_BX[:, : len(costs.node_R)], copies_BX[:, len(costs.node_R) :]
                reader_B = record.reader_B
                home_B = reader_B % group_size if is_read else np.full(len(reader_B), self.mesh.expert_rank)
                cost_BH = costs.per_home(device_BR, node_BN)
                total["homing_cost_read" if is_read else "homing_cost"] += float(cost_BH[np.arange(len(home_B)), home_B].sum())
                if is_read:
                    for name, size in self._bytes(layer, reader_B, device_BR, node_BN).items():
                        total[f"read_{name}"] += size
        return total

    def _bytes(self, layer: int, reader_B: np.ndarray, device_BR: np.ndarray, node_BN: np.ndarray) -> dict[str, float]:
        """Payload by link class that these copies would have been from the ranks that read the sequences, all four directions."""
        assert self._setup is not None
        num_devices, num_nodes = device_BR.shape[1], node_BN.shape[1]
        size = self._setup.copy_bytes * NUM_DIRECTIONS
        found = dict.fromkeys(LINK_CLASSES, 0.0)
        for group in np.unique(reader_B // num_devices):
            members = reader_B // num_devices == group
            nodes = renumbered(self.mesh.node_of_rank[group * num_devices : (group + 1) * num_devices])
            there = replace(self.topology, node_of_R=nodes)
            copies_RR = np.zeros((num_devices, num_devices), dtype=np.int64)
            node_copies_RN = np.zeros((num_devices, num_nodes), dtype=np.int64)
            np.add.at(copies_RR, reader_B[members] % num_devices, device_BR[members])
            np.add.at(node_copies_RN, reader_B[members] % num_devices, node_BN[members])
            hops_HRR = hops_of_copies(copies_RR, node_copies_RN, nodes, self._setup.travel[layer][0])
            for number, name in enumerate(LINK_CLASSES):
                found[name] += float(hops_HRR[:, there.link_class_RR == number].sum()) * size
        return found

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The step's metrics from the sums over all ranks."""
        cost, read = sums["homing_cost"], sums["homing_cost_read"]
        tally = self._tally
        return {
            "bytes_as_read_same_node": int(sums["read_same_node"]),
            "bytes_as_read_other_node": int(sums["read_other_node"]),
            "homing_saved": 1.0 - cost / read if read else 0.0,
            "homing_saved_forecast": 1.0 - tally.forecast_cost / tally.forecast_cost_read if tally.forecast_cost_read else 0.0,
            "homing_error": tally.forecast_cost / cost - 1.0 if cost else 0.0,
        }
