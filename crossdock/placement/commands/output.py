"""What commands answer programs with, one JSON object on stdout, alone; and what they tell people beside it."""

import json
import sys
from collections.abc import Iterable
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]


def say(lines: Iterable[str], as_json: bool) -> None:
    """What people are told at once: on stderr where stdout is for a program."""
    print("\n".join(lines), file=sys.stderr if as_json else sys.stdout, flush=True)


def print_json(value: Any, indent: int | None = None) -> None:
    """One JSON value on stdout; NaN and infinities are our own bug."""
    sys.stdout.write(json.dumps(value, indent=indent, allow_nan=False) + "\n")


def print_facts(facts: dict[str, Any], sentence: str, as_json: bool) -> None:
    """The facts for programs, or what they come to for people."""
    if as_json:
        print_json(facts)
    else:
        print(sentence)
