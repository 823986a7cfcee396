"""`crossdock plan`: solve, compare, show, diff, check and report. Everything heavy is imported inside the commands."""

from pathlib import Path
from typing import Annotated, Any

import typer

from crossdock.errors import UsageError
from crossdock.placement.commands.options import (
    DEFAULT_METHODS,
    METHODS,
    AlsoTraceOption,
    BatchSequencesOption,
    BoundSecondsOption,
    HomingOption,
    LoadCapOption,
    LoadPiecesOption,
    NumExpertsOption,
    PlanArgument,
    ProblemOptions,
    SecondsOption,
    SeedOption,
    SequenceTokensOption,
    WorkloadOption,
    with_problem_options,
)
from crossdock.placement.commands.output import AsJson, print_json, say

plan_app = typer.Typer(
    name="plan", help="Decide where experts live, and say what a plan is worth.", no_args_is_help=True, rich_markup_mode=None
)


@plan_app.command("solve")
@with_problem_options
def solve_command(
    problem: ProblemOptions,
    method: Annotated[str, typer.Option("--method", help=f"{METHODS}.")] = "auto",
    also_trace: AlsoTraceOption = None,
    load_pieces: LoadPiecesOption = 1,
    seconds: SecondsOption = 10.0,
    seed: SeedOption = 0,
    bound_seconds: BoundSecondsOption = 10.0,
    homing: HomingOption = False,
    sequence_tokens: SequenceTokensOption = None,
    batch_sequences: BatchSequencesOption = None,
    old: Annotated[
        Path | None, typer.Option("--from", metavar="PLAN", help="The plan in force: devices are renamed so that fewest experts move.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Where the plan goes.")] = Path("plan.json"),
    as_json: AsJson = False,
) -> None:
    """Place the experts of a trace on a topology, and write the plan.

    With --homing it plans for sequences that go to the rank where their experts are, and writes beside the plan the forecast by which a
    run finds them: `crossdock train CONFIG plan=plan.json data.homing=plan.forecast.npz`.

    Example: crossdock plan solve --trace trace.npz --topology 2x8-nvlink-ib --seconds 30 --out plan.json
    """
    from crossdock.placement.analysis.compare import Candidate
    from crossdock.placement.analysis.homing_score import check_tokens_known
    from crossdock.placement.records.plan import Plan
    from crossdock.placement.solvers import solve

    if homing and old is not None:
        raise UsageError("--homing plans devices and homes together, and --from renames devices; give one of them")
    asked = problem.read(also_trace, load_pieces)
    if homing:
        check_tokens_known(asked.trace)  # before the search, for the forecast afterwards
    say(asked.heading(f"method {method}, at most {seconds:g} s, seed {seed}"), as_json)
    solution = solve(asked.problem, method, seconds, seed)
    moves: dict[str, int] = {}
    if old is not None:
        solution, moves = asked.moving_least(solution, Plan.load(old))
    candidates = [Candidate(method, solution.plan, solution, solution.seconds)]
    written = [out]
    if homing:
        homes = asked.with_homes(candidates, sequence_tokens, batch_sequences, seconds, seed)
        solution, candidates = homes.solution, homes.candidates
        written.append(homes.save_forecast(out))
    solution.plan.save(out)
    value = asked.score(candidates, bound_seconds) | (homes.as_json() if homing else {})
    if as_json:
        print_json(value | {"out": str(out)} | moves | ({"forecast_out": str(written[1])} if homing else {}))
        return
    _print_tables(value)
    names = " and ".join(map(str, written))
    print(f"\n{solution.plan.method} stopped by {solution.stopped_by} after {solution.seconds:.1f} s; wrote {names}")
    if moves:
        print("{moves} moves from the old plan, {moves_unrenamed} had devices kept their names".format(**moves))


@plan_app.command("compare")
@with_problem_options
def compare_command(
    problem: ProblemOptions,
    methods: Annotated[
        str | None, typer.Option("--methods", help=f"Comma-separated, of {METHODS}; {DEFAULT_METHODS} if left out, as far as they suit.")
    ] = None,
    also_trace: AlsoTraceOption = None,
    load_pieces: LoadPiecesOption = 1,
    seconds: SecondsOption = 10.0,
    seed: SeedOption = 0,
    bound_seconds: BoundSecondsOption = 10.0,
    plan: Annotated[list[Path] | None, typer.Option("--plan", help="A plan.json to compare as well; may be repeated.")] = None,
    error_bars: Annotated[bool, typer.Option("--error-bars", help="Bootstrap intervals, on the held-out routing if given.")] = False,
    homing: HomingOption = False,
    sequence_tokens: SequenceTokensOption = None,
    batch_sequences: BatchSequencesOption = None,
    as_json: AsJson = False,
) -> None:
    """Score several methods, and plans from files, on the same trace with the same evaluator.

    A method that gives no plan leaves the others their rows; the command then ends with that method's exit code: 2 where it is not for a
    problem of this size or kind, 3 where it found no feasible plan.

    Example: crossdock plan compare --trace trace.npz --topology 2x4-nvlink-ib --methods contiguous,anneal --eval-trace held-out.npz
    """
    from crossdock.placement.analysis.compare import Candidate, solved
    from crossdock.placement.commands.planning import default_methods, method_names, plans_in

    names = method_names(methods or "") if methods is not None else default_methods(DEFAULT_METHODS, problem.mode, problem.objective)
    asked = problem.read(also_trace, load_pieces)
    from_files = [Candidate(name, loaded) for name, loaded in plans_in(plan or ()).items()]
    for candidate in from_files:
        candidate.plan.check_model(asked.trace.num_layers, asked.trace.num_experts, asked.topology.num_devices, candidate.label)
    say(asked.heading(f"methods {', '.join(names)}, at most {seconds:g} s each, seed {seed}"), as_json)
    candidates, refusals = solved(asked.problem, names, seconds, seed)
    candidates += from_files
    if not candidates:
        raise refusals[0].error
    about_homes = {}
    if homing:
        homes = asked.with_homes(candidates, sequence_tokens, batch_sequences, seconds, seed)
        candidates, about_homes = homes.candidates, homes.as_json()
    value = asked.score(candidates, bound_seconds, with_error_bars=error_bars) | about_homes
    value["refused"] = [refusal.as_json() for refusal in refusals]
    print_json(value) if as_json else _print_tables(value)
    if refusals:
        told = "; ".join(f"method {refusal.method} gave no plan: {refusal.error}" for refusal in refusals)
        raise type(refusals[0].error)(told)


@plan_app.command("show")
def show_command(plan: PlanArgument, as_json: AsJson = False) -> None:
    """Print where a plan puts the experts, and where the plan comes from.

    Example: crossdock plan show plan.json
    """
    from crossdock.placement.commands.planning import UNITS, plan_facts, wrapped
    from crossdock.placement.records.plan import EMPTY, Plan

    shown = Plan.load(plan)
    facts = plan_facts(shown)
    if as_json:
        print_json(facts | {"slots": shown.slots_LRS.tolist()})
        return
    for name, value in facts.items():
        shown_value = "-" if value is None else value[:12] if name in ("digest", "topology_hash", "trace_hash") else value
        unit = f" {UNITS[shown.objective]}" if name in ("cost", "bound") and value is not None and shown.objective in UNITS else ""
        print(f"{name.replace('_', ' '):>18}  {shown_value}{unit}")
    for layer, slots_RS in enumerate(shown.slots_LRS):
        print(f"\nlayer {layer}")
        for device, slots_S in enumerate(slots_RS):
            experts = " ".join("." if expert == EMPTY else str(expert) for expert in slots_S)
            print("\n".join(wrapped(f"  device {device:>3}:", experts)))


@plan_app.command("diff")
def diff_command(
    plan: PlanArgument,
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="The plan to move to.", show_default=False)],
    workload: WorkloadOption = None,
    trace: Annotated[Path | None, typer.Option("--trace", help="Routing by which steps are priced: says when the move pays back.")] = None,
    topology: Annotated[str | None, typer.Option("--topology", help="With --trace: a topology.yaml or preset.")] = None,
    num_experts: NumExpertsOption = None,
    as_json: AsJson = False,
) -> None:
    """List the moves that turn one plan into another, the bytes that they carry, and after how many steps they pay back.

    Example: crossdock plan diff old.json new.json --workload configs/tiny.yaml

    Example: crossdock plan diff old.json new.json --trace trace.npz --topology 2x8-nvlink-ib
    """
    from crossdock.placement.commands.planning import payback, read_workload, wrapped
    from crossdock.placement.records.plan import Plan

    if (trace is None) != (topology is None):
        raise UsageError("when a move pays back depends on routing and links; give both --trace and --topology, or neither")
    before, after, sizes = Plan.load(plan), Plan.load(other), read_workload(workload)
    moves = before.moves_to(after)
    value: dict[str, Any] = {"plan": before.digest, "other": after.digest, "state_bytes": len(moves) * sizes.expert_moved_bytes}
    if trace is not None and topology is not None:
        value |= payback(before, after, trace, topology, workload, num_experts)
    if as_json:
        listed = [{"layer": move.layer, "expert": move.expert, "source": move.source, "target": move.target} for move in moves]
        print_json(value | {"moves": listed})
        return
    size = f"{value['state_bytes'] / 2**20:,.1f} MiB of weights and moments"
    print(f"{len(moves)} moves of {before.num_layers * before.num_experts} experts, {size}")
    if "move_s" in value:
        steps = value["payback_steps"]
        ms = [f"{value[name] * 1e3:,.2f}" for name in ("move_s", "step_before_s", "step_after_s")]
        print("{} ms to move; step {} ms before, {} after".format(*ms))
        print("never pays back: steps become no shorter" if steps is None else f"pays back after {steps:,} steps")
    for layer in range(before.num_layers):
        of_layer = [f"{move.expert}:{move.source}>{move.target}" for move in moves if move.layer == layer]
        if of_layer:
            print("\n".join(wrapped(f"  layer {layer:>3}:", " ".join(of_layer))))
    print("expert:from>to" if moves else "the plans put every expert on the same devices")


@plan_app.command("check")
def check_command(
    plan: PlanArgument,
    config: Annotated[Path | None, typer.Option("--config", help="A run's YAML that the plan shall serve.")] = None,
    trace: Annotated[Path | None, typer.Option("--trace", help="Routing that the plan shall serve.")] = None,
    topology: Annotated[str | None, typer.Option("--topology", help="A topology.yaml or preset that the plan shall run on.")] = None,
    load_cap: LoadCapOption = None,
    num_experts: NumExpertsOption = None,
    as_json: AsJson = False,
) -> None:
    """Check that a plan is whole, fits a model, a trace and a topology, and keeps to a load cap.

    Example: crossdock plan check plan.json --config configs/tiny.yaml --topology 2x1-local
    """
    from crossdock.placement.commands.planning import check_plan, plan_facts
    from crossdock.placement.records.plan import Plan

    checked = Plan.load(plan)
    notes = check_plan(checked, config, trace, topology, load_cap, num_experts)
    if as_json:
        print_json({"ok": True, **plan_facts(checked), "notes": notes})
        return
    print(f"{plan}: ok; {checked.num_layers} layers x {checked.num_experts} experts on {checked.num_devices} devices")
    print("\n".join(f"note: {note}" for note in notes), end="\n" if notes else "")


@plan_app.command("report")
def report_command(
    run: Annotated[Path | None, typer.Argument(metavar="RUN_DIR", help="A run directory.", show_default=False)] = None,
    trace: Annotated[Path | None, typer.Option("--trace", help="Without a run: the routing to show plans on.")] = None,
    topology: Annotated[str | None, typer.Option("--topology", help="Without a run: a topology.yaml or preset.")] = None,
    plan: Annotated[list[Path] | None, typer.Option("--plan", help="Without a run: a plan.json; the last one is shown in full.")] = None,
    workload: WorkloadOption = None,
    num_experts: NumExpertsOption = None,
    bound_seconds: BoundSecondsOption = 5.0,
    out: Annotated[Path | None, typer.Option("--out", help="Where the page goes; report.html, beside the run if there is one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write one HTML page, whole in itself: traffic before and after, load, methods, and for a run predictions beside counts.

    Example: crossdock plan report runs/demo --out report.html

    Example: crossdock plan report --trace trace.npz --topology 2x8-nvlink-ib --plan plan.json --out report.html
    """
    from crossdock import atomic
    from crossdock.placement.commands.planning import Asked, plans_in
    from crossdock.placement.reports.report import render_plan_report, render_run_report

    if run is not None:
        if trace or topology or plan:
            raise UsageError(
                "a run directory brings its own trace, topology and plan; give either RUN_DIR or --trace, --topology and --plan"
            )
        page, target = render_run_report(run, bound_seconds=bound_seconds), out or run / "report.html"
    elif trace and topology and plan:
        asked = Asked.read(trace, topology, workload_path=workload, num_experts=num_experts)
        title = f"Plans for {trace.name}"
        context = asked.problem.context
        page = render_plan_report(
            asked.trace, asked.topology, asked.workload, plans_in(plan), context=context, title=title, bound_seconds=bound_seconds
        )
        target = out or Path("report.html")
    else:
        raise UsageError("nothing to report on; give a run directory, or --trace, --topology and --plan")
    atomic.write_text(target, page)
    print_json({"out": str(target), "bytes": len(page)}) if as_json else print(f"{target}: {len(page) / 1024:,.0f} KiB")


def _print_tables(value: dict[str, Any]) -> None:
    from crossdock.placement.commands.planning import error_bar_table, table

    print("\n" + "\n".join(table(value["rows"])))
    if value["eval_rows"]:
        print("\nheld out; gaps by the quick bounds alone\n" + "\n".join(table(value["eval_rows"])))
        apart = value["drift"]
        print(f"drift from the fit: load {apart['load']:.3f}, first choices' steps {apart['transitions']:.3f} (total variation)")
    if "homing" in value:
        from crossdock.placement.analysis.homing_score import lines_of

        print("\n" + "\n".join(lines_of(value["homing"])))
    barred = [row for row in value["eval_rows"] or value["rows"] if "error_bars" in row]
    if barred:
        print("\n" + "\n".join(error_bar_table(barred)))
        print("load: resampled text is never as even as the text that a plan was fitted on")
    print(
        "\nmoved: copies that leave their device, per (token, expert). dev/tok, node/tok:\n"
        "distinct devices and nodes of a token in a layer. load: busiest device over\n"
        "mean. hops: first choices that change device between layers. gap: proven\n"
        "distance to the best plan, per cent of the objective, of moved and of kept."
    )
