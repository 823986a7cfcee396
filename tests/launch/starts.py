"""The same command under every launcher, to its end, from a test."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.netlab import Lab

ROOT = Path(__file__).parents[2]
MPIRUN = Path(sys.executable).with_name("mpirun")
TIMEOUT_S = 300.0


def environment() -> dict[str, str]:
    """Ours, with one thread a rank, and without what another launcher may have left."""
    left = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return {**left, "OMP_NUM_THREADS": "1", "PATH": f"{MPIRUN.parent}{os.pathsep}{os.environ['PATH']}"}


def ended(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run to the end, whatever comes of it."""
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def _ended_well(command: Sequence[str]) -> None:
    process = ended(command)
    assert process.returncode == 0, process.stdout + process.stderr


def alone(arguments: Sequence[str]) -> None:
    """`crossdock ARGUMENTS`, which starts local ranks."""
    _ended_well([sys.executable, "-m", "crossdock", *arguments])


def torchrun(arguments: Sequence[str], num_ranks: int) -> None:
    """torchrun on this host."""
    options = ["--standalone", "--nproc-per-node", str(num_ranks)]
    _ended_well([sys.executable, "-m", "torch.distributed.run", *options, "-m", "crossdock", *arguments])


def torchrun_on_two_nodes(arguments: Sequence[str], num_ranks: int) -> None:
    """torchrun on two emulated hosts, which meet by c10d over their network."""
    with Lab(2, 1e9) as lab:
        lab.torchrun(["-m", "crossdock", *arguments], ranks_per_node=num_ranks // 2, timeout_s=TIMEOUT_S)


def mpirun(arguments: Sequence[str], num_ranks: int) -> None:
    """mpirun on this host."""
    _ended_well([str(MPIRUN), "-n", str(num_ranks), sys.executable, "-m", "crossdock", *arguments])


def printed(arguments: Sequence[str]) -> str:
    """What `crossdock ARGUMENTS` prints."""
    process = ended([sys.executable, "-m", "crossdock", *arguments])
    assert process.returncode == 0, process.stderr
    return process.stdout
