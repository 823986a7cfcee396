"""`crossdock checkpoint`: look after the checkpoints of a run."""

from pathlib import Path
from typing import Any

from crossdock.errors import MissingInput


def verify(path: Path) -> list[dict[str, Any]]:
    """One row for every checkpoint under `path` (one, a folder of them, or a run directory), newest first: `{path, ok, finding}`.

    Raises `MissingInput` where there is none.
    """
    from crossdock.launch.jobs import checkpoints_in
    from crossdock.runtime import checkpoint

    folder = checkpoints_in(path)
    if not folder.is_dir():
        raise MissingInput(f"{path} is not a folder; name a checkpoint, or a run directory")
    folders = [folder] if (folder / checkpoint.MANIFEST).exists() else sorted(folder.glob("step-*"), reverse=True)
    if not folders:
        raise MissingInput(f"{path} holds no checkpoint; name a folder with {checkpoint.MANIFEST}, or a run directory")
    problems = [(found, checkpoint.verify(found)) for found in folders]
    return [{"path": str(found), "ok": problem is None, "finding": problem or "every checksum holds"} for found, problem in problems]
