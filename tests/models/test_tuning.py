"""Measured schedules: alike on all ranks, right for the numbers seen, and without any trace in the model."""

from typing import Any

import pytest
import torch

from crossdock.models import tuning
from crossdock.models.config import ModelConfig
from crossdock.models.transformer import Transformer
from crossdock.runtime.ledger import Flight
from crossdock.runtime.overlap import Overlapped, Schedule
from tests.pool import Pool, mesh_for

TOKENS = torch.zeros((2, 4), dtype=torch.int64)


def model_of(mesh: Any = None, **options: Any) -> Transformer:
    base: dict[str, Any] = {"num_layers": 4, "model_width": 16, "num_experts": 4, "gate": {"kind": "deepseek_v3"}}
    return Transformer(ModelConfig.model_validate(base | options), mesh)


def measure(rank: int, world_size: int, options: dict[str, Any]) -> list[Schedule]:
    model = model_of(mesh_for(rank, world_size, world_size), **options)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    schedules = tuning.measured_schedules(model, TOKENS)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [block.schedule for block in model.blocks] == [None, None]
    assert not any(stage._forward_hooks or stage._forward_pre_hooks for stage in model.modules())
    model.set_schedules(schedules)
    return schedules


@pytest.mark.parametrize("options", [{"shortcut": {"position": 3}}, {"block": "shared_expert"}, {"block": "top_k"}])
def test_all_ranks_choose_alike(ranks: Pool, options: dict[str, Any]) -> None:
    first, second = ranks.run(2, measure, options)
    assert first == second
    assert len(first) == 2


def test_the_choice_follows_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    model, clock = model_of(), iter(range(10_000))
    dispatch_s = [2.5, 0.5]  # of the two layers; every stage takes 1 s

    def flights() -> tuple[Flight, ...]:
        travel = zip(dispatch_s, (0.5, 2.5), strict=True)
        return tuple(
            Flight(layer, stage, "forward", "tokens", (0, 0, 0), 0.0, 0.0, seconds)
            for layer, (there, back) in enumerate(travel)
            for stage, seconds in (("dispatch", there), ("combine", back))
        )

    monkeypatch.setattr(tuning, "_now_s", lambda device: float(next(clock)))
    monkeypatch.setattr(model.mesh.ledger, "take", flights)
    # Three stages: a dispatch of 2.5 s hides under two of them, a combine of 2.5 s as well.
    assert tuning.measured_schedules(model, TOKENS) == [Overlapped(2), Overlapped(1)]
