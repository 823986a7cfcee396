"""Reading what others hand in, within bounds: files of a stated size at most, JSON without surprises, names that stay in their folder."""

import json
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from crossdock.errors import BadData, CrossdockError, MissingInput

MAX_DEPTH = 64
"""Levels of nesting in a JSON file; nothing that Crossdock reads has a tenth of it."""


def read_bytes(path: Path, max_bytes: int, kind: str, error: type[CrossdockError] = BadData) -> bytes:
    """The bytes of a regular file, `kind` in words (`a YAML file`).

    Raises `MissingInput` where there is no readable file, and `error` where it is larger than `max_bytes`.
    """
    try:
        if not path.is_file():
            what = "is a directory" if path.is_dir() else "is not a regular file" if path.exists() else "does not exist"
            raise MissingInput(f"{path} {what}; give the path of {kind}")
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except MissingInput:
        raise
    except OSError as failure:
        raise MissingInput(f"cannot read {path}: {failure.strerror}; check the path and its permissions") from failure
    except ValueError as failure:  # a path with a NUL byte
        raise MissingInput(f"{str(path)!r} is no path ({failure}); give the path of {kind}") from failure
    if len(data) > max_bytes:
        raise error(f"{path}: larger than {max_bytes} bytes, the most that is read as {kind}; is this the right file?")
    return data


def json_value(data: bytes, name: str, error: type[CrossdockError] = BadData) -> Any:
    """One JSON value in UTF-8; `name` stands for the file in messages.

    Raises `error` for what is malformed, for a key that stands twice in one object, for NaN and infinities, and for nesting deeper than
    `MAX_DEPTH`.
    """
    try:
        value = json.loads(data.decode(), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except UnicodeDecodeError as failure:
        raise error(f"{name}: byte {failure.start} is not UTF-8 text; is this a binary file?") from failure
    except RecursionError as failure:
        raise error(f"{name}: nested deeper than {MAX_DEPTH} levels; is this the right file?") from failure
    except ValueError as failure:
        raise error(f"{name}: not JSON: {failure}; was the file edited or cut off?") from failure
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [item for held in level if isinstance(held, dict | list) for item in (held.values() if isinstance(held, dict) else held)]
        if not level:
            return value
    raise error(f"{name}: nested deeper than {MAX_DEPTH} levels; is this the right file?")


def is_plain_name(name: str) -> bool:
    """Whether `name` names a file of the folder that it is looked up in, and can name nothing outside of it."""
    is_one_part = PurePosixPath(name).name == name and PureWindowsPath(name).name == name
    return is_one_part and name not in ("", ".", "..") and name.isprintable() and len(name.encode(errors="replace")) <= 255


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {repeated!r} stands twice")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number that JSON knows")
