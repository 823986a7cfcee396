"""`crossdock ARGUMENTS...` on a Ray that puts every rank on another node than it was asked to."""

import sys
from typing import Any

from crossdock.launch import cli
from crossdock.launch.ray.incarnation import Incarnation


def main() -> int:
    request = Incarnation.request

    def elsewhere(self: Incarnation, monitor: Any) -> None:
        request(self, monitor)
        self.nodes = self.nodes[::-1]

    Incarnation.request = elsewhere  # type: ignore[method-assign]
    return cli.run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
