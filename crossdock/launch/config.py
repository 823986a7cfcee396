"""The run's configuration: every section's model stands with its owner, and this module alone reads the YAML of a run.

Precedence: `a.b=c` on the command line, then the file, then the defaults. What was resolved is saved with the run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import pydantic

from crossdock import atomic, strict_yaml
from crossdock.errors import BadConfig
from crossdock.launch.restarts import FaultConfig
from crossdock.launch.run_file import run_document
from crossdock.models.config import ModelConfig
from crossdock.placement.costs.cost import Dispatch
from crossdock.runtime.adaptation.capture import CaptureConfig
from crossdock.runtime.adaptation.choice import AdaptConfig
from crossdock.runtime.adaptation.replan import ReplanConfig, window_steps
from crossdock.runtime.checkpoints.checkpoint import CheckpointConfig
from crossdock.runtime.data import BYTE_VOCABULARY, DataConfig
from crossdock.runtime.optimization.deepspeed_engine import DeepSpeedConfig
from crossdock.runtime.optimization.engines import EngineName
from crossdock.runtime.profiler import ProfileConfig
from crossdock.runtime.training.steps import TrainConfig
from crossdock.strict_yaml import Contradiction, StrictModel


class RunSection(StrictModel):
    """Where the run writes."""

    dir: str | None = None
    """The run directory; `./runs/<name of the config file>` where left out. Ranks on several nodes need one that all can reach."""
    resume: Literal["auto", "never", "always"] = "auto"
    """auto: an unfinished run goes on from its newest checkpoint, a finished one is moved aside. never: any earlier run is moved aside."""


class ParallelConfig(StrictModel):
    """How the ranks divide the work."""

    expert: int = pydantic.Field(default=1, ge=1)
    """Ranks of one expert-parallel group, the R of a plan; the rest of the world is copies of that group."""
    ranks: int | None = pydantic.Field(default=None, ge=1, le=256)
    """Ranks to start where no launcher did: `parallel.expert` of them where left out. Launchers bring their own number."""
    dense_sharding: Literal["none", "fsdp2"] = "none"
    """fsdp2: every rank keeps 1/world of the dense parameters, of their gradients and their optimizer state (`docs/engines.md`)."""
    timeout_s: float = pydantic.Field(default=300.0, gt=0.0)
    """How long a collective may take before its ranks give up on their peers."""
    transport: Literal["torch", "mpi", "auto"] = "torch"
    """What carries the all-to-alls. mpi: the MPI library of the mpirun that started the ranks, on the CPU. auto: the faster of the two, by
    measurement at the start; torch where there is no mpirun."""

    @property
    def local_ranks(self) -> int:
        return self.ranks if self.ranks is not None else self.expert


class PrecisionConfig(StrictModel):
    """Number formats. Optimizer state and master weights are fp32 whatever is chosen (float64 for float64)."""

    compute: Literal["fp32", "bf16", "fp64"] = "fp32"
    wire: Literal["fp32", "bf16", "int8"] | None = None
    """Of token rows on their way; the compute format where left out."""


class RunConfig(StrictModel):
    """All that decides a run."""

    run: RunSection = RunSection()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    plan: str | None = None
    """A plan.json to place experts by; contiguous where left out."""
    topology: str | None = None
    """A topology.yaml or a preset's name: the nodes of the ranks are declared by it, and predictions use its speeds."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: PrecisionConfig = PrecisionConfig()
    engine: EngineName = "native"
    """What reduces gradients and updates: Crossdock itself, or ZeRO by DeepSpeed (`docs/engines.md`)."""
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    dispatch: Dispatch = "deduplicated"
    capture: CaptureConfig = CaptureConfig()
    replan: ReplanConfig = ReplanConfig()
    adapt: AdaptConfig = AdaptConfig()
    profile: ProfileConfig = ProfileConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    fault: FaultConfig = FaultConfig()

    @pydantic.model_validator(mode="after")
    def _cross_check(self) -> Self:
        num_experts, expert, ranks = self.model.num_experts, self.parallel.expert, self.parallel.local_ranks
        if self.model.block != "dense" and self.plan is None and num_experts % expert:
            raise Contradiction(
                "parallel.expert",
                f"{num_experts} experts (model.num_experts) do not divide over {expert} ranks (parallel.expert); "
                f"choose parallel.expert from {_divisors(num_experts)}",
            )
        if ranks % expert:
            raise Contradiction(
                "parallel.ranks",
                f"{ranks} ranks (parallel.ranks) do not divide into expert groups of {expert} (parallel.expert); "
                f"choose parallel.expert from {_divisors(ranks)}, or a multiple of {expert} ranks",
            )
        if self.data.homing is not None and (self.model.block == "dense" or self.model.traffic == "coherent"):
            raise Contradiction(
                "data.homing",
                f"data.homing {self.data.homing} gives sequences to the ranks of their experts, for tokens that travel there and home; "
                "leave data.homing out with model.block dense and with model.traffic coherent",
            )
        if self.adapt.mode_asked != "off" and self.model.traffic == "coherent":
            raise Contradiction(
                "adapt.mode",
                f"adapt.mode {self.adapt.mode_asked} chooses how tokens travel to their experts and home, and model.traffic coherent "
                "leaves them there; set adapt.mode: off, or model.traffic: home",
            )
        if self.model.traffic == "coherent" and self.capture.steps:
            raise Contradiction(
                "capture.steps",
                f"capture.steps {self.capture.steps} holds the bytes of tokens that go home against predictions, and with model.traffic "
                "coherent they do not; set capture.steps: 0, or model.traffic: home",
            )
        if self.model.traffic == "coherent" and self.precision.wire is not None:
            raise Contradiction(
                "precision.wire",
                f"precision.wire {self.precision.wire} would round the residual stream, which travels with model.traffic coherent; "
                "leave precision.wire out, or set model.traffic: home",
            )
        if self.engine == "deepspeed":
            self._check_deepspeed()
        if self.parallel.dense_sharding != "none" and self.model.traffic == "coherent":
            raise Contradiction(
                "parallel.dense_sharding",
                f"parallel.dense_sharding {self.parallel.dense_sharding} gathers one block after the other, and model.traffic coherent "
                "runs parts of several at once; set parallel.dense_sharding: none, or model.traffic: home",
            )
        if self.precision.compute == "fp64" and self.precision.wire is not None:
            raise Contradiction(
                "precision.wire", f"precision.wire {self.precision.wire} would cut down precision.compute fp64; leave precision.wire out"
            )
        if self.replan.at_step is not None:
            self._check_replan()
        if self.data.kind != "bin" and self.model.vocab_size < BYTE_VOCABULARY:
            raise Contradiction(
                "model.vocab_size",
                f"data.kind {self.data.kind} is read as bytes, a vocabulary of {BYTE_VOCABULARY}, and model.vocab_size is "
                f"{self.model.vocab_size}; set model.vocab_size: {BYTE_VOCABULARY}",
            )
        if self.profile.first is not None and self.profile.first > self.train.steps:
            raise Contradiction(
                "profile.first",
                f"profile.first {self.profile.first} comes after the last of {self.train.steps} steps (train.steps), and nothing would be "
                f"profiled; choose it from 1 to {self.train.steps}",
            )
        return self

    def _check_replan(self) -> None:
        """What a re-planning needs: experts to move, and room for the steps that it records."""
        if self.model.block == "dense":
            raise Contradiction(
                "replan.at_step",
                f"replan.at_step {self.replan.at_step} moves experts, and model.block dense has none; leave it out, or set another block",
            )
        try:
            window_steps(self.train.steps, self.capture.steps, self.replan)
        except BadConfig as failure:
            raise Contradiction("replan.at_step", str(failure)) from failure

    def _check_deepspeed(self) -> None:
        """All that ZeRO cannot do, in one message."""
        refused = []
        if self.replan.at_step is not None:
            refused.append(f"move experts and their partitioned state in the run (replan.at_step {self.replan.at_step}; leave it out)")
        if self.precision.compute == "fp64":
            refused.append("keep float64 masters (precision.compute fp64; choose fp32 or bf16)")
        if self.parallel.dense_sharding != "none":
            refused.append(f"divide what is divided already (parallel.dense_sharding {self.parallel.dense_sharding}; set none)")
        if refused:
            raise Contradiction("engine", f"engine deepspeed cannot {', nor '.join(refused)}; or set engine: native")


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def read_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config at `path`, or the shipped one of that bare name, with `overrides` such as `train.steps=100` applied.

    Raises `MissingInput`, `BadConfig`, and `UsageError` for an override that is none.
    """
    document, name = run_document(path, overrides)
    config = strict_yaml.validated(RunConfig, document)
    if config.run.dir is not None:
        return config
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": str(Path("runs") / name)})})


def resolved(config: RunConfig) -> dict[str, Any]:
    """Every key with its value, as YAML and JSON can hold it."""
    return config.model_dump(mode="json")


def save_resolved(config: RunConfig, path: Path) -> None:
    """Write the whole configuration; `read_config` gives back an equal one."""
    atomic.write_text(path, f"# crossdock train {path.name}\n{strict_yaml.dump(resolved(config))}")


def schema() -> dict[str, Any]:
    """The JSON Schema of a run's YAML, for editors."""
    return RunConfig.model_json_schema()
