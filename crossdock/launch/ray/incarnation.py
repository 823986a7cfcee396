"""The actors of one start of a run: asked for, waited for, checked against the nodes that they were promised, set to work, ended.

`request` returns at once, so that the actors import torch while their driver still reads its configuration.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from crossdock.authentication import Secret
from crossdock.errors import BadConfig, CrossdockError, PeerLost, Preempted, Unavailable
from crossdock.launch.ranks.rendezvous import LOOPBACK
from crossdock.launch.ranks.worker_env import Meeting, WorkerEnv
from crossdock.launch.ray.cluster import Node, Place, check_places
from crossdock.launch.ray.nodes import living_nodes
from crossdock.launch.scripts.allocation import Shape

POLL_S = 0.25
_BIRTH_S = 300.0  # for a process that has its room to start: a loaded machine takes a minute


def new_monitor(ray: Any) -> Any:
    """The board of heartbeats, beside the driver and so lost only with it. Ray may end it where memory is short, and starts it again."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from crossdock.launch.ray.rank import Monitor

    beside_us = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    lasting = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
    return ray.remote(Monitor).options(**lasting, scheduling_strategy=beside_us).remote()


class Incarnation:
    """Start `number` of a run: one placement group on each of `nodes`, one actor for each rank, none of them detached."""

    def __init__(self, ray: Any, number: int, shape: Shape, nodes: Sequence[Node]) -> None:
        self.ray, self.number, self.shape, self.nodes = ray, number, shape, tuple(nodes)
        self.groups: list[Any] = []
        self.actors: list[Any] = []
        self.results: list[Any] = []
        self.places: list[Place] = []
        self._asked: list[Any] = []

    def node_of(self, rank: int) -> Node:
        """The node that was promised to the rank: ranks are numbered node by node."""
        return self.nodes[rank // self.shape.ranks_per_node]

    def request(self, monitor: Any) -> None:
        """Ask for the groups and their actors, which begin to import what a rank needs as soon as they are there. Waits for nothing."""
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from crossdock.launch.ray.rank import Rank

        shape = self.shape
        resources = {"CPU": float(shape.cores_per_rank), **({"GPU": 1.0} if shape.gpus else {})}
        bundles = [resources] * shape.ranks_per_node
        for node in self.nodes:
            on_node = [{"ray.io/node-id": node.node_id}] * shape.ranks_per_node
            self.groups.append(placement_group(bundles, strategy="STRICT_PACK", bundle_label_selector=on_node))
        for rank in range(shape.world_size):
            node_number, bundle = divmod(rank, shape.ranks_per_node)
            options = self.ray.remote(Rank).options(
                num_cpus=shape.cores_per_rank,
                num_gpus=1 if shape.gpus else 0,
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.groups[node_number], bundle),
            )
            self.actors.append(options.remote(self.number, rank, monitor, shape.cores_per_rank))
        self._asked = [actor.place.remote() for actor in self.actors]
        for actor in self.actors:
            actor.prepare.remote()  # behind the answer in its queue, and before all that needs torch

    def settle(self, patience_s: float, is_stopping: Callable[[], bool]) -> None:
        """Wait until every actor is there, and check that it is where its rank belongs.

        Raises `Unavailable` where nodes stay busy or actors are elsewhere, `PeerLost` where a node is gone, `Preempted` where the wait is
        to end.
        """
        begin_s, waiting = time.monotonic(), self._asked
        while waiting:
            _, waiting = self.ray.wait(waiting, num_returns=len(waiting), timeout=POLL_S)
            if waiting:
                self._look_after(time.monotonic() - begin_s, patience_s)
            if is_stopping():
                raise Preempted("asked to stop before the ranks had started; start it again")
        self.places = [Place(**place) for place in self.ray.get(self._asked)]
        check_places(self.places, self.nodes, self.shape)

    def _look_after(self, waited_s: float, patience_s: float) -> None:
        alive = {node.node_id for node in living_nodes(self.ray)}
        if gone := [node.address for node in self.nodes if node.node_id not in alive]:
            raise PeerLost(f"{', '.join(gone)} was lost before its ranks could start")
        if waited_s > patience_s and (busy := self._without_room()):
            raise Unavailable(
                f"{len(busy)} of {len(self.nodes)} nodes are busy ({', '.join(busy)}): {self.shape.ranks_per_node} ranks found no room "
                f"there within {patience_s:g} s; see `ray status`, or wait longer (--wait-s)"
            )
        if waited_s > patience_s + _BIRTH_S:
            raise PeerLost(
                f"some of {len(self.actors)} ranks have not started {waited_s:.0f} s after they were asked for; see `ray status`"
            )

    def _without_room(self) -> list[str]:
        from ray.util.placement_group import placement_group_table

        states = [placement_group_table(group).get("state") for group in self.groups]
        return [node.address for node, state in zip(self.nodes, states, strict=True) if state != "CREATED"]

    def check_directory(self, path: Path) -> None:
        """Every node sees the run directory. Raises `BadConfig`."""
        mark = path / f".seen-{os.getpid()}-{self.number}"
        mark.touch()
        try:
            seen = self._answers([actor.sees.remote(str(mark)) for actor in self.actors])
        finally:
            mark.unlink()
        blind = sorted({place.address for place, sees in zip(self.places, seen, strict=True) if not sees})
        if blind:
            raise BadConfig(f"run.dir is {path}, and {', '.join(blind)} cannot see what stands there; name a folder that all nodes share")

    def begin(self, job: str, config: Mapping[str, Any], arguments: Mapping[str, Any], timeout_s: float) -> None:
        """Set the ranks to work. Rank 0 opens the store in which they meet, on a port that its system chooses."""
        shape = self.shape
        host, secret = self.places[0].address if shape.nodes > 1 else LOOPBACK, Secret.fresh()
        (port,) = self._answers([self.actors[0].open_store.remote(timeout_s, host)])
        meeting = Meeting("listen", host=host, port=port)
        for rank, actor in enumerate(self.actors):
            node_number, local_rank = divmod(rank, shape.ranks_per_node)
            env = WorkerEnv(rank, shape.world_size, local_rank, shape.ranks_per_node, node_number, meeting, "ray", secret)
            self.results.append(actor.run.remote(job, dict(config), dict(arguments), env))

    def _answers(self, asked: Sequence[Any]) -> list[Any]:
        """What the actors say. What our own code raised there is raised here, as it was."""
        try:
            answers: list[Any] = self.ray.get(list(asked))
        except self.ray.exceptions.RayTaskError as failure:
            cause = failure.cause
            if isinstance(cause, ImportError):
                raise Unavailable(f"a rank cannot import {cause.name}; every node needs the environment that the driver has") from failure
            if isinstance(cause, CrossdockError):
                raise cause from None
            raise
        return answers

    def end(self) -> None:
        """End the actors and give their room back."""
        from ray.util.placement_group import remove_placement_group

        for actor in self.actors:
            self.ray.kill(actor, no_restart=True)
        for group in self.groups:
            remove_placement_group(group)
