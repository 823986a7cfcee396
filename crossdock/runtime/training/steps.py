"""One optimizer step on this rank, and evaluation: batches, forward and backward, reduction, update, and the step's metrics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossdock.placement.records.plan import Plan, choose_replica
from crossdock.placement.records.topology import LINK_CLASSES
from crossdock.runtime.adaptation.capture import Capture
from crossdock.runtime.data import Batch, Corpus, DataState, Sampler, sequences_per_rank
from crossdock.runtime.optimization.engines import AnyEngine
from crossdock.runtime.optimization.optimizer import OptimizerConfig, learning_rate
from crossdock.runtime.phases import reached
from crossdock.runtime.training.context import Listener, StepContext
from crossdock.runtime.training.homing import Homing
from crossdock.runtime.training.stopwatch import Stopwatch, peak_memory_bytes
from crossdock.runtime.transport import collectives
from crossdock.runtime.transport.exchange import naming_lost_peers
from crossdock.runtime.transport.ledger import Flight, bytes_by_class, exposed_s
from crossdock.runtime.transport.mesh import Mesh
from crossdock.strict_yaml import StrictModel


class TrainConfig(StrictModel):
    """How long and how to train."""

    steps: int = pydantic.Field(default=200, ge=1)
    seed: int = pydantic.Field(default=0, ge=0)
    batch_sequences: int = pydantic.Field(default=32, ge=1)
    """Sequences of one optimizer step over all ranks; must divide over ranks x accumulate."""
    accumulate: int = pydantic.Field(default=1, ge=1)
    """Micro-batches of one optimizer step."""
    eval_every: int = pydantic.Field(default=0, ge=0)
    """Steps between evaluations on held-out text; 0 evaluates once, at the end."""
    eval_batches: int = pydantic.Field(default=4, ge=0)
    """Batches of `batch_sequences` held-out sequences per evaluation; 0 never evaluates."""
    optimizer: OptimizerConfig = OptimizerConfig()


class Output(Protocol):
    """What the model returns: see `models.transformer.ModelOutput`."""

    logits_QPV: Tensor
    losses: Mapping[str, Tensor]
    load_LE: Tensor
    dropped: Tensor


@dataclass(frozen=True, eq=False)
class Step:
    """A finished step: this rank's flights, bytes of all ranks by link class, whether any rank was asked to stop, and the metrics."""

    flights: tuple[Flight, ...]
    bytes_by_class: tuple[int, ...]
    step_s: float
    exposed_s: float
    loss: float
    stop: bool
    load_LE: np.ndarray
    """float64 [L, E]: assignments that each expert served in the global batch."""
    metrics: dict[str, Any]


class Stepper:
    """Runs steps of one model on one rank; holds no position in the data."""

    def __init__(
        self,
        model: nn.Module,
        engine: AnyEngine,
        corpus: Corpus,
        seq_len: int,
        config: TrainConfig,
        mesh: Mesh,
        homing: Homing | None = None,
    ) -> None:
        self.model, self.engine, self.seq_len, self.config, self.mesh = model, engine, seq_len, config, mesh
        self.homing = homing if engine.plan is not None else None
        self.sequences_per_rank = sequences_per_rank(config.batch_sequences, mesh.world_size, config.accumulate)
        self.sampler = Sampler(corpus.train, seq_len, corpus.vocab_size, config.seed, corpus.source)
        self.held_out = Sampler(corpus.held_out, seq_len, corpus.vocab_size, config.seed, corpus.source)
        self._share_of: tuple[Plan, np.ndarray] | None = None

    @property
    def tokens_per_rank(self) -> int:
        """Tokens of one micro-batch on one rank."""
        return self.sequences_per_rank * self.seq_len

    def after(self, state: DataState) -> DataState:
        """Where the next step begins to read."""
        return self.sampler.after(state, self.config.batch_sequences)

    def run(self, number: int, state: DataState, captures: Sequence[Capture], stop_asked: bool) -> Step:
        """Update number `number` (from 0) on the batch at `state`; each capture records its routing.

        Raises `NonFiniteLoss` on every rank.
        """
        config, mesh = self.config, self.mesh
        reached("step", number)
        watch = Stopwatch(mesh.device)
        self.model.train()
        losses: dict[str, Tensor] = {}
        load_LE = dropped = torch.zeros((), dtype=torch.float64, device=mesh.device)
        if self.homing is not None and self.engine.plan is not None:
            self.homing.begin(self.engine.plan)
        for micro in range(config.accumulate):
            batch = self._batch(state, micro)
            token_QP, target_QP = self._on_device(batch)
            watch.lap("data_s")
            with naming_lost_peers():  # dense parameters in parts are gathered on the way
                output: Output = self.model(token_QP, self._context(batch, token_QP, number, captures))
            parts = {
                "loss": cross_entropy(output.logits_QPV, target_QP),
                **{f"loss_{name}": value for name, value in output.losses.items()},
            }
            reached("loss", parts["loss"])
            total = torch.stack([part.to(parts["loss"].dtype) for part in parts.values()]).sum() / config.accumulate
            watch.lap("forward_s")
            self.engine.backward(total, last=micro == config.accumulate - 1)
            watch.lap("backward_s")
            losses = {name: losses.get(name, 0) + part.detach() / config.accumulate for name, part in parts.items()}
            load_LE, dropped = load_LE + output.load_LE, dropped + output.dropped
        self.engine.reduce()
        watch.lap("reduce_s")
        reached("optimizer")
        flights = mesh.ledger.take()
        spent = {**watch.read(), "exposed_s": exposed_s(flight for flight in flights if flight.kind != "gradients")}
        sent = {f"bytes_{name}": float(size) for name, size in zip(LINK_CLASSES, bytes_by_class(flights), strict=True)}
        lr = learning_rate(config.optimizer, number, config.steps)
        of_homes = {} if self.homing is None else self.homing.sums()
        report = self.engine.step(number + 1, lr, {**losses, **spent, **sent, **of_homes, "stop": float(stop_asked)})
        watch.lap("update_s")
        phases = watch.read()
        counted_LE = load_LE.cpu().numpy()
        step_s, tokens = sum(phases.values()), config.batch_sequences * self.seq_len
        mean = {name: report.sums[name] / mesh.world_size for name in (*losses, *spent)}
        total_bytes = {name: int(report.sums[name]) for name in sent}
        metrics = {
            "step": number + 1,
            "epoch": state.epoch,
            "tokens": tokens,
            "grad_norm": report.grad_norm,
            "lr": lr,
            "tokens_per_s": tokens / step_s,
            "step_s": step_s,
            "update_s": phases["update_s"],
            **mean,
            **total_bytes,
            **self._loads(counted_LE, dropped),
            **({} if self.homing is None else self.homing.metrics(report.sums)),
            "memory_bytes": peak_memory_bytes(mesh.device),
        }
        return Step(
            flights, tuple(total_bytes.values()), step_s, mean["exposed_s"], mean["loss"], report.sums["stop"] > 0, counted_LE, metrics
        )

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean cross-entropy per token on held-out text, the same on every rank and for every world."""
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        batches = self.held_out.evaluation(
            self.config.eval_batches, self.sequences_per_rank * self.mesh.world_size, rank=self.mesh.rank, world_size=self.mesh.world_size
        )
        for batch in batches:
            token_QP, target_QP = self._on_device(batch)
            with naming_lost_peers():
                output: Output = self.model(token_QP, self._context(batch, token_QP, number=0, captures=(), training=False))
            sums += torch.tensor([float(cross_entropy(output.logits_QPV, target_QP)) * target_QP.numel(), target_QP.numel()])
        loss_sum, num_targets = collectives.all_gather_numbers(sums.tolist(), self.mesh).sum(axis=0).tolist()
        self.mesh.ledger.take()  # evaluation's traffic is no step's
        return float(loss_sum / num_targets)

    def _batch(self, state: DataState, micro: int) -> Batch:
        """This rank's share of a micro-batch of the step that begins at `state`."""
        sequences, accumulate = self.config.batch_sequences, self.config.accumulate
        if self.homing is not None:
            return self.homing.batch(self.sampler, state, sequences, micro=micro, accumulate=accumulate)
        mesh = self.mesh
        return self.sampler.batch(state, sequences, rank=mesh.rank, world_size=mesh.world_size, micro=micro, accumulate=accumulate)

    def _on_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        token_QP, target_QP = (
            torch.from_numpy(np.ascontiguousarray(values)).to(self.mesh.device) for values in (batch.token_BQ, batch.target_BQ)
        )
        return token_QP, target_QP

    def _context(self, batch: Batch, token_QP: Tensor, number: int, captures: Sequence[Capture], training: bool = True) -> StepContext:
        token_T = token_QP.reshape(-1)
        for capture in captures:
            sequence_B = torch.from_numpy(batch.sequence_B).to(self.mesh.device)
            capture.begin(token_T, sequence_B.repeat_interleave(self.seq_len, output_size=len(token_T)))
        listeners: tuple[Listener, ...] = tuple(capture.listener for capture in captures)
        number_T = None
        if batch.place_B is not None and self.homing is not None:
            listeners = (*listeners, self.homing.listener)
            number_BQ = batch.place_B[:, None] * self.seq_len + np.arange(self.seq_len)
            number_T = torch.from_numpy(number_BQ.reshape(-1)).to(self.mesh.device)
        return StepContext(self.config.seed, number, training, token_T, batch.first_token, listeners, number_T)

    def _loads(self, counted_LE: np.ndarray, dropped: Tensor) -> dict[str, Any]:
        """Load of devices and of experts over their means, averaged over layers; the share dropped; the plan."""
        plan = self.engine.plan
        if plan is None:
            return {"load_max_over_mean": 1.0, "expert_load_max_over_mean": 1.0, "dropped": 0.0}
        if self._share_of is None or self._share_of[0] is not plan:
            self._share_of = (plan, device_shares_LER(plan, self.mesh.node_of_expert_rank))
        num_dropped = float(dropped)
        return {
            "load_max_over_mean": _max_over_mean(np.einsum("le,ler->lr", counted_LE, self._share_of[1])),
            "expert_load_max_over_mean": _max_over_mean(counted_LE),
            "dropped": num_dropped / max(1.0, num_dropped + float(counted_LE.sum())),
            "plan": plan.digest[:12],
        }


def cross_entropy(logits_QPV: Tensor, target_QP: Tensor) -> Tensor:
    """Mean over the rank's tokens, in fp32 or wider."""
    wide = logits_QPV.to(torch.promote_types(logits_QPV.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, -2), target_QP.flatten())


def device_shares_LER(plan: Plan, node_of_R: Sequence[int]) -> np.ndarray:
    """float64 [L, E, R]: the part of each expert's assignments that each device computes, homes being equally many everywhere."""
    device_LRE = choose_replica(plan, node_of_R) // plan.slots_per_device
    return (device_LRE[:, :, :, None] == np.arange(plan.num_devices)).mean(axis=1)


def _max_over_mean(load_LX: np.ndarray) -> float:
    mean_L = load_LX.mean(axis=1)
    busy_L = mean_L > 0
    return float((load_LX.max(axis=1)[busy_L] / mean_L[busy_L]).mean()) if busy_L.any() else 1.0
