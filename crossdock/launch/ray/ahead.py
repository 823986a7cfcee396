"""Actors that are asked for before the configuration is read: they import torch while the driver does, and not after it.

`crossdock.launch.config` needs torch, and so does every rank; one after the other would take twice as long. How many ranks there will be is
plain in the YAML (`parallel.ranks`, `parallel.expert`, `topology`), which needs nothing heavy to read.
"""

import contextlib
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from crossdock.errors import CrossdockError, Unavailable
from crossdock.launch.ray import cluster as ray_cluster
from crossdock.launch.ray.connection import connected
from crossdock.launch.ray.incarnation import Incarnation, new_monitor
from crossdock.launch.ray.nodes import living_nodes
from crossdock.launch.run_file import run_document
from crossdock.launch.scripts.allocation import Shape


class Driver:
    """A connection to a cluster, its monitor, the first incarnation where that has been asked for already; whether the run is to stop."""

    def __init__(self, ray: Any) -> None:
        self.ray, self.monitor = ray, new_monitor(ray)
        self.is_stopping = False
        self._ahead: Incarnation | None = None

    @contextlib.contextmanager
    def stopped_by_sigterm(self) -> Iterator[None]:
        """Within the block, SIGTERM (`ray job stop`) is a wish to stop: Ray's own handler would end the process, and tell nobody."""

        def ask(number: int, frame: Any) -> None:
            self.is_stopping = True

        previous = signal.signal(signal.SIGTERM, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    def ask_ahead(self, shape: Shape) -> None:
        """Ask for the actors of start 1, where the cluster can hold them; where it cannot, that is said when their turn comes."""
        nodes = ray_cluster.able(living_nodes(self.ray), shape)
        if len(nodes) >= shape.nodes:
            self._ahead = self._requested(1, shape, ray_cluster.chosen(nodes, shape.nodes, frozenset()))

    def incarnation(self, number: int, shape: Shape, nodes: Sequence[ray_cluster.Node]) -> Incarnation:
        """The actors of a start on these nodes, asked for now unless they have been before."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            if (ahead.number, ahead.shape, [node.node_id for node in ahead.nodes]) == (number, shape, [node.node_id for node in nodes]):
                return ahead
            ahead.end()
        return self._requested(number, shape, nodes)

    def _requested(self, number: int, shape: Shape, nodes: Sequence[ray_cluster.Node]) -> Incarnation:
        found = Incarnation(self.ray, number, shape, nodes)
        try:
            found.request(self.monitor)
        except BaseException:
            found.end()  # of what it has asked for nothing is left in the way of the next
            raise
        return found


class Ahead:
    """The driver of a run, or why there is none."""

    def __init__(self, driver: Driver | None, failure: CrossdockError | None) -> None:
        self._driver, self._failure = driver, failure

    def driver(self) -> Driver:
        """Raises `Unavailable` and its kin where the cluster could not be reached."""
        if self._driver is None:
            raise self._failure or Unavailable("no Ray cluster was reached")
        return self._driver


@contextlib.contextmanager
def ranks_ahead(path: Path, overrides: Sequence[str], shape: Shape | None, address: str | None) -> Iterator[Ahead]:
    """A driver, connected until the block ends, on whose cluster the ranks of the run have begun to import.

    Raises nothing of what is wrong with the configuration or with reaching the cluster: the first to say so is whoever reads the
    configuration, then `Ahead.driver`. Raises `PeerLost` where Ray fails inside the block.
    """
    with contextlib.ExitStack() as connection:
        try:
            driver = Driver(connection.enter_context(connected(address)))
        except CrossdockError as failure:
            yield Ahead(None, failure)
            return
        connection.enter_context(driver.stopped_by_sigterm())
        with contextlib.suppress(CrossdockError):  # said again, and better, by `read_config` and `launch`
            driver.ask_ahead(shape or _shape_in(path, overrides, driver.ray))
        yield Ahead(driver, None)


def _shape_in(path: Path, overrides: Sequence[str], ray: Any) -> Shape:
    """The shape that `launch` will choose, as far as the YAML alone can tell. Raises `BadConfig` and its kin."""
    document, _ = run_document(path, overrides)
    sections = document.value if isinstance(document.value, dict) else {}
    parallel = sections.get("parallel", {})
    parallel = parallel if isinstance(parallel, dict) else {}
    num_ranks = parallel.get("ranks") or parallel.get("expert", 1)
    if not isinstance(num_ranks, int) or num_ranks < 1:
        raise Unavailable("not known before the configuration is read")
    topology = None
    if isinstance(name := sections.get("topology"), str):
        from crossdock.placement.records.topology import Topology

        topology = Topology.load(name)
    return ray_cluster.shape_of(num_ranks, topology, living_nodes(ray), str(sections.get("device")))
