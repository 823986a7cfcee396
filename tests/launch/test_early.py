"""Settings that cannot work are refused before any rank starts, in one line, by every launcher and by --dry-run."""

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from crossdock.errors import BadConfig, Unavailable
from crossdock.launch import cli, start
from crossdock.launch.config import read_config
from crossdock.launch.ranks import worker
from crossdock.launch.ranks.worker_env import Meeting, WorkerEnv
from crossdock.launch.request import check_world
from crossdock.placement.solvers import SOLVERS
from crossdock.runtime.adaptation.replan import Method
from crossdock.runtime.data import write_bin
from crossdock.runtime.optimization import deepspeed_engine

NO_MPI = "parallel.transport mpi: the ranks are not started by mpirun"


@pytest.fixture
def starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*arguments: object, **options: object) -> None:
        raise AssertionError("ranks were started")

    monkeypatch.setattr(start, "run_ranks", started)
    monkeypatch.setattr(worker, "open_store", started)


CONTRADICTIONS = [
    (["replan.at_step=60"], "override replan.at_step=60: replan.at_step 60 of 60 steps leaves no room for 4 recorded steps"),
    (["replan.at_step=70"], "choose it from 4 to 56"),
    (["replan.at_step=1"], "choose it from 4 to 56"),
    (["replan.at_step=0"], "`replan.at_step` is 0 (integer); expected greater than or equal to 1"),
    (["replan.at_step=-4"], "`replan.at_step` is -4 (integer)"),
    (["replan.at_step=4", "train.steps=7"], "train for 8 steps or more"),
    (["replan.at_step=4", "capture.steps=0"], "needs a recorded window; set capture.steps or replan.capture_steps"),
    (["replan.at_step=30", "model.block=dense"], "replan.at_step 30 moves experts, and model.block dense has none"),
    (["replan.at_step=30", "replan.method=anneall"], "did you mean anneal?"),
    (["replan.at_step=30", "replan.method=columns"], "method columns is for objective devices, not seconds"),
    (["replan.at_step=30", "replan.method=replicas"], "method replicas has no slots for copies"),
    (["replan.at_step=30", "replan.method=ilp", "replan.objective=hops"], "for hops use method anneal"),
    (["replan.at_step=30", "replan.method=dp", "model.num_experts=64"], "64 experts have too many (at most 16)"),
    (["data.kind=text"], "override data.kind=text: `data`: data.kind text needs data.path"),
    (["model.vocab_size=100"], "override model.vocab_size=100: data.kind stdlib is read as bytes, a vocabulary of 256"),
    (["profile.first=61"], "profile.first 61 comes after the last of 60 steps"),
    (["parallel.transport=mpi"], f"{NO_MPI} (local), and MPI reaches no others; set parallel.transport: auto"),
]


@pytest.mark.usefixtures("starts_nothing")
@pytest.mark.parametrize(("overrides", "piece"), CONTRADICTIONS)
@pytest.mark.parametrize("dry", [False, True])
def test_contradictions(overrides: list[str], piece: str, dry: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", "tiny", *overrides, f"run.dir={tmp_path / 'run'}", *(["--dry-run"] if dry else [])]) == 78
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("crossdock: error: ")
    assert piece in line


def test_the_line_in_the_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("train: {steps: 20}\nreplan:\n  seconds: 1.0\n  at_step: 30\n")
    with pytest.raises(BadConfig, match=r"mine\.yaml:4: replan\.at_step 30 of 20 steps"):
        read_config(path)
    path.write_text("train:\n  steps: 20\nparallel:\n  expert: 3\n")
    with pytest.raises(BadConfig, match=r"mine\.yaml:4: 8 experts"):
        read_config(path)


@pytest.mark.usefixtures("starts_nothing")
@pytest.mark.parametrize("command", ["torchrun", "slurm", "kubernetes", "deepspeed", "ray"])
def test_mpi_under_launchers_that_have_none(command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    options = {
        "slurm": ["--ranks-per-node", "2"],
        "kubernetes": ["--ranks-per-node", "2"],
        "deepspeed": ["--hostfile", f"{tmp_path}/hosts"],
    }
    directory = "/runs/x" if command == "kubernetes" else f"{tmp_path}/run"
    asked = ["launch", command, "tiny", f"run.dir={directory}", *options.get(command, [])]
    assert cli.run([*asked, "parallel.transport=mpi"]) == 78
    out, err = capfd.readouterr()
    assert out == ""
    launcher = {"kubernetes": "torchrun"}.get(command, command)
    assert f"{NO_MPI} ({launcher})" in err


@pytest.mark.usefixtures("starts_nothing")
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "slurm", "ray"])
def test_mpi_asked_of_ranks_that_another_launcher_started(launcher: Any, tmp_path: Path) -> None:
    """They do not wait for one another first."""
    env = WorkerEnv(1, 2, 1, 2, 0, Meeting("listen", host="127.0.0.1", port=1), launcher)
    ended = worker.main(read_config(Path("tiny"), ["parallel.transport=mpi", f"run.dir={tmp_path}"]), env)
    assert ended.exit_code == 78
    assert f"{NO_MPI} ({launcher})" in ended.fields["message"]


def test_mpi_where_it_may_be(capfd: pytest.CaptureFixture[str]) -> None:
    """A world that nobody started may be mpirun's; what no mpirun could carry is refused there as well."""
    asked = ["train", "tiny", "parallel.transport=mpi", "--dry-run", "--world-size", "2"]
    assert cli.run(asked) == 0
    assert cli.run(["launch", "mpi", "tiny", "parallel.transport=mpi"]) == 0
    assert cli.run([*asked, "device=cuda"]) == 78
    assert cli.run([*asked, "model.block=dense", "capture.steps=0"]) == 78
    assert cli.run([*asked, "parallel.expert=1"]) == 78
    for line, piece in zip(capfd.readouterr().err.splitlines(), ("GPUs", "no experts", "parallel.expert is 1"), strict=True):
        assert piece in line
    check_world(read_config(Path("tiny"), ["parallel.transport=mpi"]), 2, "mpi")
    check_world(read_config(Path("tiny"), ["parallel.transport=auto"]), 2, "local")


@pytest.mark.usefixtures("starts_nothing")
def test_what_local_ranks_need_of_this_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    write_bin(tmp_path / "t.bin", np.arange(200), 300)
    monkeypatch.setattr(start, "usable_gpus", lambda config: 1)

    def absent() -> None:
        raise Unavailable("engine deepspeed needs the package deepspeed")

    monkeypatch.setattr(start, "check_installed", absent)
    train = ["train", "tiny", f"run.dir={tmp_path / 'run'}"]
    for overrides, code, piece in (
        (["data.kind=text", "data.path=/nonexistent/*.txt"], 66, "data.path /nonexistent/*.txt: no such file"),
        (["data.kind=bin", f"data.path={tmp_path}/t.bin"], 78, "has a vocabulary of 300 and model.vocab_size is 256"),
        (["device=cuda"], 69, "2 ranks on this host, 1 usable GPUs"),
        (["engine=deepspeed"], 69, "needs the package deepspeed"),
    ):
        assert cli.run([*train, *overrides]) == code
        assert piece in capfd.readouterr().err
        assert json.loads((tmp_path / "run" / "result.json").read_text())["exit_code"] == code
        assert cli.run([*train, *overrides, "--dry-run"]) == 0  # which is for a machine with none of it
        assert capfd.readouterr().err == ""


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_engine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match=r"it is not installed\): pip install 'crossdock\[deepspeed\]', or set engine: native"):
        deepspeed_engine.check_installed()


def test_the_methods_of_a_replanning_are_the_solvers() -> None:
    assert set(get_args(Method)) == set(SOLVERS)
