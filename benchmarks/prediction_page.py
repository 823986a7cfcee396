"""The results page of `benchmarks.prediction`, in Markdown."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import cell, markdown_table
from benchmarks.prediction_parts import PARTS
from crossdock.atomic import write_text
from crossdock.placement.records.topology import LINK_CLASSES

TIMES = [
    "method",
    "step_s",
    "step_s_low",
    "step_s_high",
    "predicted_s",
    "error_percent",
    "promised_s",
    "replayed_s",
    "speedup",
    "speedup_low",
]
TIMES += ["speedup_high", "communication_share", "load_max_over_mean", "devices_per_token", "homing_saved", "loss", "solve_s"]
BYTES = ["method", "link class", "predicted", "counted", "equal", "forecast", "forecast off by percent"]
SECONDS = ["method", *(f"{part}_{kind}" for part in PARTS for kind in ("s", "predicted_s"))]
INTERFACES = ["method", "interface_bytes", "interface_over_expected"]
CASES = {"text": "Routing as the text has it", "hot": "Some experts far more popular: Zipf's law with exponent 1.2"}


def write_page(path: Path, document: Mapping[str, Any]) -> None:
    """Write the page of a document of `publish`; the raw numbers stand in the JSON of the same name."""
    host, rows = document["machine"], document["rows"]
    groups = list(dict.fromkeys((row["case"], row["link_bit_per_s"]) for row in rows))
    parts = [_section(case, rate, [row for row in rows if (row["case"], row["link_bit_per_s"]) == (case, rate)]) for case, rate in groups]
    worst = max(abs(row["error_percent"]) for row in rows)
    text = f"""# Predictions, and what came of them

    {document["command"]} --out {path.stem}.json --page {path.name}

Commit {document["commit"]}. Machine: {host["processor"]}, {host["cores"]} cores, {host["system"]}, Python {host["python"]},
torch {host["torch"]}, load average {host["load_average_1min"]}.
{document["what"]}.
Raw numbers: [{path.stem}.json]({path.stem}.json). Medians over {rows[0]["repeats"]} paired steps of each method; bytes are those of one
step over all ranks; the columns are explained in `benchmarks/prediction.py`.

In every row the bytes that the evaluator predicts for the very steps equal those that the runtime counted, or the program fails. The
prediction of a step's seconds is off by {worst:.1f} % at most.

{"".join(parts)}"""
    write_text(path, text)


def _section(case: str, rate: float | None, rows: Sequence[Mapping[str, Any]]) -> str:
    link = "no limit" if rate is None else f"{cell(rate / 1e6)} Mbit/s"
    baseline = next(row for row in rows if row["method"] == "contiguous")
    return f"""## {CASES[case]}; links of {link}

Under contiguous experts {baseline["communication_share"]:.0%} of the step is waiting for communication.

{markdown_table(rows, TIMES)}
Parts of the step, measured and predicted. Sums of copies' gradients are predicted at their full price, an upper bound: they travel beside
the backward pass, and what they take from it is measured as waiting for tokens.

{markdown_table(rows, SECONDS)}
{markdown_table([line for row in rows for line in byte_lines(row)], BYTES)}
{markdown_table(rows, INTERFACES)}
"""


def byte_lines(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line for each link class of a row."""
    lines = []
    for name in LINK_CLASSES:
        predicted, counted, forecast = (row[f"{kind}_{name}"] for kind in ("predicted", "counted", "forecast"))
        off = 100.0 * (forecast / counted - 1.0) if counted else None
        said = "yes" if predicted == counted else "NO"
        values = (row["method"], name, predicted, counted, said, forecast, off)
        lines.append(dict(zip(BYTES, values, strict=True)))
    return lines
