"""Drives a run on a Ray cluster: lays out the ranks, starts one actor for each, watches them, and starts anew when any is lost.

The driver needs no GPU. It holds one placement group per node (STRICT_PACK, on a node that it names), one actor per rank, and one
monitor, none of them detached: all of it ends with the driver. Ranks are numbered node by node in the order of the nodes' addresses, and
where each actor really runs is checked before a process group forms. One rank is never restarted into a group that lost it: the whole
incarnation goes, and the next one resumes from the newest checkpoint, on fewer nodes where that is allowed.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from crossdock.authentication import Secret
from crossdock.errors import BadConfig, CrossdockError, PeerLost, Unavailable
from crossdock.launch.config import RunConfig, resolved
from crossdock.launch.ending import Result
from crossdock.launch.local.children import Outcome, root_cause
from crossdock.launch.ranks.rendezvous import LOOPBACK
from crossdock.launch.ranks.worker_env import Meeting, WorkerEnv, in_ray_job
from crossdock.launch.ray import cluster as ray_cluster
from crossdock.launch.ray.cluster import Node
from crossdock.launch.ray.metrics import told_to_ray
from crossdock.launch.ray.nodes import living_nodes
from crossdock.launch.request import Request, check_world, prepare_directory, read_inputs, record_failure, run_directory
from crossdock.launch.restarts import Endurance, is_worth_another, newest_checkpoint, resuming
from crossdock.launch.scripts.allocation import Shape
from crossdock.launch.transport import check_transport
from crossdock.runtime.training.metrics import RunDirectory

_PEERS_S = 5.0  # what the other ranks get to report a death
_POLL_S = 0.25
_DEATH_S = 60.0  # Ray goes on listing a dead node for some health checks


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


@dataclass(frozen=True)
class Loss:
    """Why an incarnation ended that another may follow. `started` says whether its ranks had begun to train.

    `suspects` are the nodes of ranks that Ray lost: it may be some health checks before it knows whether the node went with them.
    """

    outcome: Outcome
    started: bool
    suspects: frozenset[str] = frozenset()


@dataclass
class Incarnation:
    """The actors of one start and what they promised."""

    number: int
    config: RunConfig
    shape: Shape
    nodes: tuple[Node, ...]
    groups: list[Any] = field(default_factory=list)
    actors: list[Any] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)


def launch(config: RunConfig, shape: Shape | None, policy: Policy, address: str | None = None) -> Result:
    """Train on the cluster at `address` (that of this job or machine where None) and return the run's result.

    `shape` None: as few nodes as hold `parallel.ranks`, or as many as the topology declares. Raises `Unavailable` where Ray or room is
    missing, `BadConfig` where the run directory cannot be reached, and what reading the configuration raises.
    """
    config = _with_reachable_directory(config)
    prepare_directory(config)  # an earlier run that has finished moves aside before anything is written of this one
    try:
        return _launch(config, shape, policy, address)
    except CrossdockError as failure:
        record_failure(config, failure.exit_code, str(failure), 0, config.parallel.local_ranks if shape is None else shape.world_size)
        raise


def _launch(config: RunConfig, shape: Shape | None, policy: Policy, address: str | None) -> Result:
    read_inputs(config)
    check_transport(config, "ray")
    with _connected(address) as ray:
        nodes = living_nodes(ray)
        if shape is None:
            shape = ray_cluster.shape_of(config, nodes, gpus=any(node.gpus for node in nodes))
        check_world(config, shape.world_size)
        if len(ray_cluster.able(nodes, shape)) < shape.nodes:
            raise Unavailable(ray_cluster.too_small(nodes, shape))
        return _Supervisor(ray, Request("train", config), shape, policy).run()


def ask(request: Request, address: str | None = None) -> Result:
    """A short job on `parallel.ranks` actors of the cluster at `address`, tried once. Raises `Unavailable`."""
    with _connected(address) as ray:
        nodes = living_nodes(ray)
        shape = ray_cluster.shape_of(request.config, nodes, gpus=any(node.gpus for node in nodes))
        return _Supervisor(ray, request, shape, Policy(restarts=0)).once()


class _Supervisor:
    def __init__(self, ray: Any, request: Request, shape: Shape, policy: Policy) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from crossdock.launch.ray.rank import Monitor

        self.ray, self.request, self.config, self.shape, self.policy = ray, request, request.config, shape, policy
        beside_us = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # lost only where the driver is
        # Ray may end it where memory is short, and then starts it again
        lasting = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
        self.monitor = ray.remote(Monitor).options(**lasting, scheduling_strategy=beside_us).remote()
        self.stopping = False
        self.suspects: frozenset[str] = frozenset()

    def run(self) -> Result:
        """Start incarnations until the run has ended, for good or bad."""
        checkpoints = RunDirectory(run_directory(self.config)).checkpoints
        number, endurance = 0, Endurance(self.policy.restarts, newest_checkpoint(checkpoints))
        failing_since_s = float("inf")
        with self._stopped_by_sigterm(), told_to_ray(run_directory(self.config)):
            while True:
                number += 1
                ending = self._incarnation(number)
                if isinstance(ending, Result):
                    return ending
                if self.stopping:
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
                    time.sleep(1.0)
                _say(endurance.announced(run_directory(self.config), number + 1, ending.outcome))

    def once(self) -> Result:
        """One start, whatever comes of it."""
        ending = self._incarnation(1)
        return ending if isinstance(ending, Result) else self._failed(ending.outcome)

    def _incarnation(self, number: int) -> Result | Loss:
        """One start of all ranks: the run's result, good or bad, or what was lost."""
        config, shape, nodes = self._layout(number)
        incarnation = Incarnation(number, config, shape, tuple(nodes))
        try:
            try:
                self._start(incarnation)
            except self.ray.exceptions.RayError as failure:
                first_line = (str(failure).splitlines() or ["no reason given"])[0]
                return Loss(Outcome(0, PeerLost.exit_code, f"the ranks could not be started ({first_line})"), False, self.suspects)
            except PeerLost as failure:
                return Loss(Outcome(0, PeerLost.exit_code, str(failure)), False, self.suspects)
            return self._watch(incarnation)
        finally:
            self._end(incarnation)

    def _layout(self, number: int) -> tuple[RunConfig, Shape, list[Node]]:
        """Which nodes to use now. Raises `Unavailable` where too few are left after the wait."""
        least = self.shape.nodes if self.policy.min_nodes is None else self.policy.min_nodes
        deadline_s = time.monotonic() + (self.policy.wait_s if number > 1 else 0.0)
        while True:
            nodes = ray_cluster.able(living_nodes(self.ray), self.shape)
            if len(nodes) >= self.shape.nodes:
                return resuming(self.config, number), self.shape, ray_cluster.chosen(nodes, self.shape.nodes, self.suspects)
            if time.monotonic() > deadline_s:
                break
            time.sleep(_POLL_S)
        smaller = ray_cluster.shrunk(self.config, self.shape, len(nodes), least)
        if smaller is None:
            raise Unavailable(ray_cluster.too_small(living_nodes(self.ray), replace(self.shape, nodes=least)))
        config, shape = smaller
        _say(f"going on with {shape.nodes} of {self.shape.nodes} nodes, {shape.world_size} ranks")
        return resuming(config, number), shape, ray_cluster.chosen(nodes, shape.nodes, self.suspects)

    def _start(self, incarnation: Incarnation) -> None:
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from crossdock.launch.ray.rank import Rank

        ray, shape, config = self.ray, incarnation.shape, incarnation.config
        resources = {"CPU": float(shape.cores_per_rank), **({"GPU": 1.0} if shape.gpus else {})}
        bundles = [resources] * shape.ranks_per_node
        for node in incarnation.nodes:
            on_node = [{"ray.io/node-id": node.node_id}] * shape.ranks_per_node
            incarnation.groups.append(placement_group(bundles, strategy="STRICT_PACK", bundle_label_selector=on_node))
        self._wait_for_room(incarnation)
        threads = {"OMP_NUM_THREADS": str(shape.cores_per_rank), "OMP_WAIT_POLICY": "PASSIVE"}
        for rank in range(shape.world_size):
            node_number, bundle = divmod(rank, shape.ranks_per_node)
            options = ray.remote(Rank).options(
                num_cpus=shape.cores_per_rank,
                num_gpus=1 if shape.gpus else 0,
                max_restarts=0,
                max_task_retries=0,
                runtime_env={"env_vars": threads},
                scheduling_strategy=PlacementGroupSchedulingStrategy(incarnation.groups[node_number], bundle),
            )
            incarnation.actors.append(options.remote(incarnation.number, rank, self.monitor))
        places = ray.get([actor.place.remote() for actor in incarnation.actors])
        self._check_places(incarnation, places)
        arguments = dict(self.request.arguments)
        if self.request.job == "train":
            arguments["resume"] = prepare_directory(config)
            self._check_directory(incarnation, places)
        several = shape.nodes > 1
        host, secret = places[0]["address"] if several else LOOPBACK, Secret.fresh()
        port = ray.get(incarnation.actors[0].open_store.remote(config.parallel.timeout_s, host))
        meeting = Meeting("listen", host=host, port=port)
        for rank, actor in enumerate(incarnation.actors):
            node_number, local_rank = divmod(rank, shape.ranks_per_node)
            env = WorkerEnv(rank, shape.world_size, local_rank, shape.ranks_per_node, node_number, meeting, "ray", secret)
            incarnation.results.append(actor.run.remote(self.request.job, resolved(config), arguments, env))

    def _wait_for_room(self, incarnation: Incarnation) -> None:
        """Until every group has its node. Raises `Unavailable` where nodes are busy, `PeerLost` where one of them is gone."""
        waiting = [group.ready() for group in incarnation.groups]
        patience_s = self.policy.wait_s if incarnation.number == 1 else max(self.policy.wait_s, _DEATH_S)
        deadline_s = time.monotonic() + patience_s
        while waiting:
            _, waiting = self.ray.wait(waiting, num_returns=len(waiting), timeout=_POLL_S)
            alive = {node.node_id for node in living_nodes(self.ray)}
            gone = [node.address for node in incarnation.nodes if node.node_id not in alive]
            if gone:
                raise PeerLost(f"{', '.join(gone)} was lost before its ranks could start")
            if waiting and time.monotonic() > deadline_s:
                ranks = incarnation.shape.ranks_per_node
                raise Unavailable(
                    f"{len(waiting)} of {len(incarnation.nodes)} nodes are busy: {ranks} ranks found no room there "
                    f"within {patience_s:g} s; see `ray status`, or wait longer (--wait-s)"
                )

    def _check_places(self, incarnation: Incarnation, places: Sequence[Mapping[str, str]]) -> None:
        """Every actor runs on the node that its rank was given, and the topology agrees. Raises `BadConfig`."""
        from crossdock.launch.ranks.worker import nodes_of_ranks

        config, per_node = incarnation.config, incarnation.shape.ranks_per_node
        for rank, place in enumerate(places):
            wanted = incarnation.nodes[rank // per_node]
            assert place["node_id"] == wanted.node_id, f"rank {rank} runs on {place['address']} and belongs on {wanted.address}"
        started = tuple(rank // per_node for rank in range(len(places)))
        nodes_of_ranks(started, read_inputs(config).topology, config.parallel.expert)

    def _check_directory(self, incarnation: Incarnation, places: Sequence[Mapping[str, str]]) -> None:
        """Every node sees the run directory. Raises `BadConfig`."""
        path = run_directory(incarnation.config)
        mark = path / f".seen-{os.getpid()}-{incarnation.number}"
        mark.touch()
        try:
            seen = self.ray.get([actor.sees.remote(str(mark)) for actor in incarnation.actors])
        finally:
            mark.unlink()
        blind = sorted({place["address"] for place, sees in zip(places, seen, strict=True) if not sees})
        if blind:
            raise BadConfig(f"run.dir is {path}, and {', '.join(blind)} cannot see what stands there; name a folder that all nodes share")

    def _watch(self, incarnation: Incarnation) -> Result | Loss:
        """Wait for the ranks. The first loss gives the others a few seconds to report; then the incarnation is over."""
        outcomes: dict[int, Outcome] = {}
        pending = dict(zip(incarnation.results, range(len(incarnation.results)), strict=True))
        fields: Mapping[str, Any] = {}
        first_dead: int | None = None
        deadline_s = float("inf")
        begin_s = time.monotonic()
        while pending and time.monotonic() < deadline_s:
            if self.stopping:
                self.monitor.stop.remote()
            done, _ = self.ray.wait(list(pending), num_returns=1, timeout=_POLL_S)
            for reference in done:
                rank = pending.pop(reference)
                outcomes[rank], found = self._outcome(reference, rank, incarnation)
                fields = found if rank == 0 else fields
                if outcomes[rank].exit_code != 0 and first_dead is None:
                    first_dead, deadline_s = rank, time.monotonic() + _PEERS_S
            for rank in self._silent(incarnation, begin_s) - outcomes.keys():
                if rank in pending.values():
                    where = incarnation.nodes[rank // incarnation.shape.ranks_per_node].address
                    message = f"rank {rank} on {where} has not been heard of for {self.policy.silence_s:g} s: it is stopped, or cut off"
                    outcomes[rank] = Outcome(rank, PeerLost.exit_code, message, signalled=True)
                    first_dead = rank if first_dead is None else first_dead
                    deadline_s = min(deadline_s, time.monotonic())
        if all(outcome.exit_code == 0 for outcome in outcomes.values()):
            return Result(0, fields)
        cause = root_cause(list(outcomes.values()), first_dead)
        lost = [rank for rank, outcome in outcomes.items() if outcome.signalled]
        suspects = frozenset(incarnation.nodes[rank // incarnation.shape.ranks_per_node].node_id for rank in lost)
        return Loss(cause, started=True, suspects=suspects) if is_worth_another(cause) else self._failed(cause)

    def _outcome(self, reference: Any, rank: int, incarnation: Incarnation) -> tuple[Outcome, Mapping[str, Any]]:
        try:
            answer = self.ray.get(reference)
        except self.ray.exceptions.RayError:
            where = incarnation.nodes[rank // incarnation.shape.ranks_per_node].address
            message = f"rank {rank} on {where} was killed, or its node was lost"
            return Outcome(rank, PeerLost.exit_code, message, signalled=True), {}
        code = answer.pop("exit_code")
        return Outcome(rank, code, answer.get("message", ""), answer.get("traceback", "")), answer

    def _silent(self, incarnation: Incarnation, begin_s: float) -> set[int]:
        try:
            asked = self.monitor.silent_s.remote(incarnation.number, incarnation.shape.world_size)
            silent_s = self.ray.get(asked, timeout=self.policy.silence_s)
        except self.ray.exceptions.GetTimeoutError:
            return set()
        longest_s = time.monotonic() - begin_s
        return {rank for rank, rank_s in enumerate(silent_s) if min(rank_s, longest_s) > self.policy.silence_s}

    def _end(self, incarnation: Incarnation) -> None:
        from ray.util.placement_group import remove_placement_group

        for actor in incarnation.actors:
            self.ray.kill(actor, no_restart=True)
        for group in incarnation.groups:
            remove_placement_group(group)

    def _failed(self, outcome: Outcome) -> Result:
        sys.stderr.write(outcome.traceback)
        _say(f"error: {outcome.message}")
        if self.request.job != "train":
            return Result(outcome.exit_code, {"message": outcome.message, "rank": outcome.rank})
        return record_failure(self.config, outcome.exit_code, outcome.message, outcome.rank, self.shape.world_size)

    @contextlib.contextmanager
    def _stopped_by_sigterm(self) -> Iterator[None]:
        """Within the block, SIGTERM (`ray job stop`) asks the ranks to save and to end with 75."""

        def ask(number: int, frame: Any) -> None:
            self.stopping = True

        previous = signal.signal(signal.SIGTERM, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    try:
        import ray
    except ImportError as failure:
        raise Unavailable("Ray is not installed; run: pip install 'crossdock[ray]'") from failure
    try:
        ray.init(address=address or "auto", log_to_driver=True, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as failure:
        first_line = (str(failure).splitlines() or ["no reason given"])[0]
        raise Unavailable(f"no Ray cluster answers ({first_line}); start one by `ray start --head`, or name it by --address") from failure
    try:
        yield ray
    finally:
        ray.shutdown()


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


def _say(message: str) -> None:
    print(f"crossdock: {message}", file=sys.stderr, flush=True)
