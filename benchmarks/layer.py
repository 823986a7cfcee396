"""What does one MoE layer cost beyond its experts' arithmetic? Forward and backward of a layer beside the floor and a naive layer.

    python -m benchmarks.layer [--dtypes fp32,bf16] [--repeats 9] [--out FILE] [--json] [--short]

4 ranks, 2048 tokens a rank, D 512, F 2048, E 16, top-2, GELU: 51.5 GFLOP a rank and step. One process group runs all variants in turn:

    floor           the experts alone, forward and backward, on the very rows that the layers' gate sends to this rank
    floor_even      the same on equally many rows for every rank and slot: what perfect balance would cost
    communication   the four all-to-alls of the flat layer's rows alone
    flat            MoELayer: gate, flat dispatch, experts, combine
    deduplicated    the same with one copy per (token, device)
    naive           the layer that one writes in 30 lines: sort, all-to-all, loop over experts, index_add; bf16 re-casts fp32 weights

CPU-seconds are those of a rank's process, the mean over ranks; wall seconds those of the slowest rank. Both are medians over repeats, and
ratios to the floor are medians of paired ratios. No optimizer, no gradient reduction in any row.
"""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import command_line
from benchmarks.measure import Sample, Spread, interleaved, paired_ratio, publish
from crossdock.models.moe import MoELayer
from crossdock.runtime.training.context import StepContext
from crossdock.runtime.transport.all_to_all import Route, all_to_all_start
from crossdock.runtime.transport.collectives import barrier
from crossdock.runtime.transport.mesh import Mesh, initialise, shutdown

VARIANTS = ("floor", "floor_even", "communication", "flat", "deduplicated", "naive")
COLUMNS = ("variant", "dtype", "cpu_s", "cpu_s_low", "cpu_s_high", "wall_s", "cpu_over_floor", "cpu_over_floor_low", "cpu_over_floor_high")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """Sizes of the layer."""

    ranks: int = 4
    tokens: int = 2048
    model_width: int = 512
    expert_width: int = 2048
    num_experts: int = 16
    top_k: int = 2

    @property
    def flop(self) -> float:
        """Of one rank's experts, forward and backward, GELU."""
        return 3 * 2 * 2 * self.tokens * self.top_k * self.model_width * self.expert_width


class NaiveLayer(nn.Module):
    """Expert parallelism as a first draft: fp32 weights cast for every step, autograd through torch's own all-to-all."""

    def __init__(self, shape: Shape, mesh: Mesh, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.mesh, self.dtype = shape, mesh, dtype
        self.num_slots = shape.num_experts // shape.ranks
        self.gate = nn.Linear(shape.model_width, shape.num_experts, bias=False)
        self.inner = nn.Parameter(torch.randn(self.num_slots, shape.model_width, shape.expert_width) * 0.02)
        self.outer = nn.Parameter(torch.randn(self.num_slots, shape.expert_width, shape.model_width) * 0.02)

    def forward(self, x_TD: Tensor) -> Tensor:
        """y [T, D] of tokens x [T, D]."""
        weight_TK, expert_TK = self.gate(x_TD.float()).softmax(-1).topk(self.shape.top_k)
        order = expert_TK.flatten().argsort(stable=True)
        token = order // self.shape.top_k
        sent = torch.bincount(expert_TK.flatten(), minlength=self.shape.num_experts).view(self.shape.ranks, -1)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.mesh.token_group)
        rows = _NaiveExchange.apply(x_TD[token].to(self.dtype), sent.sum(1).tolist(), received.sum(1).tolist(), self.mesh.token_group)
        slot = torch.arange(self.num_slots).repeat(self.shape.ranks).repeat_interleave(received.flatten())
        by_slot = slot.argsort(stable=True)
        parts = rows[by_slot].split(received.sum(0).tolist())
        inner, outer = self.inner.to(self.dtype), self.outer.to(self.dtype)
        done = torch.cat([F.gelu(part @ inner[number]) @ outer[number] for number, part in enumerate(parts)])
        back = torch.empty_like(rows).index_copy(0, by_slot, done)
        home = _NaiveExchange.apply(back, received.sum(1).tolist(), sent.sum(1).tolist(), self.mesh.token_group)
        return torch.zeros_like(x_TD).index_add(0, token, (home * weight_TK.flatten()[order, None]).to(x_TD.dtype))


class _NaiveExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        out = rows.new_empty(sum(receive), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        out = grad.new_empty(sum(ctx.send), grad.shape[1])
        dist.all_to_all_single(out, grad.contiguous(), ctx.send, ctx.receive, group=ctx.group)
        return out, None, None, None


def variants_of(shape: Shape, mesh: Mesh, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """One step of every variant as a call; each begins at a barrier, so that no rank pays for another variant's stragglers."""
    generator = torch.Generator().manual_seed(7 + mesh.rank)
    x_TD = torch.randn(shape.tokens, shape.model_width, generator=generator).to(dtype).requires_grad_()
    grad_TD = torch.randn(shape.tokens, shape.model_width, generator=generator).to(dtype)
    context = StepContext(0, 0, True, torch.zeros(shape.tokens, dtype=torch.int64), mesh.rank * shape.tokens)
    layers = {
        dispatch: MoELayer(
            shape.model_width, shape.expert_width, shape.num_experts, shape.top_k,
            activation="gelu", mesh=mesh, dispatch=dispatch, dtype=dtype, seed=1,
        )
        for dispatch in ("flat", "deduplicated")
    }  # fmt: skip
    naive = NaiveLayer(shape, mesh, dtype)
    flat = layers["flat"]
    with torch.no_grad():
        assignment = flat.route(x_TD, context, shape.tokens).assignment
        received = flat.dispatch_start(x_TD, assignment).wait()
    even_S = torch.full_like(received.count_S, shape.tokens * shape.top_k * shape.ranks // shape.num_experts)
    sent_R = torch.bincount(assignment.expert_A // (shape.num_experts // shape.ranks), minlength=shape.ranks).tolist()
    route = received.handle.route
    assert isinstance(route, Route)
    there = Route(mesh, mesh.token_group, tuple(sent_R), route.receive_R, 0, "dispatch", "tokens", 0)

    def experts_on(count_S: Tensor) -> Callable[[], None]:
        rows_MD = torch.randn(int(count_S.sum()), shape.model_width, generator=generator).to(dtype).requires_grad_()
        grad_MD = torch.randn_like(rows_MD)

        def step() -> None:
            barrier(mesh)
            flat.zero_grad(set_to_none=True)
            rows_MD.grad = None
            flat.bank(rows_MD, count_S).backward(grad_MD)

        return step

    def step_of(layer: nn.Module, *arguments: Any) -> Callable[[], None]:
        def step() -> None:
            barrier(mesh)
            layer.zero_grad(set_to_none=True)
            x_TD.grad = None
            layer(x_TD, *arguments).backward(grad_TD)
            mesh.ledger.take()

        return step

    def communicate() -> None:
        barrier(mesh)
        rows = x_TD.detach().new_zeros(sum(sent_R), shape.model_width)
        for _ in ("forward", "backward"):
            away = all_to_all_start(rows, there).wait()
            all_to_all_start(away, there.back("combine")).wait()
        mesh.ledger.take()

    steps = {name: step_of(layer, context) for name, layer in layers.items()}
    return {
        "floor": experts_on(received.count_S),
        "floor_even": experts_on(even_S),
        "communication": communicate,
        **steps,
        "naive": step_of(naive),
    }


def run_rank(rank: int, shape: Shape, dtypes: list[str], repeats: int, store: str, answer: Connection) -> None:
    """One rank's part; sends {dtype: {variant: [(cpu_s, wall_s)]}} to the parent."""
    torch.set_num_threads(1)
    initialise(rank, shape.ranks, init_method=f"file://{store}")
    mesh = Mesh.create(rank, shape.ranks, shape.ranks, (0,) * shape.ranks)
    samples = {name: interleaved(variants_of(shape, mesh, DTYPES[name]), repeats, warmup=2) for name in dtypes}
    answer.send(samples)
    shutdown()


def measure(shape: Shape, dtypes: list[str], repeats: int) -> list[dict[str, dict[str, list[Sample]]]]:
    """Samples of every rank, by dtype and variant."""
    os.environ["OMP_NUM_THREADS"] = "1"
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="crossdock-layer-") as folder:
        ends = [spawn.Pipe() for _ in range(shape.ranks)]
        ranks = [
            spawn.Process(target=run_rank, args=(rank, shape, dtypes, repeats, str(Path(folder) / "store"), end[1]), daemon=True)
            for rank, end in enumerate(ends)
        ]
        for process, (_, theirs) in zip(ranks, ends, strict=True):
            process.start()
            theirs.close()
        try:
            return [ours.recv() for ours, _ in ends]
        finally:
            for process in ranks:
                process.join(timeout=20)
                process.kill()


def rows_of(samples: list[dict[str, dict[str, list[Sample]]]], dtypes: list[str], shape: Shape) -> list[dict[str, Any]]:
    """One row a dtype and variant."""
    rows = []
    for dtype in dtypes:
        cpu_s = {
            variant: [sum(s.cpu_s for s in turn) / len(turn) for turn in zip(*(rank[dtype][variant] for rank in samples), strict=True)]
            for variant in VARIANTS
        }
        for variant in VARIANTS:
            wall_s = [max(s.wall_s for s in turn) for turn in zip(*(rank[dtype][variant] for rank in samples), strict=True)]
            computes = variant != "communication"
            rows.append(
                {
                    "variant": variant,
                    "dtype": dtype,
                    **Spread.of(cpu_s[variant]).row("cpu_s"),
                    **Spread.of(wall_s).row("wall_s"),
                    **paired_ratio(cpu_s[variant], cpu_s["floor"]).row("cpu_over_floor"),
                    "flop_per_cpu_s": shape.flop / Spread.of(cpu_s[variant]).median if computes else None,
                }
            )
    return rows


def main() -> None:
    """Measure and print."""
    parser = command_line.parser(__doc__, 9, "small sizes and 3 rounds")
    parser.add_argument("--dtypes", default="fp32,bf16", help="of fp32, bf16 (default: %(default)s)")
    options = parser.parse_args()
    dtypes = options.dtypes.split(",")
    if unknown := set(dtypes) - set(DTYPES):
        parser.error(f"unknown dtypes {', '.join(sorted(unknown))}; choose from {', '.join(DTYPES)}")
    shape = Shape(tokens=256, expert_width=512) if options.short else Shape()
    samples = measure(shape, dtypes, 3 if options.short else options.repeats)
    what = f"one MoE layer, forward and backward, {shape}"
    publish(rows_of(samples, dtypes, shape), what, options.out, options.json, COLUMNS)


if __name__ == "__main__":
    main()
