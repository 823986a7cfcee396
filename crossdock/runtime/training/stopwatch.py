"""Stopwatch: seconds of the phases of a step, on the host's clock or, on CUDA, on the stream that computes."""

import time
from typing import Any

import torch


class Stopwatch:
    """Laps of one step; mutable. `read` waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = [("", self._now())]

    def lap(self, phase: str) -> None:
        """What ran since the last lap belongs to `phase`; a phase may have many laps."""
        self._marks.append((phase, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds by phase so far."""
        if self._on_cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        for (_, begin), (phase, end) in zip(self._marks, self._marks[1:], strict=False):
            lap_s = begin.elapsed_time(end) / 1e3 if self._on_cuda else end - begin
            seconds[phase] = seconds.get(phase, 0.0) + lap_s
        return seconds

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has had: allocated on CUDA, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
