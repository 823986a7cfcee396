"""What a cluster is asked for: how many nodes and ranks, and which command runs there. Plain values for the scripts and manifests."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crossdock import errors
from crossdock.errors import CrossdockError, PeerLost, Preempted, UsageError

_LOST_BEATS = 3
RETRY_CODES = (Preempted.exit_code, PeerLost.exit_code)
"""Exit codes after which the same command goes on from the newest checkpoint: asked to stop, or another rank was lost."""


def final_codes() -> tuple[int, ...]:
    """Exit codes after which starting again cannot help: wrong input, wrong configuration, a full disk, a loss that is not finite."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, CrossdockError)]
    ours = {kind.exit_code for kind in kinds if kind is not CrossdockError}
    return tuple(sorted(ours - set(RETRY_CODES)))


@dataclass(frozen=True)
class Shape:
    """`nodes` hosts with `ranks_per_node` ranks each; a rank has one GPU where `gpus`, and `cores_per_rank` cores."""

    nodes: int
    ranks_per_node: int
    gpus: bool
    cores_per_rank: int

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class Run:
    """The command of one run: `name` is fit for schedulers, `directory` is where its result will be."""

    name: str
    directory: Path
    config: str
    overrides: tuple[str, ...]

    @property
    def train(self) -> tuple[str, ...]:
        """The arguments after `crossdock`."""
        return ("train", self.config, *self.overrides)

    @property
    def result(self) -> Path:
        """How the run ended, once it has."""
        return self.directory / "result.json"

    @property
    def secret_file(self) -> Path:
        """Where the ranks of several hosts find the job's secret: beside the run directory, which all of them reach."""
        return self.directory.with_name(f"{self.directory.name}.secret")


def scheduler_name(text: str) -> str:
    """`text` as a DNS label (RFC 1123, at most 40 characters, so that suffixes fit): what Kubernetes takes for a name.

    Raises `UsageError` where nothing is left of it.
    """
    label = re.sub(r"[^a-z0-9]+", "-", text.lower())[:40].strip("-")
    if not label:
        raise UsageError(f"{text!r} holds no letter or digit to name the run by; set run.dir")
    return label


def torchrun(shape: Shape, run: Run, head: str, port: int, restarts: int) -> tuple[str, ...]:
    """The command for every node; the same on all.

    Several agents keep their store from the ranks: shared, it has the ranks' port only for agents that were there when it was chosen, and
    one that comes in the place of a lost node waits for it in vain. A node that has not been heard of for `_LOST_BEATS` heartbeats
    is lost; torchrun's own 15 s are more than the rest of a restart. The store hears of one heartbeat a second for each 16 nodes.
    """
    restarting = (f"--max-restarts={restarts}",) if restarts else ()
    what = (f"--nproc-per-node={shape.ranks_per_node}", *restarting, "-m", "crossdock", *run.train)
    if shape.nodes == 1:
        return ("torchrun", "--standalone", *what)
    beats = f"keep_alive_interval={max(1, shape.nodes // 16)},keep_alive_max_attempt={_LOST_BEATS}"
    meeting = ("--rdzv-backend=c10d", f"--rdzv-endpoint={head}:{port}", f"--rdzv-id={run.name}", f"--rdzv-conf={beats}")
    return ("env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", "torchrun", *meeting, f"--nnodes={shape.nodes}", *what)


def mpirun(shape: Shape, run: Run, hosts: Sequence[str]) -> tuple[str, ...]:
    """The command for one of the nodes; `hosts` may be empty where the scheduler tells MPI. Understood by Open MPI and MPICH alike."""
    if hosts and len(hosts) != shape.nodes:
        raise UsageError(f"{len(hosts)} hosts and --nodes {shape.nodes}; name every node once")
    where = ("-host", ",".join(f"{host}:{shape.ranks_per_node}" for host in hosts)) if hosts else ()
    return ("mpirun", "-n", str(shape.world_size), *where, "crossdock", *run.train)


def shell(command: Sequence[str]) -> str:
    """The command as one would type it, quoted."""
    return shlex.join(command)
