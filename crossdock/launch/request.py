"""What is asked of the ranks: a job with its configuration and files, and the run directory made ready for it."""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossdock import atomic, strict_yaml
from crossdock.errors import BadConfig, BadData, CrossdockError, IoFailure, MissingInput, Occupied, UsageError
from crossdock.launch.config import RunConfig, resolved
from crossdock.launch.ending import Result, read_result
from crossdock.launch.transport import check_transport
from crossdock.occupancy import occupied
from crossdock.runtime.data import sequences_per_rank, vocabulary
from crossdock.runtime.training.metrics import RunDirectory
from crossdock.runtime.training.result import TrainResult
from crossdock.runtime.transport.mesh import check_expert_parallel
from crossdock.strict_yaml import Document

if TYPE_CHECKING:
    from crossdock.placement.homing.forecast import Forecast
    from crossdock.placement.records.plan import Plan
    from crossdock.placement.records.topology import Topology


@dataclass(frozen=True)
class Request:
    """A job by its name in `JOBS`, the run's configuration, and what else the job needs (plain JSON values)."""

    job: str
    config: RunConfig
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the request for ranks in other processes."""
        atomic.write_json(path, {"job": self.job, "config": resolved(self.config), "arguments": dict(self.arguments)})

    @classmethod
    def load(cls, path: Path) -> "Request":
        """Read what `save` wrote."""
        fields = json.loads(path.read_text())
        config = strict_yaml.validated(RunConfig, Document(fields["config"], str(path), {}))
        return cls(fields["job"], config, fields["arguments"])


@dataclass(frozen=True, eq=False)
class Inputs:
    """The files that a configuration names, read and held against it."""

    topology: "Topology | None"
    plan: "Plan | None"
    forecast: "Forecast | None"


def read_inputs(config: RunConfig) -> Inputs:
    """Read topology, plan and forecast, and hold them against the model. Raises `BadData`, `BadConfig`, `MissingInput`."""
    from crossdock.placement.homing.forecast import Forecast
    from crossdock.placement.records.plan import Plan
    from crossdock.placement.records.topology import Topology

    topology = None if config.topology is None else Topology.load(config.topology)
    plan = None if config.plan is None else Plan.load(config.plan)
    ranks = config.parallel.expert
    if topology is not None and topology.num_devices != ranks:
        raise BadConfig(
            f"topology {config.topology} has {topology.num_devices} devices and parallel.expert is {ranks}; they describe the same ranks: "
            f"set parallel.expert={topology.num_devices}, or choose another topology"
        )
    if plan is not None:
        if config.model.num_moe_layers == 0:
            raise BadConfig(f"plan {config.plan} places experts, and model.block dense has none; leave the plan out")
        if plan.mode != config.model.traffic:
            raise BadConfig(
                f"plan {config.plan} is for traffic {plan.mode}, and model.traffic is {config.model.traffic}; solve one with "
                f"crossdock plan solve --mode {config.model.traffic}, or set model.traffic: {plan.mode}"
            )
        try:
            plan.check_model(config.model.num_moe_layers, config.model.num_experts, ranks)
        except BadData as failure:
            raise BadData(f"{config.plan}: {failure}") from failure
        if config.engine == "deepspeed" and plan.has_replicas:
            raise BadConfig(
                f"plan {config.plan} holds several copies of an expert, whose gradients engine deepspeed cannot sum inside a group; "
                "solve a plan without spare slots, or set engine: native"
            )
        if config.engine == "deepspeed" and not (held_R := plan.held_LR.sum(axis=0)).all():
            raise BadConfig(
                f"plan {config.plan} gives expert rank {held_R.argmin()} no expert in any layer, and engine deepspeed cannot update such a "
                "rank; solve another plan, or set engine: native"
            )
    forecast = None if config.data.homing is None else Forecast.load(config.data.homing)
    if forecast is not None:
        mine, asked = (forecast.num_layers, forecast.num_experts), (config.model.num_moe_layers, config.model.num_experts)
        if mine != asked:
            raise BadData(
                f"{config.data.homing}: a forecast for {mine[0]} MoE layers x {mine[1]} experts, and the model has {asked[0]} x "
                f"{asked[1]}; solve a plan with --homing from a trace of this model"
            )
    return Inputs(topology, plan, forecast)


def check_replan(config: RunConfig) -> None:
    """Raise `BadConfig` where the solver of `replan.method` would refuse the problem whatever the routing: for its objective, its size.

    Asked by one process before the ranks begin, and not by each rank: solvers take most of a second to import, at every restart.
    """
    if config.replan.at_step is None or config.replan.method == "auto":
        return
    import numpy as np

    from crossdock.placement.costs.cost import Workload
    from crossdock.placement.records.affinity import Affinity
    from crossdock.placement.records.topology import Topology
    from crossdock.placement.records.trace import Trace
    from crossdock.placement.solvers import check_method
    from crossdock.placement.solvers.problem import Constraints, Problem

    model, replan = config.model, config.replan
    expert_EK = (np.arange(model.num_experts)[:, None] + np.arange(model.top_k)) % model.num_experts  # any routing will do
    affinity = Affinity.from_trace(Trace(np.tile(expert_EK.astype(np.uint16)[:, None], (1, model.num_moe_layers, 1)), model.num_experts))
    constraints = Constraints(load_cap=replan.load_cap, spare_slots=replan.spare_slots or None)
    workload = Workload(dispatch=config.dispatch)
    there = Topology.local(config.parallel.expert) if config.topology is None else Topology.load(config.topology)
    try:
        check_method(Problem(affinity, there, workload, objective=replan.objective, constraints=constraints), replan.method)
    except UsageError as failure:
        raise BadConfig(f"replan.method {replan.method}: {failure}") from failure


def check_data(config: RunConfig) -> None:
    """Raise `BadConfig` for text with more tokens than the model has, and what `data.vocabulary` raises; nothing is read but headers."""
    check_vocabulary(config, vocabulary(config.data))


def check_vocabulary(config: RunConfig, vocab_size: int) -> None:
    """Raise `BadConfig` where the text may hold tokens that the model does not have."""
    if vocab_size > config.model.vocab_size:
        raise BadConfig(
            f"{config.data.path or config.data.kind} has a vocabulary of {vocab_size} and model.vocab_size is {config.model.vocab_size}; "
            f"set model.vocab_size={vocab_size}"
        )


def check_world(config: RunConfig, world_size: int, launcher: str | None = None) -> None:
    """Raise `BadConfig` where the ranks, the expert groups and the batch do not divide, or where `launcher` (None: any) cannot give them
    the transport that they ask for."""
    check_transport(config, launcher)
    check_expert_parallel(config.parallel.expert, world_size)
    sequences_per_rank(config.train.batch_sequences, world_size, config.train.accumulate)


def run_directory(config: RunConfig) -> Path:
    """The run's folder, which `read_config` has settled."""
    assert config.run.dir is not None
    return Path(config.run.dir)


def check_reachable(config: RunConfig, world_size: int) -> None:
    """For ranks on several hosts: raise `BadConfig` where they would write to places relative to each one's working directory."""
    if not run_directory(config).is_absolute():
        raise BadConfig(
            f"run.dir {config.run.dir} is relative, and {world_size} ranks on several hosts must all reach it; "
            "set run.dir to an absolute path on a file system that they share"
        )


def is_finished(config: RunConfig) -> bool:
    """Whether the run directory holds a run that reached its target."""
    return read_result(run_directory(config)).get("status") == "done"


def prepare_directory(config: RunConfig) -> bool:
    """Make the run directory ready, by one process before the ranks begin; says whether to continue from its newest checkpoint.

    `run.resume` auto: an unfinished run goes on where it has a checkpoint and begins again where it has none; a finished one is moved
    aside to `<dir>.1`, `<dir>.2`, ... never: any earlier run is moved aside. always: there must be a checkpoint.
    Raises `MissingInput`, `IoFailure`, and `Occupied` where another run works there.
    """
    with occupied(run_directory(config)):
        return _prepared(config)


def _prepared(config: RunConfig) -> bool:
    path, resume = run_directory(config), config.run.resume
    has_checkpoint = any((path / "checkpoints").glob("step-*/manifest.json"))
    if resume == "always" and not has_checkpoint:
        raise MissingInput(f"run.resume is always, and {path} holds no checkpoint; name another run.dir, or set run.resume=auto")
    is_earlier_run = has_checkpoint or (path / "config.resolved.yaml").exists()
    if is_earlier_run and resume != "always" and (resume == "never" or is_finished(config)):
        aside = next(free for number in range(1, 10_000) if not (free := path.with_name(f"{path.name}.{number}")).exists())
        try:
            path.rename(aside)
        except OSError as failure:
            raise IoFailure(f"cannot move the earlier run {path} to {aside}: {failure.strerror}; choose another run.dir") from failure
        has_checkpoint = False
    directory = RunDirectory(path)
    try:
        directory.result.unlink(missing_ok=True)
        if not has_checkpoint:
            directory.forget_after(0)
    except OSError as failure:
        raise IoFailure(f"cannot change the run directory {path}: {failure.strerror}; choose another run.dir") from failure
    return has_checkpoint


def record_failure(config: RunConfig, exit_code: int, message: str, rank: int, world_size: int) -> Result:
    """The result of a run that failed so: what `result.json` already says, with the cause; written back there. It has every key of a
    result, also where the run failed before its first step."""
    nothing = TrainResult("failed", exit_code, reached_step=0, target_step=config.train.steps, world_size=world_size)
    known = {**nothing.as_json(), **read_result(run_directory(config)), "message": message, "rank": rank}
    result = Result(exit_code, {name: value for name, value in known.items() if name not in ("status", "exit_code")})
    with contextlib.suppress(CrossdockError):  # the disk may be what failed; the exit code still tells
        RunDirectory(run_directory(config)).write_result(result.as_json())
    return result


def record_failure_of_ranks(config: RunConfig, exit_code: int, message: str, rank: int, world_size: int) -> Result:
    """The same, by a launcher whose ranks have ended. Where another run took the directory before they could, nothing there is theirs."""
    if exit_code == Occupied.exit_code:
        try:
            with contextlib.suppress(IoFailure), occupied(run_directory(config)):
                pass
        except Occupied:
            return Result(exit_code, {"message": message, "rank": rank})
    return record_failure(config, exit_code, message, rank, world_size)
