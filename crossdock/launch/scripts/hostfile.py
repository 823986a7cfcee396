"""DeepSpeed's hostfile, `name slots=N` a line: read before its launcher does, so that a mistake is told with its line; and its command."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crossdock.errors import BadData, MissingInput
from crossdock.launch.scripts.allocation import Run

_LINE = re.compile(r"(?P<name>\S+)\s+slots=(?P<slots>\d+)\s*(#.*)?")
_NAME = re.compile(r"[A-Za-z0-9_.:-]+")
MOST_BYTES = 1 << 20
MOST_SLOTS = 1024


@dataclass(frozen=True)
class Host:
    """A host and how many ranks it takes."""

    name: str
    slots: int


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """The hosts in the order of their ranks. Raises `MissingInput`, and `BadData` with the line that is wrong."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        text = content.decode("ascii")
    except OSError as failure:
        raise MissingInput(f"cannot read the hostfile {path}: {failure.strerror}") from failure
    except UnicodeDecodeError as failure:
        bad_line = content[: failure.start].count(b"\n") + 1
        raise BadData(f"{path}:{bad_line}: a byte that is no ASCII; a hostfile holds lines such as `node1 slots=8`") from failure
    if len(content) > MOST_BYTES:
        raise BadData(f"{path} is larger than {MOST_BYTES:,} bytes; a hostfile holds lines such as `node1 slots=8`")
    hosts: dict[str, Host] = {}
    line_of: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        host = _host(f"{path}:{number}", stripped)
        if host.name in hosts:
            raise BadData(f"{path}:{number}: {host.name} stands in line {line_of[host.name]} already; give each host one line")
        hosts[host.name], line_of[host.name] = host, number
    if not hosts:
        raise BadData(f"{path} names no host; a line is `node1 slots=8`")
    return tuple(hosts.values())


def _host(place: str, line: str) -> Host:
    found = _LINE.fullmatch(line)
    if found is None or not _NAME.fullmatch(found["name"]) or found["name"].startswith("-"):
        raise BadData(f"{place}: {line[:80]!r} is not of the form `node1 slots=8`")
    digits = found["slots"].lstrip("0")
    if not digits or len(digits) > 4 or int(digits) > MOST_SLOTS:
        raise BadData(f"{place}: {found['slots'][:12]} slots; a host takes 1 to {MOST_SLOTS} ranks")
    return Host(found["name"], int(digits))


def deepspeed_command(path: Path, hosts: Sequence[Host], run: Run, address: str, port: int) -> tuple[str, ...]:
    """The command that starts `run` on `hosts` by DeepSpeed's launcher, from any of them.

    address: of the first host; where left out the launcher asks that host by ssh, and takes the first of its networks.
    """
    meeting = (f"--master_addr={address}",) if address else ()
    module = ("--no_local_rank", "--module", "crossdock")
    return ("deepspeed", f"--hostfile={path}", *meeting, f"--master_port={port}", *module, *run.train)
