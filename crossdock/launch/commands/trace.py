"""`crossdock trace`: record routing, look at it, and exchange it with other systems' files."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crossdock.errors import BadData, UsageError
from crossdock.placement.commands.output import AsJson, print_facts, print_json

if TYPE_CHECKING:
    from crossdock.placement.records.trace import Trace

trace_app = typer.Typer(name="trace", help="Record, show, import and export routing.", no_args_is_help=True, rich_markup_mode=None)

TracePath = Annotated[
    Path, typer.Argument(help="A trace: .npz, or .npy of [tokens, layers] or [tokens, layers, choices].", show_default=False)
]
MAX_BYTES = 1 << 30
"""The most that is read of another system's text."""
NumExperts = Annotated[int | None, typer.Option("--num-experts", min=1, help="Experts per layer, where the file does not say.")]


@trace_app.command("capture")
def capture(
    config: Annotated[str, typer.Argument(metavar="CONFIG|CHECKPOINT", help="A run's YAML file, or a checkpoint.", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="A.B=C", help="Keys to set.", show_default=False)] = None,
    out: Annotated[Path, typer.Option("--out", help="Where the trace goes.")] = Path("trace.npz"),
    steps: Annotated[int, typer.Option("--steps", min=1, help="Batches of held-out data to route.")] = 8,
    as_json: AsJson = False,
) -> None:
    """Route held-out data through a model, and record which experts every token chose.

    Example: crossdock trace capture runs/tiny/checkpoints/step-00000200 --out trace.npz
    """
    from crossdock.launch import start

    raise typer.Exit(start.capture(config, overrides or (), out, steps, as_json))


@trace_app.command("capture-hf")
def capture_hugging_face(
    model: Annotated[str, typer.Argument(help="A folder of a Hugging Face MoE model, or its name in the hub.", show_default=False)],
    text: Annotated[Path | None, typer.Option("--text", help="A text to route, read with the model's own tokenizer.")] = None,
    token_ids: Annotated[
        Path | None, typer.Option("--token-ids", help="Instead: an .npy of token numbers, [tokens] or [sequences, tokens].")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Where the trace goes.")] = Path("trace.npz"),
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="At most so many tokens.")] = 100_000,
    seq_len: Annotated[int, typer.Option("--seq-len", min=1, help="Tokens of a sequence.")] = 512,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences that go through the model at once.")] = 1,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help="auto (as saved), float32, bfloat16 or float16.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Route a text through a Hugging Face MoE model, and record which experts every token chose.

    Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V3, gpt-oss, and others built like them. Reads safetensors alone and runs no code of the model's.

    Example: crossdock trace capture-hf ./OLMoE-1B-7B --text book.txt --out trace.npz
    """
    if (text is None) == (token_ids is None):
        raise UsageError("give either --text or --token-ids, so that there is something to route")
    if out.suffix != ".npz":
        raise UsageError(f"{out}: a trace is an .npz file; call it {out.with_suffix('.npz').name}")
    from crossdock.bounded import read_bytes
    from crossdock.models import hugging_face_capture as hf
    from crossdock.placement.records.array_files import read_array

    loaded = hf.load_model(model, device, dtype)
    if token_ids is not None:
        token_T = read_array(token_ids)
    else:
        assert text is not None
        token_T = hf.tokens_of_text(model, read_bytes(text, MAX_BYTES, "a text to route").decode(errors="replace"))
    kind = getattr(getattr(loaded, "config", None), "model_type", type(loaded).__name__)
    source = f"{Path(model).name} ({kind}) on {(text or token_ids or out).name}"
    trace = hf.capture(loaded, hf.sequences(token_T, seq_len, tokens), batch=batch, source=source)
    trace.save(out)
    _say_written(out, trace, as_json)


@trace_app.command("show")
def show(trace: TracePath, num_experts: NumExperts = None, as_json: AsJson = False) -> None:
    """Say what a trace holds: its size, what is known of its tokens, and how evenly they spread.

    Example: crossdock trace show trace.npz
    """
    from crossdock.placement.records.trace import Trace

    facts = describe(Trace.load(trace, num_experts))
    if as_json:
        print_json(facts)
        return
    for name, value in facts.items():
        print(f"{name.replace('_', ' '):>28}  {_readable(value) if name != 'digest' else value[:12]}")


@trace_app.command("import")
def import_trace(
    source: Annotated[
        Path, typer.Argument(help="Routing: .npy or .npz, or what SGLang's recorder wrote: .pt, .json or .csv.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="The .npz to write.", show_default=False)],
    num_experts: NumExperts = None,
    as_json: AsJson = False,
) -> None:
    """Read another system's routing and write it as a trace.

    Example: crossdock trace import exflow.npy trace.npz --num-experts 64

    Example: crossdock trace import expert_distribution_recorder_1765.pt trace.npz
    """
    if out.suffix != ".npz":
        raise UsageError(f"{out}: a trace is an .npz file; call it {out.with_suffix('.npz').name}")
    trace = _read(source, num_experts)
    trace.save(out)
    _say_written(out, trace, as_json)


@trace_app.command("export")
def export_trace(
    trace: TracePath,
    out: Annotated[Path, typer.Argument(help="The .npy to write, or an .npz whose only array is `experts`.", show_default=False)],
    top_1: Annotated[bool, typer.Option("--top-1", help="First choices alone, [tokens, layers], as ExFlow reads.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a trace's choices as a plain array of [tokens, layers, choices]; -1 stands for no choice.

    Example: crossdock trace export trace.npz routing.npy --top-1
    """
    import numpy as np

    from crossdock import atomic
    from crossdock.placement.records.trace import NO_EXPERT, Trace

    if out.suffix not in (".npy", ".npz"):
        raise UsageError(f"{out}: exported choices are an .npy or .npz file; call it {out.with_suffix('.npy').name}")
    loaded = Trace.load(trace)
    choices = loaded.first_choice_TL if top_1 else loaded.experts_TLK
    plain = np.where(choices == NO_EXPERT, -1, choices.astype(np.int64))
    with atomic.replacing(out) as aside, aside.open("wb") as file:
        if out.suffix == ".npy":
            np.save(file, plain, allow_pickle=False)
        else:
            np.savez_compressed(file, experts=plain)
    _say_written(out, loaded, as_json, 1 if top_1 else loaded.top_k)


def describe(trace: "Trace") -> dict[str, Any]:
    """What `trace show` prints. Load: assignments of the busiest expert over the mean, mean over layers."""
    import numpy as np

    from crossdock.placement.records.trace import NO_EXPERT

    loads = [np.bincount(layer[layer != NO_EXPERT], minlength=trace.num_experts) for layer in trace.experts_TLK.swapaxes(0, 1)]
    means = [load.mean() for load in loads]
    return {
        "tokens": trace.num_tokens,
        "layers": trace.num_layers,
        "choices_per_token": trace.top_k,
        "experts": trace.num_experts,
        "sequences": None if trace.sequence_T is None else len(np.unique(trace.sequence_T)),
        "homes": None if trace.home_T is None else len(np.unique(trace.home_T)),
        "weights": trace.weights_TLK is not None,
        "token_ids": trace.token_T is not None,
        "dropped_share": round(float((trace.experts_TLK == NO_EXPERT).mean()), 6),
        "expert_load_max_over_mean": round(float(np.mean([load.max() / mean for load, mean in zip(loads, means, strict=True) if mean])), 4)
        if any(means)
        else None,
        "source": trace.source,
        "digest": trace.digest,
    }


def _read(source: Path, num_experts: int | None) -> "Trace":
    """A trace of any form that another system writes, told apart by the file's suffix."""
    from crossdock.bounded import json_value, read_bytes
    from crossdock.placement.records import recorder
    from crossdock.placement.records.trace import Trace

    if source.suffix not in (".pt", ".json", ".csv"):
        return Trace.load(source, num_experts)
    try:
        if source.suffix == ".pt":
            from crossdock.models import torch_files

            return recorder.trace_of(torch_files.read(source), source.name, num_experts)
        data = read_bytes(source, MAX_BYTES, "a dump of the expert distribution recorder")
        if source.suffix == ".json":
            return recorder.trace_of(json_value(data, str(source)), source.name, num_experts)
        return recorder.trace_of_csv(data.decode(errors="replace"), source.name, num_experts)
    except BadData as error:
        raise error if str(error).startswith(str(source)) else BadData(f"{source}: {error}") from error


def _readable(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "known" if value else "not known"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _say_written(out: Path, trace: "Trace", as_json: bool, top_k: int | None = None) -> None:
    choices = top_k or trace.top_k
    facts = {"path": str(out), "tokens": trace.num_tokens, "layers": trace.num_layers, "choices_per_token": choices}
    per_token = f"{choices} choice{'' if choices == 1 else 's'} per token"
    print_facts(facts, f"{out}: {trace.num_tokens:,} tokens, {trace.num_layers} layers, {per_token}", as_json)
