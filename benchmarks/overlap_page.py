"""The results page of `benchmarks.overlap --sweep`, in Markdown."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import markdown_table
from crossdock.atomic import write_text
from crossdock.errors import BadData, MissingInput

TIMES = ["share", "variant", "schedule", "link_bit_per_s", "step_s", "step_s_low", "step_s_high", "compute_s", "communication_s"]
TIMES += ["over_sequential", "over_shared"]
BOUNDS = ["share", "schedule", "step_over_bound", "step_over_direction_bound", "step_over_possible", "hidden_forward"]
BOUNDS += ["fits_forward", "hidden_backward", "fits_backward", "hidden_of_fits", "exposed_s"]


def merged(paths: Sequence[Path]) -> dict[str, Any]:
    """One document of several that `--sweep --out` wrote for different shares. Raises `MissingInput`, and `BadData` where blocks differ."""
    documents = []
    for path in paths:
        try:
            documents.append(json.loads(path.read_text()))
        except FileNotFoundError:
            raise MissingInput(f"{path} does not exist; `--sweep --out` writes it") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise BadData(f"{path} is not what `--sweep --out` wrote: {error}") from None
    if len({(document["what"], document["commit"]) for document in documents}) != 1:
        raise BadData(f"{len(paths)} files of different blocks or commits; merge what one program measured in parts")
    rows = sorted((row for document in documents for row in document["rows"]), key=lambda row: row["share_asked"])
    return {**documents[0], "rows": rows}


def write_page(path: Path, document: Mapping[str, Any], timeline: Path | None) -> None:
    """Write the page of a document of `publish`; the raw numbers stand in the JSON beside it, and the timeline where one was drawn."""
    host, rows = document["machine"], document["rows"]
    overlapped = [{**row, "step_over_possible": row["step_s"] / row["possible_s"]} for row in rows if row["variant"] == "scmoe_overlapped"]
    picture = f"\n![One step on every rank: what was computed, and when tokens arrived]({timeline.name})\n" if timeline is not None else ""
    text = f"""# Overlap over the share of communication

    sudo python -m benchmarks.overlap --sweep --out {path.name}

Commit {document["commit"]}. Machine: {host["processor"]}, {host["cores"]} cores, {host["system"]}, Python {host["python"]},
torch {host["torch"]}. {document["what"]}.
Raw numbers: [{path.stem}.json]({path.stem}.json). Medians over {rows[0]["repeats"]} paired repeats; the columns are explained in
`benchmarks/overlap.py` and `benchmarks/overlap_sweep.py`.

{markdown_table(rows, TIMES)}
How near ScMoE's schedule comes to what is possible:

{markdown_table(overlapped, BOUNDS)}
- Step over max(compute, communication): {_range(overlapped, "step_over_bound")}; over that of each direction by itself:
  {_range(overlapped, "step_over_direction_bound")}; over what this block allows: {_range(overlapped, "step_over_possible")}.
- Hidden of what fits: {_range(overlapped, "hidden_of_fits", "{:.1%}")}.
- Over its own sequential form: {_range(overlapped, "over_sequential")}; over the shared-expert form: {_range(overlapped, "over_shared")}.
{picture}"""
    write_text(path, text)


def _range(rows: Sequence[Mapping[str, Any]], name: str, form: str = "{:.3f}") -> str:
    values = [row[name] for row in rows if row[name] is not None]
    return f"{form.format(min(values))} to {form.format(max(values))}" if values else "nothing fits"
