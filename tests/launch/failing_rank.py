"""`crossdock ARGUMENTS` on a rank that mpirun started; rank 1 fails between two steps, and the others wait for its rows."""

import os
import sys
from typing import Any

from crossdock.launch import cli
from crossdock.runtime import phases


def _fail(phase: phases.Phase, what: Any) -> None:
    if phase == "step" and what == 2:
        raise ValueError("rank 1 has had enough")


if __name__ == "__main__":
    if os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK")) == "1":
        phases.listen(_fail)
    sys.exit(cli.run(sys.argv[1:]))
