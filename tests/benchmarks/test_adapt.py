"""The benchmark of adaptive choice: the popularity that it draws, and the strategies that it holds the choice against."""

import json

import numpy as np
import pytest
import torch

from benchmarks.adapt import EXPONENT, Run, Shape, fixed_strategies, main
from benchmarks.netlab import unavailable_reason
from crossdock.runtime.transport.mesh import Mesh

SHAPE = Shape(tokens=4096, model_width=16, mlp_width=16, expert_width=16)


@pytest.mark.parametrize("skewed", [False, True])
def test_popularity_is_what_was_asked_for_and_the_gate_obeys(skewed: bool) -> None:
    run = Run(SHAPE, Mesh.single())
    run.popularity(skewed)
    assert (run.expert_TK[:, 0] != run.expert_TK[:, 1]).all()
    first = np.sort(np.bincount(run.expert_TK[:, 0], minlength=16))[::-1] / SHAPE.tokens
    wanted = np.arange(1, 17) ** -(EXPONENT if skewed else 0.0)
    np.testing.assert_allclose(first, wanted / wanted.sum(), atol=0.03)
    heard = []
    gate = run.model.moe_layers[0].gate
    gate.register_forward_hook(lambda _module, _inputs, routing: heard.append(routing.expert_TK.clone()))
    assert run.step() > 0.0
    assert torch.equal(heard[0], run.expert_TK)


def test_fixed_strategies_differ_and_the_gathered_one_needs_hot_experts() -> None:
    named = fixed_strategies((1, 2))
    assert len(set(named.values())) == len(named) == 7
    assert named["gathered"].gathered == (1, 2)
    assert "gathered" not in fixed_strategies(())


@pytest.mark.slow
@pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))
def test_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--short", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["routing"] for row in rows} == {"balanced", "zipf"}
    adaptive = [row for row in rows if row["strategy"] == "adaptive"]
    assert len(adaptive) == 2
    assert all(row["step_s"] > 0 and row["steps_to_choice"] >= 3 for row in adaptive)
