"""`FILE ARGUMENTS...`: `crossdock ARGUMENTS...` on a Ray whose first start waits, its actors asked for, until somebody takes FILE away."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from crossdock.launch import cli
from crossdock.launch.ray.incarnation import Incarnation


def main() -> int:
    settle, held = Incarnation.settle, Path(sys.argv[1])

    def later(self: Incarnation, patience_s: float, is_stopping: Callable[[], bool]) -> None:
        if self.number == 1:
            held.touch()
            while held.exists():
                time.sleep(0.05)
        settle(self, patience_s, is_stopping)

    Incarnation.settle = later  # type: ignore[method-assign]
    return cli.run(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
