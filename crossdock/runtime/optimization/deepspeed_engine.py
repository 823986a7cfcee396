"""The optimizer step by DeepSpeed's ZeRO, stages 1 and 2: the only module that imports deepspeed.

ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054) gives every rank one part of the optimizer state: 1/world of the dense parameters', and
1/n of its experts', where n ranks hold the same experts. Stage 2 lets go of the gradients outside of that part as soon as they are reduced.

DeepSpeed's optimizer is used as it is, without the engine around it, which would cast gates to the compute format, take only DeepSpeed's
own layers for experts, and make process groups beside the mesh's. It averages every gradient over the world, experts' included, which is
the mean over ranks that the native engine computes. The norm and the shared stop are ours: a non-finite rank is named before the update.
"""

import contextlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pydantic
import torch
from torch import Tensor, nn

from crossdock.errors import BadConfig, NonFiniteLoss, Unavailable
from crossdock.placement.records.plan import Plan
from crossdock.runtime.experts.expert_bank import ExpertBank
from crossdock.runtime.optimization.agreement import StepReport, agree, clip_factor
from crossdock.runtime.optimization.engines import Piece
from crossdock.runtime.optimization.optimizer import STATES, OptimizerConfig, master_dtype
from crossdock.runtime.transport import collectives
from crossdock.runtime.transport.exchange import naming_lost_peers
from crossdock.runtime.transport.mesh import Group, Mesh, group_of_one
from crossdock.strict_yaml import StrictModel

INSTALL = "pip install 'crossdock[deepspeed]'"
EXPERTS = "crossdock_experts"
"""What DeepSpeed calls the group of ranks that hold the same experts."""


class DeepSpeedConfig(StrictModel):
    """What `engine: deepspeed` asks of ZeRO."""

    stage: Literal[1, 2] = 1
    """1: optimizer state in parts. 2: gradients as well."""
    bucket_elements: int = pydantic.Field(default=2 << 20, ge=1024)
    """Gradient elements that are reduced at once."""


@dataclass(frozen=True, eq=False)
class _Part:
    """One flat group of a ZeRO optimizer: parameters in a row, cut into equal parts, of which this rank keeps one."""

    zero: Any
    number: int  # of the group in `zero`
    group: Group
    names: tuple[str, ...]
    begin_of: Mapping[str, int]  # elements before each parameter
    begin: int  # elements before this rank's part
    state: Mapping[str, Tensor]  # this rank's part [P] by the names of `STATES`; the last part is padded

    @property
    def end(self) -> int:
        return self.begin + self.state["weight"].numel()


class DeepSpeedEngine:
    """ZeRO 1 or 2 over the mesh's groups: see `engines.AnyEngine`. Experts stay where they are for the whole run, one copy in a group."""

    def __init__(self, model: nn.Module, mesh: Mesh, plan: Plan | None, config: OptimizerConfig, zero: DeepSpeedConfig) -> None:
        """Raises `Unavailable` where deepspeed is not installed, `BadConfig` for float64, copies and ranks without experts."""
        if plan is not None and plan.has_replicas:
            raise BadConfig(
                "engine deepspeed cannot sum gradients of copies of an expert inside a group; use engine: native, or another plan"
            )
        if plan is not None and not (held_R := plan.held_LR.sum(axis=0)).all():
            raise BadConfig(
                f"engine deepspeed cannot update a rank without experts, and the plan gives expert rank {held_R.argmin()} none in any of "
                f"{plan.num_layers} layers; use engine: native, or another plan"
            )
        self.model, self.mesh, self.plan, self.config, self.zero_config = model, mesh, plan, config, zero
        self.banks: dict[str, ExpertBank] = {name: module for name, module in model.named_modules() if isinstance(module, ExpertBank)}
        self.expert_names: dict[str, tuple[str, ...]] = {
            name: tuple(f"{name}.{tensor}" for tensor in bank.expert_tensors()) for name, bank in self.banks.items()
        }
        self._named = dict(model.named_parameters())
        if any(master_dtype(parameter.dtype) != torch.float32 for parameter in self._named.values()):
            raise BadConfig("engine deepspeed keeps fp32 masters and cannot train in float64; set precision.compute to fp32 or bf16")
        self._num_updates = 0
        alone = group_of_one(mesh)  # and the world is real, also that of a lone rank
        self._deepspeed = _deepspeed(mesh)
        self._groups = {
            "dense": mesh.dense_group if mesh.dense_group is not None else alone,
            "experts": mesh.expert_replica_group if mesh.expert_replica_group is not None else alone,
            "tokens": mesh.expert_group if mesh.expert_group is not None else alone,
        }
        # One of them for each format of parameters: ZeRO takes all of its parameters to be of one, and gates are wider than the rest. And
        # one for experts alone: ranks may hold different numbers of them, and what shares a bucket with dense gradients must be alike.
        experts = {name for names in self.expert_names.values() for name in names}
        self._zeros: list[tuple[Any, list[dict[str, Any]]]] = []
        kinds = sorted({(name in experts, parameter.dtype) for name, parameter in self._named.items()}, key=str)
        for are_experts, dtype in kinds:
            alike = [name for name, parameter in self._named.items() if (name in experts, parameter.dtype) == (are_experts, dtype)]
            self._zeros.append(self._zero_of(alike, are_experts))
        self._parts = [part for zero, groups in self._zeros for part in self._parts_of(zero, groups)]
        self._part_of = {name: part for part in self._parts for name in part.names}

    def _zero_of(self, names: Sequence[str], are_experts: bool) -> tuple[Any, list[dict[str, Any]]]:
        """DeepSpeed's optimizer of these parameters, and the groups it was given, with the names of theirs."""
        groups: list[dict[str, Any]] = []
        for decays in (True, False):
            alike = [name for name in names if (self._named[name].ndim - are_experts >= 2) == decays]
            if alike:
                decay = self.config.weight_decay if decays else 0.0
                kind = {"moe": True, "name": EXPERTS} if are_experts else {}
                groups.append({"params": [self._named[name] for name in alike], "names": alike, "weight_decay": decay, **kind})
        for name in names if are_experts else ():
            self._named[name].allreduce = False  # type: ignore[attr-defined]
            self._named[name].group_name = EXPERTS  # type: ignore[attr-defined]
        betas = (self.config.beta1, self.config.beta2)
        optimizer = torch.optim.AdamW(groups, lr=self.config.lr, betas=betas, eps=self.config.epsilon, fused=True)
        with _stdout_to_stderr():
            zero = self._deepspeed.Optimizer(
                optimizer,
                {parameter: name for name, parameter in self._named.items()},
                timers=self._deepspeed.no_timer,
                optimizer_params={},
                clip_grad=0.0,  # clipped by us, with the norm that all ranks agreed on
                compute_grad_norm=False,
                check_grad_overflow=False,
                contiguous_gradients=True,
                reduce_bucket_size=self.zero_config.bucket_elements,
                allgather_bucket_size=2 * self.zero_config.bucket_elements,
                dp_process_group=self._groups["dense"],
                expert_parallel_group={EXPERTS: self._groups["tokens"]} if are_experts else None,
                expert_data_parallel_group={EXPERTS: self._groups["experts"]} if are_experts else None,
                has_moe_layers=are_experts,
                overlap_comm=False,
                partition_grads=self.zero_config.stage == 2,
                gradient_accumulation_dtype=torch.float32,
                communication_data_type=torch.float32,
            )
        return zero, groups

    def _parts_of(self, zero: Any, groups: Sequence[dict[str, Any]]) -> Iterator[_Part]:
        for number, group in enumerate(groups):
            master = zero.single_partition_of_fp32_groups[number]
            moments = {key: torch.zeros_like(master) for key in ("exp_avg", "exp_avg_sq")}
            zero.optimizer.state[master] = {"step": torch.zeros((), dtype=torch.float32, device=master.device), **moments}
            begin_of, begin = {}, 0
            for name in group["names"]:
                begin_of[name] = begin
                begin += self._named[name].numel()
            is_expert = "moe" in group
            place = self.mesh.replica if is_expert else self.mesh.rank
            process_group = self._groups["experts" if is_expert else "dense"]
            state = {"weight": master.detach(), **moments}
            yield _Part(zero, number, process_group, tuple(group["names"]), begin_of, place * master.numel(), state)

    # ---- the step --------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate gradients; stage 2 reduces those of every micro-batch, stage 1 those of the `last`, in `reduce`."""
        for zero, _ in self._zeros:
            zero.clear_backward_seen_flag()
            zero.set_gradient_accumulation_boundary(last)
            zero.backward_prologue()
            zero.enter_backward()
        with naming_lost_peers():
            loss.backward()
            if not last:
                self._end_backward()

    def reduce(self) -> None:
        """Every rank has the mean over the world of the gradients of its part."""
        with naming_lost_peers():
            self._end_backward(reduces=True)

    def _end_backward(self, reduces: bool = False) -> None:
        for zero, _ in self._zeros:
            if self.zero_config.stage == 2:
                zero.overlapping_partition_gradients_reduce_epilogue()
            elif reduces:
                zero.reduce_gradients()
            zero.backward_epilogue()
            zero.exit_backward()

    @torch.no_grad()
    def step(self, step: int, lr: float, scalars: Mapping[str, Tensor | float]) -> StepReport:
        """Agree, clip by the true global norm, update this rank's parts, gather the parameters from all."""
        gradients = [gradient for part in self._parts for gradient in part.zero.averaged_gradients[part.number]]
        nothing = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        # every element of every gradient stands on exactly one rank: padding is zero
        own_sq = torch.stack(torch._foreach_norm(gradients)).double().square().sum() if gradients else nothing
        try:
            sums, squared = agree(step, scalars, nothing, own_sq, self.mesh)
        except NonFiniteLoss:
            self._forget_gradients()
            raise
        grad_norm = squared**0.5
        clip = clip_factor(grad_norm, self.config.clip_norm)
        if clip != 1.0:
            torch._foreach_mul_(gradients, clip)
        del gradients
        with naming_lost_peers():
            for zero, _ in self._zeros:
                zero.set_lr(lr)
                zero.step()
                zero.zero_grad()
        self._num_updates += 1
        return StepReport(grad_norm, sums)

    def _forget_gradients(self) -> None:
        for part in self._parts:
            part.zero.zero_grad()
            part.zero.averaged_gradients[part.number] = None

    # ---- state -----------------------------------------------------------------------------------------------

    @property
    def num_updates(self) -> int:
        """Updates made so far."""
        return self._num_updates

    @torch.no_grad()
    def collect(self, pieces: Collection[Piece]) -> dict[Piece, dict[str, Tensor]]:
        """Copies of the state of `pieces`. One flat state is whole on a rank at a time: the rest of it goes as the next one comes."""
        found: dict[Piece, dict[str, Tensor]] = {piece: {} for piece in pieces}
        for part in self._parts:
            for key in STATES:
                flat = torch.cat(collectives.all_gather_rows(part.state[key], part.group))
                for piece in pieces:
                    if self._part_of[piece.parameter] is part:
                        begin, shape = self._place(piece)
                        found[piece][key] = flat[begin : begin + shape.numel()].view(shape).clone()
        return found

    def _place(self, piece: Piece) -> tuple[int, torch.Size]:
        """Where `piece` begins in the flat parameters of its part, and its shape."""
        shape, begin = self._named[piece.parameter].shape, self._part_of[piece.parameter].begin_of[piece.parameter]
        return (begin, shape) if piece.slot is None else (begin + piece.slot * shape[1:].numel(), shape[1:])

    def _shared(self, piece: Piece) -> tuple[slice, slice]:
        """The elements of `piece` that this rank keeps: where in the piece, and where in the part."""
        part = self._part_of[piece.parameter]
        begin, shape = self._place(piece)
        first, last = max(begin, part.begin), min(begin + shape.numel(), part.end)
        last = max(first, last)
        return slice(first - begin, last - begin), slice(first - part.begin, last - part.begin)

    def wants(self, piece: Piece) -> bool:
        """Whether this rank's part holds any element of `piece`."""
        inside, _ = self._shared(piece)
        return inside.stop > inside.start

    @torch.no_grad()
    def fill(self, piece: Piece, state: str, values: Tensor) -> None:
        """Overwrite what this rank keeps of one state of `piece`."""
        inside, here = self._shared(piece)
        self._part_of[piece.parameter].state[state][here].copy_(values.flatten()[inside])

    def filled(self, num_updates: int) -> None:
        """Parameters are gathered anew from the masters of all ranks; updates are counted from `num_updates`."""
        self._num_updates = num_updates
        for part in self._parts:
            part.zero.optimizer.state[part.zero.single_partition_of_fp32_groups[part.number]]["step"].fill_(float(num_updates))
        with naming_lost_peers():
            for zero, _ in self._zeros:
                zero.update_lp_params()


@dataclass(frozen=True)
class _DeepSpeed:
    """What is used of the package."""

    Optimizer: Any
    no_timer: Any


def check_installed() -> None:
    """Raise `Unavailable` where deepspeed is not installed; it is not imported."""
    if importlib.util.find_spec("deepspeed") is None:
        raise _not_usable("it is not installed")


def _not_usable(why: str) -> Unavailable:
    return Unavailable(f"engine deepspeed needs the package deepspeed ({why}): {INSTALL}, or set engine: native")


def _deepspeed(mesh: Mesh) -> _DeepSpeed:
    """Import deepspeed and tell it of the world that is there. Raises `Unavailable`."""
    # DeepSpeed gathers by a name that torch 2.13 calls deprecated, and every rank would print so; the warning is about its code alone
    warnings.filterwarnings("ignore", r"`torch\.distributed\.all_gather_into_tensor` is deprecated", FutureWarning)
    if mesh.device.type == "cpu":  # said before the import, or every rank warns that it found no other accelerator
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with _stdout_to_stderr():
        try:
            import deepspeed
            from deepspeed.accelerator import set_accelerator
            from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
            from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
            from deepspeed.utils.timer import NoopTimer
        except ImportError as failure:
            raise _not_usable(str(failure)) from failure
        if mesh.device.type == "cpu":  # also on a machine with GPUs, where it would choose those
            set_accelerator(CPU_Accelerator())
        # its shared-memory reduction serves inference alone; on the CPU it would be compiled here, for half a minute, by a compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.comm.init_distributed(dist_backend=None, auto_mpi_discovery=False, dist_init_required=False, verbose=False)
    return _DeepSpeed(DeepSpeedZeroOptimizer, NoopTimer())


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """DeepSpeed logs to what is stdout when it is imported; ours may hold one JSON object and nothing else."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
