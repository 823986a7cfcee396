"""Inputs shared by the placement tests: small random traces and plans, and the real traces where they are at hand."""

import os
from pathlib import Path

import numpy as np
import pytest

from crossdock.placement.records.plan import EMPTY, Plan
from crossdock.placement.records.trace import NO_EXPERT, Trace


def random_trace(
    seed: int = 0,
    *,
    num_tokens: int = 40,
    num_layers: int = 3,
    num_experts: int = 8,
    top_k: int = 2,
    num_homes: int | None = None,
    num_sequences: int | None = None,
    drop: float = 0.0,
) -> Trace:
    """Skewed random routing; `drop` is the chance that a choice is absent."""
    rng = np.random.default_rng(seed)
    score_TLE = rng.random((num_tokens, num_layers, num_experts)) * (1.0 + np.arange(num_experts))
    experts_TLK = np.argsort(-score_TLE, axis=2)[:, :, :top_k].astype(np.uint16)
    experts_TLK[rng.random(experts_TLK.shape) < drop] = NO_EXPERT
    return Trace(
        experts_TLK,
        num_experts,
        home_T=None if num_homes is None else rng.integers(0, num_homes, num_tokens),
        sequence_T=None if num_sequences is None else rng.integers(0, num_sequences, num_tokens),
        source=f"random {seed}",
    )


def random_plan(seed: int = 0, *, num_layers: int = 3, num_experts: int = 8, num_devices: int = 4, num_slots: int | None = None) -> Plan:
    """Every expert once at a random place; slots beyond that hold random replicas or stay empty."""
    rng = np.random.default_rng(seed)
    num_slots = num_slots or -(-num_experts // num_devices)
    slots_LRS = np.full((num_layers, num_devices, num_slots), EMPTY)
    for layer in range(num_layers):
        places = rng.permutation(num_devices * num_slots)
        slots_LRS[layer].reshape(-1)[places[:num_experts]] = rng.permutation(num_experts)
        for place in places[num_experts:]:
            device, slot = divmod(int(place), num_slots)
            expert = int(rng.integers(-1, num_experts))
            if expert not in slots_LRS[layer, device]:
                slots_LRS[layer, device, slot] = expert
    return Plan(slots_LRS, num_experts, method="random", seed=seed)


@pytest.fixture(scope="session")
def real_trace() -> Trace:
    """Routing of a real model: the first .npz of the folder that CROSSDOCK_TRACES names."""
    folder = os.environ.get("CROSSDOCK_TRACES")
    if not folder:
        pytest.skip("CROSSDOCK_TRACES names no folder of real traces")
    files = sorted(Path(folder).glob("*.npz"))
    if not files:
        pytest.skip(f"CROSSDOCK_TRACES={folder} holds no .npz")
    return Trace.load(files[0])
