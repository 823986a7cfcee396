"""How benchmark programs begin and end: the options that all of them have, and users' errors in one line with their exit code."""

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

from crossdock.errors import CrossdockError

Given = ParamSpec("Given")


def parser(description: str | None, repeats: int, short: str) -> argparse.ArgumentParser:
    """Options of a program that measures on this machine alone. `description` is its docstring; `short` says what --short leaves out."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repeats", type=int, default=repeats, help="timed rounds (default: %(default)s)")
    options.add_argument("--out", type=Path, help="also write the JSON document here")
    options.add_argument("--json", action="store_true", help="print JSON alone")
    options.add_argument("--short", action="store_true", help=f"{short}: shows that it runs")
    return options


def one_line_errors(main: Callable[Given, int]) -> Callable[Given, int]:
    """`main` as a program's own: what is the user's to mend is one line on stderr and an exit code, never a traceback."""

    @functools.wraps(main)
    def told(*arguments: Given.args, **options: Given.kwargs) -> int:
        try:
            return main(*arguments, **options)
        except CrossdockError as error:
            print(error, file=sys.stderr)
            return error.exit_code

    return told
