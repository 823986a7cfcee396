"""Schedules: overlapped equals sequential to the last bit, tokens really travel while stages run, and the chosen slot is the best one."""

import importlib
import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from crossdock.errors import BadConfig
from crossdock.models.blocks import MoEBlock
from crossdock.models.config import ModelConfig
from crossdock.models.moe import MoELayer
from crossdock.models.transformer import Transformer
from crossdock.runtime.dispatch.rows import spread
from crossdock.runtime.experts.overlap import Chunked, Overlapped, Schedule, Sequential, balanced_expert_slot, choose_expert_slot, run
from crossdock.runtime.training.context import StepContext
from crossdock.runtime.transport.ledger import Flight
from tests.pool import Pool, mesh_for

WIDTH = 16
BLOCKS: dict[str, dict[str, Any]] = {
    "top_k": {"block": "top_k"},
    "shared_expert": {"block": "shared_expert"},
    "pos1_every": {"block": "scmoe", "moe_every": 1},
    "pos1": {"block": "scmoe", "shortcut": {"position": 1, "coefficient": "cg2"}},
    "pos2": {"block": "scmoe", "shortcut": {"position": 2, "coefficient": "cg1"}},
    "pos3": {"block": "scmoe", "shortcut": {"position": 3, "coefficient": "cg2"}},
}


def config_of(block: str) -> ModelConfig:
    return ModelConfig.model_validate({"num_layers": 4, "model_width": WIDTH, "num_heads": 2, "expert_width": 24} | BLOCKS[block])


def all_schedules(rank: int, world_size: int, block: str, dtype: torch.dtype, dispatch: str) -> dict[str, list[Tensor]]:
    """Logits and all gradients of one step under every schedule that the block knows."""
    config = config_of(block)
    mesh = mesh_for(rank, world_size, world_size)
    token_QP = torch.randint(0, 256, (2, 8), generator=torch.Generator().manual_seed(rank))
    context = StepContext(1, 2, True, token_QP.reshape(-1), rank * token_QP.numel())
    results: dict[str, list[Tensor]] = {}
    kinds: tuple[type[Sequential] | type[Overlapped], ...] = (Sequential, Overlapped)
    for kind, slot in itertools.product(kinds, range(len(config.window) + 1)):
        model = Transformer(config, mesh, dtype=dtype, dispatch=dispatch)
        model.set_schedules([kind(slot)] * config.num_moe_layers)
        output = model(token_QP, context)
        loss = F.cross_entropy(output.logits_QPV.flatten(0, 1).float(), token_QP.flatten())
        (loss + sum(output.losses.values())).backward()
        results[f"{kind.__name__}({slot})"] = [output.logits_QPV.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    return results


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("block", BLOCKS)
def test_every_schedule_gives_the_same_bits(ranks: Pool, block: str, world_size: int) -> None:
    for dtype, dispatch in ((torch.float32, "deduplicated"), (torch.bfloat16, "flat")):
        for results in ranks.run(world_size, all_schedules, block, dtype, dispatch):
            baseline = results.pop("Sequential(0)")
            assert len(results) == 2 * len(config_of(block).window) + 1
            assert all(gradient.isfinite().all() for gradient in baseline)
            for name, tensors in results.items():
                assert all(map(torch.equal, tensors, baseline)), f"{name} differs from Sequential(0)"


class _Mark(torch.autograd.Function):
    """Passes a tensor on and notes when forward and backward come by."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, events: list[tuple[str, float]], name: str) -> Tensor:
        ctx.events, ctx.name = events, name
        events.append((f"forward {name}", time.perf_counter()))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.events.append((f"backward {ctx.name}", time.perf_counter()))
        return grad, None, None


def order_of_events(rank: int, world_size: int, schedule: Schedule, dispatch: str) -> list[str]:
    """What happened on a rank, in order: two stages in the window, the movements of tokens as the ledger saw them, forward and backward."""
    mesh = mesh_for(rank, world_size, world_size)
    layer = MoELayer(WIDTH, 24, 4, 2, mesh=mesh, dispatch=dispatch)
    linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
    events: list[tuple[str, float]] = []

    def stage(name: str, linear: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: _Mark.apply(x + linear(x), events, name)

    x_TD = torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(rank), requires_grad=True)
    context = StepContext(0, 0, True, torch.zeros(32, dtype=torch.int64), rank * 32)
    mesh.ledger.take()
    routing = layer.route(x_TD, context, 32)
    stages = [stage("attention", linears[0]), stage("shared", linears[1])]
    stream, y_TD = run(schedule, layer, x_TD, routing.assignment, stages, x_TD)
    (stream + y_TD).square().sum().backward()
    for flight in mesh.ledger.take():
        if flight.kind == "tokens":
            events += _moments(flight)
    return [name for name, _ in sorted(events, key=lambda event: event[1])]


def _moments(flight: Flight) -> list[tuple[str, float]]:
    name = f"{flight.direction} {flight.stage}"
    return [(f"{name} launched", flight.launched_s), (f"{name} waited for", flight.wait_begin_s), (f"{name} here", flight.wait_end_s)]


def _moved(name: str, *stages: str) -> list[str]:
    return [f"{name} launched", *stages, f"{name} waited for", f"{name} here"]


@pytest.mark.parametrize("dispatch", ["flat", "deduplicated"])
def test_stages_run_while_tokens_travel_forward_and_backward(ranks: Pool, dispatch: str) -> None:
    for events in ranks.run(2, order_of_events, Overlapped(1), dispatch):
        assert events == [
            *_moved("forward dispatch", "forward attention"),
            *_moved("forward combine", "forward shared"),
            *_moved("backward combine", "backward shared"),
            *_moved("backward dispatch", "backward attention"),
        ]


def test_the_slot_moves_the_stages_between_the_windows(ranks: Pool) -> None:
    for events in ranks.run(2, order_of_events, Overlapped(2), "flat"):
        assert events == [
            *_moved("forward dispatch", "forward attention", "forward shared"),
            *_moved("forward combine"),
            *_moved("backward combine"),
            *_moved("backward dispatch", "backward shared", "backward attention"),
        ]


def test_sequential_waits_at_once(ranks: Pool) -> None:
    for events in ranks.run(2, order_of_events, Sequential(1), "flat"):
        assert events == [
            *_moved("forward dispatch"),
            "forward attention",
            *_moved("forward combine"),
            "forward shared",
            "backward shared",
            *_moved("backward combine"),
            "backward attention",
            *_moved("backward dispatch"),
        ]


def counts_and_gathers(rank: int, world_size: int, schedule: Schedule, dispatch: str) -> tuple[list[Flight], list[tuple[float, float]]]:
    """Of one forward pass of a Pos-2 block: the flights of counts, and when rows of the pieces were gathered."""
    mesh = mesh_for(rank, world_size, world_size, (0, 0, 1, 1))
    block = Transformer(config_of("pos2"), mesh, dispatch=dispatch).blocks[0]
    assert isinstance(block, MoEBlock)
    block.schedule = schedule
    x_QPD = torch.randn(2, 8, WIDTH, generator=torch.Generator().manual_seed(rank), requires_grad=True)
    module = importlib.import_module(f"crossdock.runtime.dispatch.{dispatch}")
    gathers: list[tuple[float, float]] = []

    def timed_spread(*arguments: Any) -> Tensor:
        begin_s = time.perf_counter()
        rows = spread(*arguments)
        gathers.append((begin_s, time.perf_counter()))
        return rows

    mesh.ledger.take()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "spread", timed_spread)
        block(x_QPD, StepContext(0, 0, True, torch.zeros(16, dtype=torch.int64), rank * 16))
    return [flight for flight in mesh.ledger.take() if flight.kind == "counts"], gathers


@pytest.mark.parametrize("dispatch", ["flat", "deduplicated", "hierarchical"])
@pytest.mark.parametrize("schedule", [Overlapped(1), Chunked(1, 2, 4)], ids=str)
def test_counts_of_all_pieces_travel_together_while_rows_are_gathered(ranks: Pool, schedule: Schedule, dispatch: str) -> None:
    for flights, gathers in ranks.run(4, counts_and_gathers, schedule, dispatch):
        (counts,) = flights
        begin_s, end_s = gathers[0]
        assert counts.launched_s < begin_s < end_s < counts.wait_begin_s


def configured(rank: int, world_size: int, changes: dict[str, Any]) -> list[Tensor]:
    """Logits and all gradients of one step of a whole model in float64, the sums of experts' gradients over the ranks left out."""
    config = ModelConfig.model_validate(config_of("pos2").model_dump() | changes)
    mesh = mesh_for(rank, world_size, world_size)
    token_QP = torch.randint(0, 256, (2, 8), generator=torch.Generator().manual_seed(rank))
    model = Transformer(config, mesh, dtype=torch.float64)
    output = model(token_QP, StepContext(1, 2, True, token_QP.reshape(-1), rank * token_QP.numel()))
    F.cross_entropy(output.logits_QPV.flatten(0, 1), token_QP.flatten()).backward()
    mesh.ledger.take()
    return [output.logits_QPV.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("gathered", [[], [0, 5]])
def test_configured_chunks_and_recomputation_leave_the_step_as_it_is(ranks: Pool, gathered: list[int]) -> None:
    whole = ranks.run(2, configured, {"gathered_experts": gathered})
    for forward, backward in ((2, 2), (3, 2), (1, 4)):
        changes = {"schedule": {"forward_chunks": forward, "backward_chunks": backward}, "expert_recompute": "all"}
        for found, expected in zip(ranks.run(2, configured, changes | {"gathered_experts": gathered}), whole, strict=True):
            assert len(found) == len(expected)
            for mine, other in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


seconds = st.floats(0, 10)


@given(st.lists(seconds, max_size=5), seconds, seconds, seconds)
def test_the_chosen_slot_has_the_shortest_makespan(stage_s: list[float], dispatch_s: float, expert_s: float, combine_s: float) -> None:
    def spent(slot: int) -> float:
        before, after = sum(stage_s[:slot]), sum(stage_s[slot:])
        forward = max(before, dispatch_s) + expert_s + max(after, combine_s)
        # The gradients of the results go the way of the dispatch, beside the later stages.
        return forward + max(2 * after, dispatch_s) + 2 * expert_s + max(2 * before, combine_s)

    chosen = choose_expert_slot(stage_s, dispatch_s, expert_s, combine_s)
    assert spent(chosen) <= min(spent(slot) for slot in range(len(stage_s) + 1)) + 1e-9


def test_slots_by_hand() -> None:
    # Dispatch 3, combine 1: forward wants 2 + 1 before the experts, backward as much after them, and 3 + 5 + 2 twice is as short as 9 + 11.
    assert choose_expert_slot([2.0, 1.0, 1.0], 3.0, 5.0, 1.0, backward_over_forward=1.0) == 1
    assert choose_expert_slot([2.0, 1.0, 3.0], 3.0, 5.0, 1.0, backward_over_forward=1.0) == 2
    assert choose_expert_slot([], 3.0, 5.0, 1.0) == 0
    assert balanced_expert_slot([4.0, 1.0, 2.0]) == 1
    assert balanced_expert_slot([1.0, 1.0, 1.0, 1.0]) == 2


def test_a_slot_outside_the_block_is_refused() -> None:
    model = Transformer(config_of("pos2"))
    with pytest.raises(BadConfig, match=r"expert_slot 4 .* 3 stages; choose 0 to 3"):
        model.set_schedules([Overlapped(4)] * 2)
    with pytest.raises(ValueError, match=r"expert_slot 2 .*choose 0 to 1"):
        ModelConfig.model_validate({"block": "shared_expert", "schedule": {"expert_slot": 2}})
