"""The files of a run directory that a report reads: `result.json` and lines of JSON, checked as far as anybody relies on them."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import pydantic

from crossdock.bounded import MAX_DEPTH, json_value, read_bytes
from crossdock.errors import BadData
from crossdock.strict_yaml import Document, validated

MAX_BYTES = 1 << 30
LARGEST = 1e30
"""No count, time or loss is larger; beyond it charts have no axis."""

Count = Annotated[int, pydantic.Field(ge=0, lt=2**63)] | None
Number = Annotated[float, pydantic.Field(ge=-LARGEST, le=LARGEST)] | None


class _Known(pydantic.BaseModel):
    """What is known of a file that may say more than that."""

    model_config = pydantic.ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


class _Bytes(_Known):
    steps: Count = None
    counted: dict[str, Count] | None = None
    predicted: dict[str, Count] | None = None
    forecast: dict[str, Number] | None = None


class _StepTime(_Known):
    measured_s: Number = None
    predicted_s: Number = None


class _Plan(_Known):
    method: str | None = None


class _Window(_Known):
    bytes: _Bytes | None = None
    step_time: _StepTime | None = None
    load_max_over_mean: Number = None
    plan: _Plan | None = None


class _Result(_Window):
    status: str = ""
    message: str = ""
    reached_step: Count = None
    target_step: Count = None
    world_size: Count = None
    loss: Number = None
    eval_loss: Number = None
    tokens_per_s: Number = None
    step_s: Number = None
    exposed_s: Number = None
    before: _Window | None = None


def read_result(path: Path) -> Mapping[str, Any]:
    """The object of `result.json`; empty where there is none. Raises `BadData`, naming the key, where it says what cannot be."""
    if not path.exists():
        return {}
    value = json_value(read_bytes(path, MAX_BYTES, "the result of a run"), str(path))
    validated(_Result, Document(value, str(path), {}), BadData)
    assert isinstance(value, dict)
    return value


def read_lines(path: Path) -> list[Mapping[str, Any]]:
    """The objects of a JSON-lines file; a torn last line, as a killed run leaves it, is passed over. Raises `BadData`."""
    if not path.exists():
        return []
    values: list[Mapping[str, Any]] = []
    lines = read_bytes(path, MAX_BYTES, "the lines of a run").decode(errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except RecursionError as error:
            raise BadData(f"{path}:{number}: nested deeper than {MAX_DEPTH} levels; was the file edited?") from error
        except ValueError as error:
            if number == len(lines):
                break
            raise BadData(f"{path}:{number}: not JSON: {error}; was the file edited?") from error
        if isinstance(value, dict):
            values.append(value)
    return values


def is_number(value: Any) -> bool:
    """Whether `value` can stand on an axis."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST and math.isfinite(value)
