"""What training and checkpoints ask of an optimizer step: done by `engine.Engine` in plain torch, or by `deepspeed_engine` with ZeRO."""

from collections.abc import Collection, Mapping
from typing import Literal, NamedTuple, Protocol

from torch import Tensor, nn

from crossdock.placement.records.plan import Plan
from crossdock.runtime.experts.expert_bank import ExpertBank
from crossdock.runtime.optimization.agreement import StepReport
from crossdock.runtime.transport.mesh import Mesh

EngineName = Literal["native", "deepspeed"]


class Piece(NamedTuple):
    """A parameter by name, or the one slot of an expert tensor: what checkpoints save and load as one tensor for each of `STATES`."""

    parameter: str
    slot: int | None


class AnyEngine(Protocol):
    """Owns the gradients and the optimizer state of `model` under `plan`; one per run.

    A step is: `backward(loss / n, last=False)` n - 1 times, `backward(loss / n, last=True)`, `reduce()`, then `step`. Every rank makes the
    same calls; those that may communicate are `backward`, `reduce`, `step`, `collect` and `filled`.
    """

    model: nn.Module
    mesh: Mesh
    plan: Plan | None
    banks: dict[str, ExpertBank]
    expert_names: dict[str, tuple[str, ...]]
    """The parameters of every bank of `banks`."""

    @property
    def num_updates(self) -> int:
        """Updates made so far; the bias correction of AdamW depends on it."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate gradients; on the `last` micro-batch of a step their reduction may start as they come."""

    def reduce(self) -> None:
        """Wait until every gradient that this rank updates with is reduced over all ranks that share the parameter."""

    def step(self, step: int, lr: float, scalars: Mapping[str, Tensor | float]) -> StepReport:
        """Agree, clip by the global norm, update and clear; raises `NonFiniteLoss` on every rank before the update."""

    def collect(self, pieces: Collection[Piece]) -> dict[Piece, dict[str, Tensor]]:
        """Optimizer state of the `pieces` that this rank asks for (others may ask for others), by the names of `STATES`."""

    def wants(self, piece: Piece) -> bool:
        """Whether this rank keeps any of the state of `piece`."""

    def fill(self, piece: Piece, state: str, values: Tensor) -> None:
        """Overwrite one state of `piece`, or as much of it as this rank keeps."""

    def filled(self, num_updates: int) -> None:
        """After the last `fill`: parameters follow their masters, and updates are counted from `num_updates`."""
