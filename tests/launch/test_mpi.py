"""mpirun as a launcher: every ending with its exit code, and where rank 0 is found. That runs are equal: see test_anywhere.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from crossdock.errors import Unavailable
from crossdock.launch.ranks.mpi import reachable_address

MPIRUN = Path(sys.executable).with_name("mpirun")
pytest.importorskip("mpi4py", reason="mpi4py is not installed")
needs_mpirun = pytest.mark.skipif(not MPIRUN.exists(), reason="no mpirun beside this Python: install the package mpich")


def mpirun(*arguments: str, num_ranks: int = 2, module: str = "crossdock") -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [str(MPIRUN), "-n", str(num_ranks), sys.executable, "-m", module, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@needs_mpirun
def test_an_error_is_one_line_and_its_exit_code(tmp_path: Path) -> None:
    ended = mpirun("train", "tiny", "parallel.expert=2", f"run.dir={tmp_path}", num_ranks=3)
    assert ended.returncode == 78
    assert json.loads((tmp_path / "result.json").read_text())["exit_code"] == 78
    assert "Traceback" not in ended.stderr


@needs_mpirun
def test_a_rank_that_fails_alone_ends_a_run_over_mpi(tmp_path: Path) -> None:
    """MPI itself would let the others wait for its rows for ever; `parallel.timeout_s` is longer than this test may take."""
    ended = mpirun("train", "tiny", "parallel.transport=mpi", f"run.dir={tmp_path}", module="tests.launch.failing_rank")
    assert ended.returncode != 0
    assert "rank 1 has had enough" in ended.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["status"], result["reached_step"]) == ("failed", 2)


@needs_mpirun
def test_rank_0_alone_fails_before_the_ranks_meet(tmp_path: Path) -> None:
    """Only rank 0 looks at the run directory; the others would wait for its word for ever."""
    ended = mpirun("train", "tiny", "run.resume=always", f"run.dir={tmp_path}")
    assert ended.returncode != 0
    assert "holds no checkpoint" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_network_that_most_ranks_share() -> None:
    one = ["172.17.0.1/16", "10.1.0.1/24", "192.168.5.1/24"]
    two = ["172.18.0.1/16", "10.1.0.2/24", "192.168.5.2/24"]
    three = ["10.1.0.3/24"]
    assert reachable_address([one, two, three]) == "10.1.0.1"
    assert reachable_address([one, two]) == "10.1.0.1"  # the first of equal ones
    with pytest.raises(Unavailable, match="MASTER_ADDR"):
        reachable_address([[], two])
