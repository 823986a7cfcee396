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
    compute_s           the same step without ranks to talk to: each rank alone with its S = E/R experts and as many rows, all ranks at once
    communication_s     the token all-to-alls of that very step, four of them, one after the other, alone on the shaped link
    bound_s             max(compute_s, communication_s): no schedule can be faster
    hidden              (compute_s + communication_s - step_s) / communication_s
    fits_s              what the schedule can hide at best: the sum over the four all-to-alls of min(its window, its time), where the
                        windows are compute only, measured on ranks that are alone
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

from benchmarks.measure import Spread, paired_ratio, publish
from benchmarks.netlab import Lab
from crossdock.errors import CrossdockError
from crossdock.models.blocks import MoEBlock
from crossdock.models.config import ModelConfig
from crossdock.models.moe import MoELayer
from crossdock.runtime import ledger
from crossdock.runtime.assignment import Assignment
from crossdock.runtime.collectives import Route, all_gather_objects, all_to_all_start, barrier, broadcast_object
from crossdock.runtime.context import StepContext
from crossdock.runtime.mesh import Mesh, initialise, shutdown
from crossdock.runtime.overlap import Overlapped, Schedule, Sequential, choose_expert_slot

NODES, RANKS_PER_NODE = 2, 2
VARIANTS = ("top2", "shared_expert", "scmoe_sequential", "scmoe_overlapped")
COLUMNS = ["variant", "link_bit_per_s", "step_s", "compute_s", "communication_s", "bound_s", "step_over_bound", "hidden", "fits_s"]
COLUMNS += ["hidden_of_fits", "exposed_s", "expert_slot"]


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

    def config(self, variant: str, num_experts: int) -> ModelConfig:
        return ModelConfig(
            num_layers=2,
            model_width=self.model_width,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            mlp_width=self.mlp_width,
            expert_width=round(self.mlp_width * self.expert_ratio),
            shared_expert_width=None if variant == "top2" else self.mlp_width,
            block={"top2": "top_k", "shared_expert": "shared_expert"}.get(variant, "scmoe"),  # type: ignore[arg-type]
            num_experts=num_experts,
            top_k=2 if variant == "top2" else 1,
        )


@dataclass(frozen=True)
class Timing:
    """One repeat of one variant, on the slowest rank, and what the ledger says (mean over ranks)."""

    step_s: float
    waits_s: Mapping[str, float]

    @property
    def exposed_s(self) -> float:
        return sum(self.waits_s.values())


def waits_s(flights: Iterable[ledger.Flight]) -> dict[str, float]:
    """Seconds waited, by what was waited for: `dispatch forward tokens` and so on."""
    waits: dict[str, float] = defaultdict(float)
    for flight in flights:
        waits[f"{flight.stage} {flight.direction} {flight.kind}"] += flight.wait_end_s - flight.wait_begin_s
    return dict(waits)


class Pair:
    """A block pair on a mesh with its input and the gradient of its output; `step` is what is timed."""

    def __init__(self, shape: Shape, variant: str, mesh: Mesh, schedule: Schedule | None = None) -> None:
        self.mesh, self.shape, dtype = mesh, shape, getattr(torch, shape.dtype)
        num_experts = shape.num_experts if mesh.world_size > 1 else shape.num_experts // (NODES * RANKS_PER_NODE)
        config = shape.config(variant, num_experts)
        torch.manual_seed(0)
        moe = MoELayer(config.model_width, config.routed_width, config.num_experts, config.top_k, gate=config.gate, mesh=mesh, dtype=dtype)
        self.block = MoEBlock(config, moe, dtype)
        self.block.schedule = schedule or Sequential(self.block.schedule_for(shape.sequence).expert_slot)
        for parameter in self.block.parameters():
            parameter.grad = torch.zeros_like(parameter)  # accumulated into, as every step but the first of a run does
        generator = torch.Generator().manual_seed(1 + mesh.rank)
        num_sequences = shape.tokens // shape.sequence
        size = (num_sequences, shape.sequence, shape.model_width)
        self.x_QPD = torch.randn(size, generator=generator).to(dtype).requires_grad_()
        self.gradient_QPD = torch.randn(size, generator=generator).to(dtype)
        self.assignment: Assignment | None = None

    def step(self) -> None:
        """Forward and backward."""
        self.x_QPD.grad = None
        y_QPD, _ = self.block(self.x_QPD, self._context())
        y_QPD.backward(self.gradient_QPD)

    def route(self) -> Route:
        """Who sends how many rows to whom in `step`, under a ledger that is off."""
        self.step()
        assert self.assignment is not None
        x_TD = torch.zeros(self.shape.tokens, self.shape.model_width, dtype=self.x_QPD.dtype)
        dispatched = self.block.moe.dispatch_start(x_TD, self.assignment).wait()
        quiet = dataclasses.replace(self.mesh, ledger=ledger.Ledger(enabled=False))
        return dataclasses.replace(dispatched.handle.route, mesh=quiet)

    def _context(self) -> StepContext:
        tokens = self.shape.tokens
        return StepContext(0, 0, True, torch.zeros(tokens, dtype=torch.int64), self.mesh.rank * tokens, listeners=(self._note,))

    def _note(self, _layer: int, assignment: Assignment) -> None:
        self.assignment = assignment


@dataclass(frozen=True)
class Compute:
    """What a variant computes, by itself: seconds forward of each stage of the window and of the experts, and of backward over forward."""

    stage_s: tuple[float, ...]
    expert_s: float
    backward_over_forward: float

    def windows_s(self, expert_slot: int) -> tuple[float, float, float, float]:
        """Compute beside dispatch and combine, forward; beside dispatch and combine, backward."""
        before, after = sum(self.stage_s[:expert_slot]), sum(self.stage_s[expert_slot:])
        return before, after, before * self.backward_over_forward, after * self.backward_over_forward


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
        return Timing(step_s, waits_s(self.mesh.ledger.take()))

    def agreed(self, timings: Sequence[Timing]) -> list[Timing]:
        """For each repeat the slowest rank's seconds, and the mean of the waits; equal on every rank."""
        of_ranks = all_gather_objects([(timing.step_s, timing.waits_s) for timing in timings], self.mesh)
        return [
            Timing(
                max(step_s for step_s, _ in repeat),
                {name: statistics.mean(waits.get(name, 0.0) for _, waits in repeat) for name in repeat[0][1]},
            )
            for repeat in zip(*of_ranks, strict=True)
        ]

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

    def compute(self, shape: Shape, variant: str) -> Compute:
        """Stage, expert and backward seconds of one rank alone, from the ledger's windows with the experts at the window's end."""
        single = Mesh.single()
        num_stages = len(shape.config(variant, 2).window)
        pairs = {str(slot): Pair(shape, variant, single, Overlapped(slot)) for slot in range(num_stages + 1)}
        profiles: dict[str, list[ledger.LayerProfile]] = {name: [] for name in pairs}
        for round_number in range(-2, max(5, self.repeats // 2)):
            for name, pair in pairs.items():
                barrier(self.mesh)
                single.ledger.take()
                pair.step()
                if round_number >= 0:
                    profiles[name].append(ledger.profile(single.ledger.take())[0])
        medians = [
            (
                statistics.median(profile.dispatch_forward_s for profile in profiles[name]),
                statistics.median(profile.dispatch_backward_s for profile in profiles[name]),
                statistics.median(profile.expert_forward_s for profile in profiles[name]),
            )
            for name in pairs
        ]
        of_ranks = all_gather_objects(medians, self.mesh)
        before_s, backward_s, expert_s = (
            [statistics.mean(of_rank[slot][part] for of_rank in of_ranks) for slot in range(num_stages + 1)] for part in range(3)
        )
        stage_s = tuple(max(0.0, later - sooner) for sooner, later in itertools.pairwise(before_s))
        ratio = backward_s[-1] / before_s[-1] if num_stages and before_s[-1] > 0 else 2.0
        return Compute(stage_s, statistics.median(expert_s), ratio)


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


def measure_rate(bench: Bench, shape: Shape, rate: float, compute: Compute) -> list[dict[str, Any]]:
    """The rows of one link rate."""
    bench.set_rate(rate)
    mesh = bench.mesh
    pairs = {variant: Pair(shape, variant, mesh) for variant in VARIANTS}
    routes = {variant: pairs[variant].route() for variant in VARIANTS}
    # The slot needs the time of one all-to-all at this rate.
    once = bench.interleaved({"scmoe": bench.communicate(routes["scmoe_overlapped"], shape)}, 5)["scmoe"]
    one_way_s = statistics.median(timing.step_s for timing in once) / 4
    slot = choose_expert_slot(compute.stage_s, one_way_s, compute.expert_s, one_way_s, compute.backward_over_forward)
    slots = {"top2": 0, "shared_expert": 0, "scmoe_sequential": slot, "scmoe_overlapped": slot}
    schedules: dict[str, Schedule] = {"scmoe_sequential": Sequential(slot), "scmoe_overlapped": Overlapped(slot)}
    calls: dict[str, Callable[[], object]] = {}
    for variant, pair in pairs.items():
        pair.block.schedule = schedules.get(variant, Sequential(slots[variant]))
        calls[f"{variant}/step"] = pair.step
        calls[f"{variant}/communication"] = bench.communicate(routes[variant], shape)
        if variant != "scmoe_overlapped":  # computes the same as scmoe_sequential
            calls[f"{variant}/compute"] = Pair(shape, variant, Mesh.single(), pair.block.schedule).step
    samples = bench.interleaved(calls, bench.repeats)
    samples["scmoe_overlapped/compute"] = samples["scmoe_sequential/compute"]
    return [
        row(
            variant,
            rate,
            [timing.step_s for timing in samples[f"{variant}/step"]],
            [timing.step_s for timing in samples[f"{variant}/compute"]],
            [timing.step_s for timing in samples[f"{variant}/communication"]],
            [timing.exposed_s for timing in samples[f"{variant}/step"]],
            compute.windows_s(slots[variant]) if variant.startswith("scmoe") else (0.0, 0.0, 0.0, 0.0),
        )
        | {"expert_slot": slots[variant], "waits_s": _median_waits([timing.waits_s for timing in samples[f"{variant}/step"]])}
        for variant in VARIANTS
    ]


def _median_waits(waits: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(of_repeat[name] for of_repeat in waits) for name in waits[0]}


def row(
    variant: str,
    rate: float,
    step_s: Sequence[float],
    compute_s: Sequence[float],
    communication_s: Sequence[float],
    exposed_s: Sequence[float],
    windows_s: Sequence[float],
) -> dict[str, Any]:
    """One row from paired repeats; see the columns above. All-to-alls of a step carry equal bytes: each takes a quarter."""
    step, compute, communication = Spread.of(step_s), Spread.of(compute_s), Spread.of(communication_s)
    bound_s = max(compute.median, communication.median)
    hidden_s = statistics.median(c + m - s for s, c, m in zip(step_s, compute_s, communication_s, strict=True))
    fits_s = sum(min(window_s, communication.median / 4) for window_s in windows_s)
    bounds_s = [max(pair) for pair in zip(compute_s, communication_s, strict=True)]
    return {
        "variant": variant,
        "link_bit_per_s": rate,
        **step.row("step_s"),
        **compute.row("compute_s"),
        **communication.row("communication_s"),
        "bound_s": bound_s,
        "step_over_bound": paired_ratio(step_s, bounds_s).median,
        "hidden": hidden_s / communication.median,
        "fits_s": fits_s,
        "hidden_of_fits": hidden_s / fits_s if fits_s > 0 else None,
        "exposed_s": statistics.median(exposed_s),
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
    compute = bench.compute(shape, "scmoe_overlapped")
    rows = [line for rate in options.rates for line in measure_rate(bench, shape, rate, compute)]
    if rank == 0:
        stages = dataclasses.asdict(compute)
        print(json.dumps({"shape": dataclasses.asdict(shape), "scmoe_forward": stages, "rows": rows}))
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
