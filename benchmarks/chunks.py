"""What cutting a layer's tokens into chunks costs where there is no link to hide behind: the routed strand on one rank, CPU-seconds.

    python -m benchmarks.chunks [--degrees 1:1,2:2,4:4,8:8,4:1,1:4] [--repeats 15] [--out FILE] [--json] [--short]

One step is forward and backward of dispatch, experts and combine on a mesh of one rank, in `forward:backward` chunks, and in one piece with
either kind of recomputation. Every call of the experts then has fewer rows, and each piece is sorted and summed by itself; what that adds
is what the makespan of chunked schedules calls the overhead of a chunk. Ratios are to one piece that keeps everything, medians of rounds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch

from benchmarks import command_line
from benchmarks.measure import Spread, interleaved, paired_ratio, publish
from crossdock.models.moe import MoELayer
from crossdock.runtime.dispatch.assignment import Assignment
from crossdock.runtime.experts.grouped_mlp import Recompute
from crossdock.runtime.experts.overlap import Chunked, run

COLUMNS = ["chunks", "recompute", "rows_per_call", "cpu_s", "cpu_over_whole", "cpu_over_whole_low", "cpu_over_whole_high"]


@dataclass(frozen=True)
class Shape:
    """One rank's share of a layer."""

    tokens: int = 4096
    model_width: int = 256
    expert_width: int = 352
    num_experts: int = 2
    top_k: int = 1


def step_of(shape: Shape, schedule: Chunked, recompute: Recompute) -> Callable[[], None]:
    """Forward and backward of the strand; the same numbers each time."""
    torch.manual_seed(0)
    sizes = (shape.model_width, shape.expert_width, shape.num_experts, shape.top_k)
    layer = MoELayer(*sizes, expert_recompute=recompute)
    x_TD = torch.randn(shape.tokens, shape.model_width, requires_grad=True)
    score_TK, expert_TK = torch.rand(shape.tokens, shape.num_experts).topk(shape.top_k)
    assignment = Assignment.from_topk(expert_TK, score_TK.requires_grad_())
    gradient_TD = torch.randn(shape.tokens, shape.model_width)

    def step() -> None:
        _, y_TD = run(schedule, layer, x_TD, assignment, [], None)
        torch.autograd.grad(y_TD, [x_TD, *layer.bank.parameters()], gradient_TD)

    return step


def _degrees(text: str) -> list[tuple[int, int]]:
    pairs = [part.split(":") for part in text.split(",")]
    return [(int(forward), int(backward)) for forward, backward in pairs]


def main() -> None:
    """Measure and print."""
    parser = command_line.parser(__doc__, 15, "small sizes and 3 rounds")
    parser.add_argument("--degrees", type=_degrees, default="1:1,2:2,4:4,8:8,4:1,1:4", help="forward:backward, ... (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape = Shape(tokens=256, model_width=64, expert_width=64) if options.short else Shape()
    recomputes: tuple[Recompute, ...] = get_args(Recompute)
    cases: list[tuple[tuple[int, int], Recompute]] = [((1, 1), recompute) for recompute in recomputes]
    cases += [(degrees, "none") for degrees in options.degrees if degrees != (1, 1)]
    names = {f"{forward}:{backward} {recompute}": ((forward, backward), recompute) for (forward, backward), recompute in cases}
    calls = {name: step_of(shape, Chunked(0, *degrees), recompute) for name, (degrees, recompute) in names.items()}
    samples = {name: [s.cpu_s for s in found] for name, found in interleaved(calls, 3 if options.short else options.repeats, 2).items()}
    rows = [
        {
            "chunks": f"{forward}:{backward}",
            "recompute": recompute,
            "rows_per_call": shape.tokens * shape.top_k / shape.num_experts / max(forward, backward),
            **Spread.of(samples[name]).row("cpu_s"),
            **paired_ratio(samples[name], samples["1:1 none"]).row("cpu_over_whole"),
        }
        for name, ((forward, backward), recompute) in names.items()
    ]
    publish(rows, f"routed strand on one rank, forward and backward, {shape}", options.out, options.json, COLUMNS)


if __name__ == "__main__":
    main()
