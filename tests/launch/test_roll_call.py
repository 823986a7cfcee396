"""Who is blamed when a collective fails: real processes that are killed, stopped, hung or waiting, and hosts that answer or do not."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from crossdock.errors import NonFiniteLoss, PeerLost
from crossdock.launch.ranks import roll_call
from crossdock.launch.ranks.processes import Address
from crossdock.launch.ranks.pulse import Pulse
from crossdock.launch.ranks.rendezvous import signed
from crossdock.launch.ranks.roll_call import Crew, Lost, waits
from crossdock.launch.ranks.worker_env import Meeting, WorkerEnv

FAILURE = PeerLost("dispatch of layer 0 failed: Connection reset by peer")
PEER = """
import signal, sys, threading, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from crossdock.launch.ranks.processes import stacks_kept
from transport.mpi_exchange import hold
with stacks_kept(Path(sys.argv[2])):
    threading.Thread(target=hold, daemon=True).start()
    print("up", flush=True)
    if sys.argv[3] == "waits":
        hold()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    while True:
        time.sleep(0.01)
"""


class Peer:
    """A process that stands for another rank, its stacks kept in `folder` as a rank's are; a thread of its transport always waits."""

    def __init__(self, folder: Path, rank: int, does: str) -> None:
        transport = folder / "modules" / "transport"
        transport.mkdir(parents=True, exist_ok=True)
        (transport / "mpi_exchange.py").write_text("import time\ndef hold():\n    time.sleep(600)\n")
        arguments = [str(transport.parent), str(folder / f"rank-{rank:05d}.txt"), does]
        self.process = subprocess.Popen([sys.executable, "-c", PEER, *arguments], stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"up\n"
        self.address = Address.of(self.process.pid)

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def peers(tmp_path: Path) -> Iterator[list[Peer]]:
    made: list[Peer] = []
    yield made
    for peer in made:
        peer.close()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is certain must be found at once: nobody waits for the end of this patience."""
    monkeypatch.setattr(roll_call, "PATIENCE_S", 600.0)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "PATIENCE_S", 0.1)


def environment(rank: int, world_size: int, ranks_per_host: int, launcher: Any = "torchrun") -> WorkerEnv:
    meeting = Meeting("listen", host="127.0.0.1", port=1)
    return WorkerEnv(rank, world_size, rank % ranks_per_host, ranks_per_host, rank // ranks_per_host, meeting, launcher)


def crew(folder: Path, peers: list[Peer], rank: int = 0, store: Any = None, launcher: str = "torchrun") -> Crew:
    """This process as `rank` among the peers, all on this host."""
    addresses = [peer.address for peer in peers]
    addresses.insert(rank, Address.here())
    env = environment(rank, len(addresses), len(addresses), launcher)
    return Crew(signed(dist.HashStore(), None) if store is None else store, env, tuple(addresses), folder)


def blamed(crew: Crew) -> Lost:
    with pytest.raises(Lost) as caught, crew.watching(lambda failure: (79, str(failure))):
        raise FAILURE
    return caught.value


@pytest.mark.usefixtures("patient")
def test_a_killed_rank_is_named_with_its_process(tmp_path: Path, peers: list[Peer]) -> None:
    peers += [Peer(tmp_path, 1, "waits"), Peer(tmp_path, 2, "waits")]
    peers[1].process.kill()
    peers[1].process.wait()
    cause = blamed(crew(tmp_path, peers)).cause
    assert (cause.rank, cause.exit_code, cause.is_mine_to_tell) == (2, 76, True)
    assert cause.message.startswith(f"rank 2 (process {peers[1].process.pid} on ")
    assert "was killed, or crashed" in cause.message
    assert "Connection reset by peer" in (tmp_path / "rank-00000.txt").read_text()


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(("launcher", "is_ended"), [("torchrun", True), ("local", False)])
def test_a_stopped_rank_is_named_and_ended_where_its_launcher_would_wait(
    launcher: str, is_ended: bool, tmp_path: Path, peers: list[Peer]
) -> None:
    peers.append(Peer(tmp_path, 1, "waits"))
    peers[0].send(signal.SIGSTOP)
    cause = blamed(crew(tmp_path, peers, launcher=launcher)).cause
    assert cause.rank == 1
    assert "is stopped, by SIGSTOP" in cause.message
    assert "kernel at" in (tmp_path / "rank-00001.system.txt").read_text()
    if is_ended:
        assert peers[0].process.wait(60) == -signal.SIGKILL
    else:
        assert peers[0].process.poll() is None


@pytest.mark.usefixtures("patient")
def test_a_stopped_rank_that_holds_the_store_is_named_without_it(tmp_path: Path, peers: list[Peer]) -> None:
    class Silent:
        """The store of a process that is stopped: a question waits until that has gone."""

        def __init__(self, holder: Peer) -> None:
            self.holder = holder

        def set(self, key: str, value: str) -> None:
            self.holder.process.wait()
            raise RuntimeError("Connection reset by peer")

    peers.append(Peer(tmp_path, 0, "waits"))
    peers[0].send(signal.SIGSTOP)
    mine = crew(tmp_path, peers, rank=1, store=Silent(peers[0]))
    cause = blamed(mine).cause
    assert (cause.rank, cause.is_mine_to_tell) == (0, True)
    assert "is stopped, by SIGSTOP" in cause.message
    assert not [thread for thread in threading.enumerate() if thread.name == "roll-call"], "it would come back while the interpreter ends"


@pytest.mark.usefixtures("impatient")
def test_a_hung_rank_is_told_from_one_that_waits_also_where_a_thread_of_its_transport_waits(tmp_path: Path, peers: list[Peer]) -> None:
    peers += [Peer(tmp_path, 1, "waits"), Peer(tmp_path, 2, "hangs")]
    cause = blamed(crew(tmp_path, peers)).cause
    assert cause.rank == 2
    assert "is alive and hangs" in cause.message
    assert "rank 1" not in cause.message
    assert "in hold" in (tmp_path / "rank-00001.txt").read_text()


@pytest.mark.usefixtures("impatient")
def test_where_all_silent_ranks_wait_they_are_told_as_waiting(tmp_path: Path, peers: list[Peer]) -> None:
    peers += [Peer(tmp_path, 1, "waits"), Peer(tmp_path, 2, "waits")]
    assert "wait for others" in blamed(crew(tmp_path, peers)).cause.message


def test_stacks_are_judged_by_the_thread_that_runs_the_program() -> None:
    transport = '  File "/x/threading.py", line 1 in wait\n  File "/x/transport/mpi_exchange.py", line 2 in _look_after\n'
    bootstrap = '  File "/x/threading.py", line 3 in _bootstrap\n'
    program = '  File "/x/model.py", line 9 in forward\n  File "/x/__main__.py", line 1 in <module>\n'
    threads = f"Thread 0x1 (most recent call first):\n{transport}{bootstrap}\nCurrent thread 0x2 (most recent call first):\n"
    assert not waits(threads + program)
    assert waits(threads + transport + program)
    assert waits(f"Thread 0x3 (most recent call first):\n{transport}\n{threads}{program}"), (
        "autograd's threads on devices, which are not Python's"
    )
    elsewhere = '  File "/x/crossdock/launch/ranks/faults.py", line 5 in _hang\n'
    assert not waits(threads + elsewhere + transport + program)
    assert waits(threads + '  File "/x/torch/distributed/c10d.py", line 5 in wait\n' + transport + program)
    assert not waits("")


@pytest.mark.usefixtures("patient")
def test_another_error_of_a_rank_is_the_cause_with_its_exit_code(tmp_path: Path, peers: list[Peer]) -> None:
    peers.append(Peer(tmp_path, 1, "waits"))
    mine = crew(tmp_path, peers)
    mine.store.set("roll/1", json.dumps({"exit_code": 79, "message": "loss is not finite on rank 1"}))
    peers[0].process.kill()
    peers[0].process.wait()
    cause = blamed(mine).cause
    assert (cause.rank, cause.exit_code) == (1, 79)
    assert cause.message == "rank 1: loss is not finite on rank 1"


@pytest.mark.usefixtures("patient")
def test_a_rank_that_leaves_its_reason_and_goes_between_two_looks_was_not_killed(tmp_path: Path, peers: list[Peer]) -> None:
    class LateWord(dist.HashStore):
        looks = 0

        def check(self, keys: list[str]) -> bool:
            if keys == ["roll/1"]:
                self.looks += 1
                if self.looks == 2:
                    self.set("roll/1", json.dumps({"exit_code": 80, "message": "out of memory"}))
            return bool(super().check(keys))

    peers.append(Peer(tmp_path, 1, "waits"))
    peers[0].process.kill()
    peers[0].process.wait()
    cause = blamed(crew(tmp_path, peers, store=LateWord())).cause
    assert (cause.rank, cause.exit_code) == (1, 80)


def test_the_reason_of_an_error_of_this_rank_is_left_for_the_others(tmp_path: Path) -> None:
    mine = crew(tmp_path, [])
    with pytest.raises(NonFiniteLoss), mine.watching(lambda failure: (79, str(failure))):
        raise NonFiniteLoss("step 3")
    assert json.loads(mine.store.get("roll/0")) == {"exit_code": 79, "message": "step 3"}


@pytest.mark.usefixtures("patient")
def test_rank_0_stays_until_all_that_are_there_have_heard_why_it_leaves(tmp_path: Path, peers: list[Peer]) -> None:
    peers += [Peer(tmp_path, 1, "waits"), Peer(tmp_path, 2, "waits")]
    mine = crew(tmp_path, peers)
    other = crew(tmp_path, peers, rank=1, store=mine.store)
    with pytest.raises(NonFiniteLoss), mine.watching(lambda failure: (79, str(failure))):
        raise NonFiniteLoss("step 3")
    other.stay_until_heard()  # the store is not its
    staying = threading.Thread(target=mine.stay_until_heard)
    staying.start()
    peers[1].process.kill()
    staying.join(0.3)
    assert staying.is_alive()
    assert blamed(other).cause.exit_code == 79
    staying.join(60)
    assert not staying.is_alive()


@pytest.mark.usefixtures("impatient")
def test_rank_0_does_not_stay_for_ever(tmp_path: Path, peers: list[Peer]) -> None:
    peers.append(Peer(tmp_path, 1, "waits"))
    crew(tmp_path, peers).stay_until_heard()


def on_hosts(folder: Path, rank: int, store: Any, pulses: list[str]) -> Crew:
    """This process as `rank` of four on two hosts, the other ones felt at `pulses`."""
    here = Address.here()
    addresses = [here if rank // 2 == number // 2 else Address("other 1", 100 + number, "1") for number in range(4)]
    return Crew(store, environment(rank, 4, 2), tuple(addresses), folder, None, tuple(pulses))


@pytest.mark.usefixtures("patient")
def test_rank_0_does_not_stay_for_a_host_that_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its result would come after that of the other side of the cut, and name the wrong one."""
    store = signed(dist.HashStore(), None)
    store.set("heard/1", "")
    monkeypatch.setattr(roll_call, "felt", lambda places, within_s: dict.fromkeys(places, "unreachable"))
    staying = threading.Thread(target=on_hosts(tmp_path, 0, store, ["", "", "cut off", "cut off"]).stay_until_heard, daemon=True)
    staying.start()
    staying.join(30)
    assert not staying.is_alive()


@pytest.mark.usefixtures("patient")
def test_a_lost_host_is_certain_as_soon_as_its_system_refuses_for_all_its_ranks(tmp_path: Path) -> None:
    gone = Pulse("127.0.0.1")
    place = str(gone)
    gone.close()
    store = signed(dist.HashStore(), None)
    store.set("roll/1", json.dumps({"exit_code": 76}))
    cause = blamed(on_hosts(tmp_path, 0, store, ["", "", place, place])).cause
    assert cause.rank == 2
    assert cause.message.startswith("ranks 2, 3 (all of other) were killed, or crashed")


@pytest.mark.usefixtures("impatient")
def test_a_rank_of_another_host_that_is_there_is_not_called_cut_off(tmp_path: Path) -> None:
    pulse = Pulse("127.0.0.1")
    store = signed(dist.HashStore(), None)
    for rank in (1, 2):
        store.set(f"roll/{rank}", json.dumps({"exit_code": 76}))
    message = blamed(on_hosts(tmp_path, 0, store, ["", "", str(pulse), str(pulse)])).cause.message
    assert message.startswith("rank 3 (process 103 on other) is there and does not answer")
    assert "did not answer: the host is lost or cut off" in blamed(on_hosts(tmp_path, 0, store, [])).cause.message


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("is_host_lost", [True, False])
def test_the_store_goes_with_its_host_or_with_rank_0_alone(is_host_lost: bool, tmp_path: Path) -> None:
    class Gone:
        def set(self, key: str, value: str) -> None:
            raise RuntimeError("Broken pipe")

    gone, there = Pulse("127.0.0.1"), Pulse("127.0.0.1")
    place = str(gone)
    gone.close()
    cause = blamed(on_hosts(tmp_path, 2, Gone(), [place, place if is_host_lost else str(there), "", ""])).cause
    assert (cause.rank, cause.is_mine_to_tell) == (0, True)
    start = "ranks 0, 1 (all of other) were killed" if is_host_lost else "rank 0 (process 100 on other) was killed"
    assert cause.message.startswith(start)
