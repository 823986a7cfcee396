"""`crossdock checkpoint`: look after the checkpoints of a run, and exchange models with Hugging Face transformers."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crossdock.errors import BadCheckpoint, MissingInput, UsageError
from crossdock.placement.commands.output import AsJson, print_facts, print_json

if TYPE_CHECKING:
    from crossdock.runtime.checkpoints.manifest import Manifest

checkpoint_app = typer.Typer(
    name="checkpoint", help="Look after checkpoints, and exchange models.", no_args_is_help=True, rich_markup_mode=None
)

Source = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a run directory: its newest.", show_default=False)]
Out = Annotated[Path, typer.Argument(help="A folder that does not exist yet.", show_default=False)]


@checkpoint_app.command("verify")
def verify(
    path: Annotated[Path, typer.Argument(help="A checkpoint, or a run directory with checkpoints.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Check every byte of a checkpoint, or of all checkpoints of a run, against its manifest.

    Example: crossdock checkpoint verify runs/tiny
    """
    from crossdock.runtime.checkpoints import checkpoint

    problems = [(folder, checkpoint.verify(folder)) for folder in folders_in(path)]
    found = [{"path": str(folder), "ok": problem is None, "finding": problem or "every checksum holds"} for folder, problem in problems]
    if as_json:
        print_json({"ok": any(row["ok"] for row in found), "checkpoints": found})
    else:
        for row in found:
            print(f"{row['path']}: {'ok, ' if row['ok'] else 'BAD: '}{row['finding']}")
    if not any(row["ok"] for row in found):
        raise typer.Exit(BadCheckpoint.exit_code)


@checkpoint_app.command("ls")
def ls(
    path: Annotated[Path, typer.Argument(help="A checkpoint, or a run directory with checkpoints.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """List checkpoints, newest first, as their manifests describe them; `verify` reads the rest.

    Example: crossdock checkpoint ls runs/tiny
    """
    rows = [_described(folder) for folder in folders_in(path)]
    if as_json:
        print_json({"checkpoints": rows})
        return
    for row in rows:
        facts = "" if row["problem"] else "{bytes:,} bytes in {shards} shards, by {world_size} ranks, plan {plan}".format(**row)
        print(f"{row['path']}: {row['problem'] or facts}")


@checkpoint_app.command("reshard")
def reshard(
    source: Source,
    out: Out,
    shards: Annotated[int, typer.Option("--shards", min=1, help="Files of the new checkpoint.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint anew in a number of even files. Any world reads any checkpoint: this is for the file system's sake.

    Example: crossdock checkpoint reshard runs/tiny/checkpoints/step-00000200 resharded --shards 8
    """
    from crossdock.runtime.checkpoints.reshard import reshard as rewrite

    folder, manifest = newest(source)
    written = rewrite(folder, manifest, out, shards)
    sizes = [shard.bytes for shard in written.shards]
    _say({"path": str(out), "from": str(folder), "shards": len(sizes), "smallest_bytes": min(sizes), "largest_bytes": max(sizes)}, as_json)


@checkpoint_app.command("export-hf")
def export_hf(
    source: Source,
    out: Out,
    config: Annotated[
        Path | None, typer.Option("--config", help="The run's YAML, where it does not lie beside the checkpoint.", show_default=False)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="fp32, bf16 or fp64; as in the checkpoint, bit by bit, where left out.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the weights for Hugging Face transformers, as a Mixtral or a Qwen3-MoE (model.qk_norm): safetensors and config.json.

    Example: crossdock checkpoint export-hf runs/moe exported
    """
    from crossdock.launch.config import read_config
    from crossdock.launch.ranks.jobs import DTYPES
    from crossdock.launch.start import config_of_checkpoint
    from crossdock.models.hugging_face_files import export

    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype} is none of {', '.join(DTYPES)}")
    folder, manifest = newest(source)
    run = read_config(config or config_of_checkpoint(folder))
    count = export(folder, manifest, run.model, run.data.seq_len, out, None if dtype is None else DTYPES[dtype])
    kind = "Qwen3-MoE" if run.model.qk_norm else "Mixtral"
    _say({"path": str(out), "from": str(folder), "step": manifest.step, "architecture": kind, "tensors": count}, as_json)


@checkpoint_app.command("import-hf")
def import_hf(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that transformers saved: safetensors.", show_default=False)],
    out: Out,
    as_json: AsJson = False,
) -> None:
    """Make a run directory of a Mixtral or Qwen3-MoE: its configuration, and a checkpoint before the first step.

    Training goes on from it, on text in the model's own tokens: OUT/tokens.bin, or what data.kind and data.path name. Only a vocabulary
    of 256 is taken for bytes, and so for text as it is.

    Example: crossdock checkpoint import-hf Qwen3-30B-A3B runs/qwen && crossdock train runs/qwen/config.resolved.yaml data.path=tokens.bin
    """
    from crossdock import atomic, strict_yaml
    from crossdock.launch.config import RunConfig, save_resolved
    from crossdock.models.hugging_face_files import HuggingFaceFolder
    from crossdock.runtime.data import BYTE_VOCABULARY
    from crossdock.runtime.training.metrics import RunDirectory
    from crossdock.strict_yaml import Document

    model = HuggingFaceFolder(source)
    precision = {"compute": "bf16" if model.is_bf16 else "fp32"}
    document = {"run": {"dir": str(out.absolute())}, "model": model.config.model_dump(mode="json"), "precision": precision}
    if model.config.vocab_size != BYTE_VOCABULARY:
        document["data"] = {"kind": "bin", "path": str(out.absolute() / "tokens.bin")}
    run = strict_yaml.validated(RunConfig, Document(document, str(source), {}))
    with atomic.new_folder(out) as aside:
        directory = RunDirectory(aside)
        folder = directory.checkpoints / "step-00000000"
        folder.mkdir(parents=True)
        manifest = model.write_checkpoint(folder)
        save_resolved(run, directory.config)
    facts = {"path": str(out), "from": str(source), "tensors": len(manifest.tensors), "bytes": manifest.num_bytes}
    _say({**facts, "data": run.data.path or run.data.kind}, as_json)


def folders_in(path: Path) -> list[Path]:
    """The checkpoints under `path`, newest first: it may be one, a folder of them, or a run directory. Raises `MissingInput` for none."""
    from crossdock.launch.ranks.jobs import checkpoints_in
    from crossdock.runtime.checkpoints import checkpoint
    from crossdock.runtime.checkpoints.manifest import MANIFEST

    folder = checkpoints_in(path)
    if not folder.is_dir():
        raise MissingInput(f"{path} is not a folder; name a checkpoint, or a run directory")
    folders = [folder] if (folder / MANIFEST).exists() else checkpoint.finished(folder)
    if not folders:
        raise MissingInput(f"{path} holds no checkpoint; name a folder with {MANIFEST}, or a run directory")
    return folders


def newest(path: Path) -> "tuple[Path, Manifest]":
    """The newest whole checkpoint under `path`, every byte checked, and its manifest. Raises `MissingInput` and `BadCheckpoint`."""
    from crossdock.runtime.checkpoints import checkpoint
    from crossdock.runtime.transport.mesh import Mesh

    folder = folders_in(path)[0]
    folder, manifest, passed_over = checkpoint.latest(folder if folder == path else folder.parent, Mesh.single())
    for problem in passed_over:
        print(f"-- damaged checkpoint passed over: {problem}", file=sys.stderr)
    return folder, manifest


def _described(folder: Path) -> dict[str, Any]:
    from crossdock.runtime.checkpoints.manifest import Manifest

    try:
        manifest = Manifest.read(folder)
    except BadCheckpoint as error:
        return {"path": str(folder), "problem": str(error)}
    return {
        "path": str(folder),
        "problem": None,
        "step": manifest.step,
        "bytes": manifest.num_bytes,
        "shards": len(manifest.shards),
        "tensors": len(manifest.tensors),
        "world_size": manifest.world_size,
        "expert_parallel": manifest.expert_parallel,
        "plan": None if manifest.plan is None else manifest.plan.method,
    }


def _say(facts: dict[str, Any], as_json: bool) -> None:
    print_facts(facts, "\n".join(f"{name.replace('_', ' ')}: {value}" for name, value in facts.items()), as_json)
