"""The laboratory of emulated hosts: it comes up, shapes, counts, and leaves nothing behind whatever ends it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import netlab
from benchmarks.netlab import Lab, owners, standing
from benchmarks.netlab.__main__ import main
from crossdock.errors import PeerLost, Unavailable, UsageError

REASON = netlab.unavailable_reason()
needs_lab = pytest.mark.skipif(REASON is not None, reason=f"no emulated hosts: {REASON}")
pytestmark = pytest.mark.netns

# argv: seconds to send for; prints the bytes and the seconds that sending took
SENDER = """
import socket, sys, time
peer = socket.create_connection(("node1", 5001))
begin, sent = time.perf_counter(), 0
while time.perf_counter() - begin < float(sys.argv[1]):
    sent += peer.send(bytes(65536))
peer.shutdown(socket.SHUT_WR)
peer.recv(1)
print(sent, time.perf_counter() - begin)
"""
RECEIVER = """
import socket
server = socket.create_server(("0.0.0.0", 5001))
print("ready", flush=True)
peer, _ = server.accept()
while peer.recv(1 << 20):
    pass
peer.sendall(b"x")
"""


def namespaces_of(name: str) -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split()
    return [word for word in listed if word.startswith(name)]


def files_of(name: str) -> list[Path]:
    return [*owners.HOSTS_ROOT.glob(f"{name}*"), *owners.MARKERS.glob(f"{name}*")]


def send(lab: Lab, seconds: float) -> tuple[int, float]:
    """Bytes that host 0 sent to host 1 over TCP, and the seconds until the last of them had arrived."""
    receiver = subprocess.Popen(lab.command(1, [sys.executable, "-c", RECEIVER]), stdout=subprocess.PIPE, text=True)
    assert receiver.stdout is not None
    assert receiver.stdout.readline() == "ready\n"
    sent, took_s = lab.run(0, [sys.executable, "-c", SENDER, str(seconds)]).split()
    assert receiver.wait(10) == 0
    receiver.stdout.close()
    return int(sent), float(took_s)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    if REASON is not None:
        pytest.skip(f"no emulated hosts: {REASON}")
    with Lab(2, 200e6) as lab:
        yield lab


def test_hosts_have_their_own_name_and_see_each_other(lab: Lab) -> None:
    assert lab.run(1, ["hostname"]) == "node1\n"
    resolved = "import socket; print(socket.gethostbyname(socket.gethostname()), socket.gethostbyname('node0'))"
    assert lab.run(1, [sys.executable, "-c", resolved]) == "10.77.0.2 10.77.0.1\n"
    assert not Path("/sys/class/net/br0").exists(), "the switch belongs in a namespace of its own"


def test_the_link_carries_its_rate_and_follows_a_change(lab: Lab) -> None:
    """The upper bound holds on any machine; a busy one only sends less."""
    for rate in (200e6, 40e6):
        lab.set_rate(rate)
        before = lab.counters(0), lab.counters(1)
        sent, took_s = send(lab, 0.5)
        counted = lab.counters(0) - before[0], lab.counters(1) - before[1]
        assert sent <= took_s * rate / 8 + 65_536 + 64_000
        assert sent >= 0.4 * took_s * rate / 8
        assert sent <= counted[0].sent_bytes <= 1.05 * sent + 10_000
        assert counted[1].received_bytes >= sent
    lab.set_rate(None)
    sent, took_s = send(lab, 0.2)
    assert sent > took_s * 400e6 / 8, "an unshaped link is faster than any rate above"
    lab.set_rate(200e6)


def test_both_directions_carry_the_rate_at_once(lab: Lab) -> None:
    """Acknowledgements that queue behind data would halve a full-duplex exchange."""
    lab.set_rate(100e6)
    program = """
import socket, sys, threading, time
me = int(sys.argv[1])
server = socket.create_server(("0.0.0.0", 5002 + me))
for _ in range(200):
    try:
        out = socket.create_connection((f"node{1 - me}", 5003 - me))
        break
    except ConnectionRefusedError:
        time.sleep(0.02)
into, _ = server.accept()
def drain():
    left = 4_000_000
    while left:
        left -= len(into.recv(min(left, 1 << 20)))
thread = threading.Thread(target=drain)
begin = time.perf_counter()
thread.start()
out.sendall(bytes(4_000_000))
thread.join()
print(time.perf_counter() - begin)
"""
    outputs = lab.together([(node, [sys.executable, "-c", program, str(node)], {}) for node in range(2)], timeout_s=30)
    one_way_s = 4_000_000 * 8 / 100e6
    assert min(float(text) for text in outputs) < 1.6 * one_way_s
    lab.set_rate(200e6)


def test_a_failing_program_ends_the_others_and_shows_its_last_lines(lab: Lab) -> None:
    program = "import os, sys, time; sys.exit('the disk is on fire') if os.environ['RANK'] == '1' else time.sleep(60)"
    begin_s = time.monotonic()
    with pytest.raises(PeerLost, match="the disk is on fire"):
        lab.ranks(["-c", program])
    assert time.monotonic() - begin_s < 50, "the healthy rank was waited for"
    with pytest.raises(PeerLost, match="still ran after"):
        lab.ranks(["-c", "import time; time.sleep(60)"], timeout_s=0.3)


def test_two_laboratories_coexist_and_know_only_their_own(lab: Lab) -> None:
    with Lab(3, 50e6) as other:
        assert set(standing()) >= {lab.name, other.name}
        assert other.run(2, [sys.executable, "-c", "import socket; print(socket.gethostname())"]) == "node2\n"
    assert namespaces_of(other.name) == []
    assert len(namespaces_of(lab.name)) == 3


@needs_lab
def test_an_exception_takes_the_laboratory_and_its_processes_down() -> None:
    lab = Lab(2)
    sleepers = []

    def fail_inside() -> None:
        with lab:
            sleepers.append(subprocess.Popen(lab.command(0, ["sleep", "600"])))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert sleepers[0].wait(10) == -signal.SIGKILL
    assert namespaces_of(lab.name) == []
    assert files_of(lab.name) == []


@needs_lab
@pytest.mark.parametrize("cause", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_the_end_of_the_owner_takes_the_laboratory_down(cause: signal.Signals) -> None:
    program = """
import signal, subprocess, time
from benchmarks.netlab import Lab
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and so perhaps these tests, ignore it
lab = Lab(2).__enter__()
sleeper = subprocess.Popen(lab.command(1, ["sleep", "600"]))
print(lab.name, flush=True)
time.sleep(600)
"""
    owner = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    with owner:
        try:
            assert owner.stdout is not None
            name = owner.stdout.readline().strip()
            assert len(namespaces_of(name)) == 3
            os.killpg(owner.pid, cause)  # as Ctrl-C does: everything in the group
            owner.wait(20)
        finally:
            owner.kill()
    deadline_s = time.monotonic() + 20
    while (namespaces_of(name) or files_of(name)) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert namespaces_of(name) == []
    assert files_of(name) == []


@needs_lab
def test_what_a_killed_janitor_left_the_next_laboratory_removes() -> None:
    program = """
import time
from benchmarks.netlab import Lab
lab = Lab(2, latency_s=1e-3).__enter__()
print(lab.name, lab._janitor.pid, flush=True)
time.sleep(600)
"""
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    with owner:
        assert owner.stdout is not None
        name, janitor = owner.stdout.readline().split()
        os.kill(int(janitor), signal.SIGKILL)
        assert owners.remove_leftovers() == [], "its owner lives"
        owner.kill()
        owner.wait(20)
    assert len(namespaces_of(name)) == 3, "nobody was left to remove it"
    with Lab(1):
        assert namespaces_of(name) == []
    assert files_of(name) == []


@needs_lab
def test_latency_and_rate_of_each_link() -> None:
    """Light is never faster than asked; how much slower the cable is depends on the machine's load."""
    asked_s = (0.02, 0.05)
    echo = "import socket; s = socket.create_server(('', 5009)); print('ready', flush=True); p, _ = s.accept(); p.sendall(p.recv(1))"
    ping = """
import socket, time
begin_s = time.perf_counter()
peer = socket.create_connection(("node1", 5009))
connected_s = time.perf_counter()
peer.sendall(b"x")
peer.recv(1)
print(connected_s - begin_s, time.perf_counter() - connected_s)
"""
    with Lab(2, [80e6, 20e6], latency_s=asked_s) as lab:
        assert Lab.attach(lab.name).latencies_s == asked_s
        answering = subprocess.Popen(lab.command(1, [sys.executable, "-c", echo]), stdout=subprocess.PIPE, text=True)
        with answering:
            assert answering.stdout is not None
            assert answering.stdout.readline() == "ready\n"
            for round_trip_s in map(float, lab.run(0, [sys.executable, "-c", ping]).split()):
                assert sum(asked_s) <= round_trip_s < sum(asked_s) + 0.2
        sent, took_s = send(lab, 1.0)
        assert 0.1 * took_s * 80e6 / 8 <= sent <= took_s * 80e6 / 8 + 65_536 + 64_000
        assert lab.counters(0).sent_bytes >= sent


@needs_lab
def test_a_link_without_our_marker_is_not_shaped() -> None:
    with Lab(1) as lab:
        marker = owners.MARKERS / f"{lab.namespace(0)}.json"
        kept = marker.read_text()
        marker.unlink()
        with pytest.raises(Unavailable, match="no marker of ours"):
            lab.set_rate(1e6)
        marker.write_text(kept)


@needs_lab
def test_foreign_namespaces_stay_untouched() -> None:
    name = f"foreign{os.getpid()}"
    subprocess.run(["ip", "netns", "add", f"{name}-node0"], check=True)
    try:
        with pytest.raises(Unavailable, match="not ours"), Lab(1, name=name):
            pass
        assert namespaces_of(name) == [f"{name}-node0"]
        Lab(1, name=name).remove()
        assert namespaces_of(name) == [f"{name}-node0"]
        with pytest.raises(UsageError, match="no laboratory"):
            Lab.attach(name)
    finally:
        subprocess.run(["ip", "netns", "delete", f"{name}-node0"], check=True)


@needs_lab
def test_the_commands_make_use_and_remove_a_laboratory() -> None:
    def call(*arguments: str) -> str:
        return subprocess.run([sys.executable, "-m", "benchmarks.netlab", *arguments], capture_output=True, text=True, check=True).stdout

    name = call("up", "--nodes", "2", "--rate", "1e8").strip()
    try:
        assert name in call("list").split()
        assert call("exec", name, "1", "--", "hostname") == "node1\n"
        call("rate", name, "5e7")
        assert Lab.attach(name).rates_bit_per_s == (5e7, 5e7)
        assert '"sent_bytes"' in call("counters", name)
    finally:
        call("down", name)
    assert namespaces_of(name) == []
    placed = call("run", "--nodes", "3", "--rate", "1e8,5e7,none", "--", "sh", "-c", "echo $NODE_RANK of $NNODES on $(hostname)")
    assert placed == "".join(f"{node} of 3 on node{node}\n" for node in range(3))


def test_without_root_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(Unavailable, match="need root"), Lab(2):
        pass
    assert main(["up"]) == 69
    assert "need root" in capsys.readouterr().err


@pytest.mark.parametrize(("nodes", "rate"), [(0, None), (201, None), (2, -1.0), (2, float("nan")), (2, 10.0)])
def test_senseless_numbers_are_refused(nodes: int, rate: float | None) -> None:
    with pytest.raises(UsageError, match="choose"):
        Lab(nodes, rate)


def test_one_value_for_all_or_one_for_each() -> None:
    assert Lab(2, 1e6, latency_s=[0.0, 0.1]).latencies_s == (0.0, 0.1)
    assert Lab(2, [1e6, None]).rates_bit_per_s == (1e6, None)
    with pytest.raises(UsageError, match="3 rates for 2 emulated nodes"):
        Lab(2, [1e6, 1e6, 1e6])
    with pytest.raises(UsageError, match="latency"):
        Lab(2, latency_s=-1.0)
