"""How a run ended, as its `result.json` says; it loads nothing heavy, so that a script may ask as often as it likes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossdock.bounded import json_value, read_bytes
from crossdock.errors import CrossdockError

MAX_RESULT_BYTES = 1 << 26
STATUS_OF_CODE = {0: "done", 75: "preempted", 130: "interrupted"}


@dataclass(frozen=True)
class Result:
    """How a job ended, the same for every launcher: `status`, `exit_code`, and the rest of the job's JSON object."""

    exit_code: int
    fields: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """The object of `result.json`."""
        return {"status": STATUS_OF_CODE.get(self.exit_code, "failed"), "exit_code": self.exit_code, **self.fields}


def read_result(path: Path) -> dict[str, Any]:
    """The object of a run directory's `result.json`; empty where there is none."""
    try:
        value = json_value(read_bytes(path / "result.json", MAX_RESULT_BYTES, "the result of a run"), str(path))
    except CrossdockError:
        return {}
    return value if isinstance(value, dict) else {}
