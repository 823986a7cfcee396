"""Blocks that route twice: the same bits under every schedule, a first half that really overlaps, and bytes that a trace foretells."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crossdock.models.blocks import MoEBlock
from crossdock.models.config import ModelConfig
from crossdock.models.transformer import Transformer
from crossdock.placement.costs.cost import Workload
from crossdock.placement.costs.evaluate import evaluate
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import Trace
from crossdock.runtime.adaptation.capture import Capture
from crossdock.runtime.experts.overlap import Overlapped, Schedule, Sequential
from crossdock.runtime.training.context import StepContext
from crossdock.runtime.transport.ledger import bytes_by_class
from tests.pool import Pool, mesh_for

BLOCKS: dict[str, dict[str, Any]] = {
    "dgmoe_every": {"block": "dgmoe", "moe_every": 1},
    "dgmoe_pos1": {"block": "dgmoe", "shortcut": {"position": 1}},
    "dgmoe_pos2": {"block": "dgmoe", "top_k": 1},
    "dgmoe_pos3": {"block": "dgmoe", "shortcut": {"position": 3}},
    "dgmoe_share": {"block": "dgmoe_share", "top_k": 1},
    "dgmoe_share_every": {"block": "dgmoe_share", "moe_every": 1},
}


def config_of(block: str) -> ModelConfig:
    base = {"vocab_size": 32, "num_layers": 4, "model_width": 16, "num_heads": 2, "expert_width": 24}
    return ModelConfig.model_validate(base | BLOCKS[block])


def step(rank: int, world_size: int, block: str, schedule: Schedule, dtype: torch.dtype, dispatch: str) -> list[Tensor]:
    """Logits and all gradients of one step."""
    config, mesh = config_of(block), mesh_for(rank, world_size, world_size)
    model = Transformer(config, mesh, dtype=dtype, dispatch=dispatch)
    model.set_schedules([schedule] * config.num_moe_layers)
    token_QP = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(rank))
    output = model(token_QP, StepContext(1, 2, True, token_QP.reshape(-1), rank * token_QP.numel()))
    (F.cross_entropy(output.logits_QPV.flatten(0, 1).float(), token_QP.flatten()) + sum(output.losses.values())).backward()
    return [output.logits_QPV.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def all_schedules(rank: int, world_size: int, block: str, dtype: torch.dtype, dispatch: str) -> dict[tuple[str, int], list[Tensor]]:
    slots = range(len(config_of(block).window) + 1)
    return {
        (kind.__name__, slot): step(rank, world_size, block, kind(slot), dtype, dispatch)
        for kind in (Sequential, Overlapped)
        for slot in slots
    }


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("block", BLOCKS)
def test_every_schedule_gives_the_same_bits(ranks: Pool, block: str, world_size: int) -> None:
    for dtype, dispatch in ((torch.float32, "deduplicated"), (torch.bfloat16, "flat")):
        for results in ranks.run(world_size, all_schedules, block, dtype, dispatch):
            for (name, slot), tensors in results.items():
                # Blocks that share their experts sum four gradients into them, in an order that the slot decides.
                baseline = results["Sequential", slot if "share" in block else 0]
                assert all(gradient.isfinite().all() for gradient in baseline)
                assert all(map(torch.equal, tensors, baseline)), f"{name}({slot}) differs"


def launches(rank: int, world_size: int, slot: int) -> list[tuple[str, str, bool]]:
    """(direction, stage, whether something was launched before it was waited for) of each movement of tokens, in order of launch."""
    config, mesh = config_of("dgmoe_pos2"), mesh_for(rank, world_size, world_size)
    model = Transformer(config.model_copy(update={"num_layers": 2}), mesh)
    block = model.blocks[0]
    assert isinstance(block, MoEBlock)
    model.set_schedules([Overlapped(slot)])
    token_QP = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(rank))
    mesh.ledger.take()
    model(token_QP, StepContext(1, 2, True, token_QP.reshape(-1), rank * 16)).logits_QPV.sum().backward()
    flights = sorted((flight for flight in mesh.ledger.take() if flight.kind == "tokens"), key=lambda flight: flight.launched_s)
    return [
        (flight.direction, flight.stage, any(flight.launched_s < other.launched_s < flight.wait_begin_s for other in flights))
        for flight in flights
    ]


@pytest.mark.parametrize(
    ("slot", "forward"),
    [
        # The previous half's combine is on its way while the current half goes out and comes back.
        (2, [("dispatch", False), ("combine", True), ("dispatch", False), ("combine", False)]),
        # The previous half's experts wait for the current half, and its dispatch may take all the time in the world.
        (3, [("dispatch", True), ("dispatch", False), ("combine", False), ("combine", False)]),
    ],
)
def test_the_previous_half_travels_beside_the_current_one(ranks: Pool, slot: int, forward: list[tuple[str, bool]]) -> None:
    for moved in ranks.run(2, launches, slot):
        assert [(stage, beside) for direction, stage, beside in moved if direction == "forward"] == forward
        assert sum(beside for direction, _, beside in moved if direction == "backward") == 1


def captured_step(rank: int, world_size: int, block: str, dispatch: str) -> tuple[tuple[int, ...], list[Trace]]:
    """This rank's bytes of two micro-batches, forward and backward, and (on rank 0) their traces."""
    config, mesh = config_of(block), mesh_for(rank, world_size, world_size)
    model = Transformer(config, mesh, dispatch=dispatch)
    capture = Capture(config.num_moe_layers, config.num_experts)
    mesh.ledger.take()
    for micro in range(2):
        token_QP = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(10 * micro + rank))
        capture.begin(token_QP.reshape(-1), torch.arange(2).repeat_interleave(8))
        context = StepContext(1, micro, True, token_QP.reshape(-1), rank * 16, (capture.listener,))
        model(token_QP, context).logits_QPV.square().sum().backward()
    return bytes_by_class(mesh.ledger.take()), capture.gather(mesh)


@pytest.mark.parametrize("dispatch", ["flat", "deduplicated"])
@pytest.mark.parametrize("block", ["dgmoe_pos2", "dgmoe_pos3", "dgmoe_share"])
def test_counted_bytes_equal_those_of_the_trace(ranks: Pool, block: str, dispatch: str) -> None:
    config, answers = config_of(block), ranks.run(2, captured_step, block, dispatch)
    (trace,) = answers[0][1]
    assert trace.num_tokens == 2 * 2 * 16 * config.turns_per_layer  # ranks, micro-batches, tokens, turns
    plan = Plan.contiguous(config.num_moe_layers, config.num_experts, 2)
    workload = Workload(model_width=16, wire="fp32", dispatch=dispatch)  # type: ignore[arg-type]
    predicted = evaluate(trace, plan, Topology.uniform(nodes=1, devices_per_node=2), workload)
    assert tuple(map(sum, zip(*(counted for counted, _ in answers), strict=True))) == predicted.bytes_by_class
    assert predicted.bytes_by_class[1] > 0
