"""The background runs tasks in order, beside the program, and hands on what they return or raise."""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from crossdock.runtime.transport.background import Background
from crossdock.runtime.transport.exchange import _NcclExchange


class Done:
    """A collective that is complete."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def wait(self) -> Any:
        return self.value


def test_tasks_run_in_order_without_being_waited_for() -> None:
    background, ran, gate = Background(), [], threading.Event()

    def task(number: int) -> Done:
        gate.wait(10)
        ran.append((number, threading.current_thread() is threading.main_thread()))
        return Done(number)

    tasks = [background.submit(lambda n=number: task(n)) for number in range(4)]
    assert ran == []
    gate.set()
    assert [task_.started().wait() for task_ in reversed(tasks)] == [3, 2, 1, 0]
    assert ran == [(number, False) for number in range(4)]


def test_what_a_task_raises_is_raised_where_it_is_waited_for_and_later_tasks_run() -> None:
    background = Background()

    def fails() -> Done:
        raise RuntimeError("connection closed by peer")

    first, second = background.submit(fails), background.submit(lambda: Done(2))
    assert second.started().wait() == 2
    with pytest.raises(RuntimeError, match="connection closed"):
        first.started()


def test_the_thread_ends_with_its_owner() -> None:
    background = Background()
    background.submit(lambda: Done(threading.current_thread())).started()
    thread = background.submit(lambda: Done(threading.current_thread())).started().wait()
    del background
    thread.join(timeout=10)
    assert not thread.is_alive()


class Stream:
    """A stream that only says what it is asked to do."""

    def __init__(self, name: str, said: list[str]) -> None:
        self.name, self.said = name, said

    def wait_stream(self, other: "Stream") -> None:
        self.said.append(f"{self.name} waits for {other.name}")


class Buffer:
    """Memory on a device."""

    def __init__(self, name: str, said: list[str]) -> None:
        self.name, self.said, self.device = name, said, torch.device("cpu")

    def record_stream(self, stream: Stream) -> None:
        self.said.append(f"{self.name} is kept for {stream.name}")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What streams are told, with two streams in place of CUDA's: the program's, and the first that is made."""
    told: list[str] = []
    current = [Stream("program", told)]

    @contextlib.contextmanager
    def use(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda _device: Stream("side", told))
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device=None: current[-1])
    return told


def test_on_cuda_a_task_reads_nothing_that_is_not_made_yet_and_frees_nothing_too_early(said: list[str]) -> None:
    """The side stream waits for the program's kernels, and the memory of the first hop's rows outlives its own kernels."""
    background = Background("cuda")
    first = _NcclExchange(Buffer("received", said), Buffer("sent", said), Done(None))  # type: ignore[arg-type]

    def second_hop() -> Done:
        first.wait()
        said.append("kernels")
        return Done(None)

    background.submit(second_hop)
    assert said == ["side waits for program", "received is kept for side", "sent is kept for side", "kernels"]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_tasks_run_on_a_stream_of_their_own() -> None:
    background = Background("cuda")
    begin = time.perf_counter()
    streams = [background.submit(lambda: Done(torch.cuda.current_stream().cuda_stream)).started().wait() for _ in range(2)]
    assert streams[0] == streams[1] != torch.cuda.current_stream().cuda_stream
    assert time.perf_counter() - begin < 60
