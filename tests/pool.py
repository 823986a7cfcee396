"""Worker processes that stay alive between tests: one gloo world for each world size, so that a multi-rank test costs milliseconds.

    results = pool.run(4, function, *args)      function(rank, world_size, *args) on every rank; the results in rank order

`function` stands at the top level of an importable module, and its arguments and result can be pickled (tensors detached). A rank that
raises makes `run` raise `RankFailed` with that rank's traceback; a hang ends at the time limit with every rank's stack on stderr. Either
way the world is killed and the next call starts a new one. Workers end with their parent, whatever ends it.
"""

import contextlib
import faulthandler
import functools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

CALL_TIMEOUT_S = 60.0
START_TIMEOUT_S = 120.0
GRACE_S = 2.0


class RankFailed(AssertionError):
    """A rank raised; the message holds the traceback of each that did."""


class RankHung(AssertionError):
    """A rank did not answer in time."""


class World:
    """The processes of one world size."""

    def __init__(self, world_size: int) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="crossdock-pool-")
        store = Path(self._directory.name) / "store"
        spawn = multiprocessing.get_context("spawn")
        self._pipes: list[multiprocessing.connection.Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_work, args=(rank, world_size, f"file://{store}", theirs), daemon=True, name=f"pool-{rank}")
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._answers(time.monotonic() + START_TIMEOUT_S, "start")

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], timeout_s: float) -> list[Any]:
        """Call `function` on every rank; raises `RankFailed` or `RankHung`, after which this world is of no more use."""
        task = pickle.dumps((function, args))
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):  # a rank that died is noticed when its answer is missing
                pipe.send_bytes(task)
        return self._answers(time.monotonic() + timeout_s, getattr(function, "__name__", str(function)))

    def kill(self) -> None:
        """End all processes, at once."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
            process.close()
        for pipe in self._pipes:
            pipe.close()
        self._directory.cleanup()

    def _answers(self, deadline: float, what: str) -> list[Any]:
        """One answer from every rank. After the first failure the others get a moment to fail as well, then what is known is raised."""
        waiting = dict(zip(self._pipes, range(len(self._pipes)), strict=True))
        answers: list[Any] = [None] * len(self._pipes)
        failures: dict[int, str] = {}
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, multiprocessing.connection.Connection)
                rank = waiting.pop(pipe)
                try:
                    is_good, answer = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join(GRACE_S)
                    is_good, answer = False, f"the process died with exit code {self._processes[rank].exitcode}\n"
                if is_good:
                    answers[rank] = answer
                else:
                    failures[rank] = answer
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if failures:
            silent = f"no answer from ranks {sorted(waiting.values())}\n" if waiting else ""
            raise RankFailed(f"{what} failed\n{silent}" + "\n".join(f"--- rank {r} ---\n{failures[r]}" for r in sorted(failures)))
        if waiting:
            self._dump_stacks()
            raise RankHung(
                f"{what}: ranks {sorted(waiting.values())} of {len(self._pipes)} did not answer in time; their stacks are on stderr"
            )
        return answers

    def _dump_stacks(self) -> None:
        for process in self._processes:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.5)


class Pool:
    """Worlds by size, started when first used."""

    def __init__(self) -> None:
        self._worlds: dict[int, World] = {}

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = CALL_TIMEOUT_S) -> list[Any]:
        """`function(rank, world_size, *args)` on every rank; a world of one is this process. See the module's first lines."""
        if world_size == 1:
            return [function(0, 1, *args)]
        if world_size not in self._worlds:
            self._worlds[world_size] = World(world_size)
        try:
            return self._worlds[world_size].run(function, args, timeout_s)
        except BaseException:
            self._worlds.pop(world_size).kill()
            raise

    def close(self) -> None:
        """End all worlds."""
        while self._worlds:
            self._worlds.popitem()[1].kill()


@functools.cache
def mesh_for(rank: int, world_size: int, expert_parallel: int, node_of_rank: tuple[int, ...] | None = None) -> Any:
    """The mesh of this worker, made once for each shape: all ranks must ask for the same ones in the same order."""
    from crossdock.runtime.transport.mesh import Mesh

    if world_size == 1:
        return Mesh.single()
    return Mesh.create(rank, world_size, expert_parallel, node_of_rank, timeout_s=CALL_TIMEOUT_S)


def _work(rank: int, world_size: int, init_method: str, pipe: multiprocessing.connection.Connection) -> None:
    """A worker's life: join the world, then answer calls until the pipe closes."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it then kills the workers
    answer: tuple[bool, Any] = (True, None)
    try:
        import torch

        from crossdock.runtime.transport.mesh import initialise

        torch.set_num_threads(1)
        initialise(rank, world_size, init_method=init_method, timeout_s=START_TIMEOUT_S)
    except BaseException:
        answer = (False, traceback.format_exc())
    while True:
        pipe.send_bytes(_packed(answer))
        try:
            task = pipe.recv_bytes()
        except EOFError:
            os._exit(0)
        try:
            function, args = pickle.loads(task)
            answer = (True, function(rank, world_size, *args))
        except BaseException:
            answer = (False, traceback.format_exc())
            sys.stdout.flush()


def _packed(answer: tuple[bool, Any]) -> bytes:
    # Plain pickle copies tensors by value; a pipe's own pickler would pass shared-memory handles that die with the worker.
    try:
        return pickle.dumps(answer)
    except Exception:
        return pickle.dumps((False, traceback.format_exc()))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
