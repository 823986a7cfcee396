"""`crossdock train --dry-run`: groups, plan and memory of worlds that nobody started."""

import json
from pathlib import Path
from typing import Any

import pytest

from crossdock import strict_yaml
from crossdock.launch.cli import run
from crossdock.placement.records.plan import Plan


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run(["train", *arguments, "--dry-run", "--json"]) == 0
    value: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert value["train"]["steps"] == 60
    return value["dry_run"]


def test_groups_of_a_large_world(capsys: pytest.CaptureFixture[str]) -> None:
    facts = said(capsys, "tiny", "parallel.expert=4", "topology=2x2-ethernet", "train.batch_sequences=64", "--world-size", "64")
    groups = facts["groups"]
    assert facts["world_size"] == 64
    assert len(groups["expert_groups"]) == 16
    assert groups["expert_groups"][1] == [4, 5, 6, 7]
    assert groups["copies"][3] == list(range(3, 64, 4))
    assert groups["node_of_rank"][:8] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert facts["plan"]["experts_per_rank"] == [{"fewest": 1, "most": 1}] * 4
    assert facts["tokens_per_micro_batch"] == 64


def test_memory_falls_with_ranks_and_grows_with_slots_and_tokens(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    one, four = (said(capsys, "tiny", f"parallel.expert={ranks}", "--world-size", "4")["memory"][0] for ranks in (1, 4))
    assert four["optimizer"] < one["optimizer"]
    assert four["activations"] == one["activations"]
    double = said(capsys, "tiny", "parallel.expert=4", "--world-size", "4", "train.batch_sequences=16")["memory"][0]
    assert double["activations"] == 2 * four["activations"]
    split = said(capsys, "tiny", "parallel.expert=4", "--world-size", "4", "train.batch_sequences=16", "train.accumulate=2")["memory"][0]
    assert split == four
    uneven = Plan.from_devices([[0, 0, 0, 1]], 2)
    uneven.save(tmp_path / "plan.json")
    memory = said(capsys, "tiny", f"plan={tmp_path / 'plan.json'}")["memory"]
    expert_bytes = 3 * 64 * 96 * 4  # of tiny's model and expert width, in fp32
    for kind, values in (("parameters", 1), ("gradients", 1), ("optimizer", 2)):
        assert memory[0][kind] - memory[1][kind] == 2 * values * expert_bytes  # 3 experts and 1
    assert memory[0]["activations"] > memory[1]["activations"]
    assert all(row["total"] == sum(size for kind, size in row.items() if kind not in ("total", "expert_rank")) for row in memory)


def test_deepspeed_refuses_a_rank_without_experts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Plan.from_devices([[0, 0, 0, 0]], 2).save(tmp_path / "plan.json")
    options = ["train", "tiny", f"plan={tmp_path / 'plan.json'}", "--dry-run"]
    assert run([*options, "engine=deepspeed"]) == 78
    assert "gives expert rank 1 no expert in any layer" in capsys.readouterr().err
    assert run(options) == 0


def test_zero_divides_the_state(capsys: pytest.CaptureFixture[str]) -> None:
    run_of_8 = ("tiny", "parallel.expert=2", "--world-size", "8", "deepspeed.bucket_elements=1024")
    native, first, second = (
        said(capsys, *run_of_8, *engine)["memory"][0]
        for engine in (("engine=native",), ("engine=deepspeed",), ("engine=deepspeed", "deepspeed.stage=2"))
    )
    assert first["parameters"] == native["parameters"]
    assert (
        native["optimizer"] / 5 < first["optimizer"] < native["optimizer"] / 2.5
    )  # masters beside the moments; 1/8 of dense, 1/4 of experts
    assert second["optimizer"] == first["optimizer"]
    assert second["gradients"] < first["gradients"] / 2.5 < native["gradients"]


def test_fsdp_divides_what_is_dense(capsys: pytest.CaptureFixture[str]) -> None:
    run_of_8 = ("tiny", "parallel.expert=4", "--world-size", "8", "train.batch_sequences=8")
    whole, parts = (said(capsys, *run_of_8, f"parallel.dense_sharding={how}")["memory"][0] for how in ("none", "fsdp2"))
    for kind in ("parameters", "gradients", "optimizer"):
        assert whole[kind] / 8 < parts[kind] < whole[kind] / 2
    assert parts["activations"] == whole["activations"]


def test_for_people_it_is_yaml_with_comments(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "tiny", "--dry-run", "--world-size", "8"]) == 0
    out = capsys.readouterr().out
    assert strict_yaml.parse(out, "out").value["train"]["steps"] == 60
    lines = [line for line in out.splitlines() if line.startswith("#")]
    assert lines[0] == "# 8 ranks in 4 expert groups of 2: 0-1, 2-3, 4-5, 6-7"
    assert "2 experts a rank in the MoE layer" in lines[1]
    assert lines[2] == "# memory of a rank for 64 tokens a micro-batch, spread evenly over the experts:"
    assert lines[-1].startswith("#   every rank")


def commented(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert run(["train", *arguments, "--dry-run"]) == 0
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("#")]


def test_people_read_of_what_there_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    dense = commented(capsys, "tiny", "model.block=dense", "--world-size", "4", "parallel.expert=4")
    assert dense[:2] == ["# 4 ranks", "# memory of a rank for 128 tokens a micro-batch:"]
    alone = commented(capsys, "tiny", "parallel.expert=1")
    assert alone[0] == "# 1 rank in 1 expert group of 1: 0"
    four = commented(capsys, "small", "parallel.expert=8", "--world-size", "8", "parallel.transport=mpi")
    assert four[1] == "# tokens travel over MPI: start the ranks by mpirun"
    assert "2 experts a rank in each of 4 MoE layers" in four[2]


def test_ranks_that_need_the_same_share_a_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Plan.from_devices([[0, 0, 1, 2, 3, 3]], 4).save(tmp_path / "plan.json")
    uneven = ("tiny", "model.num_experts=6", "parallel.expert=4", f"plan={tmp_path / 'plan.json'}", "--world-size", "4")
    lines = commented(capsys, *uneven)
    assert "1 to 2 experts a rank in the MoE layer" in lines[1]
    assert lines[3].split() == ["#", "expert", "rank", "parameters", "gradients", "optimizer", "activations", "buffers", "total"]
    assert [line.split()[1] for line in lines[4:]] == ["0", "1-2", "3"]
    assert lines[4].split()[2:] == lines[6].split()[2:]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["tiny", "--dry-run", "--world-size", "3"], 78, "expert"),
        (["tiny", "--dry-run", "--world-size", "6"], 78, "8 sequences per step do not divide over 6 ranks"),
        (["tiny", "--world-size", "4"], 2, "--world-size goes with --dry-run"),
    ],
)
def test_worlds_that_do_not_divide_are_refused(arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", *arguments]) == code
    assert message in capsys.readouterr().err
