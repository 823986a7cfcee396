"""`crossdock plan tokens` and `drift`: how much text a plan needs, and how far two texts lie apart."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crossdock.errors import BadData, UsageError
from crossdock.placement.commands.cli import plan_app
from crossdock.placement.commands.options import (
    METHODS,
    NumExpertsOption,
    ProblemOptions,
    with_problem_options,
)
from crossdock.placement.commands.output import AsJson, print_json, say

if TYPE_CHECKING:
    from crossdock.placement.analysis.statistics import CurvePoint, Drift
    from crossdock.placement.records.trace import Trace

__all__ = ["plan_app"]

FEWEST_TOKENS = 250
ENOUGH = 0.01  # of the held-out objective: closer to the best of the curve than that is enough
HELD_OUT_EVERY = 4  # without other text, every fourth block is held out


@plan_app.command("tokens")
@with_problem_options
def tokens_command(
    problem: ProblemOptions,
    method: Annotated[str, typer.Option("--method", help=f"{METHODS}.")] = "auto",
    sizes: Annotated[str, typer.Option("--sizes", help="Numbers of tokens, comma-separated; halvings of all if left out.")] = "",
    seconds: Annotated[float, typer.Option("--seconds", help="Cap on each search.")] = 3.0,
    as_json: AsJson = False,
) -> None:
    """How many tokens are enough: plans made from ever more of the trace, scored on other text, or on a held-out part.

    Example: crossdock plan tokens --trace trace.npz --topology 1x8-nvlink --objective devices --eval-trace held-out.npz
    """
    from crossdock.placement.analysis.compare import problem_for
    from crossdock.placement.analysis.statistics import enough_tokens
    from crossdock.placement.records.affinity import Affinity
    from crossdock.placement.records.plan import Plan
    from crossdock.placement.solvers.solution import cost_of_plan

    asked = problem.read()
    fit, other = (asked.trace, asked.eval_trace) if asked.eval_trace is not None else _split(asked.trace)
    counts = _sizes(sizes, fit.num_tokens)
    say(asked.heading(f"method {method}, at most {seconds:g} s for each of {len(counts)} sizes"), as_json)
    elsewhere = Affinity.from_trace(other)
    points = enough_tokens(asked.problem, fit, elsewhere, counts, method, seconds)
    contiguous = Plan.contiguous(fit.num_layers, fit.num_experts, asked.topology.num_devices)
    reference = cost_of_plan(problem_for(elsewhere, asked.problem), contiguous)
    enough = _enough(points)
    if as_json:
        rows = [{"num_tokens": point.num_tokens, "fit": point.fit, "held_out": point.held_out} for point in points]
        print_json(
            {"objective": problem.objective, "rows": rows, "contiguous": reference, "enough": enough, "held_out_tokens": other.num_tokens}
        )
        return
    print("\n" + "\n".join(curve_table(points, reference, problem.objective)))
    where = "other text" if asked.eval_trace is not None else "held-out blocks of the same text"
    print(f"\nheld out: {other.num_tokens:,} tokens, {where}")
    print("saved: share of what contiguous costs")
    print(f"{enough:,} tokens are enough: within {ENOUGH:.0%} of the best held out")


@plan_app.command("drift")
def drift_command(
    trace: Annotated[Path, typer.Argument(help="A trace.", show_default=False)],
    other: Annotated[Path, typer.Argument(help="Another of the same model: of other text, or of a later checkpoint.", show_default=False)],
    num_experts: NumExpertsOption = None,
    repeats: Annotated[int, typer.Option("--repeats", min=5, help="Regroupings that say what chance alone would show.")] = 20,
    as_json: AsJson = False,
) -> None:
    """How far the routing of two traces lies apart, layer by layer, beside what chance alone would show.

    Example: crossdock plan drift checkpoint-1000.npz checkpoint-2000.npz
    """
    from crossdock.placement.analysis.statistics import chance_drift, drift
    from crossdock.placement.records.affinity import Affinity
    from crossdock.placement.records.trace import Trace

    first = Trace.load(trace, num_experts)
    second = Trace.load(other, num_experts or first.num_experts)
    if (first.num_layers, first.num_experts) != (second.num_layers, second.num_experts):
        raise BadData(
            f"{other}: {second.num_layers} layers x {second.num_experts} experts, and {trace} has {first.num_layers} x "
            f"{first.num_experts}; give traces of one model"
        )
    apart = drift(Affinity.from_trace(first), Affinity.from_trace(second))
    chance = chance_drift(first, second, repeats)
    if as_json:
        values = {"load": apart.load_L, "load_chance": chance.load_L, "steps": apart.transitions_L, "steps_chance": chance.transitions_L}
        print_json({name: value.tolist() for name, value in values.items()})
        return
    print("\n".join(drift_table(apart, chance)))
    print(
        "\ntotal variation, 0 (alike) to 1 (nothing in common): of the experts' load, and\n"
        "of the steps from one layer's first choice to the next's. chance: what 95 of\n"
        f"100 random regroupings of the same text stay below ({repeats} were made)."
    )


def curve_table(points: "list[CurvePoint]", contiguous: float, objective: str) -> list[str]:
    """The curve as lines of at most 80 columns; seconds are shown in milliseconds."""
    unit, name = (1e3, "ms") if objective == "seconds" else (1.0, objective)
    best = min(point.held_out for point in points)
    lines = [f"{'tokens':>10}{f'{name}, fit':>15}{f'{name}, held out':>19}{'above the best':>17}{'saved':>9}"]
    for point in points:
        above, saved = point.held_out / max(best, 1e-300) - 1.0, 1.0 - point.held_out / max(contiguous, 1e-300)
        lines.append(f"{point.num_tokens:>10,}{point.fit * unit:>15.4f}{point.held_out * unit:>19.4f}{above:>17.1%}{saved:>9.1%}")
    lines.append(f"{'contiguous':>10}{'':>15}{contiguous * unit:>19.4f}{contiguous / max(best, 1e-300) - 1.0:>17.1%}{0.0:>9.1%}")
    return lines


def drift_table(apart: "Drift", chance: "Drift") -> list[str]:
    """Layer by layer, and the means, as lines of at most 80 columns; a star marks more than chance."""
    lines = [f"{'layer':>8}{'load':>10}{'chance':>9}{'':2}{'steps to the next':>20}{'chance':>9}"]
    for layer, (load, load_chance) in enumerate(zip(apart.load_L, chance.load_L, strict=True)):
        line = f"{layer:>8}{load:>10.3f}{load_chance:>9.3f}{_star(load, load_chance):2}"
        if layer < len(apart.transitions_L):
            step, step_chance = apart.transitions_L[layer], chance.transitions_L[layer]
            line += f"{step:>20.3f}{step_chance:>9.3f}{_star(step, step_chance)}"
        lines.append(line)
    mean = f"{'mean':>8}{apart.load_L.mean():>10.3f}{chance.load_L.mean():>9.3f}{'':2}"
    if len(apart.transitions_L):
        mean += f"{apart.transitions_L.mean():>20.3f}{chance.transitions_L.mean():>9.3f}"
    return [*lines, mean]


def _star(value: float, chance: float) -> str:
    return " *" if value > chance else ""


def _enough(points: "list[CurvePoint]") -> int:
    """The smallest size from which on every plan is close to the best of the curve."""
    best = min(point.held_out for point in points)
    enough = points[-1].num_tokens
    for point in reversed(points):
        if point.held_out > best * (1.0 + ENOUGH):
            break
        enough = point.num_tokens
    return enough


def _split(trace: "Trace") -> "tuple[Trace, Trace]":
    """The trace without every fourth block, and these blocks."""
    import numpy as np

    from crossdock.placement.analysis.statistics import blocks_of

    blocks = blocks_of(trace)
    if len(blocks) < HELD_OUT_EVERY:
        raise UsageError(f"the trace is {len(blocks)} blocks of text, too few to hold some out; give --eval-trace")
    held_out_T = np.any(blocks[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY], axis=0)
    return trace.select(~held_out_T), trace.select(held_out_T)


def _sizes(text: str, num_tokens: int) -> list[int]:
    """Ascending numbers of tokens. Raises `UsageError`."""
    if not text:
        found: list[Any] = [num_tokens]
        while found[-1] // 2 >= FEWEST_TOKENS:
            found.append(found[-1] // 2)
        return sorted(found)
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isdecimal() and len(word) < 12 and 1 <= int(word) <= num_tokens for word in words):
        raise UsageError(f"--sizes is {text!r}; give numbers of tokens from 1 to {num_tokens}, such as 500,1000,2000")
    return sorted({int(word) for word in words})
