"""The decoder-only transformer: embedding, blocks, norm, head; built the same on every rank, with its experts where the plan says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossdock.models.attention import RMSNorm
from crossdock.models.blocks import DenseBlock, MoEBlock
from crossdock.models.coherent import run_blocks
from crossdock.models.config import ModelConfig
from crossdock.models.gates.base import Statistics, add_statistics, reduce_statistics
from crossdock.models.initial import named_fill
from crossdock.models.moe import MoELayer
from crossdock.placement.records.plan import Plan
from crossdock.runtime.experts.overlap import Schedule, check_expert_slot
from crossdock.runtime.training.context import StepContext
from crossdock.runtime.transport.mesh import Mesh

RESIDUAL_OUTPUTS = ("out.weight", "down.weight")
"""Names of the matrices that write into the residual stream."""


@dataclass(frozen=True, eq=False)
class ModelOutput:
    """What a forward pass returns. Losses and loads are those of the global batch, equal on every rank."""

    logits_QPV: Tensor
    losses: Mapping[str, Tensor]
    """Balance losses by name, summed over layers and already times their coefficients: add them to the training loss."""
    load_LE: Tensor
    """Assignments that each expert served, after drops: float64, no gradient."""
    dropped: Tensor
    """Assignments beyond capacity, summed over layers; scalar, no gradient."""


class Transformer(nn.Module):
    """`config`'s model on this rank of `mesh`, its experts placed by `plan` (contiguous where None), initial values keyed by `seed`.

    Raises `BadData` where the plan is for another model or another number of devices.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh | None = None,
        plan: Plan | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        *,
        dispatch: str = "deduplicated",
        wire: str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.mesh = mesh if mesh is not None else Mesh.single()
        if plan is not None:
            plan.check_model(config.num_moe_layers, config.num_experts, self.mesh.expert_parallel)
        residual_std = config.initial_std / (2 * config.num_layers) ** 0.5
        self.embedding = nn.Embedding(config.vocab_size, config.model_width, dtype=dtype)
        self.blocks = nn.ModuleList()
        self.moe_layers: list[MoELayer] = []
        """The MoE layers in the order of a plan's layers."""
        for number in range(config.num_blocks):
            if config.block == "dense":
                self.blocks.append(DenseBlock(config, dtype))
                continue
            use = number % config.kind.blocks_per_moe
            if use:
                self.blocks.append(MoEBlock(config, self.moe_layers[-1], dtype, use))
                continue
            moe = MoELayer(
                config.model_width,
                config.routed_width,
                config.num_experts,
                config.top_k,
                gate=config.gate,
                activation=config.activation,
                mesh=self.mesh,
                plan=plan,
                layer=len(self.moe_layers),
                dispatch=dispatch,
                wire=wire,
                dtype=dtype,
                seed=seed,
                initial_std=config.initial_std,
                output_scale=residual_std / config.initial_std,
                expert_recompute=config.expert_recompute,
                gathered_experts=config.gathered_experts,
                turns=config.turns_per_layer,
            )
            self.moe_layers.append(moe)
            self.blocks.append(MoEBlock(config, moe, dtype))
        self.norm = RMSNorm(config.model_width, config.norm_eps, dtype)
        if not config.tied_head:
            self.head = nn.Linear(config.model_width, config.vocab_size, bias=False, dtype=dtype)
        self.to(self.mesh.device)
        self._fill_dense(seed, config.initial_std, residual_std)

    def forward(self, token_QP: Tensor, context: StepContext) -> ModelOutput:
        """Logits [Q, P, V] for Q sequences of P tokens, and the balance of all layers, summed over the world in one all-reduce."""
        x_QPD, statistics = self._through_blocks(self.embedding(token_QP), context)
        head = self.embedding.weight if self.config.tied_head else self.head.weight
        logits_QPV = F.linear(self.norm(x_QPD), head)
        return self._balanced(logits_QPV, statistics, context)

    def _through_blocks(self, x_QPD: Tensor, context: StepContext) -> tuple[Tensor, list[Statistics]]:
        """The blocks' output, and the sums of each MoE layer's gate."""
        if self.config.traffic == "coherent":
            x_QPD, chosen = run_blocks(self._first_blocks(), x_QPD, context)
            return x_QPD, [routing.statistics for routing in chosen]
        statistics: list[Statistics] = []
        for block in self.blocks:
            if isinstance(block, MoEBlock):
                x_QPD, routings = block(x_QPD, context)
                sums = reduce(add_statistics, [routing.statistics for routing in routings])
                if block.use:
                    statistics[-1] = add_statistics(statistics[-1], sums)
                else:
                    statistics.append(sums)
            else:
                x_QPD = block(x_QPD)
        return x_QPD, statistics

    def set_schedules(self, schedules: Sequence[Schedule]) -> None:
        """Give each MoE layer its schedule; the same on every rank. Raises `BadConfig` for a slot that a block does not have."""
        assert len(schedules) == len(self.moe_layers), f"{len(schedules)} schedules for {len(self.moe_layers)} MoE layers"
        for number, block in enumerate(self.blocks):
            assert isinstance(block, MoEBlock)
            schedule = schedules[number // self.config.kind.blocks_per_moe]
            check_expert_slot(schedule.expert_slot, len(self.config.window))
            block.schedule = schedule

    def schedules(self, num_positions: int) -> list[Schedule]:
        """What each MoE layer does for sequences of that length: as set, or else as configured."""
        return [block.schedule_for(num_positions) for block in self._first_blocks()]

    @property
    def early_stages(self) -> list[tuple[nn.Module, ...]]:
        """The stages of each MoE layer's block before its routed experts' input is known, in order."""
        return [block.early_stages for block in self._first_blocks()]

    @property
    def window_stages(self) -> list[tuple[nn.Module, ...]]:
        """The stages of each MoE layer's block that may run while tokens travel, in order."""
        return [block.window_stages for block in self._first_blocks()]

    def _first_blocks(self) -> list[MoEBlock]:
        """The block of each MoE layer; of several that share one layer, the first."""
        return [block for block in self.blocks if isinstance(block, MoEBlock) and block.use == 0]

    def _balanced(self, logits_QPV: Tensor, statistics: Sequence[Statistics], context: StepContext) -> ModelOutput:
        nothing = torch.zeros((), dtype=torch.float64, device=logits_QPV.device)
        if not statistics:
            return ModelOutput(logits_QPV, {}, nothing.new_zeros((0, self.config.num_experts)), nothing)
        reduced = reduce_statistics(statistics, self.mesh)
        balances = [moe.gate.balance(sums, context.training) for moe, sums in zip(self.moe_layers, reduced, strict=True)]
        losses = {name: torch.stack([balance.losses[name] for balance in balances]).sum() for name in balances[0].losses}
        load_LE = torch.stack([balance.load_E for balance in balances])
        return ModelOutput(logits_QPV, losses, load_LE, torch.stack([balance.dropped for balance in balances]).sum())

    def _fill_dense(self, seed: int, std: float, residual_std: float) -> None:
        """Normal initial values for all matrices but those of the MoE layers, which have filled their own; norms are ones already."""
        fill = named_fill(seed)
        own = {id(parameter) for moe in self.moe_layers for parameter in moe.parameters()}
        for name, parameter in self.named_parameters():
            if id(parameter) not in own and parameter.ndim == 2:
                fill(name, parameter, residual_std if name.endswith(RESIDUAL_OUTPUTS) else std)
