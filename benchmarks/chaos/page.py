"""The table of faults: printed, and kept in two files, to which later calls add."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import commit, machine, markdown_table, print_table
from crossdock import atomic

COLUMNS = ("fault", "trials", "survived", "named", "detection_s", "detection_s_max", "recovery_s", "recovery_s_max", "bitwise")
EXPLAINED = (
    "Every trial is one blow to a training run of two ranks (a small top-2 model, 24 steps, a checkpoint every 4, a re-planning",
    "with migration after step 11), at a random step and rank, in the phase that the row names.",
    "",
    "- survived: the run reached its target, or ended with the right exit code and went on by the same command.",
    "- named: the rank that was hit is the one that the run blames.",
    "- bitwise: losses and gradient norms of all steps, and every tensor of the last checkpoint, are those of the undisturbed run.",
    "- detection: from the blow until the run has said who was lost, its ranks ended.",
    "- recovery: from the blow until training goes on from the checkpoint. After SIGTERM: the whole of the second command. After a",
    "  partition: from the moment the link is back.",
    "",
    "Medians and worst cases, on the wall clock of a machine that does other things as well. No trial is judged by the seconds that its",
    "promise names: hold them against the columns.",
)


def publish(rows: Sequence[Mapping[str, Any]], out: Path | None, json_only: bool) -> None:
    """Print rows, and put them into `out` and the page beside it in place of those of the same faults."""
    if json_only:
        sys.stdout.write(json.dumps(list(rows), allow_nan=False) + "\n")
    else:
        print_table(rows, "what a run survives", COLUMNS)
    if out is None:
        return
    earlier = json.loads(out.read_text())["rows"] if out.exists() else []
    now = commit()
    merged = {row["fault"]: row for row in (*earlier, *({**row, "commit": now} for row in rows))}
    document = {"machine": machine(), "commit": now, "what": "faults", "rows": list(merged.values())}
    atomic.write_json(out, document)
    atomic.write_text(out.with_suffix(".md"), page(document, out.name))


def page(document: Mapping[str, Any], json_name: str) -> str:
    """The document in words, for docs/benchmarks."""
    rows, about = document["rows"], document["machine"]
    commits = dict.fromkeys(row.get("commit", document["commit"]) for row in rows)
    kills = sum(row["trials"] for row in rows if row["fault"].startswith("SIGKILL"))
    damaged = sum(row["trials"] for row in rows if row["fault"].startswith("damaged checkpoint"))
    different = [row for row in rows if row["bitwise"] is not None and len(set(row["bitwise"].split("/"))) > 1]
    broken = [row for row in rows if any(row[name] is not None and len(set(row[name].split("/"))) > 1 for name in ("survived", "named"))]
    failures = [f"- {row['fault']}: {'; '.join(row['notes'])}" for row in (*different, *(row for row in broken if row not in different))]
    return "\n".join(
        [
            "# What a run survives",
            "",
            f"    python -m benchmarks.chaos --out {json_name}",
            "",
            f"Commit {', '.join(commits)}. Machine: {about['processor']}, {about['cores']} cores, {about['system']}, "
            f"Python {about['python']}, torch {about['torch']}.",
            "",
            f"{kills} SIGKILLs and {damaged} damaged checkpoints. Rows whose curves or tensors differ from the undisturbed run: "
            f"{len(different)}. Rows with another promise broken: {len(broken)}.",
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
