"""`crossdock launch`: the same run under every launcher. Scripts and manifests are printed to be read first; Ray is driven from here."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer

from crossdock.errors import MissingInput, UsageError
from crossdock.launch.scripts import allocation as cluster
from crossdock.placement.commands.output import print_facts

launch_app = typer.Typer(
    name="launch", help="Start a run on a cluster, or print what starts it.", no_args_is_help=True, rich_markup_mode=None
)

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A run's YAML file, or the name of a shipped one.", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="A.B=C", help="Keys to set, after YAML's rules.", show_default=False)]
Nodes = Annotated[int, typer.Option("--nodes", min=1, help="Hosts.")]
RanksPerNode = Annotated[int, typer.Option("--ranks-per-node", min=1, help="Ranks of one host: one per GPU.")]
CoresPerRank = Annotated[int, typer.Option("--cores-per-rank", min=1, help="Cores for each rank.")]
Gpus = Annotated[bool, typer.Option("--gpus/--no-gpus", help="A GPU for each rank.")]
Restarts = Annotated[int, typer.Option("--restarts", min=0, help="How often a run that lost a rank starts again from its checkpoint.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object: a command as `command`, a script as `script`, a manifest as it is.")
]
Out = Annotated[Path | None, typer.Option("--out", help="Write to this file instead of stdout.")]


@launch_app.command("torchrun")
def print_torchrun(
    config: Config,
    overrides: Overrides = None,
    nodes: Nodes = 1,
    ranks_per_node: RanksPerNode = 2,
    head: Annotated[str, typer.Option("--head", help="Address of one of the nodes, for several.")] = "",
    port: Annotated[int, typer.Option("--port", min=1, max=65_535, help="Free port of that node.")] = 29_400,
    restarts: Restarts = 3,
    as_json: AsJson = False,
) -> None:
    """Print the torchrun command; for several nodes it is the same on each, and names the file of the job's secret, which all must read.

    Example: crossdock launch torchrun configs/small.yaml run.dir=/data/small parallel.expert=4 --nodes 2 --ranks-per-node 2 --head n1
    """
    shape = cluster.Shape(nodes, ranks_per_node, gpus=False, cores_per_rank=1)
    if nodes > 1 and not head:
        raise UsageError(f"{nodes} nodes meet at one of them; name its address by --head")
    run = _run(config, overrides, shape.world_size, nodes, "torchrun")
    command = cluster.torchrun(shape, run, head, port, restarts)
    if nodes > 1:
        command = ("env", f"CROSSDOCK_SECRET_FILE={run.secret_file}", *command[command[0] == "env" :])
        _ask_for_secret(run)
    _print_command(command, as_json)


@launch_app.command("mpi")
def print_mpirun(
    config: Config,
    overrides: Overrides = None,
    nodes: Nodes = 1,
    ranks_per_node: RanksPerNode = 2,
    hosts: Annotated[str, typer.Option("--hosts", help="The nodes, separated by commas, where no scheduler tells MPI.")] = "",
    as_json: AsJson = False,
) -> None:
    """Print the mpirun command, for Open MPI and MPICH.

    Example: crossdock launch mpi configs/small.yaml run.dir=/data/small parallel.expert=4 --nodes 2 --ranks-per-node 2 --hosts n1,n2
    """
    shape = cluster.Shape(nodes, ranks_per_node, gpus=False, cores_per_rank=1)
    run = _run(config, overrides, shape.world_size, nodes, "mpi")
    _print_command(cluster.mpirun(shape, run, [host for host in hosts.split(",") if host]), as_json)


@launch_app.command("deepspeed")
def print_deepspeed(
    config: Config,
    overrides: Overrides = None,
    hostfile: Annotated[Path, typer.Option("--hostfile", help="Lines `name slots=N`: hosts and their ranks.")] = Path("/job/hostfile"),
    address: Annotated[str, typer.Option("--address", help="Of the first host; without it the launcher asks that host by ssh.")] = "",
    port: Annotated[int, typer.Option("--port", min=1, max=65_535, help="Free port of that host.")] = 29_500,
    as_json: AsJson = False,
) -> None:
    """Print the command of DeepSpeed's launcher, which starts the ranks on all hosts by pdsh and ssh. The engine is the configuration's.

    Example: crossdock launch deepspeed configs/small.yaml engine=deepspeed parallel.expert=4 run.dir=/shared/small --hostfile hosts
    """
    from crossdock.launch.scripts.hostfile import deepspeed_command, read_hostfile

    hosts = read_hostfile(hostfile)
    run = _run(config, overrides, sum(host.slots for host in hosts), len(hosts), "deepspeed")
    command = deepspeed_command(hostfile, hosts, run, address, port)
    if len(hosts) > 1:
        _ask_for_secret(run, f"and hand it down: echo CROSSDOCK_SECRET_FILE={run.secret_file} >> ~/.deepspeed_env")
    _print_command(command, as_json)


@launch_app.command("slurm")
def print_slurm(
    config: Config,
    overrides: Overrides = None,
    nodes: Nodes = 1,
    ranks_per_node: RanksPerNode = 8,
    cores_per_rank: CoresPerRank = 8,
    gpus: Gpus = True,
    time_limit: Annotated[str, typer.Option("--time", help="Time limit, in Slurm's form.")] = "24:00:00",
    grace_s: Annotated[int, typer.Option("--grace-s", min=10, help="Seconds to save before the time is over.")] = 120,
    restarts: Restarts = 10,
    options: Annotated[list[str] | None, typer.Option("--sbatch", help="Further options of sbatch, such as --partition=long.")] = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Print a batch script that requeues itself after a preemption or a lost rank.

    Example: crossdock launch slurm configs/small.yaml run.dir=/shared/small parallel.expert=16 --nodes 2 --sbatch=--partition=long | sbatch
    """
    from crossdock.launch.scripts.slurm import batch_script

    shape = cluster.Shape(nodes, ranks_per_node, gpus, cores_per_rank)
    run = _run(config, overrides, shape.world_size, nodes, "slurm")
    script = batch_script(shape, run, time_limit, grace_s, restarts, tuple(options or ()))
    _write(json.dumps({"script": script}) + "\n" if as_json else script, out)


@launch_app.command("kubernetes")
def print_kubernetes(
    config: Config,
    overrides: Overrides = None,
    kind: Annotated[str, typer.Option("--kind", help="jobset or rayjob.")] = "jobset",
    nodes: Nodes = 1,
    ranks_per_node: RanksPerNode = 8,
    cores_per_rank: CoresPerRank = 8,
    gpus: Gpus = True,
    image: Annotated[str, typer.Option("--image", help="Container image with crossdock in it.")] = "crossdock:latest",
    claim: Annotated[str, typer.Option("--claim", help="Claim of a volume that every node can write, mounted at /runs.")] = "runs",
    restarts: Restarts = 10,
    ray_version: Annotated[str, typer.Option("--ray-version", help="Ray in the image, for rayjob.")] = "2.60.0",
    secret: Annotated[
        bool,
        typer.Option("--secret/--no-secret", help="A fresh secret of the job in a JobSet's manifest; without it NAME-secret is yours."),
    ] = True,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Print a manifest: a JobSet with torchrun in every pod and the Secret of its ranks, or a RayJob of KubeRay.

    Keep a manifest with a secret out of repositories: print it anew for each start, or make the Secret yourself and give --no-secret.

    Example: crossdock launch kubernetes configs/small.yaml run.dir=/runs/small parallel.expert=16 --nodes 2 | kubectl apply -f -
    """
    from crossdock import strict_yaml
    from crossdock.authentication import Secret
    from crossdock.launch.scripts.kubernetes import MOUNT, check_names, job_set, ray_job, with_secret

    check_names(image, claim, ray_version)
    shape = cluster.Shape(nodes, ranks_per_node, gpus, cores_per_rank)
    run = _run(config, overrides, shape.world_size, nodes, "ray" if kind == "rayjob" else "torchrun")
    if Path(MOUNT) not in Path(os.path.normpath(run.directory)).parents:  # the mount itself neither: a finished run is moved aside
        name = run.name if run.directory != Path(MOUNT) else "NAME"
        raise UsageError(f"run.dir is {run.directory}, which a pod forgets; set run.dir={MOUNT}/{name}: the claim is mounted at {MOUNT}")
    if kind == "jobset":
        manifest = job_set(shape, run, image, claim, restarts)
        manifest = with_secret(manifest, run, Secret.fresh()) if secret else manifest
    elif kind == "rayjob":
        manifest = ray_job(shape, run, image, claim, restarts, ray_version)
    else:
        raise UsageError(f"--kind is {kind!r}; it is jobset or rayjob")
    _write(json.dumps(manifest) + "\n" if as_json else strict_yaml.dump(manifest), out)


@launch_app.command("ray")
def launch_ray(
    config: Config,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option("--nodes", min=1, help="Hosts; as few as hold the ranks where left out.")] = None,
    ranks_per_node: Annotated[int | None, typer.Option("--ranks-per-node", min=1, help="Ranks of one host, with --nodes.")] = None,
    cores_per_rank: CoresPerRank = 1,
    gpus: Gpus = False,
    address: Annotated[str | None, typer.Option("--address", help="The cluster; this machine's or this job's where left out.")] = None,
    restarts: Annotated[int, typer.Option("--restarts", min=0, help="Losses in a row, without a new checkpoint, that are endured.")] = 3,
    min_nodes: Annotated[int | None, typer.Option("--min-nodes", min=1, help="Go on with as few where others stay away.")] = None,
    wait_s: Annotated[float, typer.Option("--wait-s", min=0.0, help="Seconds to wait for nodes.")] = 60.0,
    silence_s: Annotated[
        float, typer.Option("--silence-s", min=2.0, help="Seconds without a heartbeat after which a rank is lost.")
    ] = 20.0,
    as_json: Annotated[bool, typer.Option("--json", help="stdout is one JSON object alone: it always is.")] = False,
) -> None:
    """Train on a Ray cluster, one actor per rank, and start again from the newest checkpoint when ranks or nodes are lost.

    `ray job submit --working-dir . -- crossdock train CONFIG` does the same, with these defaults.

    Example: crossdock launch ray configs/small.yaml parallel.expert=4 run.dir=/shared/small --nodes 2 --ranks-per-node 2
    """
    if (nodes is None) != (ranks_per_node is None):
        raise UsageError("--nodes and --ranks-per-node belong together; give both, or none to use as few nodes as hold the ranks")
    shape = None if nodes is None or ranks_per_node is None else cluster.Shape(nodes, ranks_per_node, gpus, cores_per_rank)
    policy = {"restarts": restarts, "silence_s": silence_s, "wait_s": wait_s, "min_nodes": min_nodes}
    raise typer.Exit(train_on_ray(Path(config), overrides or (), shape, address, policy))


def train_on_ray(
    config: Path,
    overrides: Sequence[str],
    shape: cluster.Shape | None = None,
    address: str | None = None,
    policy: Mapping[str, Any] = MappingProxyType({}),
) -> int:
    """Train on a Ray cluster, whose ranks import torch while we do; returns the exit code. `policy`: fields of `launcher.Policy`."""
    from crossdock.launch.ray.ahead import ranks_ahead

    with ranks_ahead(config, overrides, shape, address) as ahead:
        from crossdock.launch import start
        from crossdock.launch.config import read_config
        from crossdock.launch.ray.launcher import Policy, launch

        run_config = read_config(config, overrides)
        return start.report(launch(run_config, shape, Policy(**policy), ahead), run_config)


def _run(config: str, overrides: Sequence[str] | None, world_size: int, num_hosts: int, launcher: str) -> cluster.Run:
    """The run, checked against the cluster it is meant for and against its `launcher`. Raises `BadConfig` and its kin."""
    from crossdock.launch.config import read_config
    from crossdock.launch.request import check_reachable, check_world, run_directory

    run_config = read_config(Path(config), overrides or ())
    check_world(run_config, world_size, launcher)
    if num_hosts > 1:
        check_reachable(run_config, world_size)
    directory = run_directory(run_config)
    return cluster.Run(cluster.scheduler_name(directory.name), directory, config, tuple(overrides or ()))


def _ask_for_secret(run: cluster.Run, further: str = "") -> None:
    """Say how the file comes to be: a command that anyone may read is no place for a secret."""
    making = f"test -e {run.secret_file} || (umask 077; openssl rand -hex 32 > {run.secret_file})"
    print(f"crossdock: the ranks sign what steers the others; before the first start, once: {making} {further}".rstrip(), file=sys.stderr)


def _print_command(command: Sequence[str], as_json: bool) -> None:
    print_facts({"command": list(command)}, cluster.shell(command), as_json)


def _write(text: str, out: Path | None) -> None:
    from crossdock import atomic

    if out is None:
        print(text, end="")
    else:
        atomic.write_text(out, text)


def status(directory: Path, otherwise: int | None) -> tuple[str, dict[str, Any]]:
    """One line on how the run in `directory` ended, and its result; without one, `otherwise` as its `exit_code`.

    Raises `MissingInput` where there is neither.
    """
    from crossdock.launch.ending import read_result

    if otherwise is None and not directory.is_dir():
        raise MissingInput(f"{directory} is not a folder; give the run.dir of a run")
    result = read_result(directory)
    if not isinstance(code := result.get("exit_code"), int) or not 0 <= code <= 255:
        missing = f"{directory} holds no result.json: the run has not ended, or rank 0 was killed before it could write one"
        if otherwise is None:
            raise MissingInput(missing)
        return missing, {"status": "unknown", "exit_code": otherwise}
    message = f": {result['message']}" if result.get("message") else ""
    return f"{result.get('status')} at step {result.get('reached_step')} of {result.get('target_step')}{message}", result
