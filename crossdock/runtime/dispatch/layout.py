"""ExpertLayout: where the experts of one MoE layer live, as one rank sees it."""

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crossdock.errors import BadData
from crossdock.placement.records.plan import EMPTY, Plan, choose_replica
from crossdock.placement.strategies.gather import Hops, check_gathered, weight_hops
from crossdock.runtime.transport.mesh import Mesh


@dataclass(frozen=True, eq=False)
class ExpertLayout:
    """Physical slots of one layer. A global slot is `rank of the expert group * S + local slot`.

    Where an expert has several copies, `slot_of_expert_E` names the one that tokens of THIS rank use; other ranks may use another.
    """

    layer: int
    slot_of_expert_E: Tensor
    """int64 [E] on the mesh's device: global slot of each logical expert."""
    local_experts: tuple[int, ...]
    """Logical expert of each of this rank's S slots; -1 where a slot is empty."""
    num_ranks: int
    device_RE: NDArray[np.int64] | None = None
    """[R, E]: the rank whose copy each rank of the group uses, as the plan has it; None where there is no plan and one rank."""
    hops: Hops = ((), ())
    """How the weights of gathered experts travel in the group."""

    def __post_init__(self) -> None:
        assert self.local_experts, "a rank without a slot cannot take part in the layer"
        assert self.slot_of_expert_E.dtype == torch.int64

    @property
    def num_slots(self) -> int:
        """S, slots per rank."""
        return len(self.local_experts)

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

        Every rank gets as many further slots as there are such experts. They are filled with those that it has no copy of, in the order
        in which `experts.gathered` brings them, and the rest stays empty. Raises `BadConfig` for experts that the layer does not have.
        """
        check_gathered(experts, self.num_experts)
        assert not any(self.hops), "experts are gathered once; begin from the plan's layout"
        device_RE = np.zeros((1, self.num_experts), dtype=np.int64) if self.device_RE is None else self.device_RE
        hops = weight_hops(device_RE, mesh.node_of_expert_rank, experts)
        here, arriving = mesh.expert_rank, [t.expert for hop in hops for t in hop if t.target == mesh.expert_rank]
        num_slots = self.num_slots + len(experts)
        rank_E, slot_E = self.slot_of_expert_E.div(self.num_slots, rounding_mode="floor"), self.slot_of_expert_E % self.num_slots
        slot_of_expert_E = rank_E * num_slots + slot_E
        first_slot = here * num_slots + self.num_slots
        for place, expert in enumerate(arriving):
            slot_of_expert_E[expert] = first_slot + place
        empty = (EMPTY,) * (len(experts) - len(arriving))
        local_experts = (*self.local_experts, *arriving, *empty)
        return replace(self, slot_of_expert_E=slot_of_expert_E, local_experts=local_experts, hops=hops)

    @classmethod
    def _of(cls, plan: Plan, layer_of_plan: int, layer: int, mesh: Mesh) -> "ExpertLayout":
        slot_RE = choose_replica(plan, mesh.node_of_expert_rank)[layer_of_plan].astype(np.int64)
        return cls(
            layer=layer,
            slot_of_expert_E=torch.as_tensor(slot_RE[mesh.expert_rank], dtype=torch.int64, device=mesh.device),
            local_experts=tuple(plan.slots_LRS[layer_of_plan, mesh.expert_rank].tolist()),
            num_ranks=mesh.expert_parallel,
            device_RE=slot_RE // plan.slots_per_device,
        )
