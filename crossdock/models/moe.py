"""MoELayer: a gate, a dispatcher and this rank's experts; drops into any PyTorch model on one process or many (`examples/drop_in.py`)."""

from collections.abc import Collection, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from crossdock.errors import BadConfig, BadData
from crossdock.models.gates.base import FIRST, Routing, Turn, largest_over_world, reduce_statistics
from crossdock.models.gates.noisy_topk import NoisyTopKConfig
from crossdock.models.gates.table import AnyGateConfig, build_gate
from crossdock.models.initial import named_fill
from crossdock.placement.records.plan import Plan
from crossdock.placement.strategies.strategy import Strategy
from crossdock.runtime.dispatch.assignment import Assignment
from crossdock.runtime.dispatch.dispatcher import DISPATCHERS, Dispatched, Dispatcher, Handle, Pending, Prepared
from crossdock.runtime.dispatch.layout import ExpertLayout
from crossdock.runtime.experts.expert_bank import ExpertBank
from crossdock.runtime.experts.gathered import GatheringBank
from crossdock.runtime.experts.grouped_mlp import Network, Recompute
from crossdock.runtime.profiler import mark_backward, span, spanned
from crossdock.runtime.training.context import StepContext
from crossdock.runtime.transport.collectives import all_reduce
from crossdock.runtime.transport.mesh import Mesh
from crossdock.runtime.transport.wire import wire_named


class MoELayer(nn.Module):
    """Routed experts: y = sum over the chosen experts i of weight_i x expert_i(x).

    In a model of Crossdock a schedule drives it step by step: `route`, `prepare`, `start`, `compute`, `combine_start`. Anywhere else
    `layer(x)` does all of it, and `layer.losses` then holds the balance losses to add to the training loss. `layer.finish_gradients()`
    after the backward pass turns the experts' gradients into those of the loss's mean over ranks, as `DistributedDataParallel` does for
    the rest of the model. The experts differ from rank to rank, so `DistributedDataParallel` itself must be told to leave them alone, or it
    overwrites all of them with those of rank 0; before the model is wrapped:

        experts = [name for name, _ in model.named_parameters() if ".bank." in f".{name}"]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, experts)

    Args:
        model_width, expert_width: D and F. num_experts: E of the whole layer, not of this rank. top_k: K.
        gate: the router and its losses; noisy top-k where None. activation: "swiglu" or "gelu".
        mesh: who holds which experts; one process where None. plan, layer: the plan that places them and which of its layers this is, 0
            for a layer by itself; in contiguous blocks, also of unequal size, where plan is None.
        dispatch: "flat", "deduplicated" or "hierarchical". wire: the format of rows between ranks, "fp64", "fp32", "bf16" or "int8"; the
            tokens' own where None.
        dtype: of the experts and of what they compute in; the router is of float32 or wider.
        seed, initial_std, output_scale: initial values, the same on any number of ranks; see `ExpertBank.reset_parameters`.
        expert_recompute: what backward computes again instead of keeping it: "none", "activation" or "all".
        gathered_experts: those whose weights travel to all ranks instead of their tokens.
        turns: how often a forward pass of the model routes each token here.

    Every rank of the mesh makes the same calls in the same order. Raises `BadConfig` for what does not fit together, `BadData` for a plan
    of another model.
    """

    def __init__(
        self,
        model_width: int,
        expert_width: int,
        num_experts: int,
        top_k: int,
        *,
        gate: AnyGateConfig | None = None,
        activation: str = "swiglu",
        mesh: Mesh | None = None,
        plan: Plan | None = None,
        layer: int = 0,
        dispatch: str = "deduplicated",
        wire: str | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        initial_std: float = 0.02,
        output_scale: float = 1.0,
        expert_recompute: Recompute = "none",
        gathered_experts: Collection[int] = (),
        turns: int = 1,
    ) -> None:
        super().__init__()
        self.turns = turns  # how often a forward pass of the model routes each token here
        self.mesh = mesh if mesh is not None else Mesh.single()
        self.layer, self.seed = layer, seed
        self.dispatch, self.wire = dispatch, wire_named(wire)
        if dispatch not in DISPATCHERS:
            raise BadConfig(f"no dispatcher is called {dispatch!r}; choose from {', '.join(DISPATCHERS)}")
        self.plan_has_copies = plan is not None and plan.has_replicas
        layout = ExpertLayout.contiguous(layer, num_experts, self.mesh) if plan is None else ExpertLayout.from_plan(plan, layer, self.mesh)
        if layout.num_experts != num_experts:
            raise BadData(f"the plan places {layout.num_experts} experts, and the layer has {num_experts}; solve a plan for this model")
        self.gate = build_gate(gate or NoisyTopKConfig(), layer, model_width, num_experts, top_k, dtype).to(self.mesh.device)
        self.bank = ExpertBank(layout, model_width, expert_width, activation, dtype, self.mesh.device, recompute=expert_recompute)
        self.gathered_experts = tuple(gathered_experts)
        self._set_dispatcher(layout)
        self.gate.reset_parameters(named_fill(seed, f"moe.{layer}.gate."), initial_std)
        self.bank.reset_parameters(seed, initial_std, output_scale)
        self.losses: dict[str, Tensor] = {}
        self._num_forwards = 0

    def forward(self, x: Tensor, context: StepContext | None = None) -> Tensor:
        """Route `x` [..., T, D] and return y of its shape and dtype; leading dimensions are sequences, and a rank may have no tokens.

        Sets `self.losses`, scalars of the global batch and equal on every rank. Experts compute in the layer's own dtype, also under
        autocast. Without a context, steps are counted by forwards in training mode, and every rank must bring equally many tokens.
        Raises `BadData` for another width, and `BadConfig` where activation checkpointing computes again without a context.
        """
        if x.ndim < 2 or x.shape[-1] != self.bank.model_width:
            raise BadData(
                f"x has shape {list(x.shape)}, and the layer is for tokens of width {self.bank.model_width}; "
                f"give it [..., tokens, {self.bank.model_width}]"
            )
        x_TD = x.reshape(-1, x.shape[-1]).to(self.bank.inner.dtype)
        if context is None:
            context = self._plain_context(x_TD)
        self.prefetch()
        routing = self.route(x_TD, context, max(1, x.shape[-2]))  # a rank without tokens has no sequences to divide
        received = self.dispatch_start(x_TD, routing.assignment).wait()
        y_TD = self.combine_start(self.compute(received)).wait()
        (statistics,) = reduce_statistics([routing.statistics], self.mesh)
        self.losses = self.gate.balance(statistics, context.training).losses
        return y_TD.view(x.shape).to(x.dtype)

    def prefetch(self) -> None:
        """Start what waits for no token, the weights of gathered experts; whatever computes until `compute` may hide them."""
        if self.gathering is not None:
            self.gathering.start()

    def route(self, x_TD: Tensor, context: StepContext, tokens_per_sequence: int, turn: Turn = FIRST) -> Routing:
        """The gate's choice, shown to every listener of the context."""
        if self.gathering is not None and turn.barred_TK is None:  # a second half of a block uses the weights of the first
            self.gathering.enter()
        with span("route"):
            routing: Routing = self.gate(x_TD, context, tokens_per_sequence, turn, partial(largest_over_world, mesh=self.mesh))
            for listener in context.listeners:
                listener(self.layer, routing.assignment)
        return routing

    def dispatch_start(self, x_TD: Tensor, assignment: Assignment) -> Pending[Dispatched]:
        """Send tokens [T, D] to the ranks of their experts."""
        (prepared,) = self.prepare([assignment])
        return self.start(prepared, x_TD)

    def prepare(self, pieces: Sequence[Assignment]) -> Sequence[Prepared]:
        """Begin to tell the experts' ranks what will come of each piece of the tokens, in one exchange."""
        with span("dispatch"):
            return self.dispatcher.prepare(pieces)

    def start(self, prepared: Prepared, x_TD: Tensor) -> Pending[Dispatched]:
        """Send the tokens [T, D] of one piece to the ranks of their experts."""
        with span("dispatch"):
            return spanned(prepared.start(x_TD), "dispatch")

    def compute(self, received: Dispatched) -> tuple[Tensor, Handle]:
        """Run this rank's experts over the rows that arrived, sorted by slot."""
        rows_MD, count_S, handle = received
        if self.gathering is not None:
            self.gathering.arrive()
        experts = self.bank if self.gathering is None else self.gathering
        with span("experts"):
            computed_MD = experts(rows_MD, count_S)
        mark_backward("experts", computed_MD, rows_MD)
        return computed_MD, handle

    def network(self) -> Network:
        """This rank's experts as tensors, gathered ones included once they are here."""
        if self.gathering is None:
            return self.bank.network()
        self.gathering.arrive()
        return self.gathering.network()

    def combine_start(self, computed: tuple[Tensor, Handle]) -> Pending[Tensor]:
        """Send the experts' rows back to the ranks of their tokens; the result is y [T, D]."""
        rows_MD, handle = computed
        with span("combine"):
            return spanned(self.dispatcher.combine_start(rows_MD, handle), "combine")

    def set_layout(self, layout: ExpertLayout, tensors: dict[str, Tensor]) -> None:
        """Take over a new placement and this rank's expert tensors under it, after a migration."""
        self.bank.replace_layout(layout, tensors)
        self._set_dispatcher(layout)

    def set_gathered(self, experts: Collection[int]) -> None:
        """From the next forward pass on, move the weights of `experts` instead of their tokens; the same on every rank.

        Raises `BadConfig` for experts that the layer does not have.
        """
        self.gathered_experts = tuple(experts)
        self._set_dispatcher(self.layout)

    def set_strategy(self, strategy: Strategy) -> None:
        """From the next forward pass on, dispatch as `strategy` says and gather its experts; the same on every rank. No weight moves.

        Its slot and chunks are the schedule's: see `Transformer.set_schedules`. Raises `BadConfig` for a dispatcher or experts that there
        are not.
        """
        if strategy.dispatch not in DISPATCHERS:
            raise BadConfig(f"no dispatcher is called {strategy.dispatch!r}; choose from {', '.join(DISPATCHERS)}")
        self.dispatch = strategy.dispatch
        self.set_gathered(strategy.gathered)

    def finish_gradients(self) -> None:
        """Sum the experts' gradients over the copies of the expert group and divide them by the world size: call once after backward.

        Only for loops that reduce gradients themselves; the engine of Crossdock does it for its own models. Raises `BadConfig` for a plan
        that holds several copies of an expert in one group: they need the engine.
        """
        if self.plan_has_copies:
            raise BadConfig(
                "finish_gradients cannot sum copies of an expert inside a group; use a plan without copies, or "
                "runtime.optimization.engine.Engine"
            )
        for parameter in self.bank.parameters():
            if parameter.grad is None:  # no token of any rank came here, but the other copies may have had some
                parameter.grad = torch.zeros_like(parameter)
            all_reduce(parameter.grad, self.mesh.expert_replica_group).div_(self.mesh.world_size)

    def _set_dispatcher(self, layout: ExpertLayout) -> None:
        """`layout` is the plan's; with gathered experts the dispatcher sees them on every rank."""
        self.layout = layout
        self.gathering: GatheringBank | None = None
        if self.gathered_experts:
            layout = layout.with_gathered(self.gathered_experts, self.mesh)
            self.gathering = GatheringBank(self.bank, layout, self.mesh)
        self.dispatcher: Dispatcher = DISPATCHERS[self.dispatch](self.mesh, layout, self.wire)

    def _plain_context(self, x_TD: Tensor) -> StepContext:
        if self.training and torch._C._current_graph_task_id() >= 0:  # inside a backward pass
            raise BadConfig(
                "activation checkpointing computes this forward again, and without a context it would count as another step and draw other "
                "noise; call layer(x, StepContext(seed, step, True, token_ids, first_token)), or leave the layer out of checkpointing"
            )
        step = self._num_forwards
        self._num_forwards += self.training
        unknown_T = torch.zeros(len(x_TD), dtype=torch.int64, device=x_TD.device)
        return StepContext(self.seed, step, self.training, unknown_T, first_token=self.mesh.rank * len(x_TD))
