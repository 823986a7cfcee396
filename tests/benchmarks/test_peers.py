"""The comparison with other systems: arithmetic by hand, right answers that catch wrong ones, a short run of what needs no installing."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.peers import rounds
from benchmarks.peers.case import Case, Sizes, choose_experts, make_case
from benchmarks.peers.crew import Hosts
from benchmarks.peers.environments import SYSTEMS, System, torch_requirement
from benchmarks.peers.page import page
from benchmarks.peers.rounds import Outcome, Stage, Variant, variants_of
from benchmarks.peers.scmoe import scmoe_rows
from benchmarks.peers.table import (
    Place,
    best_of_others,
    bound_of,
    least_link_bytes,
    load_max_over_mean,
    mathematics,
    paired_interval,
    rows_of,
    verdict,
)

ROOT = Path(__file__).parents[2]
TINY = Sizes(tokens=32, model_width=32, expert_width=24, num_experts=8)


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case("layer", "fp32", "zipf", TINY)


def test_balanced_routing_is_even_on_every_rank_and_zipf_is_not() -> None:
    balanced = choose_experts("balanced", TINY, torch.Generator().manual_seed(0))
    for expert_TK in balanced:
        assert torch.bincount(expert_TK.flatten(), minlength=8).tolist() == [8] * 8
    zipf = choose_experts("zipf", Sizes(tokens=4096, num_experts=8), torch.Generator().manual_seed(0))
    share_E = torch.bincount(zipf[..., 0].flatten(), minlength=8).double() / zipf[..., 0].numel()
    wanted_E = torch.arange(1, 9).double() ** -1.2
    assert torch.allclose(share_E.sort(descending=True).values, wanted_E / wanted_E.sum(), atol=0.02)
    for chosen in (balanced, zipf):
        assert (chosen[..., 0] != chosen[..., 1]).all()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_gate_chooses_what_was_planned(dtype: str) -> None:
    made = make_case("layer", dtype, "zipf", TINY)
    logits = made.x @ made.layers[0].router_ED.t()
    assert torch.equal(logits.topk(2).indices, made.expert_RTK)


def test_a_case_comes_back_from_its_file(case: Case, tmp_path: Path) -> None:
    case.save(tmp_path / "case.pt")
    back = Case.load(tmp_path / "case.pt")
    assert (back.sizes, back.name) == (case.sizes, case.name)
    assert torch.equal(back.layers[0].up_EFD, case.layers[0].up_EFD)
    assert torch.equal(back.input_gradient, case.input_gradient)


def test_the_least_bytes_worked_by_hand() -> None:
    """Four ranks of one expert each on two nodes. Node 0 sends two tokens to node 1 (one to both its ranks) and gets one of node 1's."""
    sizes = Sizes(ranks=4, tokens=1, model_width=8, expert_width=8, num_experts=4)
    made = dataclasses.replace(make_case("layer", "fp32", "zipf", sizes), expert_RTK=torch.tensor([[[2, 3]], [[0, 2]], [[2, 3]], [[0, 1]]]))
    assert least_link_bytes(made, 2) == 2 * (2 + 1) * 8 * 4  # dispatch of two and combine of one leave node 0, forward and backward
    assert least_link_bytes(made, 1) == 0
    assert load_max_over_mean(made) == 3 / 2  # rank 2 has three of eight rows
    assert bound_of(made, 1, None, 3.0)["bound_s"] == 2.0
    assert bound_of(made, 2, 8.0, 3.0) == {"link_s": 192.0, "experts_s": 2.0, "bound_s": 192.0}


def test_an_interval_holds_its_median_and_is_narrow_where_rounds_agree() -> None:
    assert paired_interval([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == (2.0, 2.0, 2.0)
    ratio, low, high = paired_interval([1.0, 1.2, 1.4, 1.6, 1.8], [1.0] * 5)
    assert low < ratio == 1.4 < high


def test_what_is_chosen_in_a_round_is_chosen_by_the_others() -> None:
    """The second is the fastest in rounds 1 and 2; in round 0 it would be chosen by them, and is."""
    assert best_of_others([[1.0, 9.0, 9.0], [5.0, 2.0, 2.0]]) == [5.0, 2.0, 2.0]
    assert best_of_others([[1.0], [2.0]]) == [1.0]


def test_tables_of_variants_hold_where_their_words_do() -> None:
    everywhere = {variant.name for variant in variants_of("crossdock", [])}
    nodes = {variant.name for variant in variants_of("crossdock", ["NODES", "BF16"])}
    assert everywhere < nodes < {variant.name for variant in variants_of("crossdock", ["NODES", "FP32", "SKEWED"])}
    assert "crossdock flat" in {variant.name for variant in variants_of("crossdock", ["LOCAL"])} - nodes


def test_rows_say_who_is_ahead_and_what_is_not_equal(case: Case) -> None:
    ours, slower, wrong, broken = (
        Outcome(Variant(system, name, ""), {"output": error}, step_s, [0.1] * 3, [1000] * 3, reason)
        for system, name, error, step_s, reason in (
            ("crossdock", "ours", 1e-7, [1.0, 2.0, 3.0], ""),
            ("naive", "slower", 1e-7, [1.5, 3.0, 4.5], ""),
            ("naive", "wrong", 0.5, [0.1, 0.1, 0.1], ""),
            ("megatron", "broken", 0.0, [], "rank 0: no such thing"),
        )
    )
    rows = rows_of(Place("one", None, case.name), [broken, slower, ours, wrong], case)
    assert [row["row"] for row in rows] == ["wrong", "ours *", "slower", "broken"]
    assert [row["mathematics"] for row in rows] == ["differs: output by 5.0e-01", "equal", "equal", "none: rank 0: no such thing"]
    assert rows[2]["over_crossdock"] == 1.5
    assert verdict(rows) == "first; next is slower, 1.50 (1.50 to 1.50) times our time"
    slower.step_s = [0.5, 1.0, 1.5]
    assert verdict(rows_of(Place("one", None, case.name), [slower, ours], case)).startswith("NOT FIRST: slower takes 0.50")
    assert mathematics(Outcome(ours.variant, {"output": float("nan")}), 1.0) != "equal"


def test_scmoe_rows_divide_by_the_overlapped_step() -> None:
    measured = [
        {"variant": variant, "link_bit_per_s": rate, "step_s": step_s, "step_s_low": step_s, "step_s_high": step_s, "bound_s": 1.0}
        | {"communication_s": 1.0}
        for rate in (1e8, 5e8, 1e9)
        for variant, step_s in (("top2", 3.0), ("shared_expert", 2.6), ("scmoe_overlapped", 2.0))
    ]
    rows = {(row["row"], row["link_bit_per_s"]): row for row in scmoe_rows(measured)}
    assert rows["top2", 5e8]["scmoe_speedup"] == 1.5
    assert rows["top2", 5e8]["aim"] == 1.49
    assert rows["top2", 1e9]["aim"] is None


def test_every_system_names_its_variants_and_is_pinned() -> None:
    assert torch_requirement().startswith("torch==")
    for name, system in SYSTEMS.items():
        assert variants_of(name)
        assert name in ("crossdock", "naive") or any("==" in package for package in system.packages)


def test_wrong_answers_are_caught_and_a_system_that_is_not_there_is_a_row(
    case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The naive layer against a spoilt answer; torchtitan's adapter where torchtitan is not installed."""
    monkeypatch.setitem(rounds.SYSTEMS, "torchtitan", System("torchtitan"))
    spoilt = dataclasses.replace(case, input_gradient=case.input_gradient + 0.01)
    with Stage(["naive", "torchtitan"], tmp_path, Hosts(), 4) as stage, stage.built(spoilt) as outcomes:
        stage.measure(outcomes, 2, warmup=0)
        naive, absent = rows_of(Place("one", None, spoilt.name), outcomes, spoilt)
    assert naive["mathematics"].startswith("differs: input gradient by")
    assert naive["step_s"] > 0
    assert (absent["step_s"], absent["row"]) == (None, "torchtitan")
    assert "ModuleNotFoundError" in absent["mathematics"]


def test_a_short_run_on_one_host() -> None:
    """What needs no installing, and the page from it."""
    command = [sys.executable, "-m", "benchmarks.peers", "--short", "--only", "crossdock,naive", "--hosts", "one", "--kinds", "layer"]
    command += ["--dtypes", "fp32", "--routings", "zipf", "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=150)
    assert ended.returncode == 0, ended.stderr
    document = json.loads(ended.stdout)
    names = {row["row"].removesuffix(" *") for row in document["rows"]}
    names.add(rounds.EXPERTS_ALONE)
    assert names == {variant.name for system in ("crossdock", "naive") for variant in variants_of(system, ["LOCAL", "FP32", "SKEWED"])}
    for row in document["rows"]:
        assert row["rounds"] == 3
        assert row["experts_s"] > 0
        assert row["mathematics"] == "equal"
    assert sum(row["row"].endswith(" *") for row in document["rows"]) == 1
    assert "| naive | " in page([document])
