"""The links of a laboratory: their shaping by `tc`, their counters, and the one way in which system commands are called."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from crossdock.errors import Unavailable, UsageError

QUEUE_BYTES = 256 << 20  # at most; only what waits takes memory


@dataclass(frozen=True)
class Counters:
    """What went over one host's `eth0` since the laboratory came up, headers included."""

    sent_bytes: int
    received_bytes: int

    def __sub__(self, before: "Counters") -> "Counters":
        return Counters(self.sent_bytes - before.sent_bytes, self.received_bytes - before.received_bytes)


def counters(namespace: str) -> Counters:
    """Bytes sent and received by the `eth0` of `namespace`."""
    text = command(["ip", "-n", namespace, "-s", "-json", "link", "show", "eth0"])
    stats = json.loads(text)[0]["stats64"]
    return Counters(sent_bytes=stats["tx"]["bytes"], received_bytes=stats["rx"]["bytes"])


def shape(namespace: str, device: str, before: float | None, rate_bit_per_s: float | None) -> None:
    """Take `device` from one rate to another (None: unshaped)."""
    for line in _shaping(device, before, rate_bit_per_s):
        command(["tc", "-n", namespace, *line.split()])


def checked_rate(rate_bit_per_s: float | None) -> float | None:
    """The rate, or `UsageError`."""
    if rate_bit_per_s is not None and not 1e5 <= rate_bit_per_s <= 4e11:
        raise UsageError(f"a link of {rate_bit_per_s} bit/s; choose 1e5 to 4e11, or none for no shaping")
    return rate_bit_per_s


def checked_latency(latency_s: float) -> float:
    """The latency, or `UsageError`."""
    if not 0 <= latency_s <= 10:
        raise UsageError(f"a link with a latency of {latency_s} s; choose 0 to 10")
    return latency_s


def ip(namespace: str, line: str) -> None:
    """`ip LINE` inside `namespace`."""
    command(["ip", "-n", namespace, *line.split()])


def command(arguments: Sequence[str]) -> str:
    """Run a program of the system and return its stdout; raises `Unavailable` with what it said where it fails."""
    result = subprocess.run(arguments, capture_output=True, text=True)
    if result.returncode != 0:
        shown = " ".join(arguments if len(arguments) < 20 else arguments[:1])
        raise Unavailable(f"emulated hosts: `{shown}` failed: {result.stderr.strip() or result.returncode}")
    return result.stdout


def _shaping(device: str, before: float | None, rate: float | None) -> list[str]:
    """The tc lines that take `device` from one rate to another.

    Two queues below one htb class: packets of fewer than 128 bytes (bare acknowledgements) go ahead of data. In one common queue each
    direction's acknowledgements wait behind the other direction's data, and a full-duplex exchange takes twice its time now and then.
    The data queue holds what senders can have under way: where several meet at one receiver, a shorter one drops, and the exchange then
    waits for TCP's timeouts of 0.2 s, which the lossless fabrics that are emulated here do not have.
    """
    if rate is None:
        return [] if before is None else [f"qdisc delete dev {device} root"]
    verb = "add" if before is None else "change"
    burst_bytes = max(65_536, int(rate / 8 / 2000))  # half a millisecond, and never less than one segmentation-offload packet
    burst = f"burst {burst_bytes} cburst {burst_bytes} quantum 70000"
    lines = [
        f"class {verb} dev {device} parent 1: classid 1:1 htb rate {rate:.0f}bit ceil {rate:.0f}bit {burst}",
        f"class {verb} dev {device} parent 1:1 classid 1:10 htb rate {rate / 10:.0f}bit ceil {rate:.0f}bit prio 0 {burst}",
        f"class {verb} dev {device} parent 1:1 classid 1:20 htb rate {rate * 0.9:.0f}bit ceil {rate:.0f}bit prio 1 {burst}",
        f"qdisc {verb} dev {device} parent 1:10 handle 10: bfifo limit 1000000",
        f"qdisc {verb} dev {device} parent 1:20 handle 20: bfifo limit {QUEUE_BYTES}",
    ]
    if before is not None:
        return lines
    acknowledgements = (
        f"filter add dev {device} parent 1: protocol ip prio 1 u32 match ip protocol 6 0xff match u16 0 0xff80 at 2 flowid 1:10"
    )
    return [f"qdisc add dev {device} root handle 1: htb default 20", *lines, acknowledgements]
