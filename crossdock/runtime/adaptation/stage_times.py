"""Stage times: how long the stages take that may run while tokens travel, listened to in a live model without changing it."""

import statistics
from collections.abc import Sequence

from torch import nn
from torch.utils.hooks import RemovableHandle

from crossdock.runtime.transport.ledger import Ledger, Mark


class StageTimes:
    """Forward seconds of some modules in training mode, from `begin` to `end`; mutable. Times are the ledger's, on the computing stream."""

    def __init__(self, stages_L: Sequence[Sequence[nn.Module]], ledger: Ledger) -> None:
        self._stages_L, self._ledger = stages_L, ledger
        self._hooks: list[RemovableHandle] = []
        self._began: dict[nn.Module, Mark] = {}
        self._laps: dict[nn.Module, list[tuple[Mark, Mark]]] = {}

    def begin(self) -> None:
        """Listen from now on."""
        assert not self._hooks, "begun twice"
        self._laps = {stage: [] for stages in self._stages_L for stage in stages}
        for stage in self._laps:
            self._hooks.append(stage.register_forward_pre_hook(self._enter))
            self._hooks.append(stage.register_forward_hook(self._leave))

    def end(self) -> list[list[float]]:
        """Stop, and give the median seconds of each layer's stages; 0 where a stage never ran. On CUDA call it when the device is done."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        return [[self._median_s(stage) for stage in stages] for stages in self._stages_L]

    def _enter(self, stage: nn.Module, _inputs: object) -> None:
        self._began[stage] = self._ledger.now()

    def _leave(self, stage: nn.Module, _inputs: object, _output: object) -> None:
        if stage.training:
            self._laps[stage].append((self._began.pop(stage), self._ledger.now()))

    def _median_s(self, stage: nn.Module) -> float:
        laps = [self._ledger.seconds(end) - self._ledger.seconds(begin) for begin, end in self._laps[stage]]
        return statistics.median(laps) if laps else 0.0
