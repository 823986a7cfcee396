"""All-to-alls over MPI, under mpirun: the same bits and bytes as over torch, under way while nobody waits, and no wait without an end."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from crossdock.runtime.transport.carrier import CarrierTimes
from crossdock.runtime.transport.mpi_exchange import MpiExchange, MpiGroup, Progress

MPIRUN = Path(sys.executable).with_name("mpirun")
pytest.importorskip("mpi4py", reason="mpi4py is not installed")
pytestmark = pytest.mark.skipif(not MPIRUN.exists(), reason="no mpirun beside this Python: install the package mpich")


def on_ranks(num_ranks: int, what: str, folder: Path, *, ends_well: bool = True) -> list[dict[str, Any]]:
    """What each rank found; see mpi_ranks.py."""
    command = [str(MPIRUN), "-n", str(num_ranks), sys.executable, "-m", "tests.runtime.transport.mpi_ranks", str(folder / "store")]
    ended = subprocess.run([*command, str(folder), what], capture_output=True, text=True, timeout=150, check=False)
    assert ended.returncode == 0 or not ends_well, ended.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(num_ranks)]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_dispatcher_gives_the_same_bits_and_counts_the_same_bytes(num_ranks: int, tmp_path: Path) -> None:
    found = on_ranks(num_ranks, "equality", tmp_path)
    for rank, cases in enumerate(found):
        assert {case.split()[0] for case in cases} == {"flat", "deduplicated", "hierarchical"}
        assert [case for case, outcome in cases.items() if not outcome["same"]] == [], f"rank {rank}"
    for case in found[0]:
        assert sum(cases[case]["bytes"] for cases in found) > 100


def test_rows_travel_while_nobody_waits(tmp_path: Path) -> None:
    """16 MiB a rank is more than MPI takes over at the start, so that somebody has to bring it forward."""
    for outcome in on_ranks(2, "goes_on", tmp_path):
        assert outcome == {"at_once": False, "over": True, "right": True}


def test_both_are_measured_and_all_ranks_use_the_same(tmp_path: Path) -> None:
    first, *others = on_ranks(4, "choice", tmp_path)
    assert others == [first] * 3
    measured = {name: CarrierTimes(**times) for name, times in first["measured"].items()}
    assert measured.keys() == {"torch", "mpi"}
    assert all(min(times.alone_s, times.beside_compute_s) > 0 for times in measured.values())
    assert first["transport"] == min(measured, key=lambda name: measured[name].score_s)
    assert first["is_mpi"] == (first["transport"] == "mpi")
    assert (first["asked"], first["message_bytes"]) == ("auto", 1 << 16)


def test_a_rank_that_fails_is_noticed_by_those_that_wait_for_its_rows(tmp_path: Path) -> None:
    _, *others = found = on_ranks(2, "farewell", tmp_path, ends_well=False)
    assert others == [{"said": ""}]
    assert "combine of layer 5 (tokens) on rank 0 of 2 failed: another rank is gone" in found[0]["said"]
    assert found[0]["seconds"] < 30  # and not the 60 s after which it would have given up


class Never:
    """A request, or a communicator, on which nothing ever happens; `error` is what looking at it raises."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def Test(self) -> bool:
        if self.error is not None:
            raise self.error
        return False

    def Iprobe(self) -> bool:
        return False


def waiting_for(request: Never) -> MpiExchange:
    return MpiExchange(torch.zeros(1), torch.zeros(1), [request], Progress(Never(), timeout_s=0.3))


def test_a_wait_ends_with_the_time_limit() -> None:
    with pytest.raises(RuntimeError, match=r"MPI: timed out after 0\.3 s"):
        waiting_for(Never()).wait()


def test_what_mpi_reports_reaches_whoever_waits() -> None:
    exchange = waiting_for(Never(OSError("MPI_ERR_OTHER: the wire is cut")))
    assert exchange.look()  # the thread that looks after it has met the error
    for _ in range(2):
        with pytest.raises(OSError, match="wire is cut"):
            exchange.wait()


class Taken:
    """A communicator of three ranks that notes what is posted, in order."""

    def __init__(self) -> None:
        self.posted: list[tuple[str, int, int, int]] = []

    def Get_rank(self) -> int:
        return 1

    def Get_size(self) -> int:
        return 3

    def Irecv(self, block: Any, peer: int, tag: int) -> Never:
        self.posted.append(("receive", peer, block.nbytes, tag))
        return Never()

    def Isend(self, block: Any, peer: int, tag: int) -> Never:
        self.posted.append(("send", peer, block.nbytes, tag))
        return Never()


def test_receives_stand_before_sends_and_nothing_is_posted_for_no_rows() -> None:
    communicator, progress = Taken(), Progress(Never(), 1.0)
    sent, received = torch.arange(8.0).view(4, 2), torch.zeros(3, 2)
    MpiGroup(communicator, progress).exchange_start(received, sent, (2, 1, 0), (1, 1, 2), tag=7)
    progress.close(failed=False)  # else its thread would look after the exchange for as long as the tests run
    assert communicator.posted == [("receive", 0, 16, 7), ("send", 2, 16, 7), ("send", 0, 8, 7)]
    assert received[2].tolist() == [2.0, 3.0]  # what stays on its rank
