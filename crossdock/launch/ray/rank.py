"""What runs on a Ray cluster's nodes: one actor per rank, and the monitor that their heartbeats reach.

A rank's actor runs one function on its main thread, so that signals work as everywhere; a second thread sends a heartbeat every
`BEAT_S` and is told there when the run is to save and stop.
"""

import os
import signal
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import ray

from crossdock import strict_yaml
from crossdock.errors import Preempted
from crossdock.launch.ranks.rendezvous import listen, signed
from crossdock.launch.ranks.worker_env import WorkerEnv

BEAT_S = 0.5
_ANSWER_S = 5.0


class Monitor:
    """The non-detached controller's board: when each rank was last heard of, and whether they shall stop. It dies with the driver."""

    def __init__(self) -> None:
        self.born_s = time.monotonic()
        self.heard_s: dict[tuple[int, int], float] = {}
        self.stopping = False

    def beat(self, incarnation: int, rank: int) -> bool:
        """Note a heartbeat; says whether the rank shall save and stop."""
        self.heard_s[incarnation, rank] = time.monotonic()
        return self.stopping

    def silent_s(self, incarnation: int, world_size: int) -> list[float]:
        """Seconds since each rank of the incarnation was heard of, or since this board has been there to hear."""
        now_s = time.monotonic()
        return [now_s - self.heard_s.get((incarnation, rank), self.born_s) for rank in range(world_size)]

    def stop(self) -> None:
        """Ask all ranks to save and stop."""
        self.stopping = True


class Rank:
    """One rank. It is never restarted alone: on any loss the whole incarnation goes."""

    def __init__(self, incarnation: int, rank: int, monitor: Any, threads: int) -> None:
        self.incarnation, self.rank, self.monitor = incarnation, rank, monitor
        self.store: Any = None
        self.running = False
        # torch reads them when it is loaded. A runtime environment would keep Ray from giving us a process that it has in store
        os.environ.update({"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"})
        threading.Thread(target=self._beat, daemon=True, name="heartbeat").start()

    def place(self) -> dict[str, Any]:
        """Where this rank runs: the fields of a `Place`."""
        gpus = tuple(str(gpu) for gpu in ray.get_gpu_ids())
        return {"node_id": ray.get_runtime_context().get_node_id(), "address": ray.util.get_node_ip_address(), "gpus": gpus}

    def prepare(self) -> None:
        """Import what a run needs, which takes seconds, while the driver reads its configuration."""
        import crossdock.launch.ranks.worker  # noqa: F401

    def sees(self, path: str) -> bool:
        """Whether this node has that file: run directories are shared by all nodes."""
        return Path(path).exists()

    def open_store(self, timeout_s: float, host: str) -> int:
        """Open the store in which the ranks meet, which this rank holds on that address of its node; returns its port."""
        self.store = listen(self.rank, host, timeout_s)
        return int(self.store.port)

    def run(self, job: str, config: dict[str, Any], arguments: dict[str, Any], env: WorkerEnv) -> dict[str, Any]:
        """Do the job as the rank that `env` says; returns the exit code with the fields of the result. Never raises."""
        from crossdock.launch.config import RunConfig
        from crossdock.launch.ranks.worker import explain, run_job
        from crossdock.launch.request import Request

        signal.signal(signal.SIGTERM, _stopped_early)  # until training puts its own in place; Ray's would end the process
        self.running = True
        try:
            run_config = strict_yaml.validated(RunConfig, strict_yaml.Document(config, "the driver's configuration", {}))
            result = run_job(Request(job, run_config, arguments), env, None if self.store is None else signed(self.store, env.secret))
        except Exception as failure:
            code, message = explain(failure)
            return {"exit_code": code, "message": message, "traceback": "".join(traceback.format_exception(failure)) if code == 1 else ""}
        finally:
            self.running = False
        return {"exit_code": result.exit_code, **result.fields}

    def _beat(self) -> None:
        asked = False
        while True:
            try:
                stop = ray.get(self.monitor.beat.remote(self.incarnation, self.rank), timeout=_ANSWER_S)
            except (ray.exceptions.GetTimeoutError, ray.exceptions.ActorUnavailableError):
                stop = False  # Ray starts the monitor again; a rank that fell silent over that would be taken for a lost one
            except ray.exceptions.RayError:
                return  # the driver is gone, and this process goes with it
            if stop and self.running and not asked:
                asked = True
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(BEAT_S)


def _stopped_early(number: int, frame: Any) -> None:
    raise Preempted("asked to stop before there was anything to save; start it again")
