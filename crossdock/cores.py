"""How many cores this process may use, on any platform."""

import os
from pathlib import Path

CONTROL_GROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def available_cores() -> int:
    """Cores of the affinity mask, or of the machine on platforms without one, less what the control group (version 2) allows."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CONTROL_GROUP_QUOTA.read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no such control group, or "max"
        return max(1, cores)
