"""MPI beside torch: the all-to-alls of a mesh over an MPI library, on the CPU; a process of a run that mpirun started.

MPI moves rows only while somebody is inside one of its calls. Whoever waits for an exchange drives it; while nobody waits, a thread looks
after those under way, so that rows travel while the program computes. It looks, and sleeps in between: a blocking wait
would keep a core busy that the program computes on.

Every receive is posted before any send, and messages carry the exchange's tag: that is `exchange`'s own contract, and measured at 64 KiB to
16 MiB between 2 and 4 processes of one host it took 0.3 to 1.0 times what MPI_Ialltoallv took.

This module never imports mpi4py: the launcher hands over its communicator.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from crossdock.runtime.transport.mesh import Mesh, ranks_of

_GROUPS = ("token_group", "metadata_group", "count_group", "weight_group", "node_group", "rail_group")
_SPIN_S = 1e-3  # a waiter's patience before it sleeps between looks: most exchanges inside a host are over by then
_NAP_S = 5e-5
_LOOK_S = 2e-4  # between two looks of the thread
_FAREWELL_S = 0.1  # between two looks for a rank that has left


class Progress:
    """Brings the exchanges of one process forward; owns the thread, and knows when a rank has left.

    `communicator` is one of mpi4py over all ranks of the run, used here for nothing but farewells. An exchange that takes longer than
    `timeout_s` raises.
    """

    def __init__(self, communicator: Any, timeout_s: float) -> None:
        self.communicator, self.timeout_s = communicator, timeout_s
        self._lock = threading.Lock()
        self._under_way: deque[MpiExchange] = deque()
        self._num_waiting = 0
        self._something_to_do = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._look_after, daemon=True, name="crossdock-mpi")
        self._thread.start()

    def look_after(self, exchange: "MpiExchange") -> None:
        """Bring the exchange forward until it is complete, or somebody waits for it."""
        with self._lock:
            self._under_way.append(exchange)
        self._something_to_do.set()

    def drive(self, exchange: "MpiExchange") -> None:
        """Bring the exchange to its end, on the calling thread. Raises `RuntimeError` where a rank has left or the time is over."""
        begin_s = time.monotonic()
        farewell_s = begin_s + _FAREWELL_S
        with self._lock:
            self._num_waiting += 1
        try:
            while not exchange.look():
                now_s = time.monotonic()
                if now_s > farewell_s:
                    farewell_s = now_s + _FAREWELL_S
                    self._check_all_present()
                    if now_s - begin_s > self.timeout_s:
                        raise RuntimeError(f"MPI: timed out after {self.timeout_s:g} s")
                if now_s - begin_s < _SPIN_S:
                    os.sched_yield()
                else:
                    time.sleep(_NAP_S)
        finally:
            with self._lock:
                self._num_waiting -= 1

    def close(self, failed: bool) -> None:
        """Stop the thread. Where this rank `failed`, tell the others, who would wait for it until their time is over."""
        with self._lock:  # else the thread could clear the event after it is set, and sleep for ever
            self._closed = True
            self._something_to_do.set()
        self._thread.join()
        if failed:
            here = self.communicator.Get_rank()
            for rank in range(self.communicator.Get_size()):
                if rank != here:
                    self.communicator.Isend(b"", rank).Free()

    def _check_all_present(self) -> None:
        if self.communicator.Iprobe():
            raise RuntimeError("MPI: connection closed: another rank has failed and left")

    def _look_after(self) -> None:
        while True:
            self._something_to_do.wait()
            with self._lock:
                if self._closed:
                    return
                while self._under_way and self._under_way[0].is_complete:
                    self._under_way.popleft()
                if not self._under_way:
                    self._something_to_do.clear()
                    continue
                oldest, num_waiting = self._under_way[0], self._num_waiting
            if num_waiting == 0:  # a waiter's looks bring all exchanges forward
                oldest.look()
            time.sleep(_LOOK_S)


class MpiExchange:
    """An all-to-all under way over MPI; see `exchange.Exchange`."""

    def __init__(self, received: Tensor, sent: Tensor, requests: list[Any], progress: Progress) -> None:
        self.received, self.progress = received, progress
        self.is_complete = False
        self._sent: Tensor | None = sent
        self._requests = requests
        self._error: BaseException | None = None
        self._looking = threading.Lock()  # two threads must not test one request at a time

    def wait(self) -> Tensor:
        """See `exchange.Exchange`."""
        if not self.is_complete:
            self.progress.drive(self)
        if self._error is not None:
            raise self._error
        return self.received

    def look(self) -> bool:
        """Bring it forward, unless another thread is at it; whether it is over."""
        if not self.is_complete and self._looking.acquire(blocking=False):
            try:
                while self._requests and self._requests[-1].Test():
                    self._requests.pop()
                if not self._requests:
                    self._sent, self.is_complete = None, True
            except Exception as error:  # a waiter is the one to hear of it
                self._error, self.is_complete = error, True
            finally:
                self._looking.release()
        return self.is_complete


class MpiGroup:
    """The ranks of one process group, as `exchange_start` takes them, with a communicator of their own."""

    def __init__(self, communicator: Any, progress: Progress) -> None:
        self.communicator, self.progress = communicator, progress

    def exchange_start(self, received: Tensor, sent: Tensor, receive_R: Sequence[int], send_R: Sequence[int], tag: int) -> MpiExchange:
        """Start one all-to-all of contiguous rows in the memory of the host."""
        here, num_ranks = self.communicator.Get_rank(), self.communicator.Get_size()
        into_R, from_R = _blocks(received, receive_R), _blocks(sent, send_R)
        peers = [(here + distance) % num_ranks for distance in range(1, num_ranks)]
        requests = [self.communicator.Irecv(into_R[peer], peer, tag) for peer in reversed(peers) if into_R[peer].size]
        requests += [self.communicator.Isend(from_R[peer], peer, tag) for peer in peers if from_R[peer].size]
        into_R[here][:] = from_R[here]
        exchange = MpiExchange(received, sent, requests, self.progress)
        if not exchange.look():
            self.progress.look_after(exchange)
        return exchange


def _blocks(rows: Tensor, count_R: Sequence[int]) -> list[Any]:
    """The bytes of each rank's rows, as numpy sees them: MPI then knows no dtype, and bf16 needs none."""
    row_bytes = rows.element_size() * rows.shape[1:].numel()
    memory = rows.detach().reshape(-1).view(torch.uint8).numpy()
    blocks, begin = [], 0
    for count in count_R:
        blocks.append(memory[begin : begin + count * row_bytes])
        begin += count * row_bytes
    return blocks


def over_mpi(mesh: Mesh, communicator: Any, progress: Progress) -> Mesh:
    """The mesh with its all-to-alls over MPI; sums, records and checkpoints stay with torch.

    communicator: mpi4py's, over all ranks of the world, in their order. Every rank calls this at the same time.
    """
    assert mesh.device.type == "cpu", f"MPI carries rows of the host's memory, these are on {mesh.device}"
    assert (communicator.Get_rank(), communicator.Get_size()) == (mesh.rank, mesh.world_size)
    groups: dict[str, MpiGroup] = {}
    for name in _GROUPS:
        ranks = ranks_of(getattr(mesh, name), mesh.rank)
        split = communicator.Split(color=min(ranks), key=ranks.index(mesh.rank))  # every rank must, also those that are alone in theirs
        if len(ranks) > 1:
            groups[name] = MpiGroup(split, progress)
    return replace(mesh, **groups)  # type: ignore[arg-type]
