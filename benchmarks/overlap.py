"""Does the shortcut hide the all-to-all? Step times of four block pairs on two emulated nodes behind a slow link.

    python -m benchmarks.overlap [--rates 1e9,500e6,250e6] [--repeats 15] [--out FILE] [--json] [--short]      (root: it makes namespaces)
    python -m benchmarks.overlap --sweep [--shares 0.1,0.5] [--ranks-per-node 1] [--timeline FILE.svg] [--out FILE.md]

A block pair is one Block-MLP and one Block-MoE as `models.blocks` builds them; a step is its forward and backward pass on every rank.
Dense gradient reduction, the optimizer and the output head are in neither step nor bound. Variants, two ranks on each of two nodes:

    top2                attention, MLP, attention, then two routed experts a token: dispatch, experts, combine, all waited for
    shared_expert       attention, MLP, attention, shared expert beside one routed expert, waited for at once
    scmoe_sequential    ScMoE Pos-2, CG-1, one routed expert; every movement waited for at once
    scmoe_overlapped    the same starts in the same places, waited for where the result is needed; bitwise the same numbers

Columns, medians over paired repeats (all variants take turns in one process group; a repeat's time is that of its slowest rank):

    step_s              forward and backward over the shaped link
    compute_s           the same step, all ranks at once, with every message copied from memory instead of received: rows are gathered,
                        sorted and summed as ever, and nothing is sent; bitwise the same numbers
    alone_s             beside that, for the overlapped variant: a rank that has only its own S = E/R experts and as many rows, and so need
                        not gather rows for others; a floor that no expert-parallel step reaches
    communication_s     the token all-to-alls of that very step, four of them, one after the other, alone on the shaped link
    bound_s             max(compute_s, communication_s): no schedule can be faster
    hidden              (compute_s + communication_s - step_s) / communication_s
    fits_s              what the schedule can hide at best: the sum over the four all-to-alls of min(its window, its time), where the
                        windows are compute only, measured in the compute_s steps
    hidden_of_fits      (compute_s + communication_s - step_s) / fits_s
    exposed_s           time that ranks stood in waits, by the ledger, counts and metadata included (`waits_s` in the JSON tells them
                        apart); what step_s exceeds compute_s + exposed_s by is contention

`--sweep` (in `overlap_sweep.py`) holds the block and varies the link instead, from a tenth of communication to most of the step, with
chunked schedules, forward and backward apart.

The MLP's width is chosen so that communication_s is about `--share` of the shared-expert step at the middle rate on this machine, and the
expert slot from measured stage times (`runtime.experts.overlap.choose_expert_slot`) for each rate.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import on_ranks
from benchmarks.block_pair import VARIANTS, Pair, Shape
from benchmarks.command_line import one_line_errors
from benchmarks.measure import Spread, paired_ratio, publish
from benchmarks.netlab import Lab
from benchmarks.on_ranks import meeting, started, tell
from benchmarks.overlap_bench import Bench, Stages, Timing
from benchmarks.overlap_page import merged, write_page
from benchmarks.overlap_sweep import COLUMNS as SWEEP_COLUMNS
from benchmarks.overlap_sweep import SHARES, sweep
from benchmarks.timeline import Recorded, draw
from crossdock.atomic import write_json, write_text
from crossdock.errors import UsageError
from crossdock.runtime.experts.overlap import Overlapped, Sequential, choose_expert_slot
from crossdock.runtime.transport.collectives import broadcast_object
from crossdock.runtime.transport.mesh import Mesh

NODES = 2
COLUMNS = ["variant", "link_bit_per_s", "step_s", "compute_s", "communication_s", "bound_s", "step_over_bound", "hidden", "fits_s"]
COLUMNS += ["hidden_of_fits", "exposed_s", "expert_slot", "alone_s"]


def fit_width(bench: Bench, shape: Shape, share: float) -> Shape:
    """The MLP width with which communication is `share` of the shared-expert step; needs the middle rate to be set.

    The least disturbed of a few repeats counts: medians of so few would follow whatever else the machine does.
    """
    tried: dict[int, float] = {}
    width = shape.mlp_width
    for _ in range(5):
        candidate = dataclasses.replace(shape, mlp_width=width)
        pair = Pair(candidate, "shared_expert", bench.mesh)
        calls: dict[str, Callable[[], object]] = {"step": pair.step, "communicate": bench.communicate(pair.route(), candidate)}
        samples = bench.interleaved(calls, 5)
        step_s, communication_s = (min(timing.step_s for timing in samples[name]) for name in ("step", "communicate"))
        tried[width] = communication_s / step_s
        if bench.mesh.rank == 0:
            print(f"calibration: MLP width {width}: communication is {tried[width]:.1%} of the shared-expert step", file=sys.stderr)
        if abs(tried[width] - share) < 0.01:
            break
        width = next_width(tried, communication_s, step_s, width, share)
        if width in tried:
            break
    best = min(tried, key=lambda width: abs(tried[width] - share))
    return dataclasses.replace(shape, mlp_width=best)


def next_width(tried: Mapping[int, float], communication_s: float, step_s: float, width: int, share: float) -> int:
    """Steps are affine in the width: from two tries on through both of the nearest, at first through half the step at width zero."""
    wanted_s = communication_s / share
    known = {w: communication_s / fraction for w, fraction in tried.items()}
    if len(known) == 1:
        slope = step_s / 2 / width
        guess = width + (wanted_s - step_s) / slope
    else:
        (w1, s1), (w2, s2) = sorted(known.items(), key=lambda item: abs(item[1] - wanted_s))[:2]
        guess = w1 + (wanted_s - s1) * (w2 - w1) / (s2 - s1) if s2 != s1 else w1
    return int(min(8192, max(64, round(guess / 32) * 32)))


def measure_rate(bench: Bench, shape: Shape, rate: float, stages: Stages) -> list[dict[str, Any]]:
    """The rows of one link rate."""
    bench.set_rate(rate)
    pairs = {variant: Pair(shape, variant, bench.mesh) for variant in VARIANTS}
    routes = {variant: pair.route() for variant, pair in pairs.items()}
    once = bench.interleaved({"": bench.communicate(routes["scmoe_overlapped"], shape)}, 5)[""]
    one_way_s = statistics.median(timing.step_s for timing in once) / 4
    slot = choose_expert_slot(stages.stage_s, one_way_s, stages.expert_s, one_way_s, stages.backward_over_forward)
    pairs["scmoe_sequential"].block.schedule, pairs["scmoe_overlapped"].block.schedule = Sequential(slot), Overlapped(slot)
    calls: dict[str, Callable[[], object]] = {}
    for variant, pair in pairs.items():
        pair.record()
        calls |= {f"{variant}/step": pair.step, f"{variant}/compute": pair.replay}
        calls[f"{variant}/communication"] = bench.communicate(routes[variant], shape)
    own_experts = dataclasses.replace(shape, num_experts=shape.num_experts // bench.mesh.world_size)
    calls["alone"] = Pair(own_experts, "scmoe_overlapped", Mesh.single(), Overlapped(slot)).step
    samples = bench.interleaved(calls, bench.repeats)
    alone_s = statistics.median(timing.step_s for timing in samples["alone"])
    return [
        row(variant, rate, samples[f"{variant}/step"], samples[f"{variant}/compute"], samples[f"{variant}/communication"])
        | {"expert_slot": slot if variant.startswith("scmoe") else 0, "alone_s": alone_s if variant == "scmoe_overlapped" else None}
        for variant in VARIANTS
    ]


def row(variant: str, rate: float, steps: Sequence[Timing], computes: Sequence[Timing], communications: Sequence[Timing]) -> dict[str, Any]:
    """One row from paired repeats; see the columns above. All-to-alls of a step carry equal bytes: each takes a quarter."""
    step_s, compute_s, communication_s = ([timing.step_s for timing in timings] for timings in (steps, computes, communications))
    step, compute, communication = Spread.of(step_s), Spread.of(compute_s), Spread.of(communication_s)
    hidden_s = statistics.median(c + m - s for s, c, m in zip(step_s, compute_s, communication_s, strict=True))
    fits_s = 0.0
    if variant == "scmoe_overlapped":  # elsewhere nothing runs between start and wait
        windows = [timing.windows_s for timing in computes if timing.windows_s is not None]
        fits_s = sum(min(statistics.median(column), communication.median / 4) for column in zip(*windows, strict=True))
    return {
        "variant": variant,
        "link_bit_per_s": rate,
        **step.row("step_s"),
        **compute.row("compute_s"),
        **communication.row("communication_s"),
        "bound_s": max(compute.median, communication.median),
        "step_over_bound": paired_ratio(step_s, [max(both) for both in zip(compute_s, communication_s, strict=True)]).median,
        "hidden": hidden_s / communication.median,
        "fits_s": fits_s,
        "hidden_of_fits": hidden_s / fits_s if fits_s > 0 else None,
        "exposed_s": statistics.median(timing.exposed_s for timing in steps),
        "waits_s": {name: statistics.median(timing.waits_s[name] for timing in steps) for name in steps[0].waits_s},
        "repeats": step.count,
    }


def worker(options: argparse.Namespace) -> None:
    """One rank: measure everything, and tell the document's body."""
    shape = Shape(**json.loads(options.shape))
    with meeting(options) as (mesh, lab):
        bench = Bench(mesh, lab, options.repeats)
        if options.sweep:
            tell(mesh, sweep(bench, shape, options.shares, with_timeline=options.timeline is not None))
            return
        middle = sorted(options.rates)[len(options.rates) // 2]
        if options.share:
            bench.set_rate(middle)
            shape = broadcast_object(fit_width(bench, shape, options.share), mesh)
        stages = bench.stages(shape)
        rows = [line for rate in options.rates for line in measure_rate(bench, shape, rate, stages)]
        tell(mesh, {"shape": dataclasses.asdict(shape), "scmoe_forward": dataclasses.asdict(stages), "rows": rows})


# ---- the command


def _parser() -> argparse.ArgumentParser:
    parser = on_ranks.parser("benchmarks.overlap", __doc__, repeats=15)
    parser.add_argument(
        "--share", type=float, default=0.365, help="communication in the shared-expert step at the middle rate; 0: keep the width"
    )
    parser.add_argument("--ranks-per-node", type=int, help="default 2; with --sweep 1: a core more for each rank")
    parser.add_argument("--sweep", action="store_true", help="vary the share of communication through the link rate")
    parser.add_argument("--shares", type=on_ranks.rates, default=SHARES, help="of the sequential shared-expert step, with --sweep")
    parser.add_argument("--timeline", type=Path, help="with --sweep: an SVG of one step under the schedule chosen at the last share")
    parser.add_argument("--merge", type=Path, nargs="+", help="with --sweep: no measurement, one page of these files (--out FILE.md)")
    parser.add_argument("--tokens", type=int, default=Shape.tokens, help="of one rank")
    parser.add_argument("--sequence", type=int, default=Shape.sequence)
    parser.add_argument("--model-width", type=int, default=Shape.model_width)
    parser.add_argument("--mlp-width", type=int, default=Shape.mlp_width, help="of MLP and shared expert; where the calibration begins")
    parser.add_argument("--expert-ratio", type=float, default=Shape.expert_ratio, help="width of a routed expert over that of the MLP")
    parser.add_argument("--heads", type=int, default=Shape.num_heads)
    parser.add_argument("--kv-heads", type=int, default=Shape.num_kv_heads)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default=Shape.dtype, help="of weights, activations and wire")
    return parser


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.lab:
        worker(options)
        return 0
    if options.short:
        options.rates, options.repeats, options.share = [500e6], 7, 0.0
        options.tokens, options.model_width, options.mlp_width, options.shares = 512, 128, 256, [0.4]
        if options.sweep:
            options.tokens, options.model_width, options.mlp_width = 256, 64, 128
    if options.repeats < 7:
        print(f"{options.repeats} repeats; a median here is over at least 7", file=sys.stderr)
        return 2
    sizes = (options.tokens, options.sequence, options.model_width, options.mlp_width, options.expert_ratio)
    shape = Shape(*sizes, options.heads, options.kv_heads, dtype=options.dtype)
    if options.merge:
        return _merge(options.merge, options.out, options.timeline)
    ranks_per_node = options.ranks_per_node or (1 if options.sweep else 2)
    with Lab(NODES, options.rates[0]) as lab:
        more = ["--share", str(options.share), "--shares", ",".join(map(str, options.shares))] + ["--sweep"] * options.sweep
        more += ["--timeline", str(options.timeline)] if options.timeline else []
        measured = started("benchmarks.overlap", lab, ranks_per_node, shape, options, *more)
    rows = measured.pop("rows")
    recorded = measured.pop("timeline", None)
    what = f"{NODES} nodes x {ranks_per_node} ranks, shape {measured['shape']}"
    if options.timeline and recorded:
        title = f"{recorded['title']}, {NODES} nodes x {ranks_per_node} ranks: one step"
        write_text(options.timeline, draw([Recorded.of_plain(rank) for rank in recorded["ranks"]], title))
    out, page = options.out, None
    if out is not None and out.suffix == ".md":
        out, page = out.with_suffix(".json"), out
    document = publish(rows, what, out, options.json, SWEEP_COLUMNS if options.sweep else COLUMNS, extra=measured)
    if page is not None:
        write_page(page, document, options.timeline)
    return 0


def _merge(parts: Sequence[Path], out: Path | None, timeline: Path | None) -> int:
    if out is None:
        raise UsageError("--merge writes a page; say where with --out FILE.md")
    document = merged(parts)
    write_json(out.with_suffix(".json"), document)
    write_page(out, document, timeline)
    return 0


if __name__ == "__main__":
    sys.exit(main())
