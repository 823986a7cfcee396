"""A Block-MLP and a Block-MoE on a mesh, and their step with every message taken from memory: what `benchmarks.overlap` times."""

import dataclasses
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from crossdock.models.blocks import MoEBlock
from crossdock.models.config import ModelConfig
from crossdock.models.moe import MoELayer
from crossdock.runtime.dispatch.assignment import Assignment
from crossdock.runtime.experts.overlap import Schedule, Sequential
from crossdock.runtime.training.context import StepContext
from crossdock.runtime.transport.all_to_all import Route
from crossdock.runtime.transport.ledger import Ledger
from crossdock.runtime.transport.mesh import Group, Mesh

VARIANTS = ("top2", "shared_expert", "scmoe_sequential", "scmoe_overlapped")


@dataclass(frozen=True)
class Shape:
    """Sizes of the block pair. MLP and shared expert have one width, the routed experts `expert_ratio` of it."""

    tokens: int = 4096  # of one rank
    sequence: int = 128
    model_width: int = 256
    mlp_width: int = 704
    expert_ratio: float = 0.5
    num_heads: int = 4
    num_kv_heads: int = 1
    num_experts: int = 8
    dtype: str = "float32"

    def config(self, variant: str) -> ModelConfig:
        """The model whose one block pair `variant` is."""
        return ModelConfig(
            num_layers=2,
            model_width=self.model_width,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            mlp_width=self.mlp_width,
            expert_width=round(self.mlp_width * self.expert_ratio),
            shared_expert_width=None if variant == "top2" else self.mlp_width,
            block={"top2": "top_k", "shared_expert": "shared_expert"}.get(variant, "scmoe"),  # type: ignore[arg-type]
            num_experts=self.num_experts,
            top_k=2 if variant == "top2" else 1,
        )


class Memory:
    """A process group that remembers what arrived in one step, and can play the step again without sending anything.

    mode "live": the group itself. "record": the same, and every message that arrives is kept. "replay": a receive is a copy from memory, a
    send is nothing. Replayed, a step does what it did before down to the last bit, less the network.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.mode: Literal["live", "record", "replay"] = "live"
        self._messages: list[Tensor] = []
        self._next = 0

    def begin(self, mode: Literal["live", "record", "replay"]) -> None:
        """Before each step."""
        self.mode, self._next = mode, 0
        if mode == "record":
            self._messages = []

    def rank(self) -> int:
        return int(self.group.rank())

    def size(self) -> int:
        return int(self.group.size())

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> Any:
        if self.mode == "replay":
            tensors[0].copy_(self._messages[self._next])
            self._next += 1
            return _Done()
        work = self.group.recv(tensors, peer, tag)
        if self.mode == "live":
            return work
        self._messages.append(torch.empty_like(tensors[0]))
        return _Kept(work, tensors[0], self._messages[-1])

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> Any:
        return _Done() if self.mode == "replay" else self.group.send(tensors, peer, tag)


class _Done:
    def wait(self) -> None:
        """Nothing is under way."""


@dataclass(frozen=True, eq=False)
class _Kept:
    work: Any
    arrived: Tensor
    message: Tensor

    def wait(self) -> None:
        self.work.wait()
        self.message.copy_(self.arrived)


@dataclass(frozen=True)
class Halves:
    """When a step's forward pass began, when it turned into the backward pass, and when that ended."""

    begin_s: float
    turn_s: float
    end_s: float

    @property
    def forward_s(self) -> float:
        return self.turn_s - self.begin_s

    @property
    def backward_s(self) -> float:
        return self.end_s - self.turn_s


class Pair:
    """A block pair of `variant` with its input and the gradient of its output; the same numbers in every step.

    `step` is forward and backward over the mesh, `replay` the same from memory; `replay` needs one `step` before it.
    """

    def __init__(self, shape: Shape, variant: str, mesh: Mesh, schedule: Schedule | None = None) -> None:
        self.shape, dtype = shape, getattr(torch, shape.dtype)
        names = [name for name in ("token_group", "metadata_group", "count_group") if getattr(mesh, name) is not None]
        memories = {name: Memory(getattr(mesh, name)) for name in names}
        self._memories = tuple(memories.values())
        self.mesh = dataclasses.replace(mesh, **memories)  # type: ignore[arg-type]
        self.config = shape.config(variant)
        width, routed_width, gate = self.config.model_width, self.config.routed_width, self.config.gate
        torch.manual_seed(0)
        moe = MoELayer(width, routed_width, self.config.num_experts, self.config.top_k, gate=gate, mesh=self.mesh, dtype=dtype)
        self.block = MoEBlock(self.config, moe, dtype)
        self.block.schedule = schedule or Sequential(0)
        for parameter in self.block.parameters():
            parameter.grad = torch.zeros_like(parameter)  # accumulated into, as in every micro-batch but the first
        generator = torch.Generator().manual_seed(1 + mesh.rank)
        size = (shape.tokens // shape.sequence, shape.sequence, width)
        self.x_QPD = torch.randn(size, generator=generator).to(dtype).requires_grad_()
        self.gradient_QPD = torch.randn(size, generator=generator).to(dtype)
        self.assignment: Assignment | None = None

    def step(self) -> "Halves":
        """Forward and backward."""
        return self._run("live")

    def record(self) -> "Halves":
        """The same, remembering what arrives."""
        return self._run("record")

    def replay(self) -> "Halves":
        """The same from memory."""
        return self._run("replay")

    def _run(self, mode: Literal["live", "record", "replay"]) -> "Halves":
        begin_s = time.perf_counter()
        for memory in self._memories:
            memory.begin(mode)
        self.x_QPD.grad = None
        y_QPD, _ = self.block(self.x_QPD, self._context())
        turn_s = time.perf_counter()
        y_QPD.backward(self.gradient_QPD)
        return Halves(begin_s, turn_s, time.perf_counter())

    def route(self) -> Route:
        """Who sends how many rows to whom in `step`, over the group itself and under a ledger that is off."""
        self.step()
        assert self.assignment is not None
        x_TD = torch.zeros(self.shape.tokens, self.shape.model_width, dtype=self.x_QPD.dtype)
        dispatched = self.block.moe.dispatch_start(x_TD, self.assignment).wait()
        quiet = dataclasses.replace(self.mesh, ledger=Ledger(enabled=False))
        route = dispatched.handle.route
        assert isinstance(route, Route), "a pair's dispatcher has one hop"
        group = route.group.group if isinstance(route.group, Memory) else route.group
        return dataclasses.replace(route, mesh=quiet, group=group)

    def _context(self) -> StepContext:
        tokens = self.shape.tokens
        return StepContext(0, 0, True, torch.zeros(tokens, dtype=torch.int64), self.mesh.rank * tokens, listeners=(self._note,))

    def _note(self, _layer: int, assignment: Assignment) -> None:
        self.assignment = assignment
