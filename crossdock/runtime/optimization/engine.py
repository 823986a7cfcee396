"""The optimizer step: gradients of all ranks summed while backward runs, the true global norm, one shared decision, the update.

Loss of the global batch is the mean over ranks. Dense parameters sum their gradients over the world. The backward all-to-all brings an
expert the gradient of its whole expert group, so experts sum over the ranks that hold the same slots in other groups, and over the other
copies in their own group where the plan has copies. Both are then divided by the world size, never by the number of ranks that share the
parameter.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from crossdock.errors import NonFiniteLoss
from crossdock.placement.records.plan import EMPTY, Plan
from crossdock.runtime.experts.expert_bank import ExpertBank
from crossdock.runtime.optimization.agreement import StepReport, agree, clip_factor
from crossdock.runtime.optimization.copies import CopySums
from crossdock.runtime.optimization.engines import Piece
from crossdock.runtime.optimization.fsdp import is_part, local_part, rows_before, set_gradient_sync
from crossdock.runtime.optimization.optimizer import MasterAdamW, OptimizerConfig
from crossdock.runtime.optimization.reduction import GradientReducer, Summed
from crossdock.runtime.transport import collectives
from crossdock.runtime.transport.exchange import naming_lost_peers
from crossdock.runtime.transport.mesh import Mesh


class Engine:
    """The native engine, in plain torch: see `engines.AnyEngine` for what a step is. Experts can move; dense parameters may be in parts."""

    def __init__(self, model: nn.Module, mesh: Mesh, plan: Plan | None, config: OptimizerConfig) -> None:
        self.model, self.mesh, self.config = model, mesh, config
        self.banks: dict[str, ExpertBank] = {name: module for name, module in model.named_modules() if isinstance(module, ExpertBank)}
        self.optimizer = MasterAdamW(config)
        self.expert_names: dict[str, tuple[str, ...]] = {
            name: tuple(f"{name}.{tensor}" for tensor in bank.expert_tensors()) for name, bank in self.banks.items()
        }
        self._attach(plan, {})

    # ---- parameters ------------------------------------------------------------------------------------------

    def _attach(self, plan: Plan | None, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Make buckets for the parameters as they are now; parameters named in `states` continue from there, others are new or stay."""
        assert plan is not None or not self.banks, "experts live where a plan says"
        self.plan = plan
        bank_of = {name: bank for bank, names in self.expert_names.items() for name in names}
        named = dict(self.model.named_parameters())
        experts, dense = self.mesh.expert_replica_group, self.mesh.dense_group
        self._parts = {name: parameter for name, parameter in named.items() if is_part(parameter)}
        kept = [(name, parameter) for name, parameter in named.items() if name not in self._parts]
        self.reducer = GradientReducer(
            [
                Summed(parameter, experts, parameter.shape[1:].numel() * self.banks[bank_of[name]].layout.num_slots)
                if name in bank_of
                else Summed(parameter, dense, parameter.numel())
                for name, parameter in kept
            ]
        )
        gradient_of = {name: self.reducer.gradient_of[parameter] for name, parameter in kept}
        self._part_gradients = {name: torch.zeros_like(local_part(parameter)) for name, parameter in self._parts.items()}
        for name, parameter in named.items():
            # matrices decay; norms, biases and scalars do not. An expert tensor has its slots in front
            decays = parameter.ndim - (name in bank_of) >= 2
            here = local_part(parameter) if name in self._parts else parameter
            gradient = self._part_gradients[name] if name in self._parts else gradient_of[name]
            self.optimizer.add(name, here, gradient, decays, states.get(name))
        self._dense_gradients = [gradient for name, gradient in gradient_of.items() if name not in bank_of]
        self._expert_gradients = [(gradient, bank_of[name]) for name, gradient in gradient_of.items() if name in bank_of]
        self._weight_of: dict[str, Tensor] = {}
        for name, bank in self.banks.items():
            assert plan is not None
            copies_E = (plan.slot_LRE[bank.layout.layer] != EMPTY).sum(axis=0)
            weights = [1.0 / copies_E[expert] for expert in bank.layout.local_experts]
            self._weight_of[name] = torch.tensor(weights, dtype=torch.float64, device=self.mesh.device)
        self._sum_copies: CopySums | None = None
        if plan is not None and plan.has_replicas:
            of_bank = [
                (bank, [named[tensor] for tensor in self.expert_names[name]], [gradient_of[tensor] for tensor in self.expert_names[name]])
                for name, bank in self.banks.items()
            ]
            self._sum_copies = CopySums(plan, of_bank, self.mesh)  # behind the reducer, whose hooks complete the gradients

    def states(self) -> dict[str, dict[str, Tensor]]:
        """The live optimizer state of every parameter by name; see `optimizer.STATES`."""
        return {name: self.optimizer.state_of(name) for name, _ in self.model.named_parameters()}

    @property
    def num_updates(self) -> int:
        """Updates made so far."""
        return self.optimizer.num_updates

    def _piece(self, piece: Piece) -> dict[str, Tensor]:
        state = self.optimizer.state_of(piece.parameter)
        return state if piece.slot is None else {key: values[piece.slot] for key, values in state.items()}

    def collect(self, pieces: Collection[Piece]) -> dict[Piece, dict[str, Tensor]]:
        """The live state of `pieces`; of those in parts a copy, for which the parts of all ranks travel one by one."""
        found = {piece: self._piece(piece) for piece in pieces if piece.parameter not in self._parts}
        for name in self._parts:
            for key, here in self.optimizer.state_of(name).items():
                whole = torch.cat(collectives.all_gather_rows(here, self.mesh.dense_group))
                if Piece(name, None) in pieces:
                    found.setdefault(Piece(name, None), {})[key] = whole
        return found

    def wants(self, piece: Piece) -> bool:
        """Whether any of it is kept here: all, but for parameters in parts."""
        return piece.parameter not in self._parts or len(self._part_gradients[piece.parameter]) > 0

    def fill(self, piece: Piece, state: str, values: Tensor) -> None:
        """Overwrite one state of `piece`, or this rank's part of it."""
        here = self._piece(piece)[state]
        if piece.parameter in self._parts:
            begin = rows_before(len(values), self.mesh.rank, self.mesh.world_size)
            values = values[begin : begin + len(here)]
        here.copy_(values)

    def filled(self, num_updates: int) -> None:
        """Parameters follow their masters; updates are counted from `num_updates`."""
        self.optimizer.refresh()
        self.optimizer.set_num_updates(num_updates)

    def release(self) -> dict[str, dict[str, Tensor]]:
        """Hand out the state of every parameter, as `states` has it, and let all gradients go: between two steps they are zero.

        So there is room for experts that move. Until `adopt` no step is possible.
        """
        self.reducer.close()
        if self._sum_copies is not None:
            self._sum_copies.close()
        self._sum_copies = None
        self._dense_gradients, self._expert_gradients, self._part_gradients = [], [], {}
        return {name: self.optimizer.take(name) for name, _ in self.model.named_parameters()}

    def adopt(self, plan: Plan, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on after `release` with banks that now have the layout of `plan`, and with `states`, those of moved experts migrated."""
        self._attach(plan, states)

    # ---- the step --------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate gradients; on the `last` micro-batch of a step their reduction starts as they come."""
        if last:
            self.reducer.arm()
            if self._sum_copies is not None:
                self._sum_copies.arm()
        set_gradient_sync(self.model, last)
        with naming_lost_peers():
            loss.backward()

    def reduce(self) -> None:
        """Wait until every gradient is the sum over all ranks and copies that share the parameter."""
        self.reducer.finish()
        if self._sum_copies is not None:
            self._sum_copies.finish()
        for name, parameter in self._parts.items():
            if parameter.grad is not None:
                self._part_gradients[name].copy_(local_part(parameter.grad))
                parameter.grad = None

    @torch.no_grad()
    def step(self, step: int, lr: float, scalars: Mapping[str, Tensor | float]) -> StepReport:
        """Agree, clip, update and clear: the second half of a step, after `reduce`.

        `scalars` (the same keys on every rank; `loss` among them) come back as sums over ranks. Raises `NonFiniteLoss` on every rank,
        before the update, where a loss or the norm of any rank is not finite.
        """
        dense_sq, expert_sq = self._squared_norms()
        own_sq = expert_sq / self.mesh.num_replicas
        if parts := [part for part in self._part_gradients.values() if part.numel()]:
            own_sq = own_sq + torch.stack(torch._foreach_norm(parts)).double().square().sum()
        try:
            sums, squared = agree(step, scalars, dense_sq, own_sq, self.mesh)
        except NonFiniteLoss:
            self._zero()
            raise
        scale = 1.0 / self.mesh.world_size
        grad_norm = scale * squared**0.5
        clip = clip_factor(grad_norm, self.config.clip_norm)
        if scale * clip != 1.0:
            torch._foreach_mul_([*(bucket.flat for bucket in self.reducer.buckets), *parts], scale * clip)
        self.optimizer.update(lr)
        self._zero()
        return StepReport(grad_norm, sums)

    def _zero(self) -> None:
        self.reducer.zero()
        for part in self._part_gradients.values():
            part.zero_()

    def _squared_norms(self) -> tuple[Tensor, Tensor]:
        """Squared norms of the summed gradients: of all dense parameters, and of this rank's experts, each copy counted by its share."""
        dense_sq = expert_sq = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        if self._dense_gradients:
            dense_sq = torch.stack(torch._foreach_norm(self._dense_gradients)).double().square().sum()
        for gradient, bank in self._expert_gradients:
            norm_S = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
            expert_sq = expert_sq + norm_S.double().square() @ self._weight_of[bank]
        return dense_sq, expert_sq
