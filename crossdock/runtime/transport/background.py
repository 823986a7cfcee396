"""Background: continues movements while the program computes, always in the order in which they were begun.

A movement of two hops has work between them (rows are copied or summed at the rank where they change links), and nobody waits for the first
hop at that moment. On the CPU a thread does that work. On CUDA a stream of its own does, and the host only puts it into the queue.

Collectives must be started in the same order on every rank. They are: each `Background` runs its tasks in the order of submission, which is
the program's, and what it starts has a tag (CPU) or a place in the program (CUDA) of its own.
"""

import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Started(Protocol):
    """A collective under way."""

    def wait(self) -> Any:
        """Block (on CUDA: make the current stream wait) until it is complete; may be called again."""
        ...


class Task:
    """Something submitted; `started` blocks until it has run and gives what it returned, or raises what it raised."""

    def __init__(self, work: Callable[[], Started]) -> None:
        self._work, self._ran = work, threading.Event()
        self._started: Started | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """Do it, on whatever thread this is."""
        try:
            self._started = self._work()
        except BaseException as error:
            self._error = error
        finally:
            del self._work  # and with it the buffers that it holds
            self._ran.set()

    def started(self) -> Started:
        """The collective that the task started."""
        self._ran.wait()
        if self._error is not None:
            raise self._error
        assert self._started is not None
        return self._started


class Background:
    """Runs tasks in order beside the program: on a thread for CPU tensors, on a side stream for CUDA tensors."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._stream: Any = None
        self._tasks: queue.SimpleQueue[Task | None] | None = None

    def submit(self, work: Callable[[], Started]) -> Task:
        """Run `work`, which waits for one collective and starts another, after everything submitted before."""
        task = Task(work)
        if self.device.type == "cuda":
            self._run_on_stream(task)
            return task
        if self._tasks is None:
            self._tasks = queue.SimpleQueue()
            threading.Thread(target=_run_all, args=(self._tasks,), daemon=True, name="crossdock-background").start()
            weakref.finalize(self, self._tasks.put, None)
        self._tasks.put(task)
        return task

    def _run_on_stream(self, task: Task) -> None:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        # What the program has made for the task may still be under way; the collective that the task waits for waits for it anyway.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            task.run()
            # Memory of this stream that the collective reads goes back to this stream: it must not run ahead of the collective.
            task.started().wait()


def _run_all(tasks: "queue.SimpleQueue[Task | None]") -> None:
    while (task := tasks.get()) is not None:
        task.run()
        del task  # its buffers are the waiter's now
