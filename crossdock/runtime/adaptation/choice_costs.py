"""What a choice of strategies needs to know about this machine and no window shows: packing rows, and computing beside a transfer."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from crossdock.placement.records.topology import Topology
from crossdock.placement.strategies.overlap_rule import Interference
from crossdock.runtime.transport.all_to_all import Route, all_to_all_start
from crossdock.runtime.transport.collectives import all_gather_objects, barrier
from crossdock.runtime.transport.ledger import Ledger
from crossdock.runtime.transport.mesh import Mesh

LONG_ENOUGH_S = 0.01
"""Of computing and of travelling, each alone, when the two are measured side by side."""
ROW_WIDTH = 256


def row_seconds_per_byte(width: int, dtype: torch.dtype, device: torch.device, rows: int = 4096, repeats: int = 5) -> float:
    """Seconds per byte of gathering rows of that width in another order, which is what packing and unpacking are made of."""
    source = torch.zeros((rows, width), dtype=dtype, device=device)
    order = torch.arange(rows, device=device).flip(0)
    seconds = _seconds(lambda: source.index_select(0, order), device, repeats)
    return statistics.median(seconds) / (rows * width * dtype.itemsize)


def interference(mesh: Mesh, topology: Topology, repeats: int = 5) -> Interference:
    """What computing and travelling cost one another here; all ranks of the world together, and the same on all of them.

    The message is as long as the slowest link carries in `LONG_ENOUGH_S`, the computing is GEMMs that take about as long.
    """
    num_ranks, device = mesh.expert_parallel, mesh.device
    if num_ranks == 1:
        return Interference()
    mesh = replace(mesh, ledger=Ledger(device, enabled=False))
    apart = ~torch.eye(num_ranks, dtype=torch.bool).numpy()
    rows = max(1, int(LONG_ENOUGH_S * topology.bytes_per_s_RR[apart].min() / (4 * ROW_WIDTH * (num_ranks - 1))))
    sent_R = tuple(0 if rank == mesh.expert_rank else rows for rank in range(num_ranks))
    route = Route(mesh, mesh.token_group, sent_R, sent_R, 0, "dispatch", "tokens", 0)
    message = torch.zeros((sum(sent_R), ROW_WIDTH), device=device)
    factor = torch.ones((256, 256), device=device)
    one_s = statistics.median(_seconds(lambda: factor @ factor, device, 20))
    times = max(1, round(LONG_ENOUGH_S / max(all_gather_objects(one_s, mesh))))

    def compute() -> None:
        for _ in range(times):
            factor @ factor

    def both() -> None:
        pending = all_to_all_start(message, route)
        compute()
        pending.wait()

    found = []
    for work in (compute, lambda: all_to_all_start(message, route).wait(), both):
        seconds = _seconds(work, device, repeats, lambda: barrier(mesh))
        found.append(statistics.median(max(repeat) for repeat in zip(*all_gather_objects(seconds, mesh), strict=True)))
    compute_s, transfer_s, both_s = found
    return Interference.measured(compute_s, transfer_s, both_s, handle_s=0.0)


def _seconds(work: Callable[[], object], device: torch.device, repeats: int, together: Callable[[], None] = lambda: None) -> list[float]:
    """Seconds of each repeat, after one that is not timed."""
    seconds = []
    for _ in range(repeats + 1):
        together()
        begin_s = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin_s)
    return seconds[1:]
