"""Where a step's seconds go, as predicted and as measured: what of a prediction is off says which part of the cost model is."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict

from crossdock.placement.costs.cost import Workload
from crossdock.placement.costs.evaluate import Evaluation
from crossdock.runtime.adaptation.windows import Measured, transfer_seconds_of
from crossdock.runtime.training.steps import Step
from crossdock.runtime.transport.collectives import all_gather_objects
from crossdock.runtime.transport.mesh import Mesh

PARTS = ("tokens", "experts", "copies", "rest")
"""Transfers of tokens that are not hidden; experts; what is waited for until copies have the sums of their gradients; all else."""


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
    """The same parts of the measured steps; `rest` is what the others leave of the median step.

    Transfers are those of the rank that comes last to each of them, less its share of windows; experts those of the slowest rank in each
    layer.
    """
    tokens_s = experts_s = 0.0
    passes = len(workload.windows) * workload.micro_batches
    for (layer, stage, direction), (flight_s, _) in transfer_seconds_of(measured.ranks).items():
        window_s = statistics.median(
            transfer.flight_s - transfer.wait_s for rank in measured.ranks for transfer in rank.transfers[layer, stage, direction]
        )
        tokens_s += passes * max(0.0, flight_s - window_s)
    for layer in measured.ranks[0].profile_of_layer:
        profiles = [rank.profile_of_layer[layer] for rank in measured.ranks]
        for name in ("expert_forward_s", "expert_backward_s"):
            experts_s += passes * max(getattr(profile, name) for profile in profiles)
    parts = {"tokens": tokens_s, "experts": experts_s, "copies": statistics.median(copies_s)}
    return parts | {"rest": step_s - sum(parts.values())}
