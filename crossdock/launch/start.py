"""Starts a job: joins the ranks that a launcher started, or starts local ranks, and reports one outcome either way."""

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from crossdock import atomic, strict_yaml
from crossdock.errors import BadData, IoFailure
from crossdock.launch.config import RunConfig, read_config
from crossdock.launch.ending import Result
from crossdock.launch.local.children import Outcome, Starter, run_ranks
from crossdock.launch.local.nursery import Nursery
from crossdock.launch.ranks.worker import check_gpus, ending_recorded, run_job, usable_gpus
from crossdock.launch.ranks.worker_env import WorkerEnv, in_ray_job, worker_env
from crossdock.launch.request import (
    Request,
    check_data,
    check_replan,
    check_world,
    prepare_directory,
    read_inputs,
    record_failure_of_ranks,
    run_directory,
)
from crossdock.launch.restarts import Endurance, is_worth_another, newest_checkpoint, resuming
from crossdock.runtime.optimization.deepspeed_engine import check_installed
from crossdock.runtime.training.metrics import RunDirectory
from crossdock.strict_yaml import Document

WORKER = ("-m", "crossdock.launch.ranks.worker")


def check_inputs(config: RunConfig, launcher: str | None = None) -> None:
    """Everything that can be said before a rank starts, by `launcher` (None: any), on any host; raises what the ranks would raise."""
    read_inputs(config)
    check_replan(config)
    env = worker_env()
    check_world(config, config.parallel.local_ranks if env is None else env.world_size, launcher)


def check_host(config: RunConfig) -> None:
    """What local ranks need of this host: their text, GPUs and packages. Raises what they would raise."""
    check_data(config)
    if config.device == "cuda":
        check_gpus(usable_gpus(config), config.parallel.local_ranks)
    if config.engine == "deepspeed":
        check_installed()


def dry_run(config: RunConfig, world_size: int | None) -> dict[str, Any]:
    """What the run would be as this command would start it, or on `world_size` ranks by any launcher; see `dry_run.describe`."""
    from crossdock.launch.dry_run import describe

    if world_size is not None:
        return describe(config, world_size)
    if (env := worker_env()) is not None:
        return describe(config, env.world_size, env.launcher)
    return describe(config, config.parallel.local_ranks, "ray" if in_ray_job() else "local")


def model_facts(config: RunConfig) -> dict[str, int]:
    """Sizes of the configured model, from its numbers alone."""
    from crossdock.models.counts import flop_per_token, parameter_count

    count = parameter_count(config.model)
    return {
        "parameters": count.total,
        "active_parameters": count.active,
        "expert_parameters": count.routed,
        "flop_per_token": flop_per_token(config.model, config.data.seq_len).training,
        "moe_layers": config.model.num_moe_layers,
    }


def train(config: RunConfig, nursery: Nursery | None = None) -> int:
    """Train; returns the exit code. The last line on stdout is the object of `result.json`."""
    return report(run(Request("train", config), nursery), config)


def report(result: Result, config: RunConfig) -> int:
    """Say how a training run has ended; returns its exit code."""
    if result.exit_code == 0:
        print(f"-- done after step {result.fields['reached_step']}; files in {config.run.dir}, begin with report.html", file=sys.stderr)
    print(json.dumps(result.as_json()), flush=True)
    return result.exit_code


def run(request: Request, nursery: Nursery | None = None) -> Result:
    """Do a job in this process, where a launcher started it or one rank is enough, else in local ranks. Errors stand on stderr in one line.
    `nursery`: one that has begun to import already.

    Under a launcher only rank 0 has a result to print: the process of another rank ends here, with its exit code.
    """
    env = worker_env()
    if env is not None:
        result = _run_here(request, env)
        if env.rank != 0:
            sys.exit(result.exit_code)
        return result
    if request.job != "train":
        return _run_alone(request, nursery)
    with ending_recorded(request.config, request.config.parallel.local_ranks):
        request = Request(request.job, request.config, {**request.arguments, "resume": prepare_directory(request.config)})
        check_inputs(request.config, "local")
        check_host(request.config)
        return _run_alone(request, nursery)


def _run_alone(request: Request, nursery: Nursery | None) -> Result:
    num_ranks = request.config.parallel.local_ranks
    if num_ranks == 1:
        return _run_here(request, WorkerEnv.single())
    with nursery or Nursery() as ours:
        return _run_in_local_ranks(request, num_ranks, ours)


def _run_here(request: Request, env: WorkerEnv) -> Result:
    result = run_job(request, env)
    if result.exit_code != 0:
        _complain(f"rank {env.rank}: " if env.world_size > 1 else "", result.fields)
    return result


@contextlib.contextmanager
def _scratch() -> Iterator[str]:
    """A folder for the time of a start. Raises `IoFailure` where there can be none."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="crossdock-")
    except OSError as failure:
        raise IoFailure(f"cannot make a temporary folder: {failure.strerror}; free space, or set TMPDIR") from failure
    with folder as path:
        yield path


def _run_in_local_ranks(request: Request, num_ranks: int, nursery: Nursery) -> Result:
    with _scratch() as scratch:
        path, answer = Path(scratch) / "request.json", Path(scratch) / "answer.json"
        request = Request(request.job, request.config, {**request.arguments, "answer": str(answer)})
        request.save(path)
        outcome = _run_restarting(request, path, num_ranks, nursery.start if sys.platform == "linux" else None)
        if outcome.exit_code == 0:
            return Result(0, _without_ending(json.loads(answer.read_text())))
    _complain("", {"message": outcome.message, "traceback": outcome.traceback})
    if request.job == "train":
        return record_failure_of_ranks(request.config, outcome.exit_code, outcome.message, outcome.rank, num_ranks)
    return Result(outcome.exit_code, {"message": outcome.message, "rank": outcome.rank})


def _run_restarting(request: Request, path: Path, num_ranks: int, starter: Starter | None) -> Outcome:
    """Start the ranks; those of a training run again where one was lost: from the newest checkpoint, within `fault.max_restarts`."""
    if request.job != "train" or not request.config.fault.max_restarts:
        return run_ranks([*WORKER, str(path)], num_ranks, starter)
    directory = run_directory(request.config)
    checkpoints = RunDirectory(directory).checkpoints
    endurance, incarnation = Endurance(request.config.fault.max_restarts, newest_checkpoint(checkpoints)), 1
    while True:
        outcome = run_ranks([*WORKER, str(path)], num_ranks, starter)
        if not is_worth_another(outcome):
            return outcome
        endurance = endurance.after_loss(newest_checkpoint(checkpoints))
        if endurance.is_over:
            return endurance.given_up(outcome)
        incarnation += 1
        print(f"crossdock: {endurance.announced(directory, incarnation, outcome)}", file=sys.stderr, flush=True)
        config = resuming(request.config, incarnation)
        Request(request.job, config, {**request.arguments, "resume": prepare_directory(config)}).save(path)


def _without_ending(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in ("status", "exit_code")}


def _complain(place: str, fields: Mapping[str, Any]) -> None:
    sys.stderr.write(fields.get("traceback", ""))
    print(f"crossdock: error: {place}{fields['message']}", file=sys.stderr, flush=True)


def probe(out: Path, num_ranks: int, device: str, on_ray: bool, as_json: bool, nursery: Nursery | None = None) -> int:
    """Measure the topology of all ranks as one expert group and write it to `out`; returns the exit code."""
    result = ask_all("probe", {}, num_ranks, device, on_ray, nursery)
    if result.exit_code == 0:
        fields = dict(result.fields)
        atomic.write_text(out, fields.pop("yaml"))
        result = Result(0, {"path": str(out), **fields})
    return answer(result, as_json)


def ask_all(job: str, arguments: Mapping[str, Any], num_ranks: int, device: str, on_ray: bool, nursery: Nursery | None = None) -> Result:
    """A job for all ranks that a launcher has started, else for `num_ranks` of them, here or on a Ray cluster."""
    env = worker_env()
    world_size = num_ranks if env is None else env.world_size
    model = {"num_experts": world_size, "top_k": 1}  # one expert a rank, so that a group holds all ranks, be it one alone
    document = Document({"parallel": {"expert": world_size}, "model": model, "device": device}, job, {})
    request = Request(job, strict_yaml.validated(RunConfig, document), arguments)
    if env is None and (on_ray or in_ray_job()):
        from crossdock.launch.ray.launcher import ask

        return ask(request)
    return run(request, nursery)


def capture(source: str, overrides: Sequence[str], out: Path, steps: int, as_json: bool) -> int:
    """Route held-out data through the model of a config or a checkpoint, and write the trace to `out`; returns the exit code."""
    path = Path(source)
    checkpoint = path if path.is_dir() else None
    config = read_config(config_of_checkpoint(path) if checkpoint else path, overrides)
    arguments = {"out": str(out), "steps": steps, "checkpoint": None if checkpoint is None else str(checkpoint)}
    return answer(run(Request("capture", config, arguments)), as_json)


def config_of_checkpoint(folder: Path) -> Path:
    """The configuration that a checkpoint, or a run directory with checkpoints, was made with: it lies in the run directory."""
    for parent in (folder, *folder.absolute().parents[:2]):
        if (found := RunDirectory(parent).config).is_file():
            return found
    raise BadData(f"{folder}: no config.resolved.yaml in it or in its run directory; give the run's YAML file instead")


def answer(result: Result, as_json: bool) -> int:
    """Print a job's result; returns its exit code."""
    if as_json:
        print(json.dumps(result.as_json()), flush=True)
    elif result.exit_code == 0:
        values = {name: f"{value:,.0f}" if isinstance(value, float) and value >= 1e6 else value for name, value in result.fields.items()}
        print("\n".join(f"{name.replace('_', ' ')}: {value}" for name, value in values.items()))
    return result.exit_code
