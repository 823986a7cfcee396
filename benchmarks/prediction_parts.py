"""Where a step's seconds go, as predicted and as measured: what of a prediction is off says which part of the cost model is."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict

from crossdock.placement.costs.cost import Workload
from crossdock.placement.costs.evaluate import Evaluation
from crossdock.runtime.adaptation.windows import Measured
from crossdock.runtime.training.steps import Step
from crossdock.runtime.transport.collectives import all_gather_objects
from crossdock.runtime.transport.mesh import Mesh

PARTS = ("tokens", "experts", "copies", "rest")
"""Waiting for tokens; experts; waiting until copies have the sums of their gradients; all other work, windows among it."""


def predicted_parts(promise: Evaluation, workload: Workload) -> dict[str, float]:
    """Seconds of each part of a step as the cost model has it; their sum is the predicted step."""
    tokens_s = float(workload.micro_batches * promise.block.exposed_s.sum())
    parts = {"tokens": tokens_s, "experts": expert_seconds(promise, workload), "copies": promise.gradient_s}
    return parts | {"rest": promise.step_s - sum(parts.values())}


def expert_seconds(promise: Evaluation, workload: Workload) -> float:
    """Seconds of a step that the experts of the slowest device take: what makespans hold beside exposed transfers and windows."""
    beside_s = statistics.fmean(sum(asdict(window).values()) for window in workload.windows)
    return float(workload.micro_batches * (promise.block.total_s - promise.block.exposed_s - beside_s).sum())


def copy_waits(steps: Sequence[Step], mesh: Mesh) -> list[float]:
    """For each step the seconds that the rank which waits least stands still for gradients of copies: the others wait for it as well."""
    waited = [sum(f.wait_end_s - f.wait_begin_s for f in step.flights if f.kind == "gradients") for step in steps]
    return [min(of_ranks) for of_ranks in zip(*all_gather_objects(waited, mesh), strict=True)]


def measured_parts(measured: Measured, step_s: float, copies_s: Sequence[float], workload: Workload) -> dict[str, float]:
    """The same parts of the measured steps: experts of the slowest rank in each layer, all other work of the mean rank, and for tokens what
    these leave of the median step: waiting for them, and for one another."""
    experts_s = 0.0
    for layer in measured.ranks[0].profile_of_layer:
        profiles = [rank.profile_of_layer[layer] for rank in measured.ranks]
        slowest_s = [max(getattr(profile, name) for profile in profiles) for name in ("expert_forward_s", "expert_backward_s")]
        experts_s += workload.micro_batches * sum(slowest_s)  # which counts the turns of a block as well
    rest_s = statistics.fmean(rank.rest_s or 0.0 for rank in measured.ranks)
    parts = {"experts": experts_s, "copies": statistics.median(copies_s), "rest": rest_s}
    return {"tokens": step_s - sum(parts.values())} | parts
