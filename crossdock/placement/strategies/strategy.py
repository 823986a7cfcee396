"""Strategies of MoE layers, priced and chosen: the record that every rank shares, and how it reads.

strategy      how a layer moves its tokens: dispatch, gathered experts, expert slot, chunks forward and backward, overlap
choice        the strategy taken for a layer, what every family of alternatives was predicted to take, and why
"""

import hashlib
import json
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Self

from crossdock.errors import BadData
from crossdock.placement.costs.cost import Dispatch

RECORD_VERSION = 2


@dataclass(frozen=True, order=True)
class Strategy:
    """How one MoE layer moves its tokens. Slots and chunks are those of `runtime.overlap`."""

    dispatch: Dispatch
    expert_slot: int
    forward_chunks: int = 1
    backward_chunks: int = 1
    overlap: bool = True
    gathered: tuple[int, ...] = ()
    """Experts whose weights travel to every rank, so that their tokens stay; sorted."""

    @property
    def family(self) -> tuple[str, bool, bool, bool]:
        """What tells one kind of strategy from another, whatever its numbers: (dispatch, gathers, chunks, overlaps)."""
        return self.dispatch, bool(self.gathered), max(self.forward_chunks, self.backward_chunks) > 1, self.overlap


@dataclass(frozen=True)
class Priced:
    """A strategy with its predicted seconds of the block in one micro-batch."""

    strategy: Strategy
    forward_s: float
    backward_s: float

    @property
    def total_s(self) -> float:
        return self.forward_s + self.backward_s


@dataclass(frozen=True)
class Choice:
    """What one layer does from now on, and what the alternatives would take. `wire` is the configured one and never chosen."""

    layer: int
    strategy: Strategy
    wire: str
    predicted_s: float
    current_s: float
    """Predicted seconds of what the layer did before."""
    alternatives: tuple[Priced, ...]
    """The best candidate of every family, fastest first."""
    num_candidates: int
    reason: str
    mismatch: Priced | None = None
    """The same strategy with the experts where ScMoE's own rule puts them; None where no stage can run while tokens travel."""


@dataclass(frozen=True, eq=False)
class Choices:
    """One record for all layers, the same on every rank: what is broadcast, hashed and logged."""

    step: int
    """Steps that had been taken when it was decided."""
    layers: tuple[Choice, ...]

    @cached_property
    def canonical(self) -> str:
        """JSON with sorted keys and no spaces; equal records give equal text on every machine."""
        return json.dumps({"version": RECORD_VERSION, **asdict(self)}, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @property
    def digest(self) -> str:
        """SHA-256 of `canonical`."""
        return hashlib.sha256(self.canonical.encode()).hexdigest()

    @classmethod
    def from_canonical(cls, text: str) -> Self:
        """Read `canonical` back. Raises `BadData` for a record of another version."""
        value = json.loads(text)
        if value.get("version") != RECORD_VERSION:
            raise BadData(f"the choice is of version {value.get('version')}, and this Crossdock reads {RECORD_VERSION}; use one version")
        return cls(value["step"], tuple(_choice_from(layer) for layer in value["layers"]))


def describe(strategy: Strategy) -> str:
    """A strategy in a few words: `hierarchical, slot 2, chunks 4/2, gathered 3 7`."""
    parts = [strategy.dispatch, f"slot {strategy.expert_slot}" if strategy.overlap else "sequential"]
    if max(strategy.forward_chunks, strategy.backward_chunks) > 1:
        parts.append(f"chunks {strategy.forward_chunks}/{strategy.backward_chunks}")
    if strategy.gathered:
        parts.append(f"gathered {' '.join(map(str, strategy.gathered))}")
    return ", ".join(parts)


def explain(choices: Choices) -> str:
    """The table that `crossdock train --explain` prints: for each layer every family of candidates, at most 80 columns wide."""
    lines = [f"Strategies after step {choices.step} (record {choices.digest[:12]}); predicted per micro-batch"]
    for choice in choices.layers:
        lines += ["", f"layer {choice.layer}, wire {choice.wire}, {choice.num_candidates} candidates, best of each kind:"]
        lines.append(f"    {'dispatch':<13} {'gathered':>8} {'slot':>5} {'chunks':>7} {'forward':>11} {'backward':>11} {'both':>11}")
        for priced in choice.alternatives:
            strategy = priced.strategy
            mark = "->" if strategy == choice.strategy else "  "
            slot = str(strategy.expert_slot) if strategy.overlap else "seq"
            chunks = f"{strategy.forward_chunks}/{strategy.backward_chunks}"
            times = " ".join(f"{in_ms(seconds):>11}" for seconds in (priced.forward_s, priced.backward_s, priced.total_s))
            lines.append(f" {mark} {strategy.dispatch:<13} {len(strategy.gathered) or '-':>8} {slot:>5} {chunks:>7} {times}")
        lines += _wrapped(f"why: {choice.reason}", 76)
        if choice.mismatch is not None:
            ruled = choice.mismatch
            lines += _wrapped(f"ScMoE's rule of least mismatch would take slot {ruled.strategy.expert_slot}, at {in_ms(ruled.total_s)}", 76)
    return "\n".join(lines)


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent="    ", subsequent_indent="    ")


def in_ms(seconds: float) -> str:
    """As people read it: 12.3 ms, 1.23 s."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def _choice_from(value: Mapping[str, Any]) -> Choice:
    alternatives = tuple(_priced_from(one) for one in value["alternatives"])
    mismatch = None if value["mismatch"] is None else _priced_from(value["mismatch"])
    return Choice(**{**value, "strategy": _strategy_from(value["strategy"]), "alternatives": alternatives, "mismatch": mismatch})


def _priced_from(value: Mapping[str, Any]) -> Priced:
    return Priced(_strategy_from(value["strategy"]), value["forward_s"], value["backward_s"])


def _strategy_from(value: Mapping[str, Any]) -> Strategy:
    return Strategy(**{**value, "gathered": tuple(value["gathered"])})
