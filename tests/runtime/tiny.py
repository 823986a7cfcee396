"""A tiny model and its engine on any world, and the census by which states of different worlds are compared."""

from typing import Any

import numpy as np
import torch

from crossdock.models.config import ModelConfig
from crossdock.models.transformer import Transformer
from crossdock.placement.records.plan import Plan
from crossdock.runtime.checkpoints.checkpoint import persistent_buffers, pieces
from crossdock.runtime.data import DataConfig, DataState
from crossdock.runtime.optimization.engine import Engine
from crossdock.runtime.optimization.engines import AnyEngine
from crossdock.runtime.optimization.optimizer import OptimizerConfig
from crossdock.runtime.training.steps import Stepper, TrainConfig
from crossdock.runtime.transport.mesh import Mesh
from tests.pool import mesh_for

NUM_EXPERTS = 8
SEQ_LEN = 16
MODEL = ModelConfig(num_layers=4, model_width=16, num_heads=2, num_experts=NUM_EXPERTS, top_k=2, vocab_size=256)
OPTIMIZER = OptimizerConfig(lr=3e-3, warmup_steps=2, clip_norm=0.5)
"""A norm low enough that every step is clipped."""
TRAIN = TrainConfig(steps=12, batch_sequences=8, optimizer=OPTIMIZER, eval_batches=2)


def random_plan(num_devices: int, seed: int, extra_slots: int = 0, num_layers: int = MODEL.num_moe_layers) -> Plan:
    """Experts anywhere; with `extra_slots` per device some have several copies and some slots stay empty."""
    rng = np.random.default_rng(seed)
    slots = NUM_EXPERTS // num_devices + extra_slots
    layers = []
    for _ in range(num_layers):
        order = rng.permutation(NUM_EXPERTS).reshape(num_devices, -1).tolist()
        for device in order:
            absent = [expert for expert in range(NUM_EXPERTS) if expert not in device]
            device += rng.permutation(absent)[: max(0, extra_slots - 1)].tolist()
            device += [-1] * (slots - len(device))
            rng.shuffle(device)
        layers.append(order)
    return Plan(np.array(layers), NUM_EXPERTS, method="random")


def lopsided_plan(num_devices: int, copies: bool = False, num_layers: int = MODEL.num_moe_layers, num_experts: int = NUM_EXPERTS) -> Plan:
    """Experts anywhere, very different numbers of them on each device and none on one, another one in each layer.

    copies: of two experts, on the device with fewest, or of two devices on the one with none.
    """
    rng = np.random.default_rng(num_devices)
    slots_LRS = np.full((num_layers, num_devices, num_experts), -1)
    for layer in range(num_layers):
        empty, *others = np.roll(np.arange(num_devices), layer).tolist()
        ends = [num_experts * (2**place - 1) // (2 ** len(others) - 1) for place in range(1, len(others) + 1)]  # 1 : 2 : 4 : ...
        for device, held in zip(others, np.split(rng.permutation(num_experts), ends[:-1]), strict=True):
            slots_LRS[layer, device, : len(held)] = held
        if copies:
            smallest = others[0] if len(others) > 1 else empty
            slots_LRS[layer, smallest, -2:] = slots_LRS[layer, others[-1], :2]
    return Plan(slots_LRS, num_experts, method="lopsided")


def text(num_bytes: int = 6000) -> bytes:
    """Words of a small vocabulary, so that there is something to learn."""
    rng = np.random.default_rng(7)
    words = [bytes(rng.integers(97, 122, rng.integers(2, 7)).tolist()) for _ in range(40)]
    return b" ".join(words[number] for number in rng.zipf(1.5, num_bytes // 4) % 40)[:num_bytes]


def corpus(tmp_folder: str) -> Any:
    """The corpus of `text`, from a file in a folder that all ranks see."""
    from pathlib import Path

    from crossdock.runtime.data import load_corpus

    return load_corpus(DataConfig(kind="text", path=str(Path(tmp_folder) / "text"), seq_len=SEQ_LEN, held_out=0.2))


def build(mesh: Mesh, plan: Plan, dtype: torch.dtype = torch.float64, model: ModelConfig = MODEL, dispatch: str = "flat") -> Transformer:
    """The model under `plan`."""
    return Transformer(model, mesh, plan, dtype, seed=5, dispatch=dispatch)


def stepper(
    rank: int,
    world_size: int,
    folder: str,
    plan: Plan,
    config: TrainConfig = TRAIN,
    dtype: torch.dtype = torch.float64,
    model: ModelConfig = MODEL,
) -> Stepper:
    """Engine and steps of this rank; R is the plan's."""
    mesh = mesh_for(rank, world_size, plan.num_devices, tuple(number % 2 for number in range(world_size)) if world_size > 1 else None)
    network = build(mesh, plan, dtype, model)
    return Stepper(network, Engine(network, mesh, plan, config.optimizer), corpus(folder), SEQ_LEN, config, mesh)


def run_steps(steps: Stepper, first: int, last: int) -> list[tuple[float, float]]:
    """Steps `first` .. `last` - 1: (loss, gradient norm) of each."""
    state = DataState()
    for _ in range(first):
        state = steps.after(state)
    seen = []
    for number in range(first, last):
        done = steps.run(number, state, (), stop_asked=False)
        seen.append((done.loss, done.metrics["grad_norm"]))
        state = steps.after(state)
    return seen


def census(engine: AnyEngine) -> dict[str, np.ndarray]:
    """All states of what this rank's model holds, by logical key; every rank calls it."""
    named = list(pieces(engine))
    states = engine.collect([piece for _, piece in named])
    whole = {f"{key}/{state}": values for key, piece in named for state, values in states[piece].items()}
    whole |= {f"buffer/{name}": values for name, values in persistent_buffers(engine.model).items()}
    return {key: values.detach().cpu().clone().numpy() for key, values in whole.items()}


def merged(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The census of all ranks; ranks that hold the same key must agree to the bit."""
    whole: dict[str, np.ndarray] = {}
    for part in parts:
        for key, values in part.items():
            assert key not in whole or np.array_equal(whole[key], values), f"ranks differ in {key}"
            whole[key] = values
    return whole


def assert_close(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], tolerance: float) -> None:
    """The same keys, and values within `tolerance`; 0 means bitwise."""
    assert found.keys() == wanted.keys()
    for key, values in wanted.items():
        if tolerance == 0.0:
            assert np.array_equal(found[key], values), key
        else:
            np.testing.assert_allclose(found[key], values, rtol=0, atol=tolerance, err_msg=key)
