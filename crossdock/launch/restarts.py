"""When a run that lost a rank starts again: as long as checkpoints come, and a stated number of times in a row without a new one."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pydantic

from crossdock.errors import PeerLost
from crossdock.launch.local.children import Outcome
from crossdock.runtime.training.metrics import RunDirectory
from crossdock.strict_yaml import StrictModel

if TYPE_CHECKING:
    from crossdock.launch.config import RunConfig


class FaultConfig(StrictModel):
    """What a run does about lost ranks."""

    max_restarts: int = pydantic.Field(default=0, ge=0)
    """Restarts in a row without a new checkpoint that local ranks get. Launchers have their own option: torchrun --max-restarts,
    `crossdock launch ray --restarts`."""
    inject: str | None = None
    """A script of faults that the run shall suffer (`launch/ranks/faults.py`): for tests of survival alone."""


@dataclass(frozen=True)
class Endurance:
    """How much a run has borne: `fruitless` restarts in a row since its newest checkpoint, that of step `reached`."""

    max_fruitless: int
    reached: int = 0
    fruitless: int = 0

    def after_loss(self, newest: int) -> "Endurance":
        """After another loss, with the newest checkpoint that of step `newest`."""
        return replace(self, reached=max(self.reached, newest), fruitless=0 if newest > self.reached else self.fruitless + 1)

    @property
    def is_over(self) -> bool:
        return self.fruitless > self.max_fruitless

    def given_up(self, outcome: Outcome) -> Outcome:
        """The last loss as the outcome of the run."""
        if self.max_fruitless == 0:
            return outcome
        tried = f"given up after {self.max_fruitless} restarts in a row that brought no checkpoint beyond {self._place()}"
        return replace(outcome, message=f"{outcome.message}; {tried}")

    def announced(self, directory: Path, incarnation: int, outcome: Outcome) -> str:
        """Note in the run's events that its start number `incarnation` follows, and why; returns that in words."""
        RunDirectory(directory).write_event("restart", incarnation=incarnation, cause=outcome.message, rank=outcome.rank, step=self.reached)
        return f"{outcome.message}; starting again from {self._place()}"

    def _place(self) -> str:
        return f"step {self.reached}" if self.reached else "the beginning"


def is_worth_another(outcome: Outcome) -> bool:
    """Whether the same run may do better next time: a lost rank may come back; bad input and a non-finite loss would."""
    return outcome.exit_code == PeerLost.exit_code


def resuming(config: "RunConfig", incarnation: int) -> "RunConfig":
    """The first start goes by `run.resume`; later ones always go on with this run."""
    return config if incarnation == 1 else config.model_copy(update={"run": config.run.model_copy(update={"resume": "auto"})})


def newest_checkpoint(directory: Path) -> int:
    """The step of the newest finished checkpoint under `directory`, 0 where there is none."""
    from crossdock.runtime.checkpoints.checkpoint import finished

    folders = finished(directory)
    return int(folders[0].name.removeprefix("step-")) if folders else 0
