"""One training step of a model on one rank of a world, with everything that must not depend on the world: for tests in worker processes."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crossdock.models.config import ModelConfig
from crossdock.models.transformer import Transformer
from crossdock.placement.records.plan import Plan
from crossdock.runtime.training.context import StepContext
from crossdock.runtime.transport.collectives import all_reduce
from crossdock.runtime.transport.mesh import Mesh
from tests.pool import mesh_for
from tests.runtime.tiny import lopsided_plan

TOLERANCE = 1e-10


@dataclass(frozen=True)
class Case:
    """What is trained, and how the world around it looks."""

    model: dict[str, Any]
    expert_parallel: int = 1
    plan: str = "contiguous"
    dispatch: str = "deduplicated"
    sequences: int = 4
    positions: int = 6
    num_steps: int = 1
    micro_batches: int = 1
    training: bool = True
    router_bias: tuple[float, ...] = ()
    nodes: tuple[int, ...] | None = None

    @property
    def config(self) -> ModelConfig:
        base: dict[str, Any] = {
            "vocab_size": 17,
            "num_layers": 2,
            "model_width": 8,
            "num_heads": 2,
            "num_kv_heads": 1,
            "num_experts": 8,
            "expert_width": 6,
            "initial_std": 0.3,  # large, so that every part of the model matters to the last digit
        }
        return ModelConfig.model_validate(base | self.model)


@dataclass
class Outcome:
    """What one rank saw, and its gradients after reduction."""

    logits: Tensor
    losses: dict[str, float]
    load: Tensor
    dropped: float
    dense: dict[str, Tensor]
    experts: dict[tuple[int, int, str], Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)


def make_plan(kind: str, config: ModelConfig, devices: int, seed: int = 5) -> Plan | None:
    """None, or a plan drawn at random: a permutation; uneven with empty slots; with copies of some experts; or `tiny.lopsided_plan`."""
    if kind == "contiguous" or not config.num_moe_layers:
        return None
    if kind.startswith("lopsided"):
        return lopsided_plan(devices, kind == "lopsided_copies", config.num_moe_layers, config.num_experts) if devices > 1 else None
    rng = np.random.default_rng(seed)
    layers, experts = config.num_moe_layers, config.num_experts
    spare = {"random": 0, "uneven": 2, "copies": 1}[kind]
    slots = experts // devices + spare
    slots_LRS = np.full((layers, devices, slots), -1, dtype=np.int32)
    for layer in range(layers):
        places = rng.permutation(devices * slots)[:experts]
        slots_LRS[layer].reshape(-1)[places] = rng.permutation(experts)
        if kind == "copies":
            for device in range(devices):
                absent = [e for e in range(experts) if e not in slots_LRS[layer, device]]
                empty = np.flatnonzero(slots_LRS[layer, device] < 0)
                fill = rng.permutation(absent)[: len(empty)]
                slots_LRS[layer, device, empty[: len(fill)]] = fill
    return Plan(slots_LRS=slots_LRS, num_experts=experts)


def run_step(rank: int, world_size: int, case: Case) -> Outcome:
    """Forward and backward of this rank's share of the same global batch, then the reduction of gradients that an engine would do."""
    config = case.config
    mesh = mesh_for(rank, world_size, case.expert_parallel if world_size > 1 else 1, case.nodes)
    plan = make_plan(case.plan, config, mesh.expert_parallel)
    model = Transformer(config, mesh, plan, torch.float64, seed=3, dispatch=case.dispatch)
    if case.router_bias:
        for moe in model.moe_layers:
            moe.gate.bias_E.copy_(torch.tensor(case.router_bias))
    generator = torch.Generator().manual_seed(11)
    for step in range(case.num_steps):
        model.zero_grad()
        for micro_batch in range(case.micro_batches):
            batch_QP = torch.randint(0, config.vocab_size, (case.sequences, case.positions + 1), generator=generator)
            share_QP = batch_QP.chunk(world_size)[rank]
            token_QP, target_QP = share_QP[:, :-1], share_QP[:, 1:]
            first = micro_batch * case.sequences * case.positions + rank * token_QP.numel()
            context = StepContext(7, step, case.training, token_QP.reshape(-1), first)
            output = model(token_QP, context)
            loss = F.cross_entropy(output.logits_QPV.flatten(0, 1), target_QP.flatten())
            (loss + sum(output.losses.values())).backward()
    dense, experts = _reduced(model, mesh)
    return Outcome(
        output.logits_QPV.detach(),
        {name: float(value.detach()) for name, value in output.losses.items()},
        output.load_LE,
        float(output.dropped),
        dense,
        experts,
        {name: buffer.clone() for name, buffer in model.named_buffers()},
    )


def _reduced(model: Transformer, mesh: Mesh) -> tuple[dict[str, Tensor], dict[tuple[int, int, str], Tensor]]:
    banks = {id(p): (moe.layer, name) for moe in model.moe_layers for name, p in moe.bank.expert_tensors().items()}
    experts_of = {moe.layer: moe.layout.local_experts for moe in model.moe_layers}
    dense: dict[str, Tensor] = {}
    experts: dict[tuple[int, int, str], Tensor] = {}
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        if id(parameter) not in banks:
            dense[name] = all_reduce(gradient, mesh.dense_group) / mesh.world_size
            continue
        gradient = all_reduce(gradient, mesh.expert_replica_group) / mesh.world_size
        layer, tensor = banks[id(parameter)]
        for slot, expert in enumerate(experts_of[layer]):
            if expert >= 0:
                experts[layer, expert, tensor] = gradient[slot]
    return dense, experts


def check_equal(outcomes: list[Outcome], reference: Outcome, expert_parallel: int) -> None:
    """Outputs, losses, load, state and every gradient of n ranks equal those of one rank."""
    close = {"rtol": TOLERANCE, "atol": TOLERANCE}
    torch.testing.assert_close(torch.cat([outcome.logits for outcome in outcomes]), reference.logits, **close)
    summed: dict[tuple[int, int, str], Tensor] = {}
    for number, outcome in enumerate(outcomes):
        assert outcome.losses == {name: _near(value) for name, value in reference.losses.items()}
        torch.testing.assert_close(outcome.load, reference.load, rtol=0, atol=0)
        assert outcome.dropped == reference.dropped
        assert outcome.dense.keys() == reference.dense.keys()
        for name, gradient in reference.dense.items():
            torch.testing.assert_close(outcome.dense[name], gradient, msg=lambda text, name=name: f"{name}: {text}", **close)
        for name, buffer in reference.buffers.items():
            torch.testing.assert_close(outcome.buffers[name], buffer, **close)
        if number < expert_parallel:  # one expert group; copies inside it hold parts of the gradient
            for key, gradient in outcome.experts.items():
                summed[key] = summed[key] + gradient if key in summed else gradient
    assert summed.keys() == reference.experts.keys()
    for key, gradient in reference.experts.items():
        torch.testing.assert_close(summed[key], gradient, msg=lambda text, key=key: f"expert {key}: {text}", **close)


def _near(value: float) -> Any:
    return pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE)
