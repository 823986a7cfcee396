"""Everything that a training run is made of, and whom it tells how it goes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from crossdock.placement.homing.forecast import Forecast
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.topology import Topology
from crossdock.runtime.adaptation.capture import CaptureConfig
from crossdock.runtime.adaptation.choice import AdaptConfig
from crossdock.runtime.adaptation.replan import ReplanConfig
from crossdock.runtime.checkpoints.checkpoint import CheckpointConfig
from crossdock.runtime.data import Corpus
from crossdock.runtime.optimization.deepspeed_engine import DeepSpeedConfig
from crossdock.runtime.optimization.engines import EngineName
from crossdock.runtime.profiler import ProfileConfig
from crossdock.runtime.training.metrics import RunDirectory
from crossdock.runtime.training.steps import TrainConfig
from crossdock.runtime.transport.mesh import Mesh


class Progress(Protocol):
    """Told by rank 0 how the run goes; a launcher draws it."""

    def step(self, row: Mapping[str, Any], line: str) -> None:
        """A finished step: its metrics, and the same in one line."""

    def event(self, event: str, details: Mapping[str, Any]) -> None:
        """Anything else that happened: what events.jsonl holds."""

    def table(self, text: str) -> None:
        """A table that somebody asked for."""


class Silent:
    """Progress that nobody watches."""

    def step(self, row: Mapping[str, Any], line: str) -> None:
        """Nothing."""

    def event(self, event: str, details: Mapping[str, Any]) -> None:
        """Nothing."""

    def table(self, text: str) -> None:
        """Nothing."""


@dataclass(frozen=True, eq=False)
class Training:
    """Everything that a run is made of. `plan` is the one that `model` was built with, None for a model without experts."""

    model: nn.Module
    mesh: Mesh
    plan: Plan | None
    corpus: Corpus
    seq_len: int
    directory: RunDirectory
    config: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineName = "native"
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    """Of `engine` deepspeed, with which experts stay where `plan` puts them."""
    capture: CaptureConfig = field(default_factory=CaptureConfig)
    replan: ReplanConfig = field(default_factory=ReplanConfig)
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    forecast: Forecast | None = None
    """By which the sequences of each batch are given to ranks; None: as they are read."""
    topology: Topology | None = None
    """Declared devices and links; where None, this machine's, calibrated from the run."""
    progress: Progress = field(default_factory=Silent)
    resume: bool = False
    """Continue from the newest valid checkpoint of the run directory."""
    keep_plan: bool = False
    """Resume under `plan`, even where the checkpoint was saved under another, unless the run had re-planned by then. Without it the
    checkpoint's plan goes on where it fits."""
