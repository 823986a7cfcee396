"""The forecast: exact where tokens decide, honest where they do not, and whole or refused when read back."""

from pathlib import Path

import numpy as np
import pytest

from crossdock.errors import BadData, MissingInput
from crossdock.placement.costs.cost import Workload
from crossdock.placement.homing.forecast import Forecast, TokenCosts
from crossdock.placement.homing.homes import CopyCosts, known_costs, sequences_of
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import NO_EXPERT, Trace
from tests.placement.conftest import random_plan


def decided_trace(seed: int = 0, *, num_tokens: int = 240, vocab: int = 12, noise: float = 0.0) -> Trace:
    """Routing of 3 layers x 8 experts, top 2, that follows from the token alone, but for a share `noise` of the tokens."""
    rng = np.random.default_rng([1, seed])
    table_VLK = np.argsort(np.random.default_rng(99).random((vocab, 3, 8)), axis=2)[:, :, :2]
    token_T = np.minimum(rng.geometric(0.25, num_tokens) - 1, vocab - 1) * 3 + 5
    experts_TLK = table_VLK[(token_T - 5) // 3]
    other_TLK = np.argsort(rng.random((num_tokens, 3, 8)), axis=2)[:, :, :2]
    experts_TLK = np.where(rng.random((num_tokens, 1, 1)) < noise, other_TLK, experts_TLK)
    return Trace(experts_TLK, 8, token_T=token_T, sequence_T=np.arange(num_tokens) // 10)


@pytest.mark.parametrize("dispatch", ["flat", "deduplicated", "hierarchical"])
@pytest.mark.parametrize("num_slots", [2, 4])
def test_where_tokens_decide_the_forecast_is_what_is_counted(dispatch: str, num_slots: int) -> None:
    trace, plan = decided_trace(), random_plan(2, num_devices=4, num_slots=num_slots)
    costs = CopyCosts.of(Topology.uniform(2, 2), Workload(dispatch=dispatch))  # type: ignore[arg-type]
    forecast = Forecast.fit(trace, prior_tokens=0.0)
    sequence_T = sequences_of(trace)
    token_costs = forecast.costs(plan, costs)
    expected_QH = token_costs.of_trace(trace, sequence_T) * token_costs.unit
    np.testing.assert_allclose(expected_QH, known_costs(trace, sequence_T, plan, costs), rtol=1e-5)
    assert forecast.accuracy(trace) == pytest.approx({"seen": 1.0, "recall": 1.0, "recall_by_layer": 0.4, "chance": 1.0}, abs=0.35)
    assert forecast.accuracy(trace)["recall"] == 1.0
    assert trace.token_T is not None
    assert (token_costs.of(trace.token_T.reshape(-1, 10)) == token_costs.of_trace(trace, sequence_T)).all()


def test_costs_of_each_layer_add_up() -> None:
    trace, plan = decided_trace(noise=0.3), random_plan(2, num_devices=4)
    flat, deduplicated = (
        CopyCosts.of(Topology.uniform(2, 2), Workload(dispatch=dispatch))  # type: ignore[arg-type]
        for dispatch in ("flat", "deduplicated")
    )
    forecast = Forecast.fit(trace)
    alone = [_alone(forecast, plan, layer, costs) for layer, costs in enumerate((flat, deduplicated, flat))]
    together = forecast.costs(plan, (flat, deduplicated, flat))
    np.testing.assert_allclose(together.cost_VH * together.unit, sum(alone), rtol=1e-4, atol=together.unit * 3)


def _alone(forecast: Forecast, plan: Plan, layer: int, costs: CopyCosts) -> np.ndarray:
    part = slice(layer, layer + 1)
    of_layer = Forecast(forecast.token_V, forecast.expert_VLM[:, part], forecast.chance_VLM[:, part], forecast.share_LE[part])
    found = of_layer.costs(Plan(plan.slots_LRS[part], 8), costs)
    return found.cost_VH * found.unit


def test_few_experts_are_kept_and_the_rest_is_the_layers() -> None:
    # one identity, four tokens, one layer: expert 0 three times, 1 once; the other identity always chooses 3
    trace = Trace(np.array([0, 0, 0, 1, 3, 3, 3, 3])[:, None, None], 4, token_T=np.array([7] * 4 + [9] * 4))
    forecast = Forecast.fit(trace, per_token=1, prior_tokens=0.0)
    chance_XE = forecast.chances(0, np.array([0, 1, 2]))
    # of identity 7 only expert 0 is kept; the quarter that is left falls on 1 and 3 as 1 to 4, which is what all tokens do
    np.testing.assert_allclose(chance_XE[0], [0.75, 0.05, 0.0, 0.2], atol=1e-4)
    np.testing.assert_allclose(chance_XE[1], [0.0, 0.0, 0.0, 1.0], atol=1e-4)
    np.testing.assert_allclose(chance_XE[2], [3 / 8, 1 / 8, 0.0, 4 / 8], atol=1e-4)  # never seen: as the layer does
    assert forecast.memory_bytes == 4 * 2 * (1 + 1 * 1) + 2 * 1 * 4
    held_out = Trace(np.array([0, 1, 3, 3])[:, None, None], 4, token_T=np.array([7, 7, 9, 1000]))
    accuracy = forecast.accuracy(held_out)
    assert accuracy == pytest.approx(
        {"seen": 0.75, "recall": 0.75, "recall_by_layer": 0.5, "chance": (0.75 + 0.05 + 1.0 + 0.5) / 4}, abs=1e-4
    )


def test_a_prior_draws_rare_tokens_towards_the_layer() -> None:
    trace = Trace(np.array([0, 0, 0, 0, 1])[:, None, None], 2, token_T=np.array([1, 1, 1, 1, 2]))
    forecast = Forecast.fit(trace, prior_tokens=4.0)
    np.testing.assert_allclose(forecast.chances(0, np.array([1]))[0], [4 * 0.8 / 5, (1 + 4 * 0.2) / 5], atol=1e-4)


def test_dropped_choices_are_no_choices() -> None:
    trace = Trace(np.array([[0, NO_EXPERT], [0, 1]])[:, None, :], 2, token_T=np.array([4, 4]))
    np.testing.assert_allclose(Forecast.fit(trace, prior_tokens=0.0).chances(0, np.array([0]))[0], [1.0, 0.5], atol=1e-4)


# ---- the file --------------------------------------------------------------------------------------------------------


def test_a_file_reads_back_the_same(tmp_path: Path) -> None:
    plan = random_plan(2, num_devices=4)
    forecast = Forecast.fit(decided_trace(noise=0.5)).beside(plan)
    forecast.save(tmp_path / "f.npz")
    read = Forecast.load(tmp_path / "f.npz")
    assert (read.digest, read.plan_hash, read.trace_hash) == (forecast.digest, plan.digest, decided_trace(noise=0.5).digest)
    assert (read.num_tokens, read.memory_bytes) == (240, forecast.memory_bytes)
    assert Forecast.fit(decided_trace(1)).digest != forecast.digest


def rewritten(path: Path, **changes: np.ndarray) -> Path:
    """The file with some arrays replaced, or taken away (None)."""
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files} | changes
    other = path.with_name("changed.npz")
    np.savez(other, **{name: array for name, array in arrays.items() if array is not None})
    return other


def test_changed_and_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.npz"
    forecast = Forecast.fit(decided_trace())
    forecast.save(path)
    chance_VLM = forecast.chance_VLM.copy()
    chance_VLM[0, 0, 0] ^= 1
    cases: dict[str, dict[str, object]] = {
        "hash that the file states": {"chance": chance_VLM},
        "0 arrays named share": {"share": None},
        "format_version is 2": {"format_version": np.array(2)},
        "expert is of type int64": {"expert": forecast.expert_VLM.astype(np.int64)},
        "do not ascend": {"token": forecast.token_V[::-1].copy()},
        "different sizes": {"token": forecast.token_V[:-1].copy()},
        "beyond its 8": {"expert": forecast.expert_VLM + np.uint16(8)},
    }
    for message, changes in cases.items():
        with pytest.raises(BadData, match=message):
            Forecast.load(rewritten(path, **changes))  # type: ignore[arg-type]
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(BadData, match=r"f\.npz: "):
        Forecast.load(path)
    with pytest.raises(MissingInput, match="No such file"):
        Forecast.load(tmp_path / "absent.npz")


def test_traces_without_tokens_and_of_other_models_are_refused() -> None:
    trace = decided_trace()
    forecast = Forecast.fit(trace)
    without = Trace(trace.experts_TLK, 8)
    with pytest.raises(BadData, match="does not know its tokens"):
        Forecast.fit(without)
    with pytest.raises(BadData, match="does not know its tokens"):
        forecast.accuracy(without)
    with pytest.raises(BadData, match=r"3 layers x 8 experts, and the trace has 2 x 8"):
        forecast.accuracy(Trace(trace.experts_TLK[:, :2], 8, token_T=trace.token_T))
    with pytest.raises(BadData, match="the plan is for 3 MoE layers x 8 experts on 2 devices"):
        forecast.costs(random_plan(0, num_devices=2), CopyCosts.of(Topology.uniform(2, 2), Workload()))


def test_sums_stay_exact_in_whole_numbers() -> None:
    costs = TokenCosts(np.array([3], dtype=np.int32), np.array([[5, 7], [1 << 20, 2]]), 0.5)
    assert costs.of(np.array([[3, 3, 4], [4, 4, 4]])).tolist() == [[10 + (1 << 20), 16], [3 << 20, 6]]
