"""Findings of the doctor: what was looked at, how it stands, and what to do about it."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["ok", "note", "bad"]


@dataclass(frozen=True)
class Check:
    """One line of the report; `level` is `ok`, `note` (works, with a remark) or `bad` (a run will fail), and `remedy` says what to do."""

    topic: str
    level: Level
    finding: str
    remedy: str = ""

    def __post_init__(self) -> None:
        assert self.level == "ok" or self.remedy, f"{self.topic}: a finding without a remedy"


def as_json(checks: Sequence[Check]) -> dict[str, Any]:
    """The object that `crossdock doctor --json` prints."""
    return {"ok": all(check.level != "bad" for check in checks), "checks": [asdict(check) for check in checks]}


def show(checks: Sequence[Check]) -> None:
    """Print the checks as a table."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for check in checks:
        colour = {"ok": "green", "note": "yellow", "bad": "red"}[check.level]
        finding = escape(check.finding + (f"\n-> {check.remedy}" if check.remedy else ""))
        table.add_row(f"[{colour}]{check.level}[/]", escape(check.topic), finding)
    Console(file=sys.stdout, soft_wrap=True).print(table)
