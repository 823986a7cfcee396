"""The pool itself: answers, tracebacks, hangs, crashes and orphans."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.pool import Pool, RankFailed, RankHung


def total(rank: int, world_size: int, factor: int) -> tuple[int, torch.Tensor]:
    value = torch.tensor([rank + 1.0])
    dist.all_reduce(value)
    return rank * factor, value


def fail_on_last(rank: int, world_size: int) -> None:
    if rank == world_size - 1:
        raise KeyError("the wrong key")
    dist.barrier()


def die(rank: int, world_size: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def sleep(rank: int, world_size: int) -> None:
    time.sleep(60 if rank == 0 else 0)


def test_results_come_in_rank_order(ranks: Pool) -> None:
    results = ranks.run(2, total, 10)
    assert [number for number, _ in results] == [0, 10]
    assert all(value.item() == 3.0 for _, value in results)


def test_a_failing_rank_shows_its_traceback_and_the_world_is_replaced(ranks: Pool) -> None:
    with pytest.raises(RankFailed, match=r"(?s)--- rank 1 ---.*fail_on_last.*the wrong key"):
        ranks.run(2, fail_on_last)
    assert len(ranks.run(2, total, 1)) == 2


def test_a_crash_is_noticed(ranks: Pool) -> None:
    with pytest.raises(RankFailed, match="died with exit code -9"):
        ranks.run(2, die)


def test_a_hang_ends_at_the_time_limit(ranks: Pool) -> None:
    with pytest.raises(RankHung, match=r"ranks \[0\] of 2"):
        ranks.run(2, sleep, timeout_s=1.0)
    assert len(ranks.run(2, total, 1)) == 2


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent("""
            import os, signal
            import tests.test_pool
            from tests.pool import Pool
            if __name__ == "__main__":
                pool = Pool()
                pool.run(2, tests.test_pool.total, 1)
                print(*(process.pid for process in pool._worlds[2]._processes), flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
        """)
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=120, check=False
    )
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2, done.stderr
    deadline = time.monotonic() + 20
    while any(_is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_is_alive(pid) for pid in pids)


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
