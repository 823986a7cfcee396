"""WorkerEnv: each launcher's variables give the same record, and a restart never meets the dead."""

import os
import socket
import stat
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from crossdock.authentication import Secret
from crossdock.errors import BadConfig, CrossdockError, PeerLost, Unavailable, UsageError
from crossdock.launch.ranks import rendezvous
from crossdock.launch.ranks.rendezvous import exchange, host_secret, listen, open_store, signed
from crossdock.launch.ranks.worker_env import Meeting, WorkerEnv, first_host, local_environment, tasks_per_node, worker_env
from tests.launch.starts import free_port

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}


def test_torchrun() -> None:
    assert worker_env(TORCHRUN) == WorkerEnv(3, 4, 1, 2, 1, Meeting("shared", host="head", port=29400), "torchrun")
    own = {name: value for name, value in TORCHRUN.items() if name not in ("TORCHELASTIC_USE_AGENT_STORE", "GROUP_RANK")}
    assert worker_env(own) == WorkerEnv(3, 4, 1, 2, 1, Meeting("listen", host="head", port=29400), "torchrun")


def test_nobody_started_us() -> None:
    assert worker_env({"MASTER_ADDR": "head", "PATH": "/bin"}) is None


def test_a_local_rank_forgets_any_outer_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    environment = local_environment(1, 2, "/tmp/store", 3)
    assert worker_env(environment) == WorkerEnv(1, 2, 1, 2, 0, Meeting("file", path="/tmp/store"), "local")
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"


@pytest.mark.parametrize(
    ("change", "piece"),
    [
        ({"RANK": "4"}, "rank 4 of 4"),
        ({"RANK": "x"}, "RANK is 'x'"),
        ({"LOCAL_RANK": "2"}, "local rank 2 of 2"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set"),
        ({"LOCAL_WORLD_SIZE": "9"}, "of 9"),
    ],
)
def test_variables_that_do_not_fit_are_named(change: dict[str, str | None], piece: str) -> None:
    environ = {name: value for name, value in (TORCHRUN | change).items() if value is not None}
    with pytest.raises(UsageError, match=piece):
        worker_env(environ)


SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "9",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),1",
    "SLURM_STEP_NODELIST": "gpu[03-05]",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "2",
}


def test_slurm() -> None:
    env = worker_env(SLURM | {"PMI_RANK": "6"})  # srun speaks PMI as well, and is no mpirun
    assert env is not None
    assert env == WorkerEnv(6, 9, 2, 4, 1, Meeting("listen", host="gpu03", port=env.meeting.port if env.meeting else 0), "slurm")
    assert env.meeting is not None
    assert 20_000 <= env.meeting.port < 30_000
    other_job = worker_env(SLURM | {"SLURM_JOB_ID": "4712"})
    assert other_job is not None
    assert other_job.meeting is not None
    assert other_job.meeting.port != env.meeting.port
    chosen = worker_env(SLURM | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"})
    assert chosen is not None
    assert chosen.meeting == Meeting("listen", host="10.0.0.1", port=29500)


def test_a_batch_script_without_srun_is_no_rank() -> None:
    assert worker_env({"SLURM_JOB_ID": "4711", "SLURM_NODEID": "0", "SLURM_PROCID": "0"}) is None


@pytest.mark.parametrize(("text", "counts"), [("2", (2,)), ("4(x2),1", (4, 4, 1)), ("1,2(x3)", (1, 2, 2, 2))])
def test_slurm_tasks_per_node(text: str, counts: tuple[int, ...]) -> None:
    assert tasks_per_node(text) == counts


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [("gpu[03-05,9],login1", "gpu03"), ("a,b", "a"), ("n7", "n7"), ("rack[2]-ib", "rack2-ib"), ("x-1[10,12]", "x-110")],
)
def test_slurm_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


@pytest.mark.parametrize(
    ("change", "piece"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "four"}, "'four'"),
        ({"SLURM_NODEID": "3"}, "names 3 nodes"),
        ({"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST"),
        ({"SLURM_LOCALID": "4"}, "local rank 4 of 4"),
    ],
)
def test_slurm_variables_that_do_not_fit_are_named(change: dict[str, str], piece: str) -> None:
    with pytest.raises(UsageError, match=piece):
        worker_env(SLURM | change)


def ranks_meet(envs: list[WorkerEnv], timeout_s: float = 20.0) -> list[tuple[str, ...] | CrossdockError]:
    """What every rank learns of the others' nodes, all of them in threads of this process."""
    found: list[tuple[str, ...] | CrossdockError] = [()] * len(envs)
    stores = []  # rank 0's store serves the others: none may go before all are done

    def meet(place: int, env: WorkerEnv) -> None:
        try:
            store = open_store(env, timeout_s)
            stores.append(store)
            found[place] = exchange(store, env, "node", str(env.node))
        except CrossdockError as failure:
            found[place] = failure

    threads = [threading.Thread(target=meet, args=(place, env)) for place, env in enumerate(envs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def world(meeting: Meeting, size: int = 3, secrets: Sequence[Secret | None] = (None,)) -> list[WorkerEnv]:
    return [
        WorkerEnv(rank, size, 0, 1, node=rank, meeting=meeting, launcher="torchrun", secret=secrets[rank % len(secrets)])
        for rank in range(size)
    ]


def test_ranks_meet_at_a_file(tmp_path: Path) -> None:
    assert ranks_meet(world(Meeting("file", path=str(tmp_path / "store")))) == [("0", "1", "2")] * 3


def test_restarts_meet_afresh_in_the_agents_store() -> None:
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = Meeting("shared", host="127.0.0.1", port=agent.port)
    signed(agent, None).set("crossdock/meeting", "a-dead-rank-0 127.0.0.1 1")  # what a killed incarnation leaves behind
    assert ranks_meet(world(meeting)) == [("0", "1", "2")] * 3
    assert ranks_meet(world(meeting, size=2)) == [("0", "1")] * 2  # and again with another world, on what the first one left


def test_a_living_store_of_an_earlier_start_is_not_joined() -> None:
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = Meeting("shared", host="127.0.0.1", port=agent.port)
    inside = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    earlier = signed(inside, None, "t")
    earlier.set("token", "t")
    earlier.set("world_size", "2")
    earlier.add("arrived/1", 1)  # the earlier rank 1 has been here
    signed(agent, None).set("crossdock/meeting", f"t 127.0.0.1 {inside.port}")
    [alone] = ranks_meet(world(meeting, size=2)[1:], timeout_s=1.0)
    assert isinstance(alone, PeerLost)
    assert "rank 1 did not find rank 0" in str(alone)
    assert ranks_meet(world(meeting, size=2)) == [("0", "1")] * 2


def test_an_address_where_nobody_listens_is_named() -> None:
    [failure] = ranks_meet(world(Meeting("shared", host="127.0.0.1", port=1), size=2)[1:], timeout_s=1.0)
    assert isinstance(failure, Unavailable)
    assert "127.0.0.1:1" in str(failure)


def test_a_world_of_one_needs_no_store() -> None:
    assert open_store(WorkerEnv.single(), 1.0) is None
    assert exchange(None, WorkerEnv.single(), "node", "0") == ("0",)
    with pytest.raises(UsageError, match="no store"):
        WorkerEnv(0, 2, 0, 2, 0, None, "single")


# ---- who may join


@pytest.mark.parametrize("kind", ["file", "listen", "shared"])
@pytest.mark.parametrize("strangers", [(Secret.fresh(), Secret.fresh()), (Secret.fresh(), None), (None, Secret.fresh())])
def test_a_rank_with_another_secret_is_refused(
    kind: str, strangers: tuple[Secret | None, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "_STALE_S", 0.5)
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = agent.port if kind == "shared" else free_port()
    meeting = Meeting(kind, host="127.0.0.1", port=port, path=str(tmp_path / "store"))  # type: ignore[arg-type]
    found = ranks_meet(world(meeting, 2, strangers), timeout_s=3.0)
    assert isinstance(found[1], BadConfig)
    assert "refused: the message" in str(found[1])
    assert "CROSSDOCK_SECRET_FILE" in str(found[1])
    for secret in filter(None, strangers):
        assert secret.key.decode() not in f"{found} {world(meeting, 2, strangers)}"


@pytest.mark.parametrize("kind", ["file", "listen", "shared"])
def test_ranks_with_one_secret_meet(kind: str, tmp_path: Path) -> None:
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = agent.port if kind == "shared" else free_port()
    meeting = Meeting(kind, host="127.0.0.1", port=port, path=str(tmp_path / "store"))  # type: ignore[arg-type]
    assert ranks_meet(world(meeting, 2, [Secret.fresh()])) == [("0", "1")] * 2


def test_a_secret_is_handed_down_in_a_file_or_in_the_environment(tmp_path: Path) -> None:
    ours, theirs = Secret.fresh(), Secret.fresh()
    ours.write(tmp_path / "secret")
    in_a_file = worker_env(TORCHRUN | {"CROSSDOCK_SECRET_FILE": str(tmp_path / "secret"), "CROSSDOCK_SECRET": theirs.key.decode()})
    assert in_a_file is not None
    assert in_a_file.secret == ours
    in_the_environment = worker_env(TORCHRUN | {"CROSSDOCK_SECRET": theirs.key.decode()})
    assert in_the_environment is not None
    assert in_the_environment.secret == theirs
    with pytest.raises(BadConfig, match=r"CROSSDOCK_SECRET has 5 characters"):
        worker_env(TORCHRUN | {"CROSSDOCK_SECRET": "short"})


def test_a_local_rank_gets_the_file_of_its_job_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSDOCK_SECRET", "that of an outer launcher")
    environment = local_environment(0, 1, "/tmp/store", 1, "/tmp/secret")
    assert environment["CROSSDOCK_SECRET_FILE"] == "/tmp/secret"
    assert "CROSSDOCK_SECRET" not in environment


def test_one_secret_a_host_and_meeting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found: list[Secret] = []
    threads = [threading.Thread(target=lambda: found.append(host_secret("job-1"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert host_secret("job-2") != found[0]
    [folder] = tmp_path.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    folder.chmod(0o755)
    with pytest.raises(Unavailable, match="not a folder of this user alone"):
        host_secret("job-1")


def test_a_file_in_the_place_of_secrets_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"crossdock-{os.getuid()}").write_text("")
    with pytest.raises(Unavailable, match="not a folder of this user alone"):
        host_secret("job-1")


# ---- who can reach us


def listening() -> set[tuple[str, int]]:
    return {tuple(found.laddr) for found in psutil.Process().net_connections("inet") if found.status == psutil.CONN_LISTEN}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_store_listens_on_the_address_it_was_given_alone(host: str) -> None:
    before = listening()
    store = listen(0, host, 5.0)
    [(address, port)] = listening() - before
    assert address in ("127.0.0.1", "::1")
    assert port == store.port


def test_a_taken_port_is_named() -> None:
    store = listen(0, "127.0.0.1", 5.0)
    with pytest.raises(Unavailable, match=rf"cannot listen on 127.0.0.1:{store.port} .*in use"):
        listen(0, "127.0.0.1", 5.0, store.port)


def named_as_loopback(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Make this host know `name` as 127.0.1.1, as Debian's /etc/hosts does."""
    whole = socket.getaddrinfo

    def known(host: str, *arguments: object, **options: object) -> object:
        return whole("127.0.1.1" if host == name else host, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", known)


def test_a_host_that_knows_its_name_as_loopback_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    named_as_loopback(monkeypatch, "myhost")
    before = listening()
    store = listen(0, "myhost", 5.0)
    assert listening() - before == {("127.0.1.1", store.port)}


def test_it_listens_on_the_one_address_that_other_hosts_reach_where_there_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    named_as_loopback(monkeypatch, "myhost")
    monkeypatch.setattr(rendezvous, "outward_address", lambda name: "127.0.0.7")
    before = listening()
    store = listen(0, "myhost", 5.0, spans_hosts=True)
    assert listening() - before == {("127.0.0.7", store.port)}


def test_the_outward_address_is_one_of_ours_or_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_ELSEWHERE", ("127.0.0.1", 9))
    assert rendezvous.outward_address("myhost") == "127.0.0.1"
    monkeypatch.setattr(rendezvous, "_ELSEWHERE", ("no such host.invalid", 9))
    addresses = {"lo": ["127.0.0.1"], "a": ["10.0.0.1"], "b": ["10.1.0.1"]}

    def interfaces() -> dict[str, list[object]]:
        kind = type("Entry", (), {})
        found: dict[str, list[object]] = {}
        for name, held in addresses.items():
            for address in held:
                entry = kind()
                entry.family, entry.address = socket.AF_INET, address
                found.setdefault(name, []).append(entry)
        return found

    monkeypatch.setattr(psutil, "net_if_addrs", interfaces)
    with pytest.raises(Unavailable, match=r"2 other addresses without a route.*name rank 0 by its address"):
        rendezvous.outward_address("myhost")
    del addresses["b"]
    assert rendezvous.outward_address("myhost") == "10.0.0.1"


# ---- what signs the records of a start


def test_every_start_signs_its_records_otherwise(tmp_path: Path) -> None:
    env = WorkerEnv(0, 1, 0, 1, 0, Meeting("file", path=str(tmp_path / "a")), "local", Secret(b"k" * 32))
    controls = [rendezvous.control_of(signed(dist.HashStore(), Secret(b"k" * 32)), env) for _ in range(2)]
    assert [control.secret for control in controls] == [Secret(b"k" * 32)] * 2
    assert controls[0].start != controls[1].start
    assert rendezvous.control_of(signed(dist.HashStore(), None), env).secret is None


def test_all_ranks_of_a_start_sign_alike() -> None:
    store = dist.HashStore()
    found: dict[int, object] = {}

    def join(rank: int) -> None:
        env = WorkerEnv(rank, 3, rank, 3, 0, Meeting("listen", host="127.0.0.1", port=1), "local")
        found[rank] = rendezvous.control_of(signed(store, Secret(b"k" * 32)), env)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20.0)
    assert len(found) == 3
    assert found[0] == found[1] == found[2]
