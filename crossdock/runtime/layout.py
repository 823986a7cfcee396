"""ExpertLayout: where the experts of one MoE layer live, as one rank sees it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crossdock.errors import BadData
from crossdock.runtime.mesh import Mesh

if TYPE_CHECKING:
    from crossdock.placement.plan import Plan


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
    def from_plan(cls, plan: "Plan", layer: int, mesh: Mesh) -> "ExpertLayout":
        """The layout of `layer` under `plan` on this rank; the copy used is `placement.plan.choose_replica`'s, as in the evaluator.

        Raises `BadData` where the plan is for another number of devices or has no such layer.
        """
        from crossdock.placement.plan import choose_replica

        if plan.num_devices != mesh.expert_parallel or not 0 <= layer < plan.num_layers:
            raise BadData(
                f"the plan places {plan.num_layers} layers on {plan.num_devices} devices, but layer {layer} on {mesh.expert_parallel} "
                f"expert-parallel ranks was asked for; solve a plan for this model and expert_parallel"
            )
        slot_E = choose_replica(plan, mesh.node_of_expert_rank)[layer, mesh.expert_rank]
        return cls(
            layer=layer,
            slot_of_expert_E=torch.as_tensor(slot_E, dtype=torch.int64, device=mesh.device),
            local_experts=tuple(int(expert) for expert in plan.slots_LRS[layer, mesh.expert_rank]),
            num_ranks=mesh.expert_parallel,
        )

    @classmethod
    def contiguous(cls, layer: int, num_experts: int, mesh: Mesh) -> "ExpertLayout":
        """Experts 0..S-1 on the first rank, the next S on the second, and so on: the layout without a plan.

        Raises `BadData` where the experts do not divide over the ranks.
        """
        num_ranks = mesh.expert_parallel
        if num_experts % num_ranks:
            divisors = ", ".join(str(n) for n in range(1, num_experts + 1) if num_experts % n == 0)
            raise BadData(
                f"{num_experts} experts do not divide over {num_ranks} ranks; choose expert_parallel from {divisors}, or give a plan"
            )
        num_slots = num_experts // num_ranks
        first = mesh.expert_rank * num_slots
        return cls(layer, torch.arange(num_experts, device=mesh.device), tuple(range(first, first + num_slots)), num_ranks)
