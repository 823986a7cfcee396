"""Memory from the configuration, held against what a rank really keeps: every storage that lives when backward begins."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from crossdock.models.config import ModelConfig
from crossdock.models.memory import Memory, Zero, rank_memory
from crossdock.models.transformer import Transformer
from crossdock.placement.records.plan import Plan
from crossdock.runtime.optimization.deepspeed_engine import DeepSpeedConfig, DeepSpeedEngine
from crossdock.runtime.optimization.engine import Engine
from crossdock.runtime.optimization.fsdp import is_part, local_part, shard_dense
from crossdock.runtime.optimization.optimizer import OptimizerConfig
from crossdock.runtime.training.context import StepContext
from crossdock.runtime.training.steps import cross_entropy
from tests.pool import Pool, mesh_for

SEQUENCES, POSITIONS = 4, 64
BUCKET = 4096
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
BASE: dict[str, Any] = {"num_layers": 4, "model_width": 64, "num_heads": 4, "num_experts": 8, "vocab_size": 128}
MODELS: dict[str, dict[str, Any]] = {
    "scmoe": {},
    "dense": {"block": "dense", "num_kv_heads": 2, "tied_head": True},
    "top2": {"block": "top_k", "expert_width": 96},
    "top1_gelu": {"block": "top_k", "moe_every": 1, "top_k": 1, "gate": {"kind": "switch"}, "activation": "gelu"},
    "shared": {"block": "shared_expert", "shared_expert_width": 48, "gate": {"kind": "gshard"}},
    "cg2": {"shortcut": {"coefficient": "cg2"}, "gate": {"kind": "deepseek_v3"}},
    "dgmoe": {"block": "dgmoe", "top_k": 1},
    "dgmoe_share": {"block": "dgmoe_share", "top_k": 1},
    "qwen": {"block": "top_k", "moe_every": 1, "qk_norm": True, "head_dim": 32, "num_kv_heads": 2, "gate": {"kind": "softmax_topk"}},
    "many_experts": {"block": "top_k", "num_experts": 32, "top_k": 4, "expert_width": 24},
    "recompute_all": {"block": "top_k", "expert_recompute": "all"},
    "recompute_some": {"block": "top_k", "expert_recompute": "activation"},
    "large_vocabulary": {"block": "dense", "vocab_size": 4096, "num_layers": 1},
    "gathered": {"block": "top_k", "gathered_experts": [1, 2]},
    "chunks": {"block": "top_k", "schedule": {"forward_chunks": 2, "backward_chunks": 2}},
}
NOBODY = [-1] * 8
UNEVEN = Plan(np.array([[[0, 1, 2, 3, 4, 5, 6, 7], NOBODY], [[0, 1, 2, 3, 4, 5, -1, -1], [6, 7, *NOBODY[2:]]]]), 8)
"""Two ranks; the second has no expert of the first layer, and two of the second."""


class Storages(TorchDispatchMode):
    """Every storage that an operation makes, as long as it lives."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(out):
            if isinstance(value, Tensor):
                self._seen[value.untyped_storage()._cdata] = (StorageWeakRef(value.untyped_storage()), value.untyped_storage().nbytes())
        return out

    def live_bytes(self, known: set[int]) -> int:
        return sum(size for key, (reference, size) in self._seen.items() if not reference.expired() and key not in known)


def bytes_of(tensors: Any) -> tuple[int, set[int]]:
    """Bytes of distinct storages, and which they are."""
    storages = {value.untyped_storage()._cdata: value.untyped_storage().nbytes() for value in tensors}
    return sum(storages.values()), set(storages)


def measured(rank: int, world_size: int, options: dict[str, Any], precision: str, plan: Plan | None, dispatch: str) -> Memory:
    config = ModelConfig.model_validate(options)
    mesh = mesh_for(rank, world_size, world_size)
    model = Transformer(config, mesh, plan, DTYPES[precision], dispatch=dispatch)
    engine = Engine(model, mesh, plan, OptimizerConfig())
    parameters, known = bytes_of(model.parameters())
    gradients, of_gradients = bytes_of(bucket.flat for bucket in engine.reducer.buckets)
    kept, of_optimizer = bytes_of(value for state in engine.states().values() for value in state.values())
    shared, _ = bytes_of(p for p in model.parameters() if p.untyped_storage()._cdata in of_optimizer)
    buffers, of_buffers = bytes_of(model.buffers())
    generator = torch.Generator().manual_seed(rank)
    token_QP = torch.randint(0, config.vocab_size, (SEQUENCES, POSITIONS), generator=generator)
    target_QP = torch.randint(0, config.vocab_size, (SEQUENCES, POSITIONS), generator=generator)
    with Storages() as storages:
        output = model(token_QP, StepContext(0, 0, True, token_QP.flatten(), rank * token_QP.numel()))
        total = cross_entropy(output.logits_QPV, target_QP)
        total = total + sum(loss.to(total.dtype) for loss in output.losses.values())
        activations = storages.live_bytes(known | of_gradients | of_optimizer | of_buffers)
        activations += bytes_of((token_QP, target_QP))[0]
    total.backward()
    engine.reduce()
    return Memory(parameters, gradients, kept - shared, activations, buffers)


def check(found: Memory, config: ModelConfig, precision: str, experts: int, rows_L: Sequence[float], outputs_at_home: bool) -> None:
    predicted = rank_memory(config, precision, experts, SEQUENCES * POSITIONS, POSITIONS, rows_L, outputs_at_home=outputs_at_home)
    assert (predicted.parameters, predicted.gradients, predicted.optimizer) == (found.parameters, found.gradients, found.optimizer)
    rotations = POSITIONS * config.head_width * (8 if precision == "fp64" else 4)  # kept between models, and no module's
    assert predicted.buffers - rotations == found.buffers
    assert predicted.activations == pytest.approx(found.activations, rel=0.05)
    assert predicted.total == pytest.approx(found.total + rotations, rel=0.05)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_rank(name: str, precision: str) -> None:
    config = ModelConfig.model_validate(BASE | MODELS[name])
    plan = None if config.block == "dense" else Plan.contiguous(config.num_moe_layers, config.num_experts, 1)
    found = measured(0, 1, BASE | MODELS[name], precision, plan, "deduplicated")
    rows_L = [SEQUENCES * POSITIONS * config.top_k] * config.num_moe_layers
    check(found, config, precision, config.num_moe_layers * config.num_experts, rows_L, False)


@pytest.mark.parametrize("dispatch", ["flat", "deduplicated", "hierarchical"])
def test_ranks_with_different_numbers_of_experts(ranks: Pool, dispatch: str) -> None:
    config = ModelConfig.model_validate(BASE | {"top_k": 8, "block": "top_k", "gate": {"kind": "softmax_topk"}})
    results = ranks.run(2, measured, config.model_dump(), "fp32", UNEVEN, dispatch)
    for rank, found in enumerate(results):
        held_L = UNEVEN.held_LR[:, rank]
        rows_L = (2 * SEQUENCES * POSITIONS * held_L).tolist()  # every token goes to all experts
        check(found, config, "fp32", int(held_L.sum()), rows_L, dispatch == "flat")
    for kind in ("parameters", "gradients", "optimizer", "activations"):
        assert getattr(results[1], kind) < 0.6 * getattr(results[0], kind)


# ---- ZeRO --------------------------------------------------------------------------------------------------------


def measured_zero(rank: int, world_size: int, options: dict[str, Any], precision: str, stage: int) -> tuple[int, int, int]:
    """(bytes of gradients when backward has ended, of optimizer state, of the largest fp32 gradient of every part) under DeepSpeed."""
    config, mesh, plan = ModelConfig.model_validate(options), mesh_for(rank, world_size, 2), UNEVEN
    model = Transformer(config, mesh, plan, DTYPES[precision])
    engine = DeepSpeedEngine(model, mesh, plan, OptimizerConfig(), DeepSpeedConfig(stage=stage, bucket_elements=BUCKET))  # type: ignore[arg-type]
    kept, _ = bytes_of(part.state[key] for part in engine._parts for key in part.state)
    token_QP = torch.randint(0, config.vocab_size, (SEQUENCES, POSITIONS), generator=torch.Generator().manual_seed(rank))
    output = model(token_QP, StepContext(0, 0, True, token_QP.flatten(), rank * token_QP.numel()))
    engine.backward(cross_entropy(output.logits_QPV, token_QP), last=True)
    buckets = [buffer for zero, _ in engine._zeros for bucket in zero.ipg_buckets.values() for buffer in bucket.buffer]
    gradients, _ = bytes_of(buckets)
    if stage == 1:
        gradients += bytes_of(p.grad if p.grad is not None else p.grad_accum for p in model.parameters())[0]  # type: ignore[attr-defined]
    engine.reduce()
    if stage == 2:
        gradients += bytes_of(gradient for part in engine._parts for gradient in part.zero.averaged_gradients[part.number])[0]
    named = dict(model.named_parameters())
    return gradients, kept, sum(4 * max(named[name].numel() for name in part.names) for part in engine._parts)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_zero(ranks: Pool, precision: str, stage: int) -> None:
    pytest.importorskip("deepspeed", reason="the extra crossdock[deepspeed] is not installed")
    options = BASE | {"top_k": 2, "block": "top_k"}
    config = ModelConfig.model_validate(options)
    memory = [
        rank_memory(config, precision, experts, SEQUENCES * POSITIONS, POSITIONS, [256.0, 256.0], zero=Zero(stage, 4, 2, BUCKET))
        for experts in UNEVEN.held_LR.sum(axis=0).tolist()
    ]
    for rank, (gradients, optimizer, largest) in enumerate(ranks.run(4, measured_zero, options, precision, stage)):
        predicted = memory[rank % 2]
        assert predicted.optimizer == pytest.approx(optimizer, rel=0.01)
        if (precision, stage) == ("fp32", 2):  # it keeps the whole of a tensor that its part cuts through: much of so small a model
            assert 0.98 * predicted.gradients < gradients < predicted.gradients + largest
        else:
            assert predicted.gradients == pytest.approx(gradients, rel=0.02)


# ---- FSDP2 -------------------------------------------------------------------------------------------------------


def measured_in_parts(rank: int, world_size: int, options: dict[str, Any], precision: str) -> tuple[int, int, int]:
    """(bytes of parameters, of gradients, of optimizer state beside the parameters) with dense parameters in parts."""
    config, mesh, plan = ModelConfig.model_validate(options), mesh_for(rank, world_size, 2), UNEVEN
    model = Transformer(config, mesh, plan, DTYPES[precision])
    shard_dense(model, model.blocks, {parameter for moe in model.moe_layers for parameter in moe.parameters()}, mesh)
    engine = Engine(model, mesh, plan, OptimizerConfig())
    parameters, known = bytes_of(local_part(p) if is_part(p) else p for p in model.parameters())
    gradients, _ = bytes_of([*(bucket.flat for bucket in engine.reducer.buckets), *engine._part_gradients.values()])
    states = [value for state in engine.states().values() for value in state.values()]
    kept, _ = bytes_of(value for value in states if value.untyped_storage()._cdata not in known)
    return parameters, gradients, kept


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fsdp(ranks: Pool, precision: str) -> None:
    options = BASE | {"top_k": 2, "block": "top_k"}
    config = ModelConfig.model_validate(options)
    memory = [
        rank_memory(config, precision, experts, SEQUENCES * POSITIONS, POSITIONS, [256.0, 256.0], fsdp_ranks=4)
        for experts in UNEVEN.held_LR.sum(axis=0).tolist()
    ]
    for rank, (parameters, gradients, optimizer) in enumerate(ranks.run(4, measured_in_parts, options, precision)):
        predicted = memory[rank % 2]
        assert predicted.parameters == pytest.approx(parameters, rel=0.01)
        assert predicted.gradients == pytest.approx(gradients, rel=0.01)
        assert predicted.optimizer == pytest.approx(optimizer, rel=0.01)
