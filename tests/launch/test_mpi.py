"""mpirun as a launcher: the same run as by local ranks, bit for bit, and every ending with its exit code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from crossdock.errors import Unavailable
from crossdock.launch import cli
from crossdock.launch.mpi import reachable_address

MPIRUN = Path(sys.executable).with_name("mpirun")
pytest.importorskip("mpi4py", reason="mpi4py is not installed")
needs_mpirun = pytest.mark.skipif(not MPIRUN.exists(), reason="no mpirun beside this Python: install the package mpich")


def mpirun(*arguments: str, num_ranks: int = 2) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [str(MPIRUN), "-n", str(num_ranks), sys.executable, "-m", "crossdock", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def losses(directory: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


@needs_mpirun
def test_the_same_run_as_by_local_ranks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "tiny", "train.steps=4"]
    ended = mpirun(*arguments, f"run.dir={tmp_path / 'mpi'}")
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])
    assert (result["status"], result["reached_step"], result["world_size"]) == ("done", 4, 2)
    assert cli.run([*arguments, f"run.dir={tmp_path / 'local'}"]) == 0
    capfd.readouterr()
    assert losses(tmp_path / "mpi") == losses(tmp_path / "local")


@needs_mpirun
def test_an_error_is_one_line_and_its_exit_code(tmp_path: Path) -> None:
    ended = mpirun("train", "tiny", "parallel.expert=2", f"run.dir={tmp_path}", num_ranks=3)
    assert ended.returncode == 78
    assert json.loads((tmp_path / "result.json").read_text())["exit_code"] == 78
    assert "Traceback" not in ended.stderr


def test_the_network_that_most_ranks_share() -> None:
    one = ["172.17.0.1/16", "10.1.0.1/24", "192.168.5.1/24"]
    two = ["172.18.0.1/16", "10.1.0.2/24", "192.168.5.2/24"]
    three = ["10.1.0.3/24"]
    assert reachable_address([one, two, three]) == "10.1.0.1"
    assert reachable_address([one, two]) == "10.1.0.1"  # the first of equal ones
    with pytest.raises(Unavailable, match="MASTER_ADDR"):
        reachable_address([[], two])
