"""Overlap over shares of communication: the same block pair behind ever slower links, `python -m benchmarks.overlap --sweep`.

The share is that of the four token all-to-alls in the sequential shared-expert step. For each of them, ScMoE (Pos-2, CG-1) under the
schedule that is best here, beside its sequential form; top-2 routing in chunks (Tutel's pipelining) and sequential; and the shared-expert
form. Schedules are proposed by `placement.strategies.pipeline.best_pipeline` from measured stage and transfer times, the proposals are
tried for a few repeats (waiting at once is among them), and the best one is then measured anew with everything else, taking turns.

Columns beside those of `benchmarks.overlap`:

    share                    communication_s / step_s of the sequential shared-expert form
    schedule                 expert slot and chunks forward + backward; `at once`: every movement is waited for at once
    bound_s                  max(compute_s, communication_s), which no schedule beats
    direction_bound_s        max(compute, communication) forward plus the same backward: nothing of one runs beside the other in one block,
                             and communication is equal in both while computing is not
    possible_s               compute_s + communication_s less what fits (below): what this block allows, whose first attention, gate and
                             routing come before any token can leave
    hidden_forward, ..       (compute + communication - step) / communication, in that direction
    fits_forward, ..         the part of communication that the best pipeline of these stages could hide if chunks cost nothing (up to 8)
    hidden_of_fits           hidden seconds over those that fit, both directions together
    over_sequential          step_s over that of the same block waiting at once, median of paired ratios; over_shared: over shared-expert's
"""

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.block_pair import Halves, Pair, Shape
from benchmarks.measure import Spread, paired_ratio
from benchmarks.overlap_bench import Bench, Stages, Timing
from benchmarks.timeline import record
from crossdock.placement.strategies.pipeline import CHUNK_COUNTS, BlockTimes, best_pipeline
from crossdock.runtime.experts.overlap import Chunked, Overlapped, Schedule, Sequential
from crossdock.runtime.transport.all_to_all import Route, all_to_all_start
from crossdock.runtime.transport.collectives import all_gather_objects, barrier, broadcast_object

SHARES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
FASTEST_BIT_PER_S, SLOWEST_BIT_PER_S = 2e10, 1e6
FIRST_RATE_BIT_PER_S = 5e8
TRIES = 5
NOISE = 1.02
COLUMNS = ["share", "variant", "schedule", "link_bit_per_s", "step_s", "compute_s", "communication_s", "bound_s", "step_over_bound"]
COLUMNS += ["step_over_direction_bound", "hidden_forward", "hidden_backward", "hidden_of_fits", "over_sequential", "over_shared"]


@dataclass(frozen=True)
class Family:
    """One architecture: its pair, who sends what in its step, and the stages that its tokens may travel beside."""

    name: str
    pair: Pair
    route: Route
    times: BlockTimes

    def call(self, schedule: Schedule, run: str = "step") -> Callable[[], Halves]:
        """`Pair.step` or `Pair.replay` under `schedule`."""

        def run_it() -> Halves:
            self.pair.block.schedule = schedule
            halves: Halves = getattr(self.pair, run)()
            return halves

        return run_it


def sweep(bench: Bench, shape: Shape, shares: Sequence[float], with_timeline: bool) -> dict[str, Any]:
    """The document of all shares, equal on every rank; with one watched step of every rank at the last share where asked."""
    bench.set_rate(FIRST_RATE_BIT_PER_S)
    stages = broadcast_object(bench.stages(shape), bench.mesh)
    families = {name: _family(bench, shape, name, stages) for name in ("shared_expert", "top2", "scmoe")}
    shared = families["shared_expert"]
    shared.pair.record()
    calls = {"compute": shared.call(Sequential(0), "replay"), "communication": bench.communicate(shared.route, shape)}
    first = bench.interleaved(calls, 5)
    compute_s, communication_s = (min(timing.step_s for timing in first[name]) for name in ("compute", "communication"))
    rows: list[dict[str, Any]] = []
    schedule: Schedule = Sequential(0)
    for share in shares:
        wanted_s = compute_s * share / (1 - share)
        rate = FIRST_RATE_BIT_PER_S * communication_s / wanted_s
        bench.set_rate(min(FASTEST_BIT_PER_S, max(SLOWEST_BIT_PER_S, rate)))
        found, schedule = _at_share(bench, shape, families)
        rows += [{"share_asked": share, "link_bit_per_s": rate, **row} for row in found]
    document: dict[str, Any] = {"shape": dataclasses.asdict(shape), "scmoe_forward": dataclasses.asdict(stages), "rows": rows}
    if with_timeline:
        scmoe = families["scmoe"]
        scmoe.pair.block.schedule = schedule
        bench.time(scmoe.pair.step)
        barrier(bench.mesh)
        recorded = all_gather_objects(record(scmoe.pair).plain(), bench.mesh)
        document["timeline"] = {"title": f"ScMoE Pos-2, {_words(schedule)}, communication share {rows[-1]['share']:.0%}", "ranks": recorded}
    return document


def _family(bench: Bench, shape: Shape, name: str, stages: Stages) -> Family:
    pair = Pair(shape, "scmoe_overlapped" if name == "scmoe" else name, bench.mesh)
    window, rows = (stages.stage_s if name == "scmoe" else ()), (2 if name == "top2" else 1)
    times = BlockTimes(window, 0.0, rows * stages.expert_s, 0.0, backward_over_forward=stages.backward_over_forward)
    return Family(name, pair, pair.route(), times)


def _at_share(bench: Bench, shape: Shape, families: Mapping[str, Family]) -> tuple[list[dict[str, Any]], Schedule]:
    """Rows of one link rate, and ScMoE's schedule."""
    message_s = _message_s(bench, families["scmoe"], shape)
    chosen: dict[str, Schedule] = {}
    ideal: dict[str, BlockTimes] = {}
    for name in ("top2", "scmoe"):
        family = families[name]
        one_way_s = statistics.median(t.step_s for t in bench.interleaved({"": bench.communicate(family.route, shape)}, 5)[""]) / 4
        ideal[name] = dataclasses.replace(family.times, dispatch_s=one_way_s, combine_s=one_way_s)
        proposed = proposals(dataclasses.replace(ideal[name], message_s=message_s, chunk_s=message_s))
        if name == "top2":
            proposed = [schedule for schedule in proposed if isinstance(schedule, Chunked)]
        chosen[name] = _best(bench, family, proposed)
    slot = chosen["scmoe"].expert_slot
    waiting = {"shared_expert": Sequential(0), "top2": Sequential(0), "scmoe": Sequential(slot)}
    calls: dict[str, Callable[[], object]] = {}
    for name, family in families.items():
        family.pair.block.schedule = waiting[name]
        family.pair.record()
        calls |= {
            f"{name}/sequential": family.call(waiting[name]),
            f"{name}/compute": family.call(waiting[name], "replay"),
            f"{name}/communication": bench.communicate(family.route, shape),
        }
        if name in chosen:
            calls[f"{name}/chosen"] = family.call(chosen[name])
    samples = bench.interleaved(calls, bench.repeats)
    shared = samples["shared_expert/sequential"]
    share = paired_ratio(_steps(samples["shared_expert/communication"]), _steps(shared)).median
    rows = []
    for name, form in itertools.product(families, ("sequential", "chosen")):
        if f"{name}/{form}" in samples:
            schedule, suffix = (waiting[name], "sequential") if form == "sequential" else (chosen[name], "overlapped")
            rows.append(
                {
                    "share": share,
                    "variant": f"{name}_{suffix}",
                    "schedule": _words(schedule),
                }
                | row(samples, name, form, ideal.get(name))
                | {"over_shared": paired_ratio(_steps(samples[f"{name}/{form}"]), _steps(shared)).median}
            )
    return rows, chosen["scmoe"]


def proposals(times: BlockTimes) -> list[Schedule]:
    """Schedules worth a try: the best pipeline of each degree, that of degrees chosen apart, and waiting at once."""
    found: list[Schedule] = []
    for counts in (*((count,) for count in CHUNK_COUNTS), CHUNK_COUNTS):
        best = best_pipeline(times, counts, counts)
        degrees = best.forward_chunks, best.backward_chunks
        schedule = Overlapped(best.expert_slot) if degrees == (1, 1) else Chunked(best.expert_slot, *degrees)
        if schedule not in found:
            found.append(schedule)
    return [*found, Sequential(best_pipeline(times, (1,), (1,)).expert_slot)]


def _best(bench: Bench, family: Family, proposed: Sequence[Schedule]) -> Schedule:
    """The quickest of a few repeats, the same on every rank; of those within the noise of it, the one with the fewest chunks."""
    samples = bench.interleaved({str(number): family.call(schedule) for number, schedule in enumerate(proposed)}, TRIES, warmup=1)
    median_s = [statistics.median(_steps(of_schedule)) for of_schedule in samples.values()]
    quick = [schedule for schedule, seconds in zip(proposed, median_s, strict=True) if seconds <= NOISE * min(median_s)]
    return min(quick, key=lambda schedule: schedule.forward_chunks + schedule.backward_chunks)


def _message_s(bench: Bench, family: Family, shape: Shape) -> float:
    """Seconds of an all-to-all of one row to each rank: what a chunk costs more than its rows."""
    ones = (1,) * bench.mesh.world_size
    tiny = dataclasses.replace(family.route, send_R=ones, receive_R=ones)
    rows = torch.zeros(bench.mesh.world_size, shape.model_width, dtype=getattr(torch, shape.dtype))
    call = partial(_crossed, rows, tiny)
    return statistics.median(timing.step_s for timing in bench.interleaved({"": call}, 5)[""])


def _crossed(rows: torch.Tensor, route: Route) -> None:
    all_to_all_start(rows, route).wait()


def row(samples: Mapping[str, Sequence[Timing]], name: str, form: str, ideal: BlockTimes | None) -> dict[str, Any]:
    """What one form's paired repeats say; see the columns above. `ideal`: stages and transfers of a family that may overlap."""
    steps, computes, communications = (samples[f"{name}/{what}"] for what in (form, "compute", "communication"))
    step_s, compute_s, communication_s = _steps(steps), _steps(computes), _steps(communications)
    communication = Spread.of(communication_s)
    half_s = communication.median / 2
    halves = {
        direction: [statistics.median(getattr(timing, f"{direction}_s") for timing in timings) for timings in (steps, computes)]
        for direction in ("forward", "backward")
    }
    hidden_s = {direction: compute + half_s - step for direction, (step, compute) in halves.items()}
    direction_bound_s = sum(max(compute, half_s) for _, compute in halves.values())
    fits_s = _fits_s(ideal, half_s) if ideal is not None and form == "chosen" else {"forward": 0.0, "backward": 0.0}
    return {
        **Spread.of(step_s).row("step_s"),
        **Spread.of(compute_s).row("compute_s"),
        **communication.row("communication_s"),
        **{f"{direction}_s": step for direction, (step, _) in halves.items()},
        **{f"compute_{direction}_s": compute for direction, (_, compute) in halves.items()},
        "bound_s": max(statistics.median(compute_s), communication.median),
        "step_over_bound": paired_ratio(step_s, [max(both) for both in zip(compute_s, communication_s, strict=True)]).median,
        "direction_bound_s": direction_bound_s,
        "possible_s": statistics.median(compute_s) + communication.median - sum(fits_s.values()),
        "step_over_direction_bound": statistics.median(step_s) / direction_bound_s,
        **{f"hidden_{direction}": seconds / half_s for direction, seconds in hidden_s.items()},
        **{f"fits_{direction}": seconds / half_s for direction, seconds in fits_s.items()},
        "hidden_of_fits": sum(hidden_s.values()) / sum(fits_s.values()) if sum(fits_s.values()) > 0 else None,
        "over_sequential": paired_ratio(step_s, _steps(samples[f"{name}/sequential"])).median,
        "exposed_s": statistics.median(timing.exposed_s for timing in steps),
        "waits_s": {what: statistics.median(timing.waits_s.get(what, 0.0) for timing in steps) for what in steps[0].waits_s},
        "repeats": len(steps),
    }


def _fits_s(ideal: BlockTimes, half_s: float) -> dict[str, float]:
    """Seconds of communication in each direction that the best pipeline hides where chunks and messages cost nothing."""
    best = best_pipeline(ideal)
    compute_s = sum(ideal.stage_s) + ideal.expert_s
    exposed_s = {"forward": best.forward_s - compute_s, "backward": best.backward_s - ideal.backward_over_forward * compute_s}
    return {direction: max(0.0, half_s - seconds) for direction, seconds in exposed_s.items()}


def _steps(timings: Sequence[Timing]) -> list[float]:
    return [timing.step_s for timing in timings]


def _words(schedule: Schedule) -> str:
    if not schedule.overlap:
        return f"slot {schedule.expert_slot}, at once"
    return f"slot {schedule.expert_slot}, chunks {schedule.forward_chunks}+{schedule.backward_chunks}"
