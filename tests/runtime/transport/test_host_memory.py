"""Freed memory stays with the process: what is allocated again takes no page faults."""

import platform
import subprocess
import sys

import pytest

CHILD = """
import resource, torch
from crossdock.runtime.transport.host_memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for number in range(6):
        torch.full((40 + number, 1 << 18), 1.0).add(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
by_default = faults()
assert keep_freed_memory()
faults()
print(by_default, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone can be told")
def test_memory_that_was_freed_is_used_again() -> None:
    answer = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=60, check=True)
    by_default, kept = map(int, answer.stdout.split())
    assert by_default > 100
    assert kept < by_default / 10
