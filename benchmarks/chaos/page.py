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

COLUMNS = ("fault", "trials", "survived", "named", "detection_s", "detection_s_max", "recovery_s", "recovery_s_max", "bitwise")
EXPLAINED = (
    "Every trial is one blow to a training run of two ranks (a small top-2 model, 24 steps, a checkpoint every 4, a re-planning",
    "with migration after step 11), at a random step and rank, in the phase that the row names. Losses of nodes: four ranks on two hosts.",
    "",
    "- survived: the run reached its target, or ended with the right exit code and went on by the same command.",
    "- named: the rank that was hit is the one that the run blames.",
    "- bitwise: losses and gradient norms of all steps, and every tensor of the last checkpoint, are those of the undisturbed run.",
    "- detection: from the blow until the run has said who was lost, its ranks ended.",
    "- recovery: from the blow until training goes on from the checkpoint. After SIGTERM: the whole of the second command. After a",
    "  partition: from the moment the link is back. Of a lost node: its agent is started again one second after it ended, and so is that",
    "  of the other node where it ends as well.",
    "",
    "Medians and worst cases, on the wall clock of a machine that does other things as well. No trial is judged by the seconds that its",
    "promise names: hold them against the columns.",
)


def show(rows: Sequence[Row], json_only: bool) -> None:
    """Print rows."""
    found = [row.as_json() for row in rows]
    if json_only:
        sys.stdout.write(json.dumps(found, allow_nan=False) + "\n")
    else:
        print_table(found, "what a run survives", COLUMNS)


def publish(journal: Journal, out: Path) -> None:
    """Put the rows of all trials so far into `out`, and the page beside it."""
    rows = [row.as_json() for row in journal.rows()]
    about = {"machine": machine(), "commits": journal.commits, "commands": journal.commands, "what": "faults"}
    atomic.write_json(out, {**about, "rows": rows})
    atomic.write_text(out.with_suffix(".md"), page({**about, "rows": rows}))


def page(document: Mapping[str, Any]) -> str:
    """The document in words, for docs/benchmarks."""
    rows, about = document["rows"], document["machine"]
    kills = sum(row["trials"] for row in rows if row["fault"].startswith("SIGKILL of a rank"))
    damaged = sum(row["trials"] for row in rows if row["fault"].startswith("damaged checkpoint"))
    different = [row for row in rows if row["bitwise"] is not None and len(set(row["bitwise"].split("/"))) > 1]
    broken = [row for row in rows if any(row[name] is not None and len(set(row[name].split("/"))) > 1 for name in ("survived", "named"))]
    failures = [f"- {row['fault']}: {'; '.join(row['notes'])}" for row in (*different, *(row for row in broken if row not in different))]
    return "\n".join(
        [
            "# What a run survives",
            "",
            *(f"    {command}" for command in document["commands"]),
            "",
            f"Commit {', '.join(document['commits'])}. Machine: {about['processor']}, {about['cores']} cores, {about['system']}, "
            f"Python {about['python']}, torch {about['torch']}.",
            "",
            f"{kills} SIGKILLs of single ranks and {damaged} damaged checkpoints. Rows whose curves or tensors differ from the undisturbed "
            f"run: {len(different)}. Rows with another promise broken: {len(broken)}.",
            "",
            *EXPLAINED,
            "",
            markdown_table(rows, COLUMNS),
            "Promises:",
            "",
            *(f"- {promise}: {', '.join(row['fault'] for row in rows if row['promise'] == promise)}" for promise in _promises(rows)),
            "",
            *(["What went wrong:", "", *failures, ""] if failures else []),
        ]
    )


def _promises(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["promise"] for row in rows))
