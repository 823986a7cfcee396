"""AdamW on full-precision master weights: the update, its learning-rate schedule, and its state by parameter name.

Parameters in bf16 are copies of fp32 masters, written once after every update and never re-cast in the forward pass; parameters in fp32 or
float64 are their own masters. Gradients arrive in master precision (`reduction.py` accumulates them there).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import pydantic
import torch
from torch import Tensor
from torch.optim.adamw import adamw

from crossdock.strict_yaml import StrictModel

STATES = ("weight", "exp_avg", "exp_avg_sq")
"""What the optimizer keeps for every parameter, each with the parameter's shape; checkpoints and migration carry these and nothing else."""


class OptimizerConfig(StrictModel):
    """AdamW (Loshchilov and Hutter 2019) with linear warm-up, then a cosine down to `final_lr_share` of the peak."""

    lr: float = pydantic.Field(default=1e-3, gt=0.0)
    final_lr_share: float = pydantic.Field(default=0.1, ge=0.0, le=1.0)
    warmup_steps: int = pydantic.Field(default=20, ge=0)
    weight_decay: float = pydantic.Field(default=0.1, ge=0.0)
    beta1: float = pydantic.Field(default=0.9, ge=0.0, lt=1.0)
    beta2: float = pydantic.Field(default=0.95, ge=0.0, lt=1.0)
    epsilon: float = pydantic.Field(default=1e-8, gt=0.0)
    clip_norm: float = pydantic.Field(default=1.0, gt=0.0)
    """Gradients are scaled down to this global norm over dense and expert parameters; set it very high to switch clipping off."""


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The rate of update number `step` (from 0) of `total_steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    share = config.final_lr_share + (1.0 - config.final_lr_share) * 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * share


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of a parameter's master weights, gradients and moments."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(eq=False)
class _Entry:
    parameter: Tensor
    gradient: Tensor  # in master precision; the reducer's view
    weight: Tensor  # the master; shares the parameter's memory where the dtypes agree
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    decays: bool


class MasterAdamW:
    """AdamW over named parameters; mutable, one per engine."""

    def __init__(self, config: OptimizerConfig) -> None:
        self.config = config
        self.num_updates = 0
        self._entry_of: dict[str, _Entry] = {}

    def add(self, name: str, parameter: Tensor, gradient: Tensor, decays: bool, state: Mapping[str, Tensor] | None = None) -> None:
        """Take charge of `parameter`. With `state` (keys `STATES`) its moments are adopted and the parameter takes the master's value."""
        dtype = master_dtype(parameter.dtype)
        weight = parameter.detach()
        if state is not None:
            with torch.no_grad():
                parameter.copy_(state["weight"])
        if weight.dtype != dtype:
            weight = weight.to(dtype) if state is None else state["weight"]
        exp_avg, exp_avg_sq = (torch.zeros_like(weight) if state is None else state[key] for key in ("exp_avg", "exp_avg_sq"))
        step = torch.tensor(float(self.num_updates), device=weight.device)
        self._entry_of[name] = _Entry(parameter, gradient, weight, exp_avg, exp_avg_sq, step, decays)

    def state_of(self, name: str) -> dict[str, Tensor]:
        """The live tensors of a parameter by the names of `STATES`."""
        entry = self._entry_of[name]
        return {"weight": entry.weight, "exp_avg": entry.exp_avg, "exp_avg_sq": entry.exp_avg_sq}

    @torch.no_grad()
    def refresh(self) -> None:
        """Write lower-precision parameters anew from their masters, after masters were overwritten from outside."""
        copies = [entry for entry in self._entry_of.values() if entry.weight.dtype != entry.parameter.dtype]
        if copies:
            torch._foreach_copy_([entry.parameter for entry in copies], [entry.weight for entry in copies])

    def take(self, name: str) -> dict[str, Tensor]:
        """Let go of a parameter, of an expert bank that is about to change its shape, say: its state, which is nowhere else."""
        state = self.state_of(name)
        del self._entry_of[name]
        return state

    def set_num_updates(self, num_updates: int) -> None:
        """Continue counting from `num_updates`; the bias correction depends on it."""
        self.num_updates = num_updates
        for entry in self._entry_of.values():
            entry.step.fill_(float(num_updates))

    @torch.no_grad()
    def update(self, lr: float) -> None:
        """One AdamW update from the gradients as they stand."""
        self.num_updates += 1
        for decays in (True, False):
            entries = [entry for entry in self._entry_of.values() if entry.decays is decays]
            for dtype in {entry.weight.dtype for entry in entries}:
                self._update([entry for entry in entries if entry.weight.dtype == dtype], lr, self.config.weight_decay if decays else 0.0)
        self.refresh()

    def _update(self, entries: list[_Entry], lr: float, weight_decay: float) -> None:
        adamw(
            [entry.weight for entry in entries],
            [entry.gradient for entry in entries],
            [entry.exp_avg for entry in entries],
            [entry.exp_avg_sq for entry in entries],
            [],
            [entry.step for entry in entries],
            fused=True,
            amsgrad=False,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            lr=lr,
            weight_decay=weight_decay,
            eps=self.config.epsilon,
            maximize=False,
        )
