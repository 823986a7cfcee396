"""Schedules from measurement: where each block's experts run best on this cluster, by the makespan of what was timed on it."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor, nn

from crossdock.models.blocks import MoEBlock
from crossdock.models.transformer import Transformer
from crossdock.runtime.collectives import all_gather_objects
from crossdock.runtime.context import StepContext
from crossdock.runtime.ledger import Flight
from crossdock.runtime.overlap import Overlapped, Schedule, Sequential, choose_expert_slot

Seconds = dict[str, list[float]]
"""Seconds of one block: `stages` in their order, and one number each for `dispatch`, `experts` and `combine`."""


def measured_schedules(model: Transformer, token_QP: Tensor, repeats: int = 3) -> list[Schedule]:
    """The best schedule of every block for micro-batches of the shape of `token_QP`; hand them to `model.set_schedules`.

    Every rank calls this together, between two steps. It runs `repeats` + 1 forward passes outside training with every movement waited for
    at once, takes the median of each time and then the slowest rank's, so that all ranks choose alike. Flights that the ledger holds are
    lost; nothing else changes: gates learn nothing from it, and the schedule has no influence on any value.
    """
    before = [block.schedule for block in _moe_blocks(model)]
    model.set_schedules([Sequential(0)] * len(before))
    context = StepContext(0, 0, False, token_QP.reshape(-1), model.mesh.rank * token_QP.numel())
    try:
        _timed_pass(model, token_QP, context)  # the first one pays for caches and buffers
        passes = [_timed_pass(model, token_QP, context) for _ in range(repeats)]
    finally:
        for block, schedule in zip(_moe_blocks(model), before, strict=True):
            block.schedule = schedule
    here = [_combined(samples, median) for samples in zip(*passes, strict=True)]
    slowest = [_combined(samples, max) for samples in zip(*all_gather_objects(here, model.mesh), strict=True)]
    return [
        Overlapped(choose_expert_slot(block["stages"], block["dispatch"][0], block["experts"][0], block["combine"][0])) for block in slowest
    ]


def _moe_blocks(model: Transformer) -> list[MoEBlock]:
    return [block for block in model.blocks if isinstance(block, MoEBlock)]


@torch.no_grad()
def _timed_pass(model: Transformer, token_QP: Tensor, context: StepContext) -> list[Seconds]:
    """One forward pass, with the stages of every window timed from outside and the movements by the ledger."""
    device, ledger = token_QP.device, model.mesh.ledger
    stage_s: dict[nn.Module, float] = {}

    def begin(stage: nn.Module, _inputs: object) -> None:
        stage_s[stage] = -_now_s(device)

    def end(stage: nn.Module, _inputs: object, _output: object) -> None:
        stage_s[stage] += _now_s(device)

    windows = [block.window_stages for block in _moe_blocks(model)]
    stages = [stage for window in windows for stage in window]
    hooks = [stage.register_forward_pre_hook(begin) for stage in stages] + [stage.register_forward_hook(end) for stage in stages]
    was_enabled, ledger.enabled = ledger.enabled, True
    ledger.take()
    try:
        model(token_QP, context)
        flights = ledger.take()
    finally:
        ledger.enabled = was_enabled
        for hook in hooks:
            hook.remove()
    tokens: dict[int, dict[str, Flight]] = defaultdict(dict)
    for flight in flights:
        if flight.kind == "tokens":
            tokens[flight.layer][flight.stage] = flight
    return [_block_seconds([stage_s[stage] for stage in window], tokens[layer]) for layer, window in enumerate(windows)]


def _block_seconds(stage_s: list[float], flight_of: dict[str, Flight]) -> Seconds:
    dispatch, combine = flight_of["dispatch"], flight_of["combine"]
    return {
        "stages": stage_s,
        "dispatch": [dispatch.wait_end_s - dispatch.launched_s],
        "experts": [combine.launched_s - dispatch.wait_end_s],
        "combine": [combine.wait_end_s - combine.launched_s],
    }


def _combined(samples: Sequence[Seconds], combine: Callable[[list[float]], float]) -> Seconds:
    """Each number of a block combined over its samples."""
    return {name: [combine(list(numbers)) for numbers in zip(*(sample[name] for sample in samples), strict=True)] for name in samples[0]}


def _now_s(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
