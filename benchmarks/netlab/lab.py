"""`Lab`: emulated hosts behind one switch, up and down, and what runs on them."""

import atexit
import contextlib
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from benchmarks.netlab import cable
from benchmarks.netlab.links import Counters, checked_latency, checked_rate, command, counters, ip, shape
from benchmarks.netlab.owners import (
    HOSTS_ROOT,
    Marker,
    Owner,
    check_ours,
    host_of,
    namespaces_of,
    remove,
    remove_leftovers,
    standing,
    start_janitor,
    switch_of,
)
from benchmarks.netlab.programs import Program, together
from crossdock.errors import Unavailable, UsageError

PORT = 29_511  # any port is free in a fresh namespace
Rates = float | Sequence[float | None] | None
Value = TypeVar("Value")


def unavailable_reason() -> str | None:
    """Why no laboratory can stand here, or None. Looks only; `Lab` may still meet a kernel without bridge or htb and says so."""
    if sys.platform != "linux":
        return f"network namespaces need Linux, this is {sys.platform}"
    if os.geteuid() != 0:
        return f"network namespaces need root, this is user {os.geteuid()}; run it with sudo"
    missing = [tool for tool in ("ip", "tc", "unshare") if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not found; install iproute2 and util-linux"
    if subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True).returncode != 0:
        return "this process may not make network namespaces; it needs CAP_SYS_ADMIN and CAP_NET_ADMIN"
    return None


class Lab:
    """`nodes` emulated hosts behind one switch; a context manager that leaves nothing behind.

    rate_bit_per_s: of every host's link, each direction, or one for each host; None: not shaped. latency_s: how much later what a host
    sends arrives (one way), or one for each host; any above 0 puts cables of `cable.py` between hosts and switch, which cost some
    processor time. Raises `Unavailable` where the system refuses.
    """

    def __init__(
        self, nodes: int = 2, rate_bit_per_s: Rates = None, name: str | None = None, latency_s: float | Sequence[float] = 0.0
    ) -> None:
        if not 1 <= nodes <= 200:
            raise UsageError(f"{nodes} emulated nodes; choose 1 to 200")
        self.nodes = nodes
        self.rates_bit_per_s = _for_each("rates", rate_bit_per_s, nodes, checked_rate)
        self.latencies_s = _for_each("latencies", latency_s, nodes, checked_latency)
        self.name = name or f"xd{os.getpid()}-{secrets.token_hex(3)}"
        self._owner: Owner | None = None
        self._janitor: subprocess.Popen[bytes] | None = None
        self._cables: subprocess.Popen[bytes] | None = None

    @classmethod
    def attach(cls, name: str) -> "Lab":
        """The standing laboratory `name`, from any process (also one that runs on its hosts); it stays its owner's to remove."""
        marker = Marker.of(name)
        if marker is None:
            raise UsageError(f"no laboratory {name!r} that this program made; standing: {', '.join(standing()) or 'none'}")
        lab = cls(marker.nodes, marker.rates_bit_per_s, name, marker.latencies_s)
        lab._owner = marker.owner
        return lab

    @property
    def namespaces(self) -> tuple[str, ...]:
        return namespaces_of(self.name, self.nodes)

    def namespace(self, node: int) -> str:
        assert 0 <= node < self.nodes, f"node {node} of {self.nodes}"
        return host_of(self.name, node)

    def address(self, node: int) -> str:
        return f"10.77.0.{node + 1}"

    # ---- up and down

    def __enter__(self) -> "Lab":
        check_available()
        self._owner = Owner.here()
        self._janitor = start_janitor(self.namespaces)
        atexit.register(self.close)
        try:
            self.build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def build(self) -> None:
        """Make the namespaces, links and shaping, after clearing what dead owners left. Without `with`, it stands until `remove`."""
        remove_leftovers()
        switch = switch_of(self.name)
        hosts = "".join(f"{self.address(node)} node{node}\n" for node in range(self.nodes))
        for namespace in reversed(self.namespaces):
            self._add_namespace(namespace, hosts)
        ip(switch, "link add br0 type bridge stp_state 0 forward_delay 0")
        ip(switch, "link set br0 up")
        if any(self.latencies_s):
            self._start_cables(switch)
        for node in range(self.nodes):
            host = self.namespace(node)
            if self._cables is None:
                ip(switch, f"link add port{node} type veth peer name eth0 netns {host}")
            else:
                ip(switch, f"link set far{node} netns {host} name eth0")
            ip(switch, f"link set port{node} master br0 up")
            ip(host, f"addr add {self.address(node)}/24 dev eth0")
            ip(host, "link set eth0 up")
            # A step is a burst after a pause of compute: restarting each from slow start would measure TCP, not the link.
            # reno because every kernel has it and namespaces may use it; bbr probes its way to the rate anew after each pause.
            settings = ("net.ipv4.tcp_congestion_control=reno", "net.ipv4.tcp_slow_start_after_idle=0")
            command(["ip", "netns", "exec", host, "sysctl", "-qw", *settings])
            self._shape(node, None, self.rates_bit_per_s[node])

    def close(self) -> None:
        """End every process on the hosts and remove them; a second call finds nothing to do."""
        if self._janitor is None:
            return
        janitor, self._janitor = self._janitor, None
        atexit.unregister(self.close)
        assert janitor.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            janitor.stdin.close()
        janitor.wait()
        self.remove()  # nothing is left to remove, unless somebody killed the janitor

    def remove(self) -> None:
        """Remove what carries our marker, whoever made it."""
        remove(self.namespaces)
        if self._cables is not None:
            self._cables.wait()

    def _start_cables(self, switch: str) -> None:
        arguments = [sys.executable, cable.__file__, *(str(latency_s) for latency_s in self.latencies_s)]
        self._cables = subprocess.Popen(
            ["ip", "netns", "exec", switch, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        assert self._cables.stdout is not None
        assert self._cables.stderr is not None
        if self._cables.stdout.readline() != b"up\n":
            said = self._cables.stderr.read().decode(errors="replace").strip().splitlines()
            raise Unavailable(f"emulated hosts: no cables with latency, they need /dev/net/tun: {said[-1] if said else 'no word'}")
        self._cables.stdout.close()
        self._cables.stderr.close()

    def _add_namespace(self, namespace: str, hosts: str) -> None:
        directory = HOSTS_ROOT / namespace
        if (Path("/run/netns") / namespace).exists() or directory.exists():
            raise Unavailable(f"network namespace {namespace} exists and is not ours; choose another name for the laboratory")
        directory.mkdir(parents=True)
        (directory / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
        (directory / "resolv.conf").write_text("")  # no name is looked up outside
        self._marker().write(namespace)
        command(["ip", "netns", "add", namespace])
        ip(namespace, "link set lo up")

    def _marker(self) -> Marker:
        return Marker(self.nodes, self.rates_bit_per_s, self.latencies_s, self._owner)

    # ---- the links

    def set_rate(self, rate_bit_per_s: Rates) -> None:
        """Shape the links anew (None: unshaped), also while jobs run; from one rate to another no packet is lost."""
        rates = _for_each("rates", rate_bit_per_s, self.nodes, checked_rate)
        for node, (before, rate) in enumerate(zip(self.rates_bit_per_s, rates, strict=True)):
            self._shape(node, before, rate)
        self.rates_bit_per_s = rates
        for namespace in self.namespaces:
            self._marker().write(namespace)

    def _shape(self, node: int, before: float | None, rate_bit_per_s: float | None) -> None:
        ends = [(self.namespace(node), "eth0")]
        if self.nodes > 2:  # several senders may meet at one receiver: then its own direction of the link must be shaped as well
            ends.append((switch_of(self.name), f"port{node}"))
        for namespace, device in ends:
            check_ours(namespace)
            shape(namespace, device, before, rate_bit_per_s)

    def counters(self, node: int) -> Counters:
        """Bytes sent and received by the host's `eth0`."""
        return counters(self.namespace(node))

    # ---- programs on the hosts

    def command(self, node: int, arguments: Sequence[str]) -> list[str]:
        """`arguments` as a command of this machine that runs them on host `node`, with its hostname; the process id stays the same."""
        inside = ["unshare", "--uts", "sh", "-c", f'hostname node{node}; exec "$@"', "sh", *arguments]
        return ["ip", "netns", "exec", self.namespace(node), *inside]

    def run(self, node: int, arguments: Sequence[str], timeout_s: float = 60.0) -> str:
        """Run a program on host `node`; returns its stdout. Raises `PeerLost` with its last lines when it fails."""
        return self.together([(node, list(arguments), {})], timeout_s)[0]

    def everywhere(
        self, arguments: Sequence[str], environment: Mapping[str, str] | None = None, timeout_s: float = 600.0
    ) -> tuple[str, ...]:
        """The same program on every host, with NODE_RANK, NNODES, MASTER_ADDR and MASTER_PORT; returns the hosts' stdout."""
        jobs = []
        for node in range(self.nodes):
            place = {"NODE_RANK": str(node), "NNODES": str(self.nodes), "MASTER_ADDR": self.address(0), "MASTER_PORT": str(PORT)}
            jobs.append((node, list(arguments), {**place, **(environment or {})}))
        return self.together(jobs, timeout_s)

    def torchrun(
        self, arguments: Sequence[str], ranks_per_node: int = 1, environment: Mapping[str, str] | None = None, timeout_s: float = 600.0
    ) -> tuple[str, ...]:
        """`torchrun ... ARGUMENTS` on every host, rendezvous on host 0; returns the hosts' stdout. Raises `PeerLost` when one fails."""
        jobs = []
        for node in range(self.nodes):
            options = ["--nnodes", str(self.nodes), "--nproc-per-node", str(ranks_per_node), "--local-addr", self.address(node)]
            options += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{self.address(0)}:{PORT}", "--rdzv-id", self.name]
            line = [sys.executable, "-m", "torch.distributed.run", *options, *arguments]
            jobs.append((node, line, {"OMP_NUM_THREADS": "1", **(environment or {})}))
        return self.together(jobs, timeout_s)

    def ranks(
        self, arguments: Sequence[str], ranks_per_node: int = 1, environment: Mapping[str, str] | None = None, timeout_s: float = 600.0
    ) -> tuple[str, ...]:
        """`python ARGUMENTS` once for each rank, with torchrun's variables and without its agents; returns the ranks' stdout."""
        jobs = []
        for node in range(self.nodes):
            for local_rank in range(ranks_per_node):
                variables = {
                    "RANK": str(node * ranks_per_node + local_rank),
                    "LOCAL_RANK": str(local_rank),
                    "GROUP_RANK": str(node),
                    "WORLD_SIZE": str(self.nodes * ranks_per_node),
                    "LOCAL_WORLD_SIZE": str(ranks_per_node),
                    "MASTER_ADDR": self.address(0),
                    "MASTER_PORT": str(PORT),
                    "OMP_NUM_THREADS": "1",
                }
                jobs.append((node, [sys.executable, *arguments], {**variables, **(environment or {})}))
        return self.together(jobs, timeout_s)

    def together(self, jobs: Sequence[tuple[int, list[str], dict[str, str]]], timeout_s: float) -> tuple[str, ...]:
        """Run (node, command, environment) side by side to their end; see `programs.together`."""
        interface = {"GLOO_SOCKET_IFNAME": "eth0", "TP_SOCKET_IFNAME": "eth0"}
        return together([Program(self.command(node, line), {**interface, **added}) for node, line, added in jobs], timeout_s)


def check_available() -> None:
    """Raise `Unavailable` where no laboratory can stand."""
    reason = unavailable_reason()
    if reason is not None:
        raise Unavailable(f"no emulated hosts: {reason}")


@contextlib.contextmanager
def attached_or_new(name: str | None, nodes: int, rate_bit_per_s: Rates, latency_s: float = 0.0) -> Iterator[Lab]:
    """The standing laboratory `name`, or a new one for the length of the block."""
    if name is not None:
        yield Lab.attach(name)
    else:
        with Lab(nodes, rate_bit_per_s, latency_s=latency_s) as lab:
            yield lab


def _for_each(what: str, value: Value | Sequence[Value], nodes: int, checked: Callable[[Value], Value]) -> tuple[Value, ...]:
    """One checked value for each node; `value` is one for all, or one for each."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * nodes
    if len(values) != nodes:
        raise UsageError(f"{len(values)} {what} for {nodes} emulated nodes; choose one for all, or one for each")
    return tuple(checked(one) for one in values)
