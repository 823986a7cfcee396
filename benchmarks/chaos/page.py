"""The table of faults: printed, and written out of all trials so far."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.chaos.journal import Journal
from benchmarks.chaos.runs import Row
from benchmarks.measure import machine, markdown_table, print_table
from crossdock import atomic

SHOWN = (
    *("fault", "trials", "survived", "named", "stacks", "detection_s", "detection_s_max", "recovery_s", "recovery_s_max"),
    *("in_time", "bitwise"),
)
SHARES = ("survived", "named", "stacks", "in_time", "bitwise")
EXPLAINED = (
    "Every trial is one blow to a training run of two ranks (a small top-2 model, 24 steps, a checkpoint every 4, a re-planning",
    "with migration after step 11), at a random step and rank, in the phase that the row names. Losses of nodes: four ranks on two hosts.",
    "",
    "- survived: the run reached its target, or ended with the right exit code and result.json and went on by the same command.",
    "- named: the rank that was hit is the one that the run blames.",
    "- stacks: those of all ranks were kept, or what the system says of one that could not write them.",
    "- detection_s: from the blow until the run has said who was lost, its ranks ended; the median and the worst.",
    "- recovery_s: from the blow until training goes on from the checkpoint. After SIGTERM: the whole of the second command. After a",
    "  partition: from the moment the link is back. Of a lost node: its agent is started again one second after it ended, and so is that",
    "  of the other node where it ends as well.",
    "- in_time: both within the seconds that the promise names.",
    "- bitwise: losses and gradient norms of all steps, and every tensor of the last checkpoint, are those of the undisturbed run. Of a",
    "  damaged checkpoint: every tensor that was loaded is one that was saved.",
)


def show(rows: Sequence[Row], json_only: bool) -> None:
    """Print rows."""
    found = [row.as_json() for row in rows]
    if json_only:
        sys.stdout.write(json.dumps(found, allow_nan=False) + "\n")
    else:
        print_table(found, "what a run survives", SHOWN)


def publish(journal: Journal, out: Path, left_out: Mapping[str, str]) -> None:
    """Put the rows of all trials so far into `out`, and the page beside it. `left_out`: faults that cannot be had here, and why."""
    rows = [row.as_json() for row in journal.rows()]
    about = {"machine": machine(), "commits": journal.commits, "commands": journal.commands, "what": "faults"}
    document = {**about, "seconds": round(journal.seconds_of(), 1), "left_out": dict(left_out), "rows": rows}
    atomic.write_json(out, document)
    atomic.write_text(out.with_suffix(".md"), page(document))


def page(document: Mapping[str, Any]) -> str:
    """The document in words, for docs/benchmarks."""
    rows, about = document["rows"], document["machine"]
    kills = sum(row["trials"] for row in rows if row["fault"].startswith("SIGKILL of a rank"))
    damaged = sum(row["trials"] for row in rows if row["fault"].startswith("damaged checkpoint"))
    different = sum(not _is_whole(row["bitwise"]) for row in rows)
    total, minutes = sum(row["trials"] for row in rows), document["seconds"] / 60
    left_out = [f"- {name}: {reason}" for name, reason in document["left_out"].items()]
    broken = [row for row in rows if not all(_is_whole(row[name]) for name in SHARES)]
    return "\n".join(
        [
            "# What a run survives",
            "",
            *(f"    {command}" for command in document["commands"]),
            "",
            f"Commit {', '.join(document['commits'])}. Machine: {about['processor']}, {about['cores']} cores, {about['system']}, "
            f"Python {about['python']}, torch {about['torch']}.",
            "",
            f"{total} trials in {minutes:.0f} minutes, of them {kills} SIGKILLs of single ranks and {damaged} damaged checkpoints. Rows "
            f"whose curves or tensors differ from the undisturbed run: {different}. Rows with any promise broken: {len(broken)}.",
            "",
            *EXPLAINED,
            "",
            markdown_table(rows, (*SHOWN, "promise")),
            "## Where a promise was broken",
            "",
            *([f"- {row['fault']}: {_broken(row)}" for row in broken] or ["Nowhere."]),
            "",
            *(["## Left out", "", *left_out, ""] if left_out else []),
        ]
    )


def _is_whole(share: str | None) -> bool:
    return share is None or len(set(share.split("/"))) == 1


def _broken(row: Mapping[str, Any]) -> str:
    shares = ", ".join(f"{name} {row[name]}" for name in SHARES if not _is_whole(row[name]))
    return f"{shares} (promised: {row['promise']})" + "".join(f"; {note}" for note in row["notes"])
