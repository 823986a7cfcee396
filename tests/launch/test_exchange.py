"""Files of other systems through the command line: what they hold comes back, .pt files run nothing, bad ones end in one line."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from crossdock.launch.cli import run
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.trace import Trace
from tests.placement.conftest import random_trace
from tests.placement.records.test_placement_maps import full_plan
from tests.placement.records.test_recorder import recorded


def done(*arguments: object) -> None:
    assert run([str(argument) for argument in arguments]) == 0


def refused(capsys, code: int, *arguments: object) -> str:
    capsys.readouterr()
    assert run([str(argument) for argument in arguments]) == code
    captured = capsys.readouterr()
    assert len(captured.err.strip().splitlines()) == 1, captured.err
    assert "Traceback" not in captured.err
    return captured.err


def as_tensors(value):
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, dict):
        return {key: as_tensors(item) for key, item in value.items()}
    return [as_tensors(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", ["map.json", "map.pt", "map.npz"])
def test_sglangs_map_both_ways(tmp_path: Path, name):
    plan = full_plan(0)
    plan.save(tmp_path / "plan.json")
    done("plan", "export", tmp_path / "plan.json", tmp_path / name, "--first-dense", 2)
    if name.endswith(".pt"):
        held = torch.load(tmp_path / name, weights_only=True)  # as SGLang loads it
        assert held["physical_to_logical_map"].shape == (4, 9)
    done("plan", "import", tmp_path / name, tmp_path / "again.json", "--devices", 3, "--first-dense", 2)
    assert Plan.load(tmp_path / "again.json").digest == plan.digest


@pytest.mark.parametrize(("form", "name"), [("vllm", "m.json"), ("vllm-record", "m.jsonl"), ("vllm-ascend", "m.json")])
def test_vllms_maps_both_ways(tmp_path: Path, form, name, capsys):
    plan = full_plan(3)
    plan.save(tmp_path / "plan.json")
    done("plan", "export", tmp_path / "plan.json", tmp_path / name, "--format", form)
    capsys.readouterr()
    done("plan", "import", tmp_path / name, tmp_path / "again.json", "--devices", 3, "--json")
    assert json.loads(capsys.readouterr().out)["replicas"] is True
    assert Plan.load(tmp_path / "again.json").digest == plan.digest


def test_a_recorders_pt_file_becomes_the_trace(tmp_path: Path):
    trace = random_trace()
    torch.save(as_tensors(recorded(trace, [16, 24])), tmp_path / "dump.pt")
    done("trace", "import", tmp_path / "dump.pt", tmp_path / "trace.npz")
    assert np.array_equal(Trace.load(tmp_path / "trace.npz").experts_TLK, trace.experts_TLK)


def test_counts_in_json_and_csv(tmp_path: Path):
    (tmp_path / "count.json").write_text(json.dumps({"logical_count": [[3, 1], [2, 2]]}))
    (tmp_path / "count.csv").write_text("layer_id,expert_id,count\n0,0,3\n0,1,1\n1,0,2\n1,1,2\n")
    for name in ("count.json", "count.csv"):
        done("trace", "import", tmp_path / name, tmp_path / "trace.npz")
        loads = [np.bincount(layer_T).tolist() for layer_T in Trace.load(tmp_path / "trace.npz").experts_TLK[:, :, 0].T]
        assert loads == [[3, 1], [2, 2]]


@pytest.mark.parametrize("name", ["plain.npy", "plain.npz"])
def test_plain_arrays_both_ways_with_choices_that_were_dropped(tmp_path: Path, name):
    trace = random_trace(drop=0.2)
    trace.save(tmp_path / "trace.npz")
    done("trace", "export", tmp_path / "trace.npz", tmp_path / name)
    done("trace", "import", tmp_path / name, tmp_path / "again.npz", "--num-experts", 8)
    assert np.array_equal(Trace.load(tmp_path / "again.npz").experts_TLK, trace.experts_TLK)


def test_first_choices_alone_are_an_array_of_tokens_and_layers(tmp_path: Path):
    trace = random_trace()
    trace.save(tmp_path / "trace.npz")
    done("trace", "export", tmp_path / "trace.npz", tmp_path / "first.npy", "--top-1")
    assert np.array_equal(np.load(tmp_path / "first.npy"), trace.experts_TLK[:, :, 0])
    done("trace", "import", tmp_path / "first.npy", tmp_path / "again.npz", "--num-experts", 8)
    assert np.array_equal(Trace.load(tmp_path / "again.npz").experts_TLK[:, :, 0], trace.experts_TLK[:, :, 0])


class Attack:
    """What a pickle of hostile make would run."""

    def __reduce__(self):
        return (Path.touch, (Path("attacked"),))


def test_a_pt_file_with_code_runs_nothing(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"physical_to_logical_map": Attack()}, tmp_path / "bad.pt")
    assert "more than tensors" in refused(capsys, 65, "plan", "import", tmp_path / "bad.pt", tmp_path / "p.json", "--devices", 2)
    (tmp_path / "bad.pt").write_bytes(pickle.dumps({"logical_count": Attack()}))
    assert "more than tensors" in refused(capsys, 65, "trace", "import", tmp_path / "bad.pt", tmp_path / "t.npz")
    assert not (tmp_path / "attacked").exists()


def test_a_tensor_that_shows_few_bytes_as_many_is_refused(tmp_path: Path, capsys):
    torch.save({"logical_count": torch.zeros(1, 1, dtype=torch.int32).expand(10**6, 10**6)}, tmp_path / "bomb.pt")
    assert "not stored in full" in refused(capsys, 65, "trace", "import", tmp_path / "bomb.pt", tmp_path / "t.npz")


def test_files_that_are_not_there_or_of_another_kind(tmp_path: Path, capsys):
    full_plan(0).save(tmp_path / "plan.json")
    (tmp_path / "two.jsonl").write_text("[[0]]\n[[0]]\n")
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04torn")
    np.savez(tmp_path / "other.npz", experts=np.zeros(3))
    cases = [
        (66, "absent.pt", ("plan", "import", tmp_path / "absent.pt", tmp_path / "p.json")),
        (66, "absent.json", ("trace", "import", tmp_path / "absent.json", tmp_path / "t.npz")),
        (65, "2 lines", ("plan", "import", tmp_path / "two.jsonl", tmp_path / "p.json")),
        (65, "damaged", ("plan", "import", tmp_path / "torn.npz", tmp_path / "p.json")),
        (65, "0 arrays named physical_to_logical_map", ("plan", "import", tmp_path / "other.npz", tmp_path / "p.json")),
        (65, "no dump", ("trace", "import", tmp_path / "two.json", tmp_path / "t.npz")),
        (65, "no placement map", ("plan", "import", tmp_path / "plan.json", tmp_path / "p.json")),
        (2, ".json", ("plan", "export", tmp_path / "plan.json", tmp_path / "map.yaml")),
        (2, "format is 'x'", ("plan", "export", tmp_path / "plan.json", tmp_path / "map.json", "--format", "x")),
        (2, "number of devices", ("plan", "import", tmp_path / "map.json", tmp_path / "p.json")),
    ]
    (tmp_path / "two.json").write_text("[1, 2]")
    (tmp_path / "map.json").write_text("[[0, 1]]")
    for code, words, arguments in cases:
        assert words in refused(capsys, code, *arguments)
