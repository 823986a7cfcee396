"""Does the shortcut hide the all-to-all? Step times of four block pairs on two emulated nodes behind a slow link.

    python -m benchmarks.overlap [--rates 1e9,500e6,250e6] [--repeats 15] [--out FILE] [--json] [--short]      (root: it makes namespaces)

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

The MLP's width is chosen so that communication_s is about `--share` of the shared-expert step at the middle rate on this machine, and the
expert slot from measured stage times (`runtime.overlap.choose_expert_slot`) for each rate.
"""

import argparse
import dataclasses
import gc
import itertools
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.block_pair import VARIANTS, Pair, Shape
from benchmarks.measure import Spread, paired_ratio, publish
from benchmarks.netlab import Lab
from crossdock.errors import CrossdockError
from crossdock.runtime import ledger
from crossdock.runtime.collectives import Route, all_gather_objects, all_to_all_start, barrier, broadcast_object
from crossdock.runtime.mesh import Mesh, initialise, shutdown
from crossdock.runtime.overlap import Overlapped, Sequential, choose_expert_slot

NODES, RANKS_PER_NODE = 2, 2
COLUMNS = ["variant", "link_bit_per_s", "step_s", "compute_s", "communication_s", "bound_s", "step_over_bound", "hidden", "fits_s"]
COLUMNS += ["hidden_of_fits", "exposed_s", "expert_slot", "alone_s"]


@dataclass(frozen=True)
class Timing:
    """One repeat of one call on the slowest rank, and what the ledger says, mean over ranks.

    windows_s: compute beside dispatch and combine, forward, then backward; None where no tokens moved.
    """

    step_s: float
    waits_s: Mapping[str, float]
    windows_s: tuple[float, ...] | None

    @property
    def exposed_s(self) -> float:
        return sum(self.waits_s.values())


def waits_s(flights: Iterable[ledger.Flight]) -> dict[str, float]:
    """Seconds waited, by what was waited for: `dispatch forward tokens` and so on."""
    waits: dict[str, float] = defaultdict(float)
    for flight in flights:
        waits[f"{flight.stage} {flight.direction} {flight.kind}"] += flight.wait_end_s - flight.wait_begin_s
    return dict(waits)


def windows_s(flights: Sequence[ledger.Flight]) -> tuple[float, float, float, float]:
    """Seconds between start and wait of the four token all-to-alls."""
    profile = ledger.profile(flights)[0]
    return profile.dispatch_forward_s, profile.combine_forward_s, profile.dispatch_backward_s, profile.combine_backward_s


def _slowest(of_ranks: Sequence[Timing]) -> Timing:
    first = of_ranks[0]
    waits = {name: statistics.mean(timing.waits_s.get(name, 0.0) for timing in of_ranks) for name in first.waits_s}
    windows = None
    if first.windows_s is not None:
        windows = tuple(statistics.mean(column) for column in zip(*(timing.windows_s or () for timing in of_ranks), strict=True))
    return Timing(max(timing.step_s for timing in of_ranks), waits, windows)


@dataclass(frozen=True)
class Stages:
    """Seconds forward of ScMoE's stages in the window and of its experts, and of the stages' backward over their forward."""

    stage_s: tuple[float, ...]
    expert_s: float
    backward_over_forward: float


# ---- on every rank


class Bench:
    """The measuring rank: builds pairs, times calls that all ranks begin together, agrees on numbers."""

    def __init__(self, mesh: Mesh, lab: Lab, repeats: int) -> None:
        self.mesh, self.lab, self.repeats = mesh, lab, repeats

    def set_rate(self, rate_bit_per_s: float | None) -> None:
        barrier(self.mesh)
        if self.mesh.rank == 0:
            self.lab.set_rate(rate_bit_per_s)
        barrier(self.mesh)

    def time(self, call: Callable[[], object]) -> Timing:
        """One call, begun by all ranks together; agreed later, so that nothing but the barrier stands between calls."""
        gc.collect()
        barrier(self.mesh)
        self.mesh.ledger.take()
        begin_s = time.perf_counter()
        call()
        step_s = time.perf_counter() - begin_s
        flights = self.mesh.ledger.take()
        return Timing(step_s, waits_s(flights), windows_s(flights) if flights else None)

    def agreed(self, timings: Sequence[Timing]) -> list[Timing]:
        """For each repeat the slowest rank's seconds, and the means of the rest; equal on every rank."""
        return [_slowest(repeat) for repeat in zip(*all_gather_objects(list(timings), self.mesh), strict=True)]

    def interleaved(self, calls: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 2) -> dict[str, list[Timing]]:
        """Every call `repeats` times, taking turns, the order rotating from round to round, the same on every rank."""
        names, samples = list(calls), {name: [] for name in calls}  # type: tuple[list[str], dict[str, list[Timing]]]
        for round_number in range(-warmup, repeats):
            turn = round_number % len(names)
            for name in names[turn:] + names[:turn]:
                timing = self.time(calls[name])
                if round_number >= 0:
                    samples[name].append(timing)
        return {name: self.agreed(timings) for name, timings in samples.items()}

    def communicate(self, route: Route, shape: Shape) -> Callable[[], None]:
        """The step's token all-to-alls, one after the other, with nothing beside them."""
        dtype = getattr(torch, shape.dtype)
        out, back = route, route.back("combine")

        def all_four() -> None:
            for way in (out, back, out, back):
                all_to_all_start(torch.zeros(sum(way.send_R), shape.model_width, dtype=dtype), way).wait()

        return all_four

    def stages(self, shape: Shape) -> Stages:
        """ScMoE's stages, experts and backward, from replayed steps with the experts in every slot in turn."""
        pair = Pair(shape, "scmoe_overlapped", self.mesh)
        num_slots = len(pair.config.window) + 1
        pair.record()
        profiles: list[list[ledger.LayerProfile]] = [[] for _ in range(num_slots)]
        for round_number in range(-1, max(5, self.repeats // 2)):
            for slot in range(num_slots):
                pair.block.schedule = Overlapped(slot)
                barrier(self.mesh)
                self.mesh.ledger.take()
                pair.replay()
                if round_number >= 0:
                    profiles[slot].append(ledger.profile(self.mesh.ledger.take())[0])

        def medians(field: str) -> list[float]:
            here = [statistics.median(getattr(profile, field) for profile in of_slot) for of_slot in profiles]
            return [statistics.mean(of_ranks) for of_ranks in zip(*all_gather_objects(here, self.mesh), strict=True)]

        forward_s, backward_s = medians("dispatch_forward_s"), medians("dispatch_backward_s")
        stage_s = tuple(max(0.0, later - sooner) for sooner, later in itertools.pairwise(forward_s))
        return Stages(stage_s, statistics.median(medians("expert_forward_s")), (backward_s[-1] - backward_s[0]) / sum(stage_s))


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
    """One rank: measure everything; rank 0 prints the document's body as JSON."""
    torch.set_num_threads(1)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    initialise(rank, world_size, timeout_s=120)
    mesh = Mesh.create(rank, world_size, world_size, tuple(other // RANKS_PER_NODE for other in range(world_size)), timeout_s=120)
    bench = Bench(mesh, Lab.attach(options.lab), options.repeats)
    shape = Shape(**json.loads(options.shape))
    middle = sorted(options.rates)[len(options.rates) // 2]
    if options.share:
        bench.set_rate(middle)
        shape = broadcast_object(fit_width(bench, shape, options.share), mesh)
    stages = bench.stages(shape)
    rows = [line for rate in options.rates for line in measure_rate(bench, shape, rate, stages)]
    if rank == 0:
        print(json.dumps({"shape": dataclasses.asdict(shape), "scmoe_forward": dataclasses.asdict(stages), "rows": rows}))
    barrier(mesh)
    shutdown()


# ---- the command


def _rates(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overlap", description=__doc__.partition("\n")[0])
    parser.add_argument("--rates", type=_rates, default=[1e9, 500e6, 250e6], help="bit/s of each node's link, each direction")
    parser.add_argument("--repeats", type=int, default=15, help="at least 7")
    parser.add_argument(
        "--share", type=float, default=0.365, help="communication in the shared-expert step at the middle rate; 0: keep the width"
    )
    parser.add_argument("--tokens", type=int, default=Shape.tokens, help="of one rank")
    parser.add_argument("--sequence", type=int, default=Shape.sequence)
    parser.add_argument("--model-width", type=int, default=Shape.model_width)
    parser.add_argument("--mlp-width", type=int, default=Shape.mlp_width, help="of MLP and shared expert; where the calibration begins")
    parser.add_argument("--expert-ratio", type=float, default=Shape.expert_ratio, help="width of a routed expert over that of the MLP")
    parser.add_argument("--heads", type=int, default=Shape.num_heads)
    parser.add_argument("--kv-heads", type=int, default=Shape.num_kv_heads)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default=Shape.dtype, help="of weights, activations and wire")
    parser.add_argument("--short", action="store_true", help="one rate, 7 repeats, small shapes, no calibration: for CI")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--lab", help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.lab:
        worker(options)
        return 0
    if options.short:
        options.rates, options.repeats, options.share = [500e6], 7, 0.0
        options.tokens, options.model_width, options.mlp_width = 512, 128, 256
    if options.repeats < 7:
        print(f"{options.repeats} repeats; a median here is over at least 7", file=sys.stderr)
        return 2
    sizes = (options.tokens, options.sequence, options.model_width, options.mlp_width, options.expert_ratio)
    shape = Shape(*sizes, options.heads, options.kv_heads, dtype=options.dtype)
    try:
        with Lab(NODES, options.rates[0]) as lab:
            passed = ["--rates", ",".join(str(rate) for rate in options.rates), "--repeats", str(options.repeats)]
            passed += ["--share", str(options.share), "--lab", lab.name, "--shape", json.dumps(dataclasses.asdict(shape))]
            measured = json.loads(lab.ranks(["-m", "benchmarks.overlap", *passed], RANKS_PER_NODE, timeout_s=1800)[0])
    except CrossdockError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    rows = measured.pop("rows")
    what = f"{NODES} nodes x {RANKS_PER_NODE} ranks, shape {measured['shape']}"
    publish(rows, what, options.out, options.json, COLUMNS, extra=measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
