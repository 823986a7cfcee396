"""ExpertLayout: where the experts of one MoE layer live, as one rank sees it."""

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crossdock.errors import BadData
from crossdock.placement.records.plan import Plan, choose_replica
from crossdock.placement.strategies.gather import Hops, check_gathered, weight_hops
from crossdock.runtime.transport.mesh import Mesh


@dataclass(frozen=True, eq=False)
class ExpertLayout:
    """Physical slots of one layer. A global slot is `rank of the expert group * S + local slot`.

    Ranks may hold different numbers of experts, none included; S is that of the rank with most of them. It is a stride of numbers alone: a
    rank has weights for its own experts, and counts for slots beyond them are zero.

    Where an expert has several copies, `slot_of_expert_E` names the one that tokens of THIS rank use; other ranks may use another.
    """

    layer: int
    slot_of_expert_E: Tensor
    """int64 [E] on the mesh's device: global slot of each logical expert."""
    local_experts: tuple[int, ...]
    """Logical expert of each of this rank's slots."""
    num_slots: int
    """S: slots of the rank that has most of them, the same on every rank."""
    num_ranks: int
    device_RE: NDArray[np.int64] | None = None
    """[R, E]: the rank whose copy each rank of the group uses, as the plan has it; None where there is no plan and one rank."""
    hops: Hops = ((), ())
    """How the weights of gathered experts travel in the group."""

    def __post_init__(self) -> None:
        assert len(self.local_experts) <= self.num_slots, (
            f"{len(self.local_experts)} experts on a rank, and at most {self.num_slots} on any"
        )
        assert self.slot_of_expert_E.dtype == torch.int64

    @property
    def num_experts(self) -> int:
        """E, logical experts of the layer."""
        return self.slot_of_expert_E.numel()

    @classmethod
    def from_plan(cls, plan: Plan, layer: int, mesh: Mesh) -> "ExpertLayout":
        """The layout of `layer` under `plan` on this rank; the copy used is `placement.records.plan.choose_replica`'s, as in the evaluator.

        Raises `BadData` where the plan is for another number of devices or has no such layer.
        """
        if plan.num_devices != mesh.expert_parallel or not 0 <= layer < plan.num_layers:
            raise BadData(
                f"the plan places {plan.num_layers} layers on {plan.num_devices} devices, but layer {layer} on {mesh.expert_parallel} "
                f"expert-parallel ranks was asked for; solve a plan for this model and this expert_parallel"
            )
        return cls._of(plan, layer, layer, mesh)

    @classmethod
    def contiguous(cls, layer: int, num_experts: int, mesh: Mesh) -> "ExpertLayout":
        """The layout without a plan: the first experts on the first rank, and so on, in blocks that differ by one at most."""
        return cls._of(Plan.contiguous(1, num_experts, mesh.expert_parallel), 0, layer, mesh)

    def with_gathered(self, experts: Collection[int], mesh: Mesh) -> "ExpertLayout":
        """The layout while the weights of `experts` are on every rank of the group: their tokens then use the copy at home.

        Behind its own slots every rank gets one for each of them that it has no copy of, in the order in which `experts.gathered` brings
        them. Raises `BadConfig` for experts that the layer does not have.
        """
        check_gathered(experts, self.num_experts)
        assert not any(self.hops), "experts are gathered once; begin from the plan's layout"
        device_RE = np.zeros((1, self.num_experts), dtype=np.int64) if self.device_RE is None else self.device_RE
        hops = weight_hops(device_RE, mesh.node_of_expert_rank, experts)
        here, arriving = mesh.expert_rank, [t.expert for hop in hops for t in hop if t.target == mesh.expert_rank]
        num_slots = self.num_slots + len(experts)
        rank_E, slot_E = self.slot_of_expert_E.div(self.num_slots, rounding_mode="floor"), self.slot_of_expert_E % self.num_slots
        slot_of_expert_E = rank_E * num_slots + slot_E
        first_slot = here * num_slots + len(self.local_experts)
        for place, expert in enumerate(arriving):
            slot_of_expert_E[expert] = first_slot + place
        local_experts = (*self.local_experts, *arriving)
        return replace(self, slot_of_expert_E=slot_of_expert_E, local_experts=local_experts, num_slots=num_slots, hops=hops)

    def own_counts(self, count_S: Tensor) -> Tensor:
        """Counts [S] without those of slots that this rank does not have, which are zero."""
        return count_S[: len(self.local_experts)]

    @classmethod
    def _of(cls, plan: Plan, layer_of_plan: int, layer: int, mesh: Mesh) -> "ExpertLayout":
        global_slot_RE = choose_replica(plan, mesh.node_of_expert_rank)[layer_of_plan].astype(np.int64)
        device_RE, slot_RE = np.divmod(global_slot_RE, plan.slots_per_device)
        here, held_R = mesh.expert_rank, plan.held_LR[layer_of_plan]
        num_slots = int(held_R.max())
        return cls(
            layer=layer,
            slot_of_expert_E=torch.as_tensor(device_RE[here] * num_slots + slot_RE[here], dtype=torch.int64, device=mesh.device),
            local_experts=tuple(plan.slots_LRS[layer_of_plan, here, : held_R[here]].tolist()),
            num_slots=num_slots,
            num_ranks=mesh.expert_parallel,
            device_RE=device_RE,
        )
