"""The command line as a whole: what it imports, what it lists, and the smaller commands."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

import crossdock
from crossdock.launch.cli import app, run
from crossdock.placement.records.trace import Trace


def imported(*arguments: str) -> set[str]:
    """Top-level modules that a command imports."""
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "crossdock", *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    lines = [line for line in ended.stderr.splitlines() if line.startswith("import time:")]
    assert len(lines) > 50
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines[1:]}


@pytest.mark.parametrize(
    "arguments", [("--version",), ("--help",), ("plan", "--help"), ("plan", "solve", "--help"), ("train", "--help"), ("trace", "--help")]
)
def test_help_loads_nothing_heavy(arguments: tuple[str, ...]) -> None:
    assert not imported(*arguments) & {"torch", "numpy", "scipy", "pydantic", "jinja2", "rich", "ray", "deepspeed", "mpi4py"}


def test_the_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"crossdock {crossdock.__version__} (torch {metadata.version('torch')})\n"

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"crossdock {crossdock.__version__} (no torch)\n"


def test_a_reader_of_help_that_goes_away() -> None:
    shell = f"{sys.executable} -m crossdock --help | true; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_status_loads_nothing_heavy(tmp_path: Path) -> None:
    """Batch scripts and pods ask for it at their end."""
    (tmp_path / "result.json").write_text('{"status": "done", "exit_code": 0}')
    assert not imported("status", str(tmp_path)) & {"torch", "numpy", "scipy", "ray"}


def test_a_rank_starts_without_the_solvers() -> None:
    """Half a second for each rank of each start; a re-planning loads them."""
    code = (
        "import sys; from pathlib import Path; from crossdock.launch.config import read_config; from crossdock.launch.ranks import worker;"
        "worker.read_inputs(read_config(Path('tiny'), ['replan.at_step=20', 'replan.method=anneal', 'topology=2x1-local']));"
        "print(sorted({name.split('.')[0] for name in sys.modules}))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert "'torch'" in ended.stdout
    assert not {"scipy", "ray", "deepspeed", "mpi4py", "jinja2"} & set(ast.literal_eval(ended.stdout))


@pytest.fixture
def trace_path(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    experts = np.argsort(rng.random((64, 2, 4)), axis=-1)[..., :2].astype(np.uint16)
    Trace(experts, 4, home_T=np.arange(64) % 2, source="a test").save(tmp_path / "trace.npz")
    return tmp_path / "trace.npz"


def test_no_plan_command_loads_torch(trace_path: Path) -> None:
    plan, page = str(trace_path.with_name("plan.json")), str(trace_path.with_name("page.html"))
    trace = ("--trace", str(trace_path), "--topology", "2x1-local")
    for arguments in (
        ("solve", *trace, "--seconds", "0.2", "--out", plan),
        ("compare", *trace, "--methods", "contiguous,balance,ilp", "--plan", plan, "--seconds", "2"),
        ("show", plan),
        ("diff", plan, plan),
        ("check", plan, *trace),
        ("report", *trace, "--plan", plan, "--out", page),
    ):
        assert "torch" not in imported("plan", *arguments), arguments


def test_no_arguments_is_help_and_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    assert "demo" in capsys.readouterr().out


def commands(group: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *path, name)
        else:
            yield (*path, name), command


def test_every_command_has_an_example_and_json() -> None:
    listed = dict(commands(typer.main.get_command(app)))
    assert {("demo",), ("train",), ("trace", "capture"), ("plan", "compare"), ("config", "schema"), ("checkpoint", "verify")} <= set(listed)
    for path, command in listed.items():
        assert f"Example: crossdock {' '.join(path)}" in command.help, path
        assert path == ("config", "schema") or "--json" in {option for parameter in command.params for option in parameter.opts}, path


def test_lists_of_commands_are_not_cut_and_placeholders_are_alike(capsys: pytest.CaptureFixture[str]) -> None:
    groups = [("plan",), ("trace",), ("launch",), ("config",), ("checkpoint",), ()]
    every = [path for path, _ in commands(typer.main.get_command(app))]
    for path in (*groups, *every):
        assert run([*path, "--help"]) == 0
        shown = capsys.readouterr().out
        assert not re.search(r"\w\.\.\.$", shown, re.MULTILINE), path
        assert max(map(len, shown.splitlines())) <= 80, path
        usage = " ".join(shown.partition("\n\n")[0].split()).partition("[OPTIONS]")[2]
        assert usage == usage.upper(), path
        assert "range>" not in shown, path
        assert "[[" not in shown, path


def test_a_bug_shows_its_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from crossdock.launch.commands import doctor as command

    def broken(run_dir: Path) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(command, "examine", broken)
    assert run(["doctor"]) == 1
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert "bug in Crossdock" in printed.splitlines()[-1]


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    run(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    topics = {check["topic"]: check for check in report["checks"]}
    assert {
        "crossdock",
        "torch",
        "cores",
        "memory",
        "disk",
        "disk speed",
        "rename",
        "interfaces",
        "ports",
        "process groups",
        "clock",
    } <= set(topics)
    assert topics["torch"]["level"] == "ok"


def test_config_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "show", "tiny", "train.steps=5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["train"]["steps"] == 5
    assert run(["config", "check", "tiny", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["ok"]
    assert facts["parameters"] > facts["active_parameters"] > 0
    assert run(["config", "schema"]) == 0
    assert "properties" in json.loads(capsys.readouterr().out)


def test_explain_and_profile_steps_are_keys_of_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "tiny", "--explain", "--profile-steps", "10:12", "--dry-run", "--json"]) == 0
    resolved = json.loads(capsys.readouterr().out)
    assert resolved["adapt"] == {**resolved["adapt"], "mode": "off", "explain": True}
    assert resolved["profile"] == {"first": 10, "last": 12}
    assert run(["train", "tiny", "--profile-steps", "7", "--dry-run", "--json"]) == 0
    resolved = json.loads(capsys.readouterr().out)
    assert (resolved["adapt"]["explain"], resolved["profile"]) == (False, {"first": 7, "last": 7})


@pytest.mark.parametrize(
    ("steps", "code", "message"), [("3-5", 2, "of the form A:B"), (":4", 2, "of the form A:B"), ("9:4", 78, "first <= last")]
)
def test_steps_that_are_none_are_refused(steps: str, code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "tiny", "--profile-steps", steps, "--dry-run"]) == code
    assert message in capsys.readouterr().err


def test_a_choice_of_strategies_needs_tokens_that_go_home(capsys: pytest.CaptureFixture[str]) -> None:
    coherent = ["model.block=top_k", "model.top_k=1", "model.traffic=coherent", "model.gate={kind: switch}"]
    assert run(["train", "tiny", *coherent, "adapt.mode=start", "--dry-run"]) == 78
    assert "adapt.mode start chooses how tokens travel" in capsys.readouterr().err


def test_a_trace_goes_out_and_comes_in_again(trace_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trace_path.parent
    assert run(["trace", "export", str(trace_path), str(folder / "all.npy"), "--json"]) == 0
    assert run(["trace", "export", str(trace_path), str(folder / "first.npy"), "--top-1"]) == 0
    assert np.load(folder / "first.npy").shape == (64, 2)
    assert run(["trace", "import", str(folder / "all.npy"), str(folder / "again.npz"), "--num-experts", "4"]) == 0
    assert np.array_equal(Trace.load(folder / "again.npz").experts_TLK, Trace.load(trace_path).experts_TLK)
    capsys.readouterr()
    assert run(["trace", "show", str(trace_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["tokens"], facts["layers"], facts["choices_per_token"], facts["experts"], facts["homes"]) == (64, 2, 2, 4, 2)


def test_capture_from_a_config_and_from_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("pack my box with five dozen liquor jugs. " * 300)
    small = [
        "model.model_width=32",
        "model.num_heads=2",
        "model.expert_width=32",
        "data.kind=text",
        f"data.path={tmp_path / 'text.txt'}",
        "data.seq_len=16",
        "parallel.expert=1",
        "train.steps=3",
        "train.batch_sequences=4",
        "capture.steps=1",
    ]
    out = tmp_path / "trace.npz"
    assert run(["train", "tiny", *small, f"run.dir={tmp_path / 'run'}", "checkpoint.at_end=true"]) == 0
    assert run(["checkpoint", "verify", str(tmp_path / "run"), "--json"]) == 0
    assert run(["trace", "capture", "tiny", *small, "--out", str(out), "--steps", "2"]) == 0
    untrained = Trace.load(out)
    assert (untrained.num_tokens, untrained.num_layers, untrained.top_k) == (2 * 4 * 16, 1, 2)
    assert run(["trace", "capture", str(tmp_path / "run"), "--out", str(out), "--steps", "2"]) == 0
    trained = Trace.load(out)
    assert np.array_equal(trained.token_T, untrained.token_T)
    assert not np.array_equal(trained.experts_TLK, untrained.experts_TLK)
    assert "step-00000003" in trained.source
    shard = next((tmp_path / "run" / "checkpoints").glob("step-*/shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x00")
    capsys.readouterr()
    assert run(["checkpoint", "verify", str(tmp_path / "run")]) == 67
    assert "BAD" in capsys.readouterr().out


def test_probe_writes_a_measured_topology(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from crossdock.placement.records.topology import Topology

    assert run(["probe", "--ranks", "2", "--out", str(tmp_path / "topology.yaml"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    topology = Topology.load(tmp_path / "topology.yaml")
    assert topology.measured
    assert (topology.num_devices, topology.digest) == (2, report["digest"])
