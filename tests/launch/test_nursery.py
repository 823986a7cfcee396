"""Ranks that are forks of a waiting process: how they end, what they are given, and what is told of them when that process has gone."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from crossdock.errors import Unavailable
from crossdock.launch.local.nursery import Nursery, ranks_ahead

ONCE = ["-m", "timeit", "-n", "1", "-r", "1"]
SLEEP = [*ONCE, "-s", "import time", "time.sleep(60)"]
END = [*ONCE, "pass"]


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as waiting:
        yield waiting


def python(statement: str) -> list[str]:
    return [*ONCE, "-s", "import os, sys", statement]


def test_each_rank_has_its_own_environment_and_its_exit_code_is_told(nursery: Nursery) -> None:
    ranks = [nursery.start(python("os._exit(int(os.environ['CODE']))"), {**os.environ, "CODE": str(code)}) for code in (0, 7, 76)]
    assert [rank.wait() for rank in ranks] == [0, 7, 76]
    assert len({rank.pid for rank in ranks}) == 3


def test_a_variable_of_the_first_rank_is_not_the_next_ones() -> None:
    with Nursery() as nursery:  # the first rank's environment is also that of the waiting process
        assert nursery.start(python("os._exit('ONLY_HERE' not in os.environ)"), {**os.environ, "ONLY_HERE": "1"}).wait() == 0
        assert nursery.start(python("os._exit('ONLY_HERE' in os.environ)"), dict(os.environ)).wait() == 0


def test_a_killed_rank_is_told_by_its_signal_and_the_next_one_starts(nursery: Nursery) -> None:
    rank = nursery.start(SLEEP, dict(os.environ))
    assert rank.poll() is None
    rank.send_signal(signal.SIGKILL)
    assert rank.wait() == -signal.SIGKILL
    rank.send_signal(signal.SIGKILL)  # its number may be somebody else's by now
    assert nursery.start(END, dict(os.environ)).wait() == 0


def test_what_ranks_print_is_not_taken_for_answers(nursery: Nursery) -> None:
    liar = """print('{"ended": 1, "code": 5}', flush=True); os.write(1, b'no JSON\\n')"""
    assert nursery.start(python(liar), dict(os.environ)).wait() == 0
    assert nursery.start(END, dict(os.environ)).wait() == 0


def test_a_rank_leads_a_session_of_its_own_and_reads_nothing(nursery: Nursery) -> None:
    check = "os._exit(0 if os.getsid(0) == os.getpid() and sys.stdin.read() == '' else 1)"
    assert nursery.start(python(check), dict(os.environ)).wait() == 0


def test_a_rank_has_torch_already_in_memory(nursery: Nursery) -> None:
    assert nursery.start(python("os._exit('torch' not in sys.modules)"), dict(os.environ)).wait() == 0


def test_where_no_process_can_be_started_that_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    with Nursery() as nursery, pytest.raises(Unavailable, match="cannot start a rank"):
        nursery.start(END, dict(os.environ))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Nursery() as nursery, pytest.raises(Unavailable, match="ends at once"):
        nursery.start(END, dict(os.environ))


def test_ranks_of_a_waiting_process_that_was_killed_are_lost_also_when_another_waits() -> None:
    with Nursery() as nursery:
        asleep = nursery.start(SLEEP, dict(os.environ))
        assert asleep.poll() is None
        assert nursery._process is not None
        nursery._process.kill()
        nursery._process.wait()
        assert nursery.start(END, dict(os.environ)).wait() == 0
        deadline_s = time.monotonic() + 10
        while asleep.poll() is None and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert asleep.poll() == -signal.SIGKILL


def test_one_that_has_begun_before_ranks_are_known_gives_each_the_threads_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    check = "import torch; os._exit(torch.get_num_threads())"
    with Nursery() as nursery:
        nursery.prepare()
        assert nursery._process is not None
        waiting = nursery._process.pid
        ranks = [nursery.start(python(check), {**os.environ, "OMP_NUM_THREADS": str(threads)}) for threads in (3, 1)]
        assert [rank.wait() for rank in ranks] == [3, 1]
        assert nursery._process.pid == waiting
    with pytest.raises(psutil.NoSuchProcess):
        psutil.Process(waiting)


def test_it_begins_early_only_where_ranks_will_be_started_here(monkeypatch: pytest.MonkeyPatch) -> None:
    with ranks_ahead() as nursery:
        assert (nursery._process is not None) == (sys.platform == "linux")
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    for name, value in {**torchrun, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with ranks_ahead() as nursery:
        assert nursery._process is None
