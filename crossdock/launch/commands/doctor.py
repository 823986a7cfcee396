"""`crossdock doctor`: this host alone, which must work where torch does not load, or every rank of a job."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crossdock.errors import Unavailable
from crossdock.launch.doctor.examination import examine
from crossdock.launch.doctor.report import Check, as_json, show
from crossdock.launch.ranks.worker_env import in_ray_job, worker_env


def run_doctor(run_dir: Path, num_ranks: int, device: str, on_ray: bool, wants_json: bool) -> int:
    """Examine and print; returns the exit code, 69 where something would make a run fail."""
    if worker_env() is None and num_ranks == 1 and not on_ray and not in_ray_job():
        checks = examine(run_dir)
        return told(checks, as_json(checks), wants_json)
    from crossdock.launch import start

    result = start.ask_all("doctor", {"run_dir": str(run_dir.absolute())}, num_ranks, device, on_ray)
    if result.exit_code != 0:
        return start.answer(result, wants_json)
    return told([Check(**check) for check in result.fields["checks"]], result.fields, wants_json)


def told(checks: Sequence[Check], report: Mapping[str, Any], wants_json: bool) -> int:
    """Print the report as a table or as JSON; returns the exit code."""
    if wants_json:
        print(json.dumps(dict(report)), flush=True)
    else:
        show(checks)
    return 0 if report["ok"] else Unavailable.exit_code
