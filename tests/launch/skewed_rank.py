"""`crossdock` with the arguments given, where rank 1 has another numpy and a clock that is 5 s ahead; for the tests of the doctor."""

import os
import sys
import time
from types import SimpleNamespace

from crossdock.launch.cli import run
from crossdock.launch.doctor import clock, ranks

SKEW_S = 5.0


if __name__ == "__main__":
    if os.environ.get("RANK", os.environ.get("PMI_RANK")) == "1":
        installed = ranks.installed
        ranks.installed = lambda: {**installed(), "numpy": "1.0.0"}
        clock.time = SimpleNamespace(time=lambda: time.time() + SKEW_S, monotonic=time.monotonic, sleep=time.sleep)  # type: ignore[assignment]
    sys.exit(run(sys.argv[1:]))
