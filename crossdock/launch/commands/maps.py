"""`crossdock plan import` and `export`: plans as placement maps of serving systems. They stand here because .pt files need torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crossdock.errors import BadData, UsageError
from crossdock.placement.commands.options import PlanArgument
from crossdock.placement.commands.output import AsJson, print_facts
from crossdock.placement.commands.whatif_cli import plan_app

if TYPE_CHECKING:
    from crossdock.placement.records.plan import Plan

__all__ = ["plan_app"]

MAX_BYTES = 1 << 28
"""The most that is read as a placement map."""
FORMATS = "sglang, vllm, vllm-record, vllm-ascend, vllm-ranks"

FirstDense = Annotated[int, typer.Option("--first-dense", min=0, help="Dense layers before the first MoE layer, which SGLang counts.")]


@plan_app.command("import")
def import_map(
    source: Annotated[Path, typer.Argument(help="A placement map: .json, .jsonl, .pt, .npz or .npy.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The plan.json to write.", show_default=False)],
    devices: Annotated[int | None, typer.Option("--devices", min=1, help="Devices, where the map does not say.")] = None,
    num_experts: Annotated[int | None, typer.Option("--num-experts", min=1, help="Experts per layer; the largest named + 1.")] = None,
    layers: Annotated[int | None, typer.Option("--layers", min=1, help="MoE layers, where the map has one row for all.")] = None,
    first_dense: FirstDense = 0,
    as_json: AsJson = False,
) -> None:
    """Read the placement map of SGLang or vLLM and write it as a plan, to be scored, compared or moved to.

    Example: crossdock plan import expert_location.json plan.json --devices 8 --first-dense 3
    """
    from crossdock.placement.records.placement_maps import plan_of

    try:
        plan = plan_of(_read(source), num_devices=devices, num_experts=num_experts, num_layers=layers, first_dense=first_dense)
    except BadData as error:
        raise error if str(error).startswith(str(source)) else BadData(f"{source}: {error}") from error
    plan.save(out)
    _say_written(out, plan, as_json)


@plan_app.command("export")
def export_map(
    plan: PlanArgument,
    out: Annotated[Path, typer.Argument(help="The file to write: .json or .jsonl; for SGLang also .pt or .npz.", show_default=False)],
    form: Annotated[str, typer.Option("--format", help=f"{FORMATS}.")] = "sglang",
    first_dense: FirstDense = 0,
    as_json: AsJson = False,
) -> None:
    """Write a plan as a placement map: SGLang's for --init-expert-location, or one of vLLM's.

    Example: crossdock plan export plan.json expert_location.json --first-dense 3

    Example: crossdock plan export plan.json expert_map.json --format vllm
    """
    from crossdock import atomic
    from crossdock.placement.records.placement_maps import physical_to_logical, written
    from crossdock.placement.records.plan import Plan

    loaded = Plan.load(plan)
    if out.suffix in (".json", ".jsonl"):
        atomic.write_text(out, written(loaded, form, first_dense=first_dense))
    elif out.suffix in (".pt", ".npz") and form == "sglang":
        _write_array(out, physical_to_logical(loaded, first_dense))
    else:
        raise UsageError(f"{out}: format {form} is a .json file{', or a .pt or .npz' if form == 'sglang' else ''}; name it so")
    _say_written(out, loaded, as_json)


def _read(source: Path) -> Any:
    """The file's value; of an .npz the array physical_to_logical_map."""
    if source.suffix == ".pt":
        from crossdock.models import torch_files

        return torch_files.read(source)
    if source.suffix in (".npz", ".npy"):
        from crossdock.placement.records.array_files import read_array

        return read_array(source, "physical_to_logical_map")
    from crossdock.bounded import json_value, read_bytes

    data = read_bytes(source, MAX_BYTES, "a placement map: .json, .jsonl, .pt, .npz or .npy")
    lines = data.splitlines() if source.suffix == ".jsonl" else [data]
    if source.suffix == ".jsonl" and len([line for line in lines if line.strip()]) != 1:
        raise BadData(f"{source}: {len(lines)} lines; a mapping is one line, so keep the one that you mean")
    return json_value(next(line for line in lines if line.strip() or len(lines) == 1), str(source))


def _write_array(out: Path, physical_LP: Any) -> None:
    if out.suffix == ".pt":
        import torch

        from crossdock.models import torch_files

        torch_files.write(out, {"physical_to_logical_map": torch.from_numpy(physical_LP)})
        return
    import numpy as np

    from crossdock import atomic

    with atomic.replacing(out) as aside, aside.open("wb") as file:
        np.savez(file, physical_to_logical_map=physical_LP)


def _say_written(out: Path, plan: "Plan", as_json: bool) -> None:
    facts = {
        "path": str(out),
        "layers": plan.num_layers,
        "experts": plan.num_experts,
        "devices": plan.num_devices,
        "replicas": plan.has_replicas,
    }
    sentence = f"{out}: {plan.num_layers} layers x {plan.num_experts} experts in {plan.num_devices} x {plan.slots_per_device} slots"
    print_facts(facts, sentence, as_json)
