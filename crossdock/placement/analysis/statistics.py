"""How far scores of a plan can be trusted: error bars by bootstrap, how many tokens are enough, and how far two traces lie apart.

Tokens of one text resemble one another, so whole blocks are drawn: sequences where the trace knows them, else runs of BLOCK tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from crossdock.errors import UsageError
from crossdock.placement.analysis.compare import problem_for
from crossdock.placement.costs.cost import Workload
from crossdock.placement.costs.evaluate import evaluate
from crossdock.placement.records.affinity import Affinity
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import Trace, concatenate
from crossdock.placement.solvers import solve
from crossdock.placement.solvers.problem import Problem
from crossdock.placement.solvers.solution import cost_of_plan

FloatArray = NDArray[np.float64]

BLOCK = 512
MAX_BLOCKS = 200  # longer traces are cut into this many equal groups of blocks
SCORES = ("devices_per_token", "nodes_per_token", "cross_device_hops", "moved", "load_max_over_mean")


@dataclass(frozen=True)
class ErrorBar:
    """A score on the whole trace, and the interval that holds the given share of the bootstrap's resamples."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class CurvePoint:
    """A plan solved on the first `num_tokens` tokens: its objective there, and on other text."""

    num_tokens: int
    fit: float
    held_out: float


@dataclass(frozen=True, eq=False)
class Drift:
    """Total variation distance, 0 to 1, between two traces: of the experts' loads and of consecutive first choices, [L] and [L - 1]."""

    load_L: FloatArray
    transitions_L: FloatArray


def error_bars(
    trace: Trace, plan: Plan, topology: Topology, workload: Workload, *, repeats: int = 400, share: float = 0.9, seed: int = 0
) -> dict[str, ErrorBar]:
    """Error bars of SCORES under `plan`, by name. Raises `UsageError` for a trace of a single block: it says nothing about its spread."""
    blocks = blocks_of(trace)
    if len(blocks) < 2:
        raise UsageError(f"the trace is one block of {trace.num_tokens} tokens; error bars need more text, or its sequences")
    parts = [evaluate(trace.select(block), plan, topology, workload) for block in blocks]
    tokens_B = np.array([part.num_tokens for part in parts], dtype=np.float64)
    rows_BLR = np.array([part.rows_LR for part in parts], dtype=np.float64)
    rows_B = rows_BLR.sum(axis=(1, 2))
    rng = np.random.default_rng(seed)
    times_XB = np.vstack([np.ones(len(parts)), rng.multinomial(len(parts), np.full(len(parts), 1.0 / len(parts)), size=repeats)])
    values: dict[str, FloatArray] = {}
    for name in ("devices_per_token", "nodes_per_token", "cross_device_hops", "moved"):
        score_B = np.array([getattr(part, name) for part in parts])
        weight_XB = times_XB * (rows_B if name == "moved" else tokens_B)
        values[name] = weight_XB @ score_B / np.maximum(weight_XB.sum(axis=1), 1e-300)
    rows_XLR = np.einsum("xb,blr->xlr", times_XB, rows_BLR)
    values["load_max_over_mean"] = (rows_XLR.max(axis=2) / np.maximum(rows_XLR.mean(axis=2), 1e-300)).mean(axis=1)
    tails = [(1.0 - share) / 2.0, (1.0 + share) / 2.0]
    bars = {name: (float(value_X[0]), *np.quantile(value_X[1:], tails).tolist()) for name, value_X in values.items()}
    return {name: ErrorBar(*bars[name]) for name in SCORES}


def enough_tokens(problem: Problem, trace: Trace, other: Affinity, sizes: Sequence[int], method: str, seconds: float) -> list[CurvePoint]:
    """The problem solved on ever more blocks of `trace`, drawn at random, and scored on `other`. Flat: enough."""
    if not sizes or min(sizes) < 1 or max(sizes) > trace.num_tokens:
        raise UsageError(f"sizes are {list(sizes)}; give numbers of tokens from 1 to {trace.num_tokens}")
    order_T = np.concatenate([np.flatnonzero(block) for block in np.random.default_rng(0).permutation(np.array(blocks_of(trace)))])
    elsewhere = problem_for(other, problem)
    points = []
    for size in sizes:
        chosen_T = np.zeros(trace.num_tokens, dtype=bool)
        chosen_T[order_T[:size]] = True
        solution = solve(replace(problem, affinity=Affinity.from_trace(trace.select(chosen_T)), also=()), method, seconds)
        points.append(CurvePoint(size, solution.cost, cost_of_plan(elsewhere, solution.plan)))
    return points


def drift(first: Affinity, second: Affinity) -> Drift:
    """How far the routing of two traces of one model lies apart."""
    pairs = ((first.load_LE, second.load_LE), (first.transitions_LEE, second.transitions_LEE))
    load_L, transitions_L = (_total_variation(mine, theirs) for mine, theirs in pairs)
    return Drift(load_L, transitions_L)


def chance_drift(first: Trace, second: Trace, repeats: int = 20, seed: int = 0) -> Drift:
    """The drift that 95 of 100 regroupings of the two traces' blocks stay below: more than that is no accident of the sample.

    A permutation test: blocks of both are dealt at random into two groups of the traces' sizes.
    """
    both = concatenate([first, second])
    groups = [blocks_of(trace) for trace in (first, second)]
    blocks = [np.pad(block, (0, second.num_tokens)) for block in groups[0]] + [np.pad(block, (first.num_tokens, 0)) for block in groups[1]]
    if len(blocks) < 4:
        raise UsageError(f"the traces have {len(blocks)} blocks of text between them; chance needs 4 or more: give more text")
    rng, found = np.random.default_rng(seed), []
    for _ in range(repeats):
        order = rng.permutation(len(blocks))
        parts = (order[: len(groups[0])], order[len(groups[0]) :])
        found.append(drift(*(Affinity.from_trace(both.select(np.any([blocks[block] for block in part], axis=0))) for part in parts)))
    limits = (np.quantile([getattr(one, name) for one in found], 0.95, axis=0) for name in ("load_L", "transitions_L"))
    return Drift(*limits)


def _total_variation(mine: NDArray[np.int64], theirs: NDArray[np.int64]) -> FloatArray:
    flat = [counts.reshape(len(counts), math.prod(counts.shape[1:])) for counts in (mine, theirs)]  # also of no layers: one has no pairs
    shares = [counts_LX / np.maximum(counts_LX.sum(axis=1, keepdims=True), 1) for counts_LX in flat]
    return np.asarray(np.abs(shares[0] - shares[1]).sum(axis=1) / 2.0)


def blocks_of(trace: Trace) -> list[NDArray[np.bool_]]:
    """Masks [T] of the blocks, at most MAX_BLOCKS."""
    names_T = np.arange(trace.num_tokens) // BLOCK if trace.sequence_T is None else trace.sequence_T
    block_T = np.unique(names_T, return_inverse=True)[1].ravel()
    num_blocks = int(block_T.max(initial=0)) + 1
    group_T = block_T * min(num_blocks, MAX_BLOCKS) // num_blocks
    return [group_T == group for group in range(int(group_T.max(initial=0)) + 1)]
