"""Adaptation: adaptive choice in the course of a run: opens measuring windows, lets rank 0 decide, applies the record, keeps it on disk."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crossdock import atomic
from crossdock.errors import CrossdockError
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.topology import Topology
from crossdock.placement.strategies.choice import LayerProblem
from crossdock.placement.strategies.overlap_rule import Interference
from crossdock.placement.strategies.strategy import Choices, Strategy, explain
from crossdock.runtime.adaptation import choice
from crossdock.runtime.adaptation.capture import Capture
from crossdock.runtime.adaptation.choice import Adaptable, AdaptConfig, RankTimes, Watch
from crossdock.runtime.adaptation.choice_costs import interference, row_seconds_per_byte
from crossdock.runtime.adaptation.probe import probe
from crossdock.runtime.adaptation.replan import workload_of
from crossdock.runtime.adaptation.stage_times import StageTimes
from crossdock.runtime.adaptation.windows import Window
from crossdock.runtime.transport import collectives
from crossdock.runtime.transport.ledger import Flight
from crossdock.runtime.transport.mesh import Mesh


@dataclass(frozen=True)
class StepNumbers:
    """What one finished step tells the adaptation."""

    flights: tuple[Flight, ...]
    bytes_by_class: tuple[int, ...]
    step_s: float
    exposed_s: float
    load_LE: np.ndarray


class Adaptation:
    """One per rank and run; mutable. `before` and `after` stand around every step."""

    def __init__(
        self,
        config: AdaptConfig,
        model: Adaptable,
        mesh: Mesh,
        topology: Topology,
        tokens_per_rank: int,
        num_positions: int,
        accumulate: int,
        path: Path,
        event: Callable[..., None],
        table: Callable[[str], None],
    ) -> None:
        self.config, self.model, self.mesh, self.topology = config, model, mesh, topology
        self.tokens_per_rank, self.num_positions, self.accumulate = tokens_per_rank, num_positions, accumulate
        self.path, self.event, self.table = path, event, table
        self.watch = Watch(config)
        self.window: Window | None = None
        self.problems: tuple[LayerProblem, ...] = ()
        """What the last decision depended on; on rank 0."""
        self.num_choices = 0
        """Decisions since this process began."""
        self._why = ""
        self._begun_at = 0
        self._early_times = StageTimes(model.early_stages, mesh.ledger)
        self._stage_times = StageTimes(model.window_stages, mesh.ledger)
        self._costs: tuple[float, Interference] | None = None

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """What the model does now, layer by layer."""
        return choice.strategies_of(self.model, self.num_positions)

    def before(self, step: int, plan: Plan, is_busy: bool) -> None:
        """After `step` steps: begin a window where a look is due, or end it and decide. While `is_busy` another window counts bytes, and
        what it counts must come from one strategy: a look waits, and one that has begun is given up."""
        if self.window is not None:
            if is_busy:
                self._stop()
            elif step >= self._begun_at + self.config.window:
                self._decide(step, plan)
        elif not is_busy and (why := self.watch.due(step)) is not None:
            self._begin(step, plan, why)

    def after(self, numbers: StepNumbers) -> None:
        """Note a finished step."""
        self.watch.note(numbers.load_LE)
        if self.window is not None:
            self.window.add(numbers.flights, numbers.bytes_by_class, numbers.step_s, numbers.exposed_s)

    def resume(self, step: int) -> None:
        """Go on under the last decision that was taken up to `step`, where it was taken for ranks like these."""
        kept = None
        if self.mesh.rank == 0 and self.path.exists():
            entries = [entry for entry in _entries(self.path) if entry["step"] <= step]
            atomic.write_text(self.path, "".join(json.dumps(entry) + "\n" for entry in entries))
            like_these = [self.mesh.world_size, self.mesh.expert_parallel, len(self.model.moe_layers)]
            fitting = [entry for entry in entries if entry["world"] == like_these]
            kept = fitting[-1] if fitting else None
        kept = collectives.broadcast_object(kept, self.mesh)
        if kept is not None:
            choices = choice.checked(Choices.from_canonical(kept["record"]), kept["digest"], self.mesh)
            choice.apply(self.model, [layer.strategy for layer in choices.layers])
            self.watch.looked(kept["step"], np.array(kept["load"]))
            self.event("choice_resumed", step=step, digest=choices.digest, taken_after=kept["step"])

    def _begin(self, step: int, plan: Plan, why: str) -> None:
        bank = self.model.moe_layers[0].bank
        if not self.topology.measured:
            self.topology = probe(
                self.mesh,
                model_width=bank.model_width,
                expert_width=bank.expert_width,
                activation=bank.activation.name,
                dtype=bank.inner.dtype,
            )
            self.mesh.ledger.take()
        if self._costs is None:
            row_s_per_byte = row_seconds_per_byte(bank.model_width, torch.float32, self.mesh.device)
            self._costs = row_s_per_byte, interference(self.mesh, self.topology)
        self._why, self._begun_at = why, step
        self.window = Window(Capture(plan.num_layers, plan.num_experts, source=f"steps from {step + 1} on, for a choice of strategies"))
        self._early_times.begin()
        self._stage_times.begin()

    def _stop(self) -> tuple[list[list[float]], list[list[float]]]:
        self.window = None
        return self._early_times.end(), self._stage_times.end()

    def _decide(self, step: int, plan: Plan) -> None:
        assert self.window is not None
        assert self._costs is not None
        measured = self.window.close(self.mesh)
        ranks = collectives.gather_objects(RankTimes(*self._stop(), *self._costs), self.mesh)
        before, layers = self.strategies, self.model.moe_layers
        decided: Choices | CrossdockError | None = None
        if measured is not None and ranks is not None:
            try:
                workload = workload_of(layers[0], self.tokens_per_rank, self.accumulate)
                self.problems = choice.problems_of(self.config, measured, ranks, plan, self.topology, workload, before, layers)
                decided = choice.decide(self.config, step, self.problems, before)
            except CrossdockError as error:  # the other ranks wait for an answer
                decided = error
        choices = choice.agreed(decided, self.mesh)
        self.num_choices += 1
        load_LE = self.watch.recent_LE()
        self.watch.looked(step, load_LE)
        after = [layer.strategy for layer in choices.layers]
        if tuple(after) != before:
            choice.apply(self.model, after)
        if self.mesh.rank == 0:
            self._remember(choices, load_LE)
            if self.config.explain:
                self.table(explain(choices))
        self.event("choice", **choice.as_event(choices, before, self._why))

    def _remember(self, choices: Choices, load_LE: np.ndarray) -> None:
        entry = {
            "step": choices.step,
            "world": [self.mesh.world_size, self.mesh.expert_parallel, len(self.model.moe_layers)],
            "digest": choices.digest,
            "record": choices.canonical,
            "load": load_LE.tolist(),
        }
        entries: Sequence[dict[str, Any]] = _entries(self.path) if self.path.exists() else []
        atomic.write_text(self.path, "".join(json.dumps(one) + "\n" for one in [*entries, entry]))


def _entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
