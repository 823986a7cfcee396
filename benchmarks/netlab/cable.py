"""Cables with latency between the hosts of a laboratory and its switch, for kernels with or without netem: `python cable.py SECONDS ...`.

Runs in the switch's namespace. Cable i is a pair of TAP devices, `far<i>` (moved into host i afterwards, as its eth0) and `port<i>` (on
the bridge). What the host sends is handed on SECONDS later, what it receives at once; rates are tc's business at either end. Frames pass
whole with their segmentation offload, up to 64 KiB at a time. Ends with its namespace.
"""

import contextlib
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque

TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
CHECKSUM_AND_TSO = 0x01 | 0x02 | 0x04  # checksums, TCP over IPv4, TCP over IPv6
LONGEST_FRAME_BYTES = 70_000
BATCH = 64  # frames of one device before the others are looked at


def tap(name: str) -> int:
    """A new TAP device of this namespace; the descriptor moves its frames, each behind a virtio header."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22s", name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, b""))
    fcntl.ioctl(device, TUNSETOFFLOAD, CHECKSUM_AND_TSO)
    return device


def frames(device: int) -> list[bytes]:
    """Up to `BATCH` frames that wait at `device`."""
    found: list[bytes] = []
    with contextlib.suppress(BlockingIOError):
        while len(found) < BATCH:
            found.append(os.read(device, LONGEST_FRAME_BYTES))
    return found


def deliver(device: int, frame: bytes) -> None:
    """Hand on a frame; where the far end is down or full it is lost, as on any wire."""
    with contextlib.suppress(OSError):
        os.write(device, frame)


def relay(far: list[int], port: list[int], latency_s: list[float]) -> None:
    """Move frames for ever."""
    waiting: list[deque[tuple[float, bytes]]] = [deque() for _ in far]
    while True:
        due_s = min((queue[0][0] for queue in waiting if queue), default=None)
        timeout_s = None if due_s is None else max(0.0, due_s - time.monotonic())
        ready = set(select.select([*far, *port], [], [], timeout_s)[0])
        for cable, queue in enumerate(waiting):
            if port[cable] in ready:
                for frame in frames(port[cable]):
                    deliver(far[cable], frame)
            if far[cable] in ready:
                due_s = time.monotonic() + latency_s[cable]
                queue.extend((due_s, frame) for frame in frames(far[cable]))
            now_s = time.monotonic()
            while queue and queue[0][0] <= now_s:
                deliver(port[cable], queue.popleft()[1])


def main(latencies_s: list[float]) -> None:
    far = [tap(f"far{cable}") for cable in range(len(latencies_s))]
    port = [tap(f"port{cable}") for cable in range(len(latencies_s))]
    with contextlib.suppress(PermissionError):
        os.nice(-10)  # a wire does not wait for a core
    print("up", flush=True)
    relay(far, port, latencies_s)


if __name__ == "__main__":
    main([float(word) for word in sys.argv[1:]])
