"""Shared by all tests: one thread per process, deterministic hypothesis, and the pool of worker ranks."""

import os

# Before torch is imported, here and in every process started from here: many ranks share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.pool import Pool

settings.register_profile(
    "crossdock",
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("crossdock")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pool]:
    """`ranks.run(world_size, function, *args)`: see tests/pool.py."""
    pool = Pool()
    yield pool
    pool.close()
