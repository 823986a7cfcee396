"""`crossdock plan tokens` and `drift`: curves that flatten, drift that chance does not explain, tables of 80 columns."""

from pathlib import Path

import numpy as np
import pytest

from crossdock.errors import BadData, UsageError
from crossdock.placement.analysis.statistics import CurvePoint, blocks_of, chance_drift, drift
from crossdock.placement.commands.statistics_cli import _enough, _sizes, _split
from crossdock.placement.records.affinity import Affinity
from crossdock.placement.records.trace import Trace
from tests.placement.commands.test_cli import run, run_json
from tests.placement.conftest import random_trace
from tests.placement.solvers.test_replicas import hot_trace


def clustered_trace(seed: int, num_tokens: int, *, shift: int = 0) -> Trace:
    """Experts i and i + 4 go together nine times in ten; `shift` moves the popularity of the pairs."""
    rng = np.random.default_rng(seed)
    popularity = np.roll(np.arange(1.0, 5.0), shift) / 10.0
    first = rng.choice(4, (num_tokens, 3), p=popularity)
    other = 4 + (first + np.where(rng.random((num_tokens, 3)) < 0.9, 0, rng.integers(1, 4, (num_tokens, 3)))) % 4
    return Trace(np.stack([first, other], axis=2), 8, sequence_T=np.arange(num_tokens) // 10)


@pytest.fixture
def paths(tmp_path: Path) -> tuple[str, str]:
    clustered_trace(0, 2000).save(tmp_path / "trace.npz")
    clustered_trace(1, 1000).save(tmp_path / "other.npz")
    return str(tmp_path / "trace.npz"), str(tmp_path / "other.npz")


def test_the_curve_falls_to_what_the_pairs_allow(paths):
    value = run_json(
        "tokens", "--trace", paths[0], "--topology", "1x4-local", "--objective", "devices", "--eval-trace", paths[1], "--sizes", "4,2000"
    )
    few, many = value["rows"]
    assert (few["num_tokens"], many["num_tokens"]) == (4, 2000)
    assert many["held_out"] == pytest.approx(1.1, abs=0.03)  # pairs together: 1 device nine times in ten, else 2
    assert few["held_out"] > 1.2
    assert few["fit"] < few["held_out"]
    assert value["enough"] == 2000
    assert value["held_out_tokens"] == 1000


@pytest.mark.parametrize("method", ["replicas", "auto"])
def test_how_much_text_copies_of_experts_need(tmp_path, method):
    hot_trace(num_layers=2).save(tmp_path / "hot.npz")
    arguments = (
        "tokens",
        "--trace",
        str(tmp_path / "hot.npz"),
        "--topology",
        "1x4-local",
        "--sizes",
        "100",
        "--seconds",
        "1",
        "--pin",
        "0:0:2",
    )
    copied = run_json(*arguments, "--eval-trace", str(tmp_path / "hot.npz"), "--method", method, "--spare-slots", "1")
    single = run_json(*arguments, "--eval-trace", str(tmp_path / "hot.npz"))
    assert all(copied["rows"][0][scored] < 0.9 * single["rows"][0][scored] for scored in ("fit", "held_out"))


def test_how_much_text_a_plan_needs_where_tokens_stay(tmp_path):
    trace = clustered_trace(0, 1000)
    Trace(trace.experts_TLK[:, :, :1], 8).save(tmp_path / "one.npz")
    arguments = ("--topology", "1x4-local", "--sizes", "1000", "--seconds", "1", "--workload", "configs/tiny.yaml")
    value = run_json(
        "tokens", "--trace", str(tmp_path / "one.npz"), "--mode", "coherent", *arguments, "--eval-trace", str(tmp_path / "one.npz")
    )
    assert value["rows"][0]["fit"] == pytest.approx(value["rows"][0]["held_out"], rel=1e-12)


def test_without_other_text_a_quarter_is_held_out(paths):
    value = run_json("tokens", "--trace", paths[0], "--topology", "1x4-local", "--objective", "devices")
    assert value["held_out_tokens"] == 500
    assert [row["num_tokens"] for row in value["rows"]] == [375, 750, 1500]
    fit, held_out = _split(clustered_trace(0, 2000))
    assert fit.num_tokens + held_out.num_tokens == 2000
    assert not set(fit.sequence_T.tolist()) & set(held_out.sequence_T.tolist())
    with pytest.raises(UsageError, match="too few to hold some out"):
        _split(random_trace())


def test_tables_fit_80_columns(paths):
    for arguments in (
        ("tokens", "--trace", paths[0], "--topology", "1x4-local", "--sizes", "100,2000", "--eval-trace", paths[1], "--seconds", "1"),
        ("drift", *paths),
    ):
        lines = [line for line in run(*arguments).splitlines() if paths[0] not in line]
        assert len(lines) > 5
        assert max(map(len, lines)) <= 80


def test_chance_explains_the_drift_of_one_text_and_not_of_another():
    one, same, other = clustered_trace(0, 4000), clustered_trace(1, 4000), clustered_trace(2, 4000, shift=1)
    alike = drift(Affinity.from_trace(one), Affinity.from_trace(same))
    apart = drift(Affinity.from_trace(one), Affinity.from_trace(other))
    assert alike.load_L.mean() < 1.3 * chance_drift(one, same).load_L.mean()
    assert alike.transitions_L.mean() < 1.3 * chance_drift(one, same).transitions_L.mean()
    assert apart.load_L.min() > 2.0 * chance_drift(one, other).load_L.max()


def test_chance_needs_blocks_and_drift_one_model(tmp_path: Path):
    with pytest.raises(UsageError, match="2 blocks of text"):
        chance_drift(random_trace(0), random_trace(1))
    random_trace(0).save(tmp_path / "a.npz")
    random_trace(0, num_layers=2).save(tmp_path / "b.npz")
    with pytest.raises(BadData, match=r"b\.npz: 2 layers x 8 experts"):
        run("drift", str(tmp_path / "a.npz"), str(tmp_path / "b.npz"))


def test_drift_stars_what_is_beyond_chance(tmp_path: Path):
    clustered_trace(0, 2000).save(tmp_path / "a.npz")
    clustered_trace(1, 2000, shift=2).save(tmp_path / "b.npz")
    lines = run("drift", str(tmp_path / "a.npz"), str(tmp_path / "b.npz")).splitlines()
    assert all(line.count("*") == (2 if layer < 2 else 1) for layer, line in enumerate(lines[1:4]))
    value = run_json("drift", str(tmp_path / "a.npz"), str(tmp_path / "b.npz"))
    assert [len(value[name]) for name in ("load", "load_chance", "steps", "steps_chance")] == [3, 3, 2, 2]


def test_enough_is_where_the_curve_stays_flat():
    curve = [CurvePoint(100, 1.0, 1.5), CurvePoint(200, 1.0, 1.2), CurvePoint(400, 1.0, 1.205), CurvePoint(800, 1.0, 1.2)]
    assert _enough(curve) == 200
    assert _enough([CurvePoint(100, 1.0, 1.2), CurvePoint(200, 1.0, 1.5), CurvePoint(400, 1.0, 1.2)]) == 400


def test_sizes():
    assert _sizes("", 1100) == [275, 550, 1100]
    assert _sizes("", 90) == [90]
    assert _sizes("30, 10,30", 40) == [10, 30]
    for text in ("0", "41", "ten", ",", "-3"):
        with pytest.raises(UsageError, match="from 1 to 40"):
            _sizes(text, 40)


def test_every_block_is_in_one_group():
    assert np.sum(blocks_of(clustered_trace(0, 100)), axis=0).tolist() == [1] * 100
