"""Drives a run on a Ray cluster: lays out the ranks, starts one actor for each, watches them, and starts anew when any is lost.

The driver needs no GPU. It holds one placement group per node (STRICT_PACK, on a node that it names), one actor per rank, and one
monitor, none of them detached: all of it ends with the driver. Ranks are numbered node by node in the order of the nodes' addresses, and
where each actor really runs is checked before a process group forms. One rank is never restarted into a group that lost it: the whole
incarnation goes, and the next one resumes from the newest checkpoint, on fewer nodes where that is allowed.
"""

import sys
import time
from dataclasses import dataclass, replace

from crossdock.errors import BadConfig, PeerLost, Preempted, Unavailable
from crossdock.launch.config import RunConfig, resolved
from crossdock.launch.ending import Result
from crossdock.launch.local.children import Outcome
from crossdock.launch.ranks.worker import ending_recorded, nodes_of_ranks
from crossdock.launch.ranks.worker_env import in_ray_job
from crossdock.launch.ray import cluster as ray_cluster
from crossdock.launch.ray.ahead import Ahead, Driver
from crossdock.launch.ray.cluster import Node
from crossdock.launch.ray.connection import connected, first_line, say
from crossdock.launch.ray.incarnation import POLL_S, Incarnation
from crossdock.launch.ray.metrics import told_to_ray
from crossdock.launch.ray.nodes import living_nodes
from crossdock.launch.ray.watch import Ending, Loss, Watch
from crossdock.launch.request import (
    Request,
    check_replan,
    check_world,
    prepare_directory,
    read_inputs,
    record_failure_of_ranks,
    run_directory,
)
from crossdock.launch.restarts import Endurance, newest_checkpoint, resuming
from crossdock.launch.scripts.allocation import Shape
from crossdock.launch.transport import check_transport
from crossdock.runtime.training.metrics import RunDirectory

_DEATH_S = 60.0  # Ray goes on listing a dead node for some health checks
_AGAIN_S = 1.0


@dataclass(frozen=True)
class Policy:
    """How far a run may go on after losses.

    `restarts` in a row without a new checkpoint are the most that are tried. A rank that has not been heard of for `silence_s` is lost.
    Missing nodes are waited for `wait_s`; then the run goes on with at least `min_nodes`.
    """

    restarts: int = 3
    silence_s: float = 20.0
    wait_s: float = 60.0
    min_nodes: int | None = None


def launch(config: RunConfig, shape: Shape | None, policy: Policy, ahead: Ahead) -> Result:
    """Train on the cluster of the driver `ahead`, and return the run's result.

    `shape` None: as few nodes as hold `parallel.ranks`, or as many as the topology declares. Raises `Unavailable` where Ray or room is
    missing, `BadConfig` where the run directory cannot be reached or the topology says other nodes, `Preempted` where it was to stop
    before there was anything to save, and what reading the configuration raises. However it ends, `result.json` says so.
    """
    config = _with_reachable_directory(config)
    with ending_recorded(config, config.parallel.local_ranks if shape is None else shape.world_size):
        prepare_directory(config)  # an earlier run that has finished moves aside before anything is written of this one
        return _launch(config, shape, policy, ahead)


def _launch(config: RunConfig, shape: Shape | None, policy: Policy, ahead: Ahead) -> Result:
    topology = read_inputs(config).topology
    check_transport(config, "ray")
    check_replan(config)
    driver = ahead.driver()
    nodes = living_nodes(driver.ray)
    if shape is None:
        shape = ray_cluster.shape_of(config.parallel.local_ranks, topology, nodes, config.device)
    check_world(config, shape.world_size)
    if len(ray_cluster.able(nodes, shape)) < shape.nodes:
        raise Unavailable(ray_cluster.too_small(nodes, shape))
    return _Supervisor(driver, Request("train", config), shape, policy).run()


def ask(request: Request, address: str | None = None) -> Result:
    """A short job on `parallel.ranks` actors of the cluster at `address`, tried once. Raises `Unavailable`."""
    with connected(address) as ray:
        config = request.config
        shape = ray_cluster.shape_of(config.parallel.local_ranks, read_inputs(config).topology, living_nodes(ray), config.device)
        return _Supervisor(Driver(ray), request, shape, Policy(restarts=0)).once()


class _Supervisor:
    def __init__(self, driver: Driver, request: Request, shape: Shape, policy: Policy) -> None:
        self.driver, self.ray = driver, driver.ray
        self.request, self.config, self.shape, self.policy = request, request.config, shape, policy
        self.suspects: frozenset[str] = frozenset()

    def run(self) -> Result:
        """Start incarnations until the run has ended, for good or bad. SIGTERM asks the ranks to save and to end with 75."""
        checkpoints = RunDirectory(run_directory(self.config)).checkpoints
        number, endurance = 0, Endurance(self.policy.restarts, newest_checkpoint(checkpoints))
        failing_since_s = float("inf")
        with told_to_ray(run_directory(self.config)):
            while True:
                number += 1
                ending = self._incarnation(number)
                if not isinstance(ending, Loss):
                    return self._ended(ending)
                if self.driver.is_stopping:
                    return self._failed(ending.outcome)
                self.suspects = ending.suspects
                now_s = time.monotonic()
                if ending.started:
                    endurance, failing_since_s = endurance.after_loss(newest_checkpoint(checkpoints)), float("inf")
                    if endurance.is_over:
                        return self._failed(endurance.given_up(ending.outcome))
                else:  # on nodes that Ray does not know yet to be dead: no fault of the run's
                    failing_since_s = min(failing_since_s, now_s)
                    if now_s - failing_since_s > _DEATH_S:
                        return self._failed(ending.outcome)
                    time.sleep(_AGAIN_S)
                say(endurance.announced(run_directory(self.config), number + 1, ending.outcome))

    def once(self) -> Result:
        """One start, whatever comes of it."""
        ending = self._incarnation(1)
        return self._failed(ending.outcome) if isinstance(ending, Loss) else self._ended(ending)

    def _incarnation(self, number: int) -> Ending:
        """One start of all ranks: the run's result, good or bad, or what was lost."""
        config, shape, nodes = self._layout(number)
        started = tuple(rank // shape.ranks_per_node for rank in range(shape.world_size))
        nodes_of_ranks(started, read_inputs(config).topology, config.parallel.expert)  # refuses what contradicts the topology
        incarnation = self.driver.incarnation(number, shape, nodes)
        try:
            try:
                self._start(incarnation, config)
            except self.ray.exceptions.RayTaskError:  # it holds an exception of our own code
                raise
            except self.ray.exceptions.RayError as failure:
                why = first_line(failure)
                if getattr(failure, "actor_init_failed", False):  # no node and no time would help
                    raise Unavailable(f"the ranks cannot be started ({why}); every node needs this environment") from failure
                return Loss(Outcome(0, PeerLost.exit_code, f"the ranks could not be started ({why})"), False, self.suspects)
            except PeerLost as failure:
                return Loss(Outcome(0, PeerLost.exit_code, str(failure)), False, self.suspects)
            return Watch(self.ray, self.driver.monitor, incarnation, self.policy.silence_s).until_it_ends(lambda: self.driver.is_stopping)
        finally:
            incarnation.end()

    def _layout(self, number: int) -> tuple[RunConfig, Shape, list[Node]]:
        """Which nodes to use now. Raises `Unavailable` where too few are left after the wait, `Preempted` where it is not to wait."""
        least = self.shape.nodes if self.policy.min_nodes is None else self.policy.min_nodes
        deadline_s = time.monotonic() + (self.policy.wait_s if number > 1 else 0.0)
        while True:
            nodes = ray_cluster.able(living_nodes(self.ray), self.shape)
            if len(nodes) >= self.shape.nodes:
                return resuming(self.config, number), self.shape, ray_cluster.chosen(nodes, self.shape.nodes, self.suspects)
            if self.driver.is_stopping:
                raise Preempted("asked to stop while nodes were missing; start it again, and it resumes from its newest checkpoint")
            if time.monotonic() > deadline_s:
                break
            time.sleep(POLL_S)
        smaller = ray_cluster.shrunk(self.config, self.shape, len(nodes), least)
        if smaller is None:
            raise Unavailable(ray_cluster.too_small(living_nodes(self.ray), replace(self.shape, nodes=least)))
        config, shape = smaller
        say(f"going on with {shape.nodes} of {self.shape.nodes} nodes, {shape.world_size} ranks")
        return resuming(config, number), shape, ray_cluster.chosen(nodes, shape.nodes, self.suspects)

    def _start(self, incarnation: Incarnation, config: RunConfig) -> None:
        patience_s = self.policy.wait_s if incarnation.number == 1 else max(self.policy.wait_s, _DEATH_S)
        incarnation.settle(patience_s, lambda: self.driver.is_stopping)
        arguments = dict(self.request.arguments)
        if self.request.job == "train":
            arguments["resume"] = prepare_directory(config)
            incarnation.check_directory(run_directory(config))
        incarnation.begin(self.request.job, resolved(config), arguments, config.parallel.timeout_s)

    def _ended(self, ending: Result | Outcome) -> Result:
        return ending if isinstance(ending, Result) else self._failed(ending)

    def _failed(self, outcome: Outcome) -> Result:
        sys.stderr.write(outcome.traceback)
        say(f"error: {outcome.message}")
        if self.request.job != "train":
            return Result(outcome.exit_code, {"message": outcome.message, "rank": outcome.rank})
        return record_failure_of_ranks(self.config, outcome.exit_code, outcome.message, outcome.rank, self.shape.world_size)


def _with_reachable_directory(config: RunConfig) -> RunConfig:
    """The run directory as an absolute path. In a job the working directory is a copy that Ray deletes: raises `BadConfig` there."""
    path = run_directory(config)
    if path.is_absolute():
        return config
    if in_ray_job():
        raise BadConfig(
            f"run.dir is {path}, inside the copy of the working directory that Ray made for this job and deletes after it; "
            "set run.dir to an absolute path that every node reaches"
        )
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": str(path.absolute())})})
