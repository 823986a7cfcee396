"""What is ours: a marker file for every namespace that was made here, who owns it, and how it is removed whatever ended its owner.

Only marked namespaces are ever removed or shaped. A janitor process holds a pipe to the owner and removes the laboratory as soon as the
owner closes the pipe or dies, whatever it dies of. Should the janitor be killed as well, the next laboratory clears up: an owner is known
by its process id and the moment it started, so a reused process id is nobody's.
"""

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.netlab.links import command
from crossdock.atomic import write_json
from crossdock.errors import Unavailable

HOSTS_ROOT = Path("/etc/netns")  # `ip netns exec NAME` binds the files of /etc/netns/NAME over /etc
MARKERS = Path("/run/crossdock-netlab")

# $@: namespaces. Ends the processes inside, then removes the namespace and its files; one without our marker is left alone.
_CLEANUP = f"""
for name in "$@"; do
  [ -e {MARKERS}/"$name".json ] || continue
  for attempt in 1 2 3 4 5 6 7 8 9 10; do
    pids=$(ip netns pids "$name" 2>/dev/null)
    [ -n "$pids" ] || break
    kill -9 $pids 2>/dev/null
    sleep 0.05
  done
  if [ -e /run/netns/"$name" ]; then ip netns delete "$name" || [ ! -e /run/netns/"$name" ] || exit 1; fi
  rm -rf {HOSTS_ROOT}/"$name" {MARKERS}/"$name".json
done
"""


@dataclass(frozen=True)
class Owner:
    """A process, told apart from a later one with its number by the clock tick at which it started."""

    pid: int
    started_ticks: int

    @classmethod
    def here(cls) -> "Owner":
        return cls(os.getpid(), _started_ticks(os.getpid()))

    @property
    def lives(self) -> bool:
        try:
            return _started_ticks(self.pid) == self.started_ticks
        except (FileNotFoundError, ProcessLookupError):
            return False


@dataclass(frozen=True)
class Marker:
    """What a marker file says. owner: None for a laboratory that was asked to stand until it is removed."""

    nodes: int
    rates_bit_per_s: tuple[float | None, ...]
    latencies_s: tuple[float, ...]
    owner: Owner | None

    def write(self, namespace: str) -> None:
        write_json(MARKERS / f"{namespace}.json", asdict(self))

    @classmethod
    def of(cls, name: str) -> "Marker | None":
        """The marker of laboratory `name`; None where there is none that this program made."""
        try:
            found = json.loads((MARKERS / f"{switch_of(name)}.json").read_text())
        except FileNotFoundError:
            return None
        owner = found["owner"]
        return cls(found["nodes"], tuple(found["rates_bit_per_s"]), tuple(found["latencies_s"]), Owner(**owner) if owner else None)


def switch_of(name: str) -> str:
    return f"{name}-switch"


def host_of(name: str, node: int) -> str:
    return f"{name}-node{node}"


def namespaces_of(name: str, nodes: int) -> tuple[str, ...]:
    """The hosts, then the switch, whose marker stands for the laboratory: it goes last."""
    return (*(host_of(name, node) for node in range(nodes)), switch_of(name))


def check_ours(namespace: str) -> None:
    """Raise `Unavailable` for a namespace that this program did not make."""
    if not (MARKERS / f"{namespace}.json").exists():
        raise Unavailable(f"network namespace {namespace} carries no marker of ours; nothing in it is touched")


def standing() -> list[str]:
    """Names of the laboratories that stand on this machine, whoever owns them."""
    return sorted(marker.name.removesuffix("-switch.json") for marker in MARKERS.glob("*-switch.json"))


def remove(namespaces: Sequence[str]) -> None:
    """End what runs in those that carry our marker, and remove them."""
    command(["sh", "-c", _CLEANUP, "crossdock-netlab-cleanup", *namespaces])


def remove_leftovers() -> list[str]:
    """Remove the laboratories whose owners are dead and whose janitors did not do it; returns their names."""
    left = []
    for name in standing():
        marker = Marker.of(name)
        if marker is not None and marker.owner is not None and not marker.owner.lives:
            remove(namespaces_of(name, marker.nodes))
            left.append(name)
    return left


def start_janitor(namespaces: Sequence[str]) -> "subprocess.Popen[bytes]":
    """A process that removes `namespaces` when its stdin closes."""
    return subprocess.Popen(
        ["sh", "-c", "cat >/dev/null; " + _CLEANUP, "crossdock-netlab-janitor", *namespaces],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C ends the owner's process group, and must not end the janitor
    )


def _started_ticks(pid: int) -> int:
    text = Path(f"/proc/{pid}/stat").read_text()
    state, *fields = text[text.rindex(")") + 2 :].split()  # the name before it may hold spaces
    if state in "ZX":
        raise ProcessLookupError(f"process {pid} has ended")
    return int(fields[18])
