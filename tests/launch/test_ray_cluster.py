"""How a run is laid out on a Ray cluster: pure decisions on facts about nodes."""

import contextlib
import http.server
import json
import signal
import socketserver
import threading
from pathlib import Path
from unittest import mock

import pytest

from crossdock.errors import BadConfig, CrossdockError, MissingInput, PeerLost, Preempted, Unavailable
from crossdock.launch.config import RunConfig, read_config
from crossdock.launch.ranks.worker_env import in_ray_job, ray_submission_id
from crossdock.launch.ray import ahead, connection, incarnation
from crossdock.launch.ray.ahead import Ahead
from crossdock.launch.ray.cluster import Node, Place, able, check_places, chosen, shape_of, shrunk, too_small
from crossdock.launch.ray.connection import open_to_strangers
from crossdock.launch.ray.launcher import Policy, launch
from crossdock.launch.ray.metrics import GAUGES, last_row
from crossdock.launch.ray.nodes import held_by_driver
from crossdock.launch.scripts.allocation import Shape
from crossdock.placement.records.topology import Topology

CPU = Shape(nodes=2, ranks_per_node=2, gpus=False, cores_per_rank=2)


def node(number: int, cores: float = 4, gpus: float = 0) -> Node:
    return Node(f"id{number}", f"10.0.0.{number}", cores, gpus)


def tiny(*overrides: str) -> RunConfig:
    return read_config(Path("tiny"), overrides)


def test_ranks_that_fit_a_node() -> None:
    assert node(1, cores=5).ranks(CPU) == 2
    assert node(1, cores=64, gpus=8).ranks(Shape(1, 8, gpus=True, cores_per_rank=4)) == 8
    assert node(1, cores=16, gpus=8).ranks(Shape(1, 8, gpus=True, cores_per_rank=4)) == 4


def test_able_nodes_are_in_the_order_of_their_addresses() -> None:
    assert able([node(3), node(1), node(2, cores=3)], CPU) == [node(1), node(3)]


def test_nodes_that_may_be_gone_are_taken_where_others_do_not_suffice() -> None:
    nodes = [node(1), node(2), node(3)]
    assert chosen(nodes, 2, frozenset()) == [node(1), node(2)]
    assert chosen(nodes, 2, {"id1"}) == [node(2), node(3)]
    assert chosen(nodes, 2, {"id1", "id3"}) == [node(1), node(2)]
    assert chosen(nodes, 3, {"id2"}) == nodes


def test_as_few_nodes_as_hold_the_ranks() -> None:
    assert shape_of(4, None, [node(1, 8), node(2, 8)]) == Shape(1, 4, False, 1)
    assert shape_of(4, None, [node(1, 2), node(2, 2)]) == Shape(2, 2, False, 1)
    assert shape_of(4, None, [node(1, 8), node(2, 8, gpus=4)]) == Shape(1, 4, True, 1)
    assert shape_of(4, None, [node(1, 8), node(2, 8, gpus=2)], device="cpu") == Shape(1, 4, False, 1), "GPUs are left to others"
    with pytest.raises(Unavailable, match=r"1 nodes with 4 ranks each need 4 cores a node.*10\.0\.0\.1 1, 10\.0\.0\.2 1"):
        shape_of(4, None, [node(1, 1), node(2, 1)])


def test_as_many_nodes_as_the_topology_declares() -> None:
    topology = Topology.load("configs/topologies/2x2-local.yaml")
    assert shape_of(4, topology, [node(1, 8), node(2, 8)]) == Shape(2, 2, False, 1)
    assert shape_of(8, topology, [node(number, 2) for number in range(4)]) == Shape(4, 2, False, 1)
    with pytest.raises(Unavailable, match="2 nodes with 2 ranks each need 2 cores a node"):
        shape_of(4, topology, [node(1, 8)])


def test_too_small_says_the_numbers() -> None:
    text = too_small([node(1), node(2, cores=1)], CPU)
    assert "2 nodes with 2 ranks each need 4 cores a node" in text
    assert "10.0.0.1 4, 10.0.0.2 1; 1 of them" in text


def test_shrinking_drops_whole_expert_groups_first() -> None:
    config = tiny("parallel.expert=2", "parallel.ranks=8", "train.batch_sequences=8")
    found = shrunk(config, Shape(4, 2, False, 1), num_nodes=3, min_nodes=1)
    assert found is not None
    smaller, shape = found
    assert (shape.nodes, shape.world_size) == (2, 4)  # 6 ranks do not divide a batch of 8
    assert smaller.parallel.expert == 2


def test_shrinking_below_a_group_plans_anew() -> None:
    config = tiny("parallel.expert=4", "train.batch_sequences=8", "topology=configs/topologies/2x2-local.yaml")
    found = shrunk(config, Shape(2, 2, False, 1), num_nodes=1, min_nodes=1)
    assert found is not None
    assert (found[0].parallel.expert, found[0].topology, found[0].plan) == (2, None, None)
    assert shrunk(config, Shape(2, 2, False, 1), num_nodes=1, min_nodes=2) is None


def test_a_relative_directory_is_refused_in_a_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert not in_ray_job({})
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(BadConfig, match="absolute path that every node reaches"):
        launch(tiny(), None, Policy(), Ahead(None, None))
    assert list(tmp_path.iterdir()) == []


def test_ranks_astray_are_named() -> None:
    nodes, shape = [node(1), node(2)], Shape(2, 2, False, 1)
    there = [Place("id1", "10.0.0.1"), Place("id1", "10.0.0.1"), Place("id2", "10.0.0.2"), Place("id2", "10.0.0.2")]
    check_places(there, nodes, shape)
    with pytest.raises(
        Unavailable, match=r"1 of 4 ranks run on other nodes .*: rank 1 on 10\.0\.0\.2 instead of 10\.0\.0\.1 \(nodes id2 and id1"
    ):
        check_places([there[0], there[2], there[2], there[3]], nodes, shape)


def test_a_gpu_serves_one_rank() -> None:
    nodes, shape = [node(1, gpus=2)], Shape(1, 2, True, 1)
    check_places([Place("id1", "10.0.0.1", ("0",)), Place("id1", "10.0.0.1", ("1",))], nodes, shape)
    with pytest.raises(Unavailable, match=r"2 of 2 ranks have not one GPU .*: rank 0 on 10\.0\.0\.1 has 0, rank 1 on 10\.0\.0\.1 has 0;"):
        check_places([Place("id1", "10.0.0.1", ("0",))] * 2, nodes, shape)
    with pytest.raises(Unavailable, match=r"1 of 2 ranks have not one GPU .*: rank 1 on 10\.0\.0\.1 has none;"):
        check_places([Place("id1", "10.0.0.1", ("0",)), Place("id1", "10.0.0.1")], nodes, shape)


class _Empty:
    """A Ray on which no actor ever comes."""

    def wait(self, references: list[object], num_returns: int, timeout: float) -> tuple[list[object], list[object]]:
        return [], references


@pytest.mark.parametrize(
    ("there", "is_stopping", "kind", "told"),
    [
        ((1,), False, PeerLost, r"^10\.0\.0\.2 was lost before its ranks could start$"),
        ((1, 2), False, Unavailable, r"1 of 2 nodes are busy \(10\.0\.0\.2\): 2 ranks found no room there within 0 s"),
        ((1, 2), True, Preempted, "asked to stop before the ranks had started"),
    ],
    ids=["a node is lost in the start", "busy", "stopped"],
)
def test_a_start_that_does_not_come_about(
    monkeypatch: pytest.MonkeyPatch, there: tuple[int, ...], is_stopping: bool, kind: type[CrossdockError], told: str
) -> None:
    monkeypatch.setattr(incarnation, "living_nodes", lambda ray: [node(number) for number in there])
    start = incarnation.Incarnation(_Empty(), 1, CPU, [node(1), node(2)])
    monkeypatch.setattr(start, "_without_room", lambda: ["10.0.0.2"])
    monkeypatch.setattr(start, "_asked", [object()] * 4)
    with pytest.raises(kind, match=told):
        start.settle(60.0 if is_stopping else 0.0, lambda: is_stopping)


def test_a_driver_that_is_asked_to_stop_while_it_reads_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops in order as soon as it comes to wait for ranks; Ray's own handler would end it with another code and no result."""
    monkeypatch.setattr(ahead, "connected", lambda address: contextlib.nullcontext(mock.MagicMock()))
    monkeypatch.setattr(ahead, "new_monitor", lambda ray: None)
    monkeypatch.setattr(ahead, "living_nodes", lambda ray: [])
    before = signal.getsignal(signal.SIGTERM)
    with ahead.ranks_ahead(Path("tiny"), (), None, None) as found:
        assert not found.driver().is_stopping
        signal.raise_signal(signal.SIGTERM)
        assert found.driver().is_stopping
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_rank_goes_on_beating_while_its_monitor_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise it would fall silent when Ray starts the monitor again, and be taken for lost."""
    exceptions = pytest.importorskip("ray", reason="ray is not installed").exceptions
    from crossdock.launch.ray import rank as actors

    away = [exceptions.GetTimeoutError(), exceptions.ActorUnavailableError("starting again", None), False, exceptions.ActorDiedError()]
    answers = iter(away)

    def get(reference: object, timeout: float) -> object:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(actors.ray, "get", get)
    monkeypatch.setattr(actors, "BEAT_S", 0.0)
    rank = actors.Rank.__new__(actors.Rank)  # its heartbeats would begin in a thread
    rank.incarnation, rank.rank, rank.monitor, rank.running = 1, 0, mock.MagicMock(), False
    rank._beat()
    assert next(answers, "all were heard") == "all were heard"


class _Dashboard(http.server.BaseHTTPRequestHandler):
    """Answers like Ray's: everybody, or those with a token alone."""

    wants_token = False

    def do_GET(self) -> None:
        self.send_response(401 if self.wants_token else 200)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: stderr is the tests'."""


@pytest.mark.parametrize("wants_token", [False, True])
def test_a_dashboard_that_strangers_can_use_is_named(monkeypatch: pytest.MonkeyPatch, wants_token: bool) -> None:
    monkeypatch.setattr(_Dashboard, "wants_token", wants_token)
    monkeypatch.setattr(connection, "_is_loopback", lambda host: host == "localhost")  # 127.0.0.1 stands for an address of the network
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Dashboard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        found = open_to_strangers(f"127.0.0.1:{port}")
        if wants_token:
            assert found is None
        else:
            assert found is not None
            assert f"listens on 127.0.0.1:{port} and asks for no token" in found
            assert "--dashboard-host 127.0.0.1" in found
        assert open_to_strangers(f"localhost:{port}") is None
        server.shutdown()
    assert open_to_strangers(f"127.0.0.1:{port}") is None  # nobody answers
    assert open_to_strangers(None) is None


class _Stranger(socketserver.StreamRequestHandler):
    """Speaks no HTTP."""

    def handle(self) -> None:
        self.wfile.write(b"SSH-2.0-OpenSSH\r\n")


def test_what_answers_in_the_place_of_a_dashboard_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_is_loopback", lambda host: False)
    with socketserver.TCPServer(("127.0.0.1", 0), _Stranger) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert open_to_strangers(f"127.0.0.1:{server.server_address[1]}") is None


def test_what_the_driver_holds_may_stay_unknown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The dashboard alone knows it; a run goes on without, and finds the node busy if it is."""
    state = pytest.importorskip("ray.util.state", reason="ray is not installed")
    from ray.util.state.exception import ServerUnavailable

    def list_actors(**asked: object) -> list[object]:
        raise ServerUnavailable("no dashboard\nand so on")

    monkeypatch.setattr(state, "list_actors", list_actors)
    ray = mock.MagicMock()
    ray.cluster_resources.return_value, ray.available_resources.return_value = {"CPU": 4.0}, {"CPU": 1.0}
    assert held_by_driver(ray, "raysubmit_x") == {}
    assert "what the driver of this job holds is not known (no dashboard)" in capsys.readouterr().err


def test_a_run_that_cannot_begin_leaves_its_result(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="holds no checkpoint"):
        launch(tiny(f"run.dir={tmp_path / 'run'}", "run.resume=always"), None, Policy(), Ahead(None, None))
    assert json.loads((tmp_path / "run" / "result.json").read_text())["exit_code"] == 66


def test_last_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_row(path) == {}
    path.write_text('{"step": 1}\n{"step": 2}\n')
    assert last_row(path) == {"step": 2}
    path.write_text('{"step": 1}\n{"st')
    assert last_row(path) == {}


def test_the_dashboard_draws_every_gauge_and_no_other() -> None:
    dashboard = json.loads(Path("configs/grafana-dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert sorted(expressions) == sorted(f'ray_crossdock_{name}{{run=~"$run"}}' for name in GAUGES)


def test_what_the_driver_holds_is_not_for_ranks() -> None:
    nodes = [Node("id1", "10.0.0.1", 4, 0, driver_cores=3), node(2)]
    assert able(nodes, CPU) == [node(2)]
    text = too_small(nodes, CPU)
    assert "10.0.0.1 4, 10.0.0.2 4 (the driver of this job holds 3 cores of 10.0.0.1: submit it without --entrypoint-num-cpus" in text
    assert "1 of them are large enough" in text
    assert Node("id1", "10.0.0.1", 64, 8, driver_gpus=1).ranks(Shape(1, 8, gpus=True, cores_per_rank=1)) == 7


def test_the_name_of_the_job_that_this_process_drives() -> None:
    assert ray_submission_id({}) is None
    assert ray_submission_id({"RAY_JOB_CONFIG_JSON_ENV_VAR": '{"runtime_env": {}}'}) is None
    assert ray_submission_id({"RAY_JOB_CONFIG_JSON_ENV_VAR": '{"metadata": {"job_submission_id": "raysubmit_x"}}'}) == "raysubmit_x"
