"""A laboratory of emulated hosts on one Linux machine: network namespaces joined by a switch, every link shaped to a rate.

    with Lab(nodes=2, rate_bit_per_s=500e6) as lab:
        lab.torchrun(["-m", "crossdock.launch.cli", "train", "configs/tiny.yaml"], ranks_per_node=2)
        lab.set_rate(250e6)
        print(lab.counters(0).sent_bytes)

    python -m benchmarks.netlab run --nodes 2 --ranks-per-node 2 --rate 500e6 -- train.py  (torchrun on every host, then teardown)
    python -m benchmarks.netlab up --nodes 2 --rate 500e6                                  (prints the name and leaves it standing)
    python -m benchmarks.netlab exec|rate|counters|down NAME ...

Each host is a network namespace with `eth0` = 10.77.0.(i+1)/24, a hostname `node<i>` and its own /etc/hosts; the switch is a bridge in a
namespace of its own, so nothing is made in the root namespace and several laboratories coexist. Traffic inside one host is not shaped.
Every namespace carries a marker file; only marked ones are ever removed. A janitor process holds a pipe to the owner and removes the
laboratory as soon as the owner closes the pipe or dies, whatever it dies of.
"""

import argparse
import atexit
import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from crossdock.atomic import write_json
from crossdock.errors import BadData, CrossdockError, PeerLost, Unavailable, UsageError

Describe = Callable[[int], str]
HOSTS_ROOT = Path("/etc/netns")  # `ip netns exec NAME` binds the files of /etc/netns/NAME over /etc
MARKERS = Path("/run/crossdock-netlab")  # one file for each namespace that this program made
PORT = 29_511  # any port is free in a fresh namespace

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
  if [ -e /run/netns/"$name" ]; then ip netns delete "$name" || exit 1; fi
  rm -rf {HOSTS_ROOT}/"$name" {MARKERS}/"$name".json
done
"""


@dataclass(frozen=True)
class Counters:
    """What went over one host's `eth0` since the laboratory came up, headers included."""

    sent_bytes: int
    received_bytes: int

    def __sub__(self, before: "Counters") -> "Counters":
        return Counters(self.sent_bytes - before.sent_bytes, self.received_bytes - before.received_bytes)


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

    rate_bit_per_s: of every host's link, each direction; None: not shaped. Raises `Unavailable` where the system refuses.
    """

    def __init__(self, nodes: int = 2, rate_bit_per_s: float | None = None, name: str | None = None) -> None:
        if not 1 <= nodes <= 200:
            raise UsageError(f"{nodes} emulated nodes; choose 1 to 200")
        self.nodes = nodes
        self.rate_bit_per_s = _checked_rate(rate_bit_per_s)
        self.name = name or f"xd{os.getpid()}-{secrets.token_hex(3)}"
        self._janitor: subprocess.Popen[bytes] | None = None

    @classmethod
    def attach(cls, name: str) -> "Lab":
        """The standing laboratory `name`, from any process (also one that runs on its hosts); it stays its owner's to remove."""
        marker = MARKERS / f"{name}-switch.json"
        try:
            described = json.loads(marker.read_text())
        except FileNotFoundError:
            raise UsageError(f"no laboratory {name!r} that this program made; standing: {', '.join(standing()) or 'none'}") from None
        return cls(described["nodes"], described["rate_bit_per_s"], name)

    @property
    def namespaces(self) -> tuple[str, ...]:
        return (*(self.namespace(node) for node in range(self.nodes)), f"{self.name}-switch")

    def namespace(self, node: int) -> str:
        assert 0 <= node < self.nodes, f"node {node} of {self.nodes}"
        return f"{self.name}-node{node}"

    def address(self, node: int) -> str:
        return f"10.77.0.{node + 1}"

    # ---- up and down

    def __enter__(self) -> "Lab":
        reason = unavailable_reason()
        if reason is not None:
            raise Unavailable(f"no emulated hosts: {reason}")
        self._janitor = subprocess.Popen(
            ["sh", "-c", "cat >/dev/null; " + _CLEANUP, "crossdock-netlab-janitor", *self.namespaces],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C ends the owner's process group, and must not end the janitor
        )
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
        """Make the namespaces, links and shaping. Without `with`, the laboratory stands until `remove`."""
        switch = f"{self.name}-switch"
        hosts = "".join(f"{self.address(node)} node{node}\n" for node in range(self.nodes))
        self._add_namespace(switch, hosts)
        _ip(switch, "link add br0 type bridge stp_state 0 forward_delay 0")
        _ip(switch, "link set br0 up")
        for node in range(self.nodes):
            host = self.namespace(node)
            self._add_namespace(host, hosts)
            _ip(switch, f"link add port{node} type veth peer name eth0 netns {host}")
            _ip(switch, f"link set port{node} master br0 up")
            _ip(host, f"addr add {self.address(node)}/24 dev eth0")
            _ip(host, "link set eth0 up")
            # A step is a burst after a pause of compute: restarting each from slow start would measure TCP, not the link.
            # reno because every kernel has it and namespaces may use it; bbr probes its way to the rate anew after each pause.
            settings = ("net.ipv4.tcp_congestion_control=reno", "net.ipv4.tcp_slow_start_after_idle=0")
            _command(["ip", "netns", "exec", host, "sysctl", "-qw", *settings])
        self._shape(None, self.rate_bit_per_s)

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
        _command(["sh", "-c", _CLEANUP, "crossdock-netlab-cleanup", *self.namespaces])

    def _add_namespace(self, namespace: str, hosts: str) -> None:
        directory = HOSTS_ROOT / namespace
        if (Path("/run/netns") / namespace).exists() or directory.exists():
            raise Unavailable(f"network namespace {namespace} exists and is not ours; choose another name for the laboratory")
        directory.mkdir(parents=True)
        (directory / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
        (directory / "resolv.conf").write_text("")  # no name is looked up outside
        self._mark(namespace)
        _command(["ip", "netns", "add", namespace])
        _ip(namespace, "link set lo up")

    def _mark(self, namespace: str) -> None:
        write_json(MARKERS / f"{namespace}.json", {"nodes": self.nodes, "rate_bit_per_s": self.rate_bit_per_s})

    # ---- the links

    def set_rate(self, rate_bit_per_s: float | None) -> None:
        """Shape every link to `rate_bit_per_s` (None: unshaped), also while jobs run; from one rate to another no packet is lost."""
        rate = _checked_rate(rate_bit_per_s)
        self._shape(self.rate_bit_per_s, rate)
        self.rate_bit_per_s = rate
        for namespace in self.namespaces:
            self._mark(namespace)

    def _shape(self, before: float | None, rate: float | None) -> None:
        ends = [(self.namespace(node), "eth0") for node in range(self.nodes)]
        if self.nodes > 2:  # several senders may meet at one receiver: then its own direction of the link must be shaped as well
            ends += [(f"{self.name}-switch", f"port{node}") for node in range(self.nodes)]
        for namespace, device in ends:
            for line in _shaping(device, before, rate):
                _command(["tc", "-n", namespace, *line.split()])

    def counters(self, node: int) -> Counters:
        """Bytes sent and received by the host's `eth0`."""
        text = _command(["ip", "-n", self.namespace(node), "-s", "-json", "link", "show", "eth0"])
        stats = json.loads(text)[0]["stats64"]
        return Counters(sent_bytes=stats["tx"]["bytes"], received_bytes=stats["rx"]["bytes"])

    # ---- programs on the hosts

    def command(self, node: int, arguments: Sequence[str]) -> list[str]:
        """`arguments` as a command of this machine that runs them on host `node`, with its hostname; the process id stays the same."""
        inside = ["unshare", "--uts", "sh", "-c", f'hostname node{node}; exec "$@"', "sh", *arguments]
        return ["ip", "netns", "exec", self.namespace(node), *inside]

    def run(self, node: int, arguments: Sequence[str], timeout_s: float = 60.0) -> str:
        """Run a program on host `node`; returns its stdout. Raises `PeerLost` with its last lines when it fails."""
        return self.together([(node, list(arguments), {})], timeout_s)[0]

    def torchrun(
        self, arguments: Sequence[str], ranks_per_node: int = 1, environment: Mapping[str, str] | None = None, timeout_s: float = 600.0
    ) -> tuple[str, ...]:
        """`torchrun ... ARGUMENTS` on every host, rendezvous on host 0; returns the hosts' stdout. Raises `PeerLost` when one fails."""
        jobs = []
        for node in range(self.nodes):
            options = ["--nnodes", str(self.nodes), "--nproc-per-node", str(ranks_per_node), "--local-addr", self.address(node)]
            options += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{self.address(0)}:{PORT}", "--rdzv-id", self.name]
            command = [sys.executable, "-m", "torch.distributed.run", *options, *arguments]
            jobs.append((node, command, {"OMP_NUM_THREADS": "1", **(environment or {})}))
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
        """Run (node, command, environment) side by side to their end; returns each stdout.

        Raises `PeerLost` with the last lines of the one to blame, at the first failure or after `timeout_s`; the rest is then ended.
        """
        with tempfile.TemporaryDirectory(prefix="crossdock-netlab-") as folder, contextlib.ExitStack() as files:
            processes = []
            for number, (node, command, variables) in enumerate(jobs):
                out = files.enter_context((Path(folder) / f"{number}.out").open("wb"))
                err = files.enter_context((Path(folder) / f"{number}.err").open("wb"))
                environment = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "TP_SOCKET_IFNAME": "eth0", **variables}
                processes.append(subprocess.Popen(self.command(node, command), stdout=out, stderr=err, env=environment))
            try:
                _wait_all(processes, timeout_s, lambda number: _last_lines(Path(folder), number))
            finally:
                for process in processes:
                    process.kill()
                    process.wait()
            return tuple((Path(folder) / f"{number}.out").read_text(errors="replace") for number in range(len(jobs)))


def standing() -> list[str]:
    """Names of the laboratories that stand on this machine, whoever owns them."""
    return sorted(marker.name.removesuffix("-switch.json") for marker in MARKERS.glob("*-switch.json"))


@contextlib.contextmanager
def attached_or_new(name: str | None, nodes: int, rate_bit_per_s: float | None) -> Iterator[Lab]:
    """The standing laboratory `name`, or a new one for the length of the block."""
    if name is not None:
        yield Lab.attach(name)
    else:
        with Lab(nodes, rate_bit_per_s) as lab:
            yield lab


def _shaping(device: str, before: float | None, rate: float | None) -> list[str]:
    """The tc lines that take `device` from one rate to another.

    Two queues below one htb class: packets of fewer than 128 bytes (bare acknowledgements) go ahead of data. In one common queue each
    direction's acknowledgements wait behind the other direction's data, and a full-duplex exchange takes twice its time now and then.
    The data queue holds a tenth of a second.
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
        f"qdisc {verb} dev {device} parent 1:20 handle 20: bfifo limit {max(262_144, int(rate / 8 / 10))}",
    ]
    if before is not None:
        return lines
    acknowledgements = (
        f"filter add dev {device} parent 1: protocol ip prio 1 u32 match ip protocol 6 0xff match u16 0 0xff80 at 2 flowid 1:10"
    )
    return [f"qdisc add dev {device} root handle 1: htb default 20", *lines, acknowledgements]


def _checked_rate(rate_bit_per_s: float | None) -> float | None:
    if rate_bit_per_s is not None and not 1e5 <= rate_bit_per_s <= 4e11:
        raise UsageError(f"a link of {rate_bit_per_s} bit/s; choose 1e5 to 4e11, or none for no shaping")
    return rate_bit_per_s


def _wait_all(processes: Sequence[subprocess.Popen[bytes]], timeout_s: float, describe: Describe) -> None:
    deadline_s = time.monotonic() + timeout_s
    running = dict(enumerate(processes))
    while running:
        for number, process in list(running.items()):
            code = process.poll()
            if code is None:
                continue
            del running[number]
            if code != 0:
                raise PeerLost(f"process {number} of {len(processes)} on the emulated hosts ended with code {code}:\n{describe(number)}")
        if time.monotonic() > deadline_s:
            number = min(running)
            raise PeerLost(
                f"{len(running)} of {len(processes)} processes still ran after {timeout_s:.0f} s; number {number}:\n{describe(number)}"
            )
        time.sleep(0.01)


def _last_lines(folder: Path, number: int) -> str:
    text = "".join((folder / f"{number}.{stream}").read_text(errors="replace") for stream in ("out", "err"))
    return "\n".join(text.splitlines()[-80:])


def _ip(namespace: str, line: str) -> None:
    _command(["ip", "-n", namespace, *line.split()])


def _command(arguments: Sequence[str]) -> str:
    result = subprocess.run(arguments, capture_output=True, text=True)
    if result.returncode != 0:
        shown = " ".join(arguments if len(arguments) < 20 else arguments[:1])
        raise Unavailable(f"emulated hosts: `{shown}` failed: {result.stderr.strip() or result.returncode}")
    return result.stdout


def _rate_argument(text: str) -> float | None:
    return None if text == "none" else float(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.netlab", description="Emulated hosts on one machine (root, Linux).")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("up", "make a laboratory and leave it standing"), ("run", "torchrun on every host, then tear down")):
        command = commands.add_parser(name, help=what)
        command.add_argument("--nodes", type=int, default=2)
        command.add_argument("--rate", type=_rate_argument, default=None, help="bit/s of every link, each direction; none: unshaped")
    command.add_argument("--ranks-per-node", type=int, default=1)
    command.add_argument("--timeout", type=float, default=3600.0, help="s")
    command.add_argument("--lab", help="a standing laboratory, which stays")
    command.add_argument("arguments", nargs=argparse.REMAINDER, help="-- SCRIPT [args] or -- -m MODULE [args]")
    for name, what in (
        ("down", "remove it"),
        ("rate", "change the rate"),
        ("counters", "bytes of every host"),
        ("exec", "run on one host"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("lab")
        if name == "rate":
            command.add_argument("rate", type=_rate_argument)
        if name == "exec":
            command.add_argument("node", type=int)
            command.add_argument("arguments", nargs=argparse.REMAINDER)
    commands.add_parser("list", help="standing laboratories")
    return parser


def _perform(options: argparse.Namespace) -> None:
    arguments = [word for number, word in enumerate(getattr(options, "arguments", [])) if number > 0 or word != "--"]
    if options.command == "list":
        print("\n".join(standing()))
    elif options.command == "up":
        lab = Lab(options.nodes, options.rate)
        reason = unavailable_reason()
        if reason is not None:
            raise Unavailable(f"no emulated hosts: {reason}")
        try:
            lab.build()
        except BaseException:
            lab.remove()
            raise
        print(lab.name)
    elif options.command == "run":
        with attached_or_new(options.lab, options.nodes, options.rate) as lab:
            for output in lab.torchrun(arguments, options.ranks_per_node, timeout_s=options.timeout):
                print(output, end="")
    else:
        lab = Lab.attach(options.lab)
        if options.command == "down":
            lab.remove()
        elif options.command == "rate":
            lab.set_rate(options.rate)
        elif options.command == "counters":
            for node in range(lab.nodes):
                print(json.dumps({"node": node, **vars(lab.counters(node))}))
        else:
            if not 0 <= options.node < lab.nodes:
                raise BadData(f"node {options.node} of a laboratory of {lab.nodes}; choose 0 to {lab.nodes - 1}")
            command = lab.command(options.node, arguments or ["sh"])
            os.execvp(command[0], command)


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        _perform(_parser().parse_args(arguments))
    except CrossdockError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
