"""ExpertLayout: where the experts of one MoE layer live, as one rank sees it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from crossdock.errors import BadData
from crossdock.placement.plan import Plan, choose_replica
from crossdock.runtime.mesh import Mesh


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
    def from_plan(cls, plan: Plan, layer: int, mesh: Mesh) -> "ExpertLayout":
        """The layout of `layer` under `plan` on this rank; the copy used is `placement.plan.choose_replica`'s, as in the evaluator.

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

    @classmethod
    def _of(cls, plan: Plan, layer_of_plan: int, layer: int, mesh: Mesh) -> "ExpertLayout":
        slot_E = choose_replica(plan, mesh.node_of_expert_rank)[layer_of_plan, mesh.expert_rank]
        return cls(
            layer=layer,
            slot_of_expert_E=torch.as_tensor(slot_E, dtype=torch.int64, device=mesh.device),
            local_experts=tuple(plan.slots_LRS[layer_of_plan, mesh.expert_rank].tolist()),
            num_ranks=mesh.expert_parallel,
        )
