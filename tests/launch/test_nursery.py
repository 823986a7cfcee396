"""Ranks that are forks of a waiting process: what is told of them when that process has gone."""

import os
import signal
import time

from crossdock.launch.local.nursery import Nursery

SLEEP = ["-m", "timeit", "-n", "1", "-r", "1", "-s", "import time", "time.sleep(60)"]
END = ["-m", "timeit", "-n", "1", "-r", "1", "pass"]


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
