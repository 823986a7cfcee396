"""The same command under every launcher, to its end, from a test."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.netlab import Lab
from crossdock import atomic

ROOT = Path(__file__).parents[2]
MPIRUN = Path(sys.executable).with_name("mpirun")
DEEPSPEED = Path(sys.executable).with_name("deepspeed")
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


def deepspeed(arguments: Sequence[str], num_ranks: int, hostfile: Path) -> subprocess.CompletedProcess[str]:
    """DeepSpeed's launcher on this host, to its end, by a hostfile that is written for it."""
    atomic.write_text(hostfile, f"# one machine\nlocalhost slots={num_ranks}\n")
    meeting = ["--no_ssh", "--node_rank=0", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]  # no ssh stands on a test's machine
    return ended([str(DEEPSPEED), f"--hostfile={hostfile}", *meeting, "--module", "crossdock", *arguments])


def deepspeed_on_two_nodes(arguments: Sequence[str], num_ranks: int, hostfile: Path) -> None:
    """DeepSpeed's launcher on two emulated hosts, started on each as its `--no_ssh` wants it, by one hostfile."""
    per_node = num_ranks // 2
    atomic.write_text(hostfile, f"node0 slots={per_node}\nnode1 slots={per_node}\n")
    with Lab(2, 1e9) as lab:
        common = [f"--hostfile={hostfile}", "--no_ssh", f"--master_addr={lab.address(0)}", "--master_port=29500"]
        command = [str(DEEPSPEED), *common, "--no_local_rank", "--module", "crossdock", *arguments]
        jobs = [(node, [*command[:1], f"--node_rank={node}", *command[1:]], {"OMP_NUM_THREADS": "1"}) for node in range(2)]
        lab.together(jobs, TIMEOUT_S)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def printed(arguments: Sequence[str]) -> str:
    """What `crossdock ARGUMENTS` prints."""
    process = ended([sys.executable, "-m", "crossdock", *arguments])
    assert process.returncode == 0, process.stderr
    return process.stdout
