"""A page for `docs/benchmarks` from what the command measured.

python -m benchmarks.peers.page RUN.json [RUN.json ...] > docs/benchmarks/DATE-peers.md
"""

import itertools
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import markdown_table
from benchmarks.peers import scmoe
from benchmarks.peers.environments import SYSTEMS
from benchmarks.peers.rounds import variants_of
from benchmarks.peers.table import COLUMNS, verdict

OPENING = """# Crossdock beside other systems

    python -m benchmarks.peers

All systems ran in one process each for every rank, side by side on one machine, and took one step each in every round, the others
standing still; the order rotated. A step is forward and backward of one MoE layer with SwiGLU experts and top-2 (or of a small model:
{model}); no optimizer, no reduction of dense gradients, no gate noise, no balance loss. Sizes: {layer}. Every system got the same
weights, tokens and gradients, and chose the same experts with its own gate. `equal`: outputs, gradients of the inputs and of an expert
matrix are those of one process in float64 (relative error below 1e-5 in fp32, 2e-2 in bf16; in the model 1e-3, and 0.3 in bf16, where
tokens whose logits nearly tie choose otherwise).

`step_s` is the slowest rank's, the median over rounds with its extremes. `over_crossdock` is the median over rounds of the paired ratio
to our best way of the same mathematics (in each round the one that is fastest by the median of the other rounds, so that choosing it
costs what it should), with a 95 % interval from resampled rounds; a star marks it. `link_mb`: what the busier node sent over its link in
a step, headers included, by the interface's counter (on one host: over the loopback). Bound: the longer of the bytes that any schedule
must send over the busier direction of the link (a row a token and other node, there and back, twice), and the experts alone with their
rows spread evenly over the ranks. With experts in equal blocks, as all but the packed rows have them, the busiest rank takes longer by
its load.
"""


def page(documents: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of one or several runs."""
    first = documents[0]
    machine = first["machine"]
    rows = [row for document in documents for row in document["rows"]]
    sizes: dict[str, Any] = {kind: size for document in documents for kind, size in document["sizes"].items()}
    parts = [OPENING.format(layer=_sizes(sizes.get("layer")), model=_sizes(sizes.get("model")))]
    parts.append(
        f"Machine: {machine['processor']}, {machine['cores']} cores, {machine['system']}, Python {machine['python']}, "
        f"torch {machine['torch']}, one thread a rank. Commit {', '.join(sorted({document['commit'] for document in documents}))}.\n"
    )
    parts.append("## How each was made to run\n\n" + _systems(first["versions"]))
    parts.append("## Verdicts\n\n" + "".join(f"- {title}: {verdict(list(some))}\n" for title, some in _grouped(rows)))
    for title, some in _grouped(rows):
        parts.append(f"## {title}\n\n{_bound(some[0])}\n\n{markdown_table(some, COLUMNS)}")
    blocks = [row for document in documents for row in document.get("scmoe", [])]
    if blocks:
        parts.append(f"## ScMoE, changed mathematics\n\n{(scmoe.__doc__ or '').strip()}\n\n{markdown_table(blocks, scmoe.COLUMNS)}")
    return "\n".join(parts)


def _grouped(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    def title(row: Mapping[str, Any]) -> str:
        rate = row["link_bit_per_s"]
        return f"{row['case']}, " + ("one host" if rate is None else f"2 nodes x 2 ranks at {rate / 1e6:.0f} Mbit/s")

    return [(name, list(some)) for name, some in itertools.groupby(rows, title)]


def _bound(row: Mapping[str, Any]) -> str:
    if row.get("bound_s") is None:
        return "No bound: the model's routing is its own."
    return f"Bound {row['bound_s']:.3f} s: link {row['link_s']:.3f} s, experts alone {row['experts_s'] or 0:.3f} s."


def _systems(versions: Mapping[str, str]) -> str:
    rows = [
        {"row": variant.name, "version": versions[system] or "this checkout", "how": variant.how}
        for system in SYSTEMS
        if system in versions
        for variant in variants_of(system)
    ]
    return markdown_table(rows)


def _sizes(size: Mapping[str, int] | None) -> str:
    if size is None:
        return "not run"
    return (
        f"{size['ranks']} ranks, {size['tokens']} tokens a rank, D {size['model_width']}, F {size['expert_width']}, "
        f"E {size['num_experts']}, {size['num_layers']} layers"
    )


if __name__ == "__main__":
    print(page([json.loads(Path(name).read_text()) for name in sys.argv[1:]]), end="")
