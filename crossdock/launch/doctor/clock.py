"""The clock of a host: whether it is kept right, whether it jumps, and how far those of ranks are apart."""

import ctypes
import os
import time
from typing import TYPE_CHECKING

from crossdock.launch.doctor.report import Check

if TYPE_CHECKING:
    from torch.distributed import Store

STEP_S = 0.05
OFFSET_S = 1.0
_ROUNDS = 8
_TIME_ERROR = 5  # of adjtimex(2): nobody keeps this clock right


def clock(watch_s: float = 0.2) -> list[Check]:
    """Looks at the clock for `watch_s` seconds."""
    begin_s = time.time() - time.monotonic()
    time.sleep(watch_s)
    jumped_s = time.time() - time.monotonic() - begin_s
    if abs(jumped_s) > STEP_S:
        remedy = "two programs may set it: leave one of chrony, ntpd and the hypervisor's agent; leases and file times go wrong"
        return [Check("clock", "note", f"jumped by {jumped_s:+.2f} s within {watch_s:g} s", remedy)]
    if is_kept() is False:
        return [Check("clock", "ok", "steady; the kernel knows of no time server that keeps it right")]
    return [Check("clock", "ok", "steady, and kept right by a time server" if is_kept() else "steady")]


def is_kept() -> bool | None:
    """Whether the kernel's clock is synchronised, as adjtimex(2) says; None where it cannot be asked."""
    try:
        buffer = ctypes.create_string_buffer(512)  # larger than struct timex; modes = 0 asks and sets nothing
        state = ctypes.CDLL(None, use_errno=True).adjtimex(buffer)
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state != _TIME_ERROR


def offset(store: "Store", rank: int, world_size: int) -> tuple[float, float]:
    """(seconds that rank 0's clock is ahead of this one, half of the fastest round trip); every rank calls it at the same time.

    Rank 0 answers the others in turn through the store, and of some round trips the fastest counts (Cristian 1989).
    """
    if rank == 0:
        for peer in range(1, world_size):
            for turn in range(_ROUNDS):
                store.get(f"clock/{peer}/{turn}/asked")
                store.set(f"clock/{peer}/{turn}/answered", repr(time.time()))
        return 0.0, 0.0
    best_s, ahead_s = float("inf"), 0.0
    for turn in range(_ROUNDS):
        begin_s, begin_monotonic_s = time.time(), time.monotonic()
        store.set(f"clock/{rank}/{turn}/asked", str(os.getpid()))
        theirs_s = float(store.get(f"clock/{rank}/{turn}/answered"))
        trip_s = time.monotonic() - begin_monotonic_s
        if turn and trip_s < best_s:  # the first one waits for its turn
            best_s, ahead_s = trip_s, theirs_s - (begin_s + trip_s / 2)
    return ahead_s, best_s / 2
