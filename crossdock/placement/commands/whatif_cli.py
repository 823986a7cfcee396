"""`crossdock plan whatif`: other devices, topologies, dispatches and copies of experts, from one trace, in one table."""

from typing import Annotated

import typer

from crossdock.errors import UsageError
from crossdock.placement.commands.options import (
    METHODS,
    LoadCapOption,
    NumExpertsOption,
    SeedOption,
    TraceOption,
    WorkloadOption,
)
from crossdock.placement.commands.output import AsJson, print_json, say
from crossdock.placement.commands.statistics_cli import plan_app

__all__ = ["plan_app"]


@plan_app.command("whatif")
def whatif_command(
    trace: TraceOption,
    topology: Annotated[list[str], typer.Option("--topology", help="A topology.yaml or a preset; repeat it to compare several.")],
    spare_slots: Annotated[
        list[int] | None, typer.Option("--spare-slots", min=1, help="Slots per device and layer for copies; may be repeated.")
    ] = None,
    dispatch: Annotated[
        list[str] | None, typer.Option("--dispatch", help="flat, deduplicated or hierarchical; all of them if left out.")
    ] = None,
    method: Annotated[str, typer.Option("--method", help=f"{METHODS}.")] = "auto",
    workload: WorkloadOption = None,
    load_cap: LoadCapOption = None,
    num_experts: NumExpertsOption = None,
    seconds: Annotated[float, typer.Option("--seconds", help="Cap on the search of one row.")] = 3.0,
    seed: SeedOption = 0,
    as_json: AsJson = False,
) -> None:
    """Answer what more devices, another topology, another dispatch or copies of hot experts would change.

    Example: crossdock plan whatif --trace trace.npz --topology 1x8-nvlink --topology 2x8-nvlink-ib --spare-slots 1
    """
    from crossdock.placement.analysis.whatif import all_dispatches, answer, refusals, table, variants
    from crossdock.placement.commands.planning import method_names, read_workload
    from crossdock.placement.records.topology import Topology
    from crossdock.placement.records.trace import Trace

    for name in dispatch or ():
        if name not in all_dispatches():
            raise UsageError(f"--dispatch is {name!r}; choose from {', '.join(all_dispatches())}")
    if not seconds > 0:
        raise UsageError(f"--seconds is {seconds}; give more than 0")
    if len(method_names(method)) != 1:
        raise UsageError(f"--method is {method!r}; give one method for all rows")
    if method == "replicas" and not spare_slots:
        raise UsageError("method replicas fills slots for copies, and there are none; give --spare-slots 1, or method auto")
    topologies, routing, sizes = [Topology.load(name) for name in topology], Trace.load(trace, num_experts), read_workload(workload)
    asked = [name for name in all_dispatches() if name in (dispatch or all_dispatches())]
    questions = variants(topologies, asked, spare_slots or (), method)
    say([f"{len(questions)} rows of at most {seconds:g} s each; {sizes.tokens_per_rank:,} tokens per rank in each"], as_json)
    rows = [answer(question, routing, sizes, load_cap, seconds, seed) for question in questions]
    if as_json:
        found = {"path": str(trace), "digest": routing.digest, "tokens": routing.num_tokens, "experts": routing.num_experts}
        print_json({"trace": found, "workload": sizes.to_mapping(), "rows": [row.as_json() for row in rows]})
        return
    print("\n" + "\n".join([*table(rows), *refusals(rows)]))
    print(
        "\ncopy to: a token sends a copy per expert, per distinct device, or per distinct\n"
        "node and on from there. spare: slots per device and layer for copies of experts,\n"
        "whose gradients are in the step. moved: copies that leave their device, per\n"
        "(token, expert). load: busiest device over mean. GiB: experts with optimizer\n"
        "state on each rank. s: search."
    )
