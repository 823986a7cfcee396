"""Networks of a host: interfaces with their MTU, the way to a peer, ports, and what the socket variables of gloo and NCCL choose."""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from crossdock.launch.doctor.report import Check

SOCKET_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
MEETING_PORTS = (29_400, 29_500)
"""Where torchrun and torch meet unless told otherwise."""
_PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_FEW_PORTS = 1000
_NOWHERE = "203.0.113.1"  # TEST-NET-3 of RFC 5737: connecting a datagram socket to it routes, and sends nothing


@dataclass(frozen=True)
class Interface:
    """An interface that is up: its IPv4 and IPv6 addresses and the largest packet it takes."""

    name: str
    addresses: tuple[str, ...]
    mtu_bytes: int


def interfaces() -> tuple[Interface, ...]:
    """Those that are up and have an address, by name."""
    import psutil

    states, entries = psutil.net_if_stats(), psutil.net_if_addrs()
    found = []
    for name in sorted(set(states) & set(entries)):
        addresses = tuple(entry.address for entry in entries[name] if entry.family in (socket.AF_INET, socket.AF_INET6))
        if states[name].isup and addresses:
            found.append(Interface(name, addresses, states[name].mtu))
    return tuple(found)


def towards(address: str) -> tuple[str, Interface | None]:
    """(the address of this host that talks to `address`, the interface that has it), or ("", None) for no way. Sends nothing."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            own = str(probe.getsockname()[0])
    except OSError:
        return "", None
    return own, next((interface for interface in interfaces() if own in interface.addresses), None)


def network(environ: Mapping[str, str] = os.environ) -> list[Check]:
    """Everything that can be said without another rank."""
    return [_interfaces(), _way_out(), *_loopback(), _host_name(), *_socket_variables(environ), *_ports()]


def _interfaces() -> Check:
    found = interfaces()
    text = "; ".join(f"{interface.name} {', '.join(interface.addresses)} (MTU {interface.mtu_bytes})" for interface in found)
    return Check("interfaces", "ok", text) if found else Check("interfaces", "bad", "none is up", "ip link set lo up")


def _way_out() -> Check:
    own, interface = towards(_NOWHERE)
    if interface is None:
        return Check("way out", "ok", "none: this host reaches its own networks alone")
    return Check("way out", "ok", f"{interface.name}, as {own}, MTU {interface.mtu_bytes}")


def _loopback() -> list[Check]:
    if any("127.0.0.1" in interface.addresses for interface in interfaces()):
        return []
    return [Check("loopback", "bad", "127.0.0.1 is not up", "ip link set lo up")]


def _host_name() -> Check:
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        remedy = "runs on several hosts need it in DNS or /etc/hosts, or pass torchrun --local-addr"
        return Check("host name", "note", f"{name} does not resolve", remedy)
    if address.startswith("127."):
        remedy = "other hosts cannot reach it there: give them an address, as by torchrun --local-addr; one host alone needs nothing"
        return Check("host name", "note", f"{name} is {address}, which is loopback", remedy)
    return Check("host name", "ok", f"{name} is {address}")


def _socket_variables(environ: Mapping[str, str]) -> list[Check]:
    checks = []
    names = [interface.name for interface in interfaces()]
    for variable in SOCKET_VARIABLES:
        if not (chosen := environ.get(variable)):
            continue
        if chosen_interfaces(chosen, names):
            checks.append(Check(variable, "ok", chosen))
        else:
            remedy = f"unset it, and ranks use the interface that leads to the others; or name one of {', '.join(names)}"
            checks.append(Check(variable, "bad", f"{chosen}: no interface of that name is up", remedy))
    return checks


def chosen_interfaces(chosen: str, names: list[str]) -> list[str]:
    """What a value such as `eth`, `=eth0`, `^docker,lo` or `eth0,eth1` leaves of the names (NCCL's rules, which contain gloo's)."""
    negated, exact = chosen.startswith("^"), "=" in chosen[:2]
    wanted = [part for part in chosen.lstrip("^=").split(",") if part]
    matches = [name for name in names if any(name == part if exact else name.startswith(part) for part in wanted)]
    return [name for name in names if name not in matches] if negated else matches


def _ports() -> list[Check]:
    import psutil

    try:
        low, high = map(int, _PORT_RANGE.read_text().split())
        used = {found.laddr.port for found in psutil.net_connections("inet") if found.laddr}
    except (OSError, psutil.Error) as failure:
        return [
            Check(
                "ports", "note", f"cannot be counted here ({failure})", "nothing is known to be wrong; ranks ask the system for free ports"
            )
        ]
    free = high - low + 1 - sum(low <= port <= high for port in used)
    finding = f"{free} of {low}-{high} free"
    checks = [
        Check("ports", "bad", finding, "end what holds them, or widen net.ipv4.ip_local_port_range")
        if free < _FEW_PORTS
        else Check("ports", "ok", finding)
    ]
    if taken := [str(port) for port in MEETING_PORTS if port in used]:
        checks.append(
            Check("meeting port", "note", f"{', '.join(taken)} taken", "a second torchrun needs another --rdzv-endpoint, or --standalone")
        )
    return checks
