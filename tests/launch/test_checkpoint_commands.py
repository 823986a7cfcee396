"""`crossdock checkpoint` from the shell: a run saved, listed, resharded, exported, imported, and trained on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crossdock.launch.cli import run
from crossdock.runtime.checkpoints import checkpoint
from crossdock.runtime.data import write_bin

MOE = [
    "tiny",
    "model.block=top_k",
    "model.moe_every=1",
    "model.gate={kind: softmax_topk}",
    "model.model_width=16",
    "model.expert_width=16",
    "model.num_heads=2",
    "parallel.expert=1",
    "data.kind=text",
    "data.seq_len=16",
    "train.batch_sequences=4",
    "train.steps=4",
    "train.eval_batches=1",
    "capture.steps=0",
    "checkpoint.every=2",
    "checkpoint.at_end=true",
]
Said = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """Runs a command: (exit code, the JSON object on stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, dict[str, Any], str]:
        code = run(arguments)
        out, err = capsys.readouterr()
        return code, json.loads(out.splitlines()[-1]) if out else {}, err

    return call


@pytest.fixture
def run_dir(tmp_path: Path, said: Said) -> Path:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    code, result, err = said("train", *MOE, f"data.path={tmp_path / 'text.txt'}", f"run.dir={tmp_path / 'run'}")
    assert (code, result["status"]) == (0, "done"), err
    return tmp_path / "run"


def test_the_life_of_a_checkpoint(run_dir: Path, said: Said) -> None:
    code, listed, _ = said("checkpoint", "ls", str(run_dir), "--json")
    assert code == 0
    assert [(row["step"], row["shards"], row["world_size"], row["plan"]) for row in listed["checkpoints"]] == [
        (4, 1, 1, "contiguous"),
        (2, 1, 1, "contiguous"),
    ]
    code, facts, _ = said("checkpoint", "reshard", str(run_dir), str(run_dir.parent / "four"), "--shards", "4", "--json")
    assert (code, facts["shards"]) == (0, 4)
    assert facts["largest_bytes"] < 1.5 * facts["smallest_bytes"]
    assert said("checkpoint", "verify", str(run_dir.parent / "four"), "--json")[1]["ok"]

    code, facts, _ = said("checkpoint", "reshard", str(run_dir.parent / "four"), str(run_dir.parent / "one"), "--shards", "1", "--json")
    assert (code, facts["shards"]) == (0, 1)
    first = run_dir / "checkpoints" / "step-00000004" / "shard-00000.safetensors"
    assert (run_dir.parent / "one" / first.name).read_bytes() == first.read_bytes(), "there and back is the same file"

    exported, back = run_dir.parent / "hf", run_dir.parent / "imported"
    code, facts, _ = said("checkpoint", "export-hf", str(run_dir), str(exported), "--json")
    assert (code, facts["architecture"], facts["step"]) == (0, "Mixtral", 4)
    code, facts, err = said("checkpoint", "import-hf", str(exported), str(back), "--json")
    assert code == 0, err
    again = run_dir.parent / "hf2"
    assert said("checkpoint", "export-hf", str(back), str(again), "--json")[0] == 0
    assert (again / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()

    # An imported model trains on: its first evaluation is that of the weights, not of new ones.
    options = [item for item in MOE[1:] if not item.startswith("model.")]
    code, result, err = said("train", str(back / "config.resolved.yaml"), *options, f"data.path={run_dir.parent / 'text.txt'}")
    assert (code, result["status"]) == (0, "done"), err
    events = [json.loads(line) for line in (back / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "resumed"] == [0]
    first = json.loads((back / "metrics.jsonl").read_text().splitlines()[0])
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert abs(first["loss"] - last["loss"]) < 0.2
    untrained = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] < untrained["loss"]


@pytest.mark.parametrize("vocab_size", [17, 300])
def test_a_model_of_any_vocabulary_is_imported_and_asks_for_its_own_tokens(vocab_size: int, tmp_path: Path, said: Said) -> None:
    tokens, run_dir, exported, back = (tmp_path / name for name in ("small.bin", "run", "hf", "back"))
    write_bin(tokens, np.random.default_rng(0).integers(0, 17, 4000), vocab_size=vocab_size)
    data = ["data.kind=bin", f"data.path={tokens}"]
    options = [item for item in MOE if item != "data.kind=text"]
    code, _, err = said("train", *options, *data, f"model.vocab_size={vocab_size}", f"run.dir={run_dir}")
    assert code == 0, err
    assert said("checkpoint", "export-hf", str(run_dir), str(exported), "--json")[0] == 0
    code, facts, err = said("checkpoint", "import-hf", str(exported), str(back), "--json")
    assert (code, facts["data"]) == (0, str(back / "tokens.bin")), err
    train = ["train", str(back / "config.resolved.yaml"), *[item for item in options[1:] if not item.startswith("model.")]]
    code, _, err = said(*train)
    assert (code, err.count("Traceback")) == (66, 0)
    assert str(back / "tokens.bin") in err
    code, result, err = said(*train, f"data.path={tokens}")
    assert (code, result["status"]) == (0, "done"), err


def test_what_is_refused(run_dir: Path, said: Said) -> None:
    for arguments, code, message in [
        (["reshard", str(run_dir), str(run_dir), "--shards", "2"], 2, "exists already"),
        (["reshard", str(run_dir), str(run_dir.parent / "x"), "--shards", "100000"], 2, "choose --shards"),
        (["reshard", str(run_dir.parent / "nothing"), str(run_dir.parent / "x"), "--shards", "2"], 66, "is not a folder"),
        (["export-hf", str(run_dir), str(run_dir.parent / "x"), "--dtype", "fp8"], 2, "none of fp32, bf16, fp64"),
        (["export-hf", str(run_dir), str(run_dir.parent / "x"), "--config", "tiny"], 78, "block scmoe"),
        (["import-hf", str(run_dir), str(run_dir.parent / "x")], 66, "config.json"),
    ]:
        found, _, err = said("checkpoint", *arguments)
        assert (found, err.count("\n")) == (code, 1), err
        assert message in err
        assert not (run_dir.parent / "x").exists()


def test_damage_is_passed_over_or_refused(run_dir: Path, said: Said) -> None:
    newest, older = (run_dir / "checkpoints" / f"step-{step:08d}" for step in (4, 2))
    shard = newest / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-2])
    code, facts, err = said("checkpoint", "reshard", str(run_dir), str(run_dir.parent / "x"), "--shards", "2", "--json")
    assert (code, facts["from"]) == (0, str(older))
    assert "damaged checkpoint passed over" in err
    assert said("checkpoint", "reshard", str(newest), str(run_dir.parent / "y"), "--shards", "2")[0] == 67
    assert checkpoint.verify(older) is None
