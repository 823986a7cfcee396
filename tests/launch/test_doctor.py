"""The doctor: findings with remedies on one host, ranks compared, and both it and the probe really started by torchrun and mpirun."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from crossdock.launch.cli import run
from crossdock.launch.doctor import disk as disk_module
from crossdock.launch.doctor.access import access, beyond_loopback, ray_authentication
from crossdock.launch.doctor.clock import clock
from crossdock.launch.doctor.devices import devices, peer_access
from crossdock.launch.doctor.disk import disk
from crossdock.launch.doctor.network import chosen_interfaces, interfaces, network, towards
from crossdock.launch.doctor.ranks import RankFacts, compared, merged, numbers
from crossdock.launch.doctor.report import Check
from crossdock.placement.records.topology import Topology

MPIRUN = Path(sys.executable).with_name("mpirun")
FACTS: dict[str, Any] = {
    "node": 0,
    "host": "h0",
    "address": "10.0.0.1",
    "interface": "eth0",
    "mtu_bytes": 1500,
    "versions": {"torch": "2.13.0", "rich": "15.0.0"},
    "gpus": 0,
    "sees_run_dir": True,
    "ahead_s": 0.0,
    "uncertain_s": 0.001,
    "checks": (Check("torch", "ok", "2.13.0"),),
}


def facts(rank: int, **changes: Any) -> RankFacts:
    return RankFacts(rank=rank, **(FACTS | changes))


def topics(checks: Any) -> Mapping[str, Check]:
    return {check.topic: check for check in checks}


# ---- ranks compared


def test_equal_ranks_are_well() -> None:
    checks = compared([facts(0), facts(1), facts(2)])
    assert {check.level for check in checks} == {"ok"}
    assert topics(checks)["versions"].finding == "equal on all 3 ranks"
    assert topics(checks)["ranks"].finding == "ranks 0-2 on h0 eth0 10.0.0.1"


@pytest.mark.parametrize(
    ("changes", "topic", "level", "finding"),
    [
        ({"versions": {"torch": "2.11.0", "rich": "15.0.0"}}, "torch differs", "bad", "ranks 0, 2 2.13.0; rank 1 2.11.0"),
        ({"versions": {"torch": "2.13.0"}}, "rich differs", "note", "ranks 0, 2 15.0.0; rank 1 none"),
        ({"ahead_s": -7.5}, "clocks", "note", "rank 1 is +7.50 s from rank 0 (+-0.001 s)"),
        ({"ahead_s": 7.5, "uncertain_s": 7.0}, "clocks", "ok", "within 7.5000 s of rank 0 (+-7.0000 s)"),
        ({"mtu_bytes": 9000}, "MTU differs", "note", "ranks 0, 2 1500; rank 1 9000"),
        ({"gpus": 8}, "GPUs differ", "note", "ranks 0, 2 0; rank 1 8"),
        ({"sees_run_dir": False}, "run directory", "bad", "rank 1 cannot see"),
    ],
)
def test_what_differs_is_named_by_rank(changes: dict[str, Any], topic: str, level: str, finding: str) -> None:
    found = topics(compared([facts(0), facts(1, **changes), facts(2)]))[topic]
    assert (found.level, finding in found.finding) == (level, True), found
    assert found.remedy or level == "ok"


def test_troubles_of_several_ranks_stand_together() -> None:
    full = Check("disk", "bad", "full", "free space")
    other = Check("disk", "note", "slow", "wait")
    checks = merged([facts(0), facts(1, checks=(full,)), facts(2, checks=(other,)), facts(3, checks=(full,))])
    assert [check.finding for check in checks] == ["2.13.0", "ranks 1, 3: full", "rank 2: slow"]


def test_numbers_of_ranks() -> None:
    assert numbers([3]) == "rank 3"
    assert numbers([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"


def test_every_trouble_has_a_remedy() -> None:
    with pytest.raises(AssertionError, match="without a remedy"):
        Check("x", "note", "strange")


# ---- one host


def test_disk_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = topics(disk(tmp_path / "runs" / "x"))
    assert str(tmp_path) in found["disk"].finding
    assert "MB/s to write and fsync 32 MiB" in found["disk speed"].finding
    assert found["rename"].level == "ok"
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(disk_module, "SLOW_BYTES_PER_S", 1e15)
    assert topics(disk(tmp_path))["disk speed"].level == "note"
    monkeypatch.setattr(Path, "replace", lambda self, target: None)
    assert topics(disk(tmp_path))["rename"].level == "bad"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc, the folder that nobody can write to")
def test_a_run_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        [found] = disk(place)
        assert found.level == "bad"
        assert found.finding.startswith(f"{tmp_path / 'file'} is a file")


def test_a_disk_that_cannot_be_written() -> None:
    [found] = disk(Path("/proc/self"))
    assert found.level == "bad"
    assert "run.dir=PATH" in found.remedy


def test_interfaces_and_the_way_to_a_peer() -> None:
    own, interface = towards("127.0.0.1")
    assert own == "127.0.0.1"
    assert interface is not None
    assert interface in interfaces()
    assert interface.mtu_bytes >= 1280
    found = topics(network({}))
    assert f"MTU {interface.mtu_bytes}" in found["interfaces"].finding
    assert "free" in found["ports"].finding


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        ("eth", ["eth0", "eth1"]),
        ("=eth0", ["eth0"]),
        ("^eth,lo", ["ib0"]),
        ("eth1,ib", ["eth1", "ib0"]),
        ("wlan", []),
        ("^=eth0", ["eth1", "ib0", "lo"]),
    ],
)
def test_socket_variables(chosen: str, names: list[str]) -> None:
    assert chosen_interfaces(chosen, ["eth0", "eth1", "ib0", "lo"]) == names


def test_a_socket_variable_that_names_no_interface() -> None:
    found = topics(network({"GLOO_SOCKET_IFNAME": "absent7", "NCCL_SOCKET_IFNAME": "=lo"}))
    assert (found["GLOO_SOCKET_IFNAME"].level, found["NCCL_SOCKET_IFNAME"].level) == ("bad", "ok")
    assert "lo" in found["GLOO_SOCKET_IFNAME"].remedy


def test_a_meeting_port_that_is_taken() -> None:
    with socket.socket() as taken:
        try:
            taken.bind(("127.0.0.1", 29_400))
            taken.listen()
        except OSError:  # by somebody else, which serves as well
            pass
        assert "29400" in topics(network({}))["meeting port"].finding


def test_dashboards_beyond_loopback() -> None:
    open_to_all = [("::", 8265), ("0.0.0.0", 6006), ("127.0.0.1", 6379), ("::1", 10_001), ("fe80::1%eth0", 3000)]
    found = beyond_loopback(open_to_all, ray_is_authenticated=False)
    assert [check.level for check in found] == ["note"] * 3
    assert "RAY_AUTH_MODE=token" in found[0].remedy
    assert [check.level for check in beyond_loopback(open_to_all, ray_is_authenticated=True)] == ["ok", "note", "note"]
    assert [check.level for check in beyond_loopback([("127.0.0.1", 8265)], ray_is_authenticated=False)] == ["ok"]


def test_ray_authentication(tmp_path: Path) -> None:
    token = tmp_path / "auth_token"
    assert [check.level for check in ray_authentication({}, token)] == ["ok"]
    assert [check.level for check in ray_authentication({"RAY_AUTH_MODE": "token"}, token)] == ["bad"]
    token.write_text("x")
    token.chmod(0o600)
    assert [check.level for check in ray_authentication({"RAY_AUTH_MODE": "token"}, token)] == ["ok"]
    [trap] = ray_authentication({}, token)
    assert "RAY_AUTH_MODE=token" in trap.remedy
    token.chmod(0o644)
    assert ray_authentication({"RAY_AUTH_MODE": "token"}, token)[0].remedy == f"chmod 600 {token}"


def test_devices_say_so_where_there_are_none() -> None:
    found = topics(devices())
    assert "process groups" in found
    import torch

    if not torch.cuda.is_available():
        assert "CPU alone" in found["devices"].finding


@pytest.mark.parametrize(
    ("change", "level"),
    [({}, "note"), ({"LOCAL_WORLD_SIZE": "4"}, "ok"), ({"CROSSDOCK_SECRET": "s" * 32}, "ok"), ({"CROSSDOCK_SECRET": "short"}, "bad")],
)
def test_ranks_on_several_hosts_without_a_secret_are_noted(change: dict[str, str], level: str) -> None:
    torchrun = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    found = next(check for check in access({**torchrun, **change}) if check.topic == "job secret")
    assert found.level == level
    assert ("CROSSDOCK_SECRET_FILE" in found.remedy) == (level != "ok")


def test_peer_access() -> None:
    assert peer_access(1, []).level == "ok"
    assert peer_access(4, []).level == "ok"
    apart = peer_access(4, [(0, 2), (2, 0)])
    assert apart.level == "note"
    assert "2 of 12 directed pairs lack it: 0->2, 2->0" in apart.finding


def test_a_clock_that_jumps(monkeypatch: pytest.MonkeyPatch) -> None:
    from crossdock.launch.doctor import clock as clock_module

    assert topics(clock(0.01))["clock"].level == "ok"
    ticks = iter([1000.0, 1030.0])
    monkeypatch.setattr(clock_module.time, "time", lambda: next(ticks))
    [found] = clock(0.01)
    assert found.level == "note"
    assert "jumped by +29.9" in found.finding


# ---- under launchers


def torchrun(*arguments: str, module: str = "crossdock") -> subprocess.CompletedProcess[str]:
    return started([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", module, *arguments])


def mpirun(*arguments: str, module: str = "crossdock") -> subprocess.CompletedProcess[str]:
    return started([str(MPIRUN), "-n", "2", sys.executable, "-m", module, *arguments])


def started(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, check=False)


LAUNCHERS = [
    torchrun,
    pytest.param(mpirun, marks=pytest.mark.skipif(not MPIRUN.exists(), reason="no mpirun beside this Python: install the package mpich")),
]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_doctor_compares_the_ranks_of_a_launcher(launcher: Any, tmp_path: Path) -> None:
    ended = launcher("doctor", "--json", "--run-dir", str(tmp_path / "runs"), module="tests.launch.skewed_rank")
    report = json.loads(next(line for line in ended.stdout.splitlines() if line.startswith("{")))
    found = {check["topic"]: check for check in report["checks"]}
    assert report["launcher"] == launcher.__name__.removesuffix("run").replace("torch", "torchrun")
    assert [rank["rank"] for rank in report["ranks"]] == [0, 1]
    assert found["numpy differs"]["level"] == "bad"
    assert found["numpy differs"]["finding"].endswith("rank 1 1.0.0")
    assert found["clocks"]["level"] == "note"
    assert found["clocks"]["finding"].startswith("rank 1 is +5.0")
    assert found["process group"]["level"] == "ok", found["process group"]
    assert not report["ok"]
    assert ended.returncode != 0
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_probe_measures_the_ranks_of_a_launcher(launcher: Any, tmp_path: Path) -> None:
    ended = launcher("probe", "--json", "--out", str(tmp_path / "topology.yaml"))
    assert ended.returncode == 0, ended.stderr
    facts = json.loads(next(line for line in ended.stdout.splitlines() if line.startswith("{")))
    topology = Topology.load(tmp_path / "topology.yaml")
    assert (topology.num_devices, topology.measured, topology.digest) == (2, True, facts["digest"])
    assert facts["same_node_bytes_per_s"] > 0
    assert facts["path"] == str(tmp_path / "topology.yaml")


def test_one_rank_alone_is_enough_for_the_probe(tmp_path: Path) -> None:
    assert run(["probe", "--ranks", "1", "--json", "--out", str(tmp_path / "topology.yaml")]) == 0
    assert Topology.load(tmp_path / "topology.yaml").num_devices == 1


@pytest.mark.parametrize("command", ["doctor", "probe"])
def test_a_device_that_is_none(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--device", "gpu"]) == 2
    assert "choose auto, cpu or cuda" in capfd.readouterr().err


def test_ranks_that_the_doctor_starts_itself(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(["doctor", "--ranks", "2", "--json", "--run-dir", str(tmp_path)])
    report = json.loads(capfd.readouterr().out)
    found = {check["topic"]: check for check in report["checks"]}
    assert report["launcher"] == "local"
    assert found["versions"]["finding"] == "equal on all 2 ranks"
    assert found["job secret"]["finding"] == "handed down to this process"


@pytest.mark.slow
def test_doctor_and_probe_on_two_nodes_of_ray(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    from tests.launch.test_ray import ENVIRONMENT, cluster

    with cluster(num_nodes=2, cores=2) as (address, _):
        environment = {**ENVIRONMENT, "RAY_ADDRESS": address}
        arguments = ["--ray", "--ranks", "4", "--json"]
        asked = [["doctor", *arguments, "--run-dir", str(tmp_path)], ["probe", *arguments, "--out", str(tmp_path / "topology.yaml")]]
        ended = [
            subprocess.run(
                [sys.executable, "-m", "crossdock", *one], env=environment, capture_output=True, text=True, timeout=150, check=False
            )
            for one in asked
        ]
    report = json.loads(ended[0].stdout)
    assert report["launcher"] == "ray"
    assert [rank["node"] for rank in report["ranks"]] == [0, 0, 1, 1]
    assert ended[1].returncode == 0, ended[1].stderr
    topology = Topology.load(tmp_path / "topology.yaml")
    assert (topology.num_devices, topology.num_nodes) == (4, 2)
