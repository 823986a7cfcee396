"""One rank of one system: started by `crew` with the environment's own python, it obeys one JSON line after another.

    python -m benchmarks.peers.rank ADAPTER       with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT

    {"do": "build", "variant": V, "case": PATH}   the layer or model of that case
    {"do": "check", "variant": V}                 one step; relative errors of outputs, input gradients and weight gradients on this rank
    {"do": "step", "variant": V}                  one step after a barrier: {"step_s", "cpu_s"}
    {"do": "forget"}                              let go of everything built

Every answer is one JSON line on the original stdout; what systems print goes to stderr. A failure is answered with {"error": ...}.
"""

import gc
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.peers.case import Case
from benchmarks.peers.frame import Decoder


class Work:
    """One variant on one case: forward and backward, gradients taken from None, no optimizer and no reduction of dense gradients."""

    def __init__(self, adapter: ModuleType, variant: str, case: Case, rank: int) -> None:
        self.adapter, self.case, self.rank = adapter, case, rank
        self.layers = [adapter.build(variant, case, weights, rank) for weights in case.layers]
        self.model: nn.Module = self.layers[0]
        self.x = case.x[rank].clone()
        if case.kind == "model":
            self.model = Decoder(case.sizes, self.layers, case.frame)
        else:
            self.x.requires_grad_()
            self.gradient = case.gradient[rank].clone()

    def step(self) -> Tensor:
        """The output, or the loss of a model."""
        self.model.zero_grad(set_to_none=True)
        self.x.grad = None
        out: Tensor = self.model(self.x)
        out.backward(self.gradient if self.case.kind == "layer" else None)
        return out.detach()

    def errors(self) -> dict[str, float | None]:
        """|found - right| / |right| of a step's outcome."""
        output = self.step()
        input_gradient = self.model.embedding.grad if isinstance(self.model, Decoder) else self.x.grad
        first, num_slots = self.rank * self.case.sizes.num_slots, self.case.sizes.num_slots
        placed = getattr(self.adapter, "experts_of", None)
        mine = list(range(first, first + num_slots)) if placed is None else placed(self.layers[0])
        down_gradient = self.adapter.down_gradient(self.layers[0])
        return {
            "output": _error(output, self.case.output[self.rank]),
            "input_gradient": _error(input_gradient, self.case.input_gradient[self.rank]),
            "weight_gradient": None if down_gradient is None else _error(down_gradient, self.case.down_gradient_EDF[mine]),
        }


def _error(found: Tensor | None, right: Tensor) -> float:
    if found is None:
        raise RuntimeError("the step left no gradient")
    return float((found.double() - right.double()).norm() / right.double().norm())


def timed(call: Callable[[], object]) -> dict[str, float]:
    """Seconds of one call that all ranks begin together, by the wall and of this process."""
    gc.collect()
    dist.barrier()
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    call()
    return {"step_s": time.perf_counter() - wall_s, "cpu_s": time.process_time() - cpu_s}


def obey(order: dict[str, Any], adapter: ModuleType, built: dict[str, Work], rank: int) -> dict[str, Any]:
    """Carry out one order."""
    variant = order.get("variant", "")
    match order["do"]:
        case "build":
            built[variant] = Work(adapter, variant, Case.load(Path(order["case"])), rank)
            return {}
        case "check":
            return dict(built[variant].errors())
        case "step":
            return dict(timed(built[variant].step))
        case "forget":
            built.clear()
            gc.collect()
            return {}
    raise ValueError(f"no order is called {order['do']!r}")


def main() -> None:
    """Join the others, then obey until stdin closes."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    built: dict[str, Work] = {}
    adapter: ModuleType | None = None
    for line in sys.stdin:
        try:
            if adapter is None:
                adapter = importlib.import_module(f"benchmarks.peers.adapters.{sys.argv[1]}")
                getattr(adapter, "join", lambda: dist.init_process_group("gloo"))()
            answer = obey(json.loads(line), adapter, built, rank)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"}
        answers.write(json.dumps(answer) + "\n")
    answers.flush()
    os._exit(0)  # some systems abort in their own teardown, and everything has been said


if __name__ == "__main__":
    main()
