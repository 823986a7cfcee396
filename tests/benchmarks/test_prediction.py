"""The benchmark of predictions: its bias makes Zipf's law of a model's routing, and its short form ends with equal bytes."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from benchmarks.measure import bootstrap_interval
from benchmarks.netlab import unavailable_reason
from benchmarks.prediction import main
from benchmarks.prediction_model import Shape, Trainee, fit_zipf, zipf_shares
from benchmarks.prediction_page import byte_lines
from benchmarks.prediction_parts import PARTS, measured_parts, predicted_parts
from crossdock.models.transformer import Transformer
from crossdock.placement.costs.evaluate import evaluate
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.topology import LINK_CLASSES
from crossdock.runtime.data import DataState, Sampler
from crossdock.runtime.training.context import StepContext
from crossdock.runtime.transport.mesh import Mesh
from tests.runtime.adaptation.test_calibrate import TRUTH, machine, pretend, skewed_trace, timed


def test_shares_are_zipf_in_another_order_for_each_layer() -> None:
    share_LE = zipf_shares(3, 16)
    assert torch.allclose(share_LE.sum(dim=1), torch.ones(3, dtype=torch.float64))
    falling_LE = share_LE.sort(dim=1, descending=True).values
    assert torch.allclose(falling_LE[:, 0] / falling_LE[:, 1], torch.full((3,), 2**1.2, dtype=torch.float64))
    assert len(set(share_LE.argmax(dim=1).tolist())) > 1


def test_biases_make_the_routing_zipf() -> None:
    """A model of random weights, whose gates are made as sure of themselves as trained ones are, stands for the trained one."""
    config = Shape(num_layers=2, model_width=32, expert_width=16, sequences=4, sequence=64).config(Path("nowhere"))
    mesh = Mesh.single()
    model = Transformer(config.model, mesh, Plan.contiguous(2, 16, 1), seed=0)
    with torch.no_grad():
        for layer in model.moe_layers:
            layer.gate.weight_ED.mul_(10.0)
    tokens = np.random.default_rng(0).integers(0, 256, size=100_000).astype(np.uint8)
    sampler = Sampler(tokens, 64, 256, 0, "noise")
    stepper = SimpleNamespace(sampler=sampler, after=lambda state: sampler.after(state, 16))
    fit_zipf(cast(Trainee, SimpleNamespace(config=config, mesh=mesh, model=model, stepper=stepper, state=DataState())))
    token_QP = torch.from_numpy(tokens[-4096:].astype(np.int64)).view(64, 64)
    with torch.no_grad():
        load_LE = model(token_QP, StepContext(0, 0, False, token_QP.reshape(-1), 0)).load_LE
    assert (load_LE / load_LE.sum(dim=1, keepdim=True) - zipf_shares(2, 16)).abs().sum() / 4 < 0.1


def test_the_model_kept_is_known_by_its_sizes() -> None:
    assert Shape().digest == Shape(num_layers=4).digest != Shape(num_layers=2).digest
    config = Shape(num_layers=2).config(Path("here"))
    assert config.model.num_moe_layers == 2
    assert config.checkpoint.at_end
    assert not config.model.schedule.overlap


def test_bootstrap_interval_holds_the_median_and_narrows() -> None:
    values = np.random.default_rng(1).normal(1.0, 0.1, size=100).tolist()
    low, high = bootstrap_interval(values)
    assert low < float(np.median(values)) < high
    few_low, few_high = bootstrap_interval(values[:10])
    assert few_high - few_low > high - low
    assert bootstrap_interval([2.0, 2.0]) == (2.0, 2.0)


def test_lines_of_bytes_tell_where_counts_differ() -> None:
    row: dict[str, object] = {"method": "auto"}
    for name in LINK_CLASSES:
        row |= {f"counted_{name}": 100, f"predicted_{name}": 100, f"forecast_{name}": 110}
    row["counted_other_node"] = 0
    lines = byte_lines(row)
    assert [line["equal"] for line in lines] == ["yes", "yes", "NO"]
    assert lines[0]["forecast off by percent"] == pytest.approx(10.0)
    assert lines[2]["forecast off by percent"] is None


def test_unknown_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cases", "cold"]) == 2
    assert "no case cold; choose from text, hot" in capsys.readouterr().err
    assert main(["--methods", "contiguous,luck"]) == 2
    assert "no method luck; choose from contiguous, moetuner" in capsys.readouterr().err


@pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))
def test_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "prediction.md"
    arguments = ["--short", "--json", "--work", str(tmp_path), "--cases", "text", "--methods", "auto_homing", "--page", str(page)]
    assert main(arguments) == 0
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert list(rows) == ["contiguous", "auto_homing"]
    for row in rows.values():
        assert all(row[f"counted_{name}"] == row[f"predicted_{name}"] for name in LINK_CLASSES)
        assert row["counted_other_node"] > 0
        # headers, small shares of what nodes say to one another besides, and never less than what the ledger knows of
        assert 1.0 < row["interface_over_expected"] < 1.5
        assert row["predicted_s"] > 0
        assert row["step_s"] > 0
    assert rows["contiguous"]["speedup"] == 1.0
    assert rows["auto_homing"]["loss"] == pytest.approx(rows["contiguous"]["loss"], rel=1e-3)
    assert "| auto_homing | other_node |" in page.read_text()


def test_parts_of_a_step_add_up_to_it_as_measured_and_as_predicted() -> None:
    trace, plan = skewed_trace(2), Plan.contiguous(2, 8, 2)
    there = machine(1e7, 1e-4)
    promise = evaluate(trace, plan, there, TRUTH)
    predicted = predicted_parts(promise, TRUTH)
    assert set(predicted) == set(PARTS)
    assert sum(predicted.values()) == pytest.approx(promise.step_s)
    windows_s = TRUTH.micro_batches * plan.num_layers * sum(dataclasses.asdict(TRUTH.window).values())
    assert predicted["rest"] == pytest.approx(TRUTH.other_s + windows_s)
    found = timed(pretend(trace, plan, there, 1e-4))
    measured = measured_parts(found, found.step_s, [0.0, 0.0, 0.1], TRUTH)
    assert measured == pytest.approx(predicted, rel=1e-6)
