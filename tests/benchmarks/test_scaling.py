"""The scaling benchmark: its model of one node against every message of all nodes, its fit on points it made itself, a short run."""

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import netlab
from benchmarks.scaling_report import Fit, fit, load, predictions, with_errors, write_report
from benchmarks.simulate import Task, simulate
from benchmarks.simulate_layer import WAYS, Cluster, Layer, all_to_all_tasks, deduplicated, flat, hierarchical, met, step_s
from crossdock.errors import BadData, MissingInput
from crossdock.runtime.dispatch.dispatcher import DISPATCHERS

REASON = netlab.unavailable_reason()
ROOT = Path(__file__).parents[2]
LAYER = Layer(tokens=64, model_width=128, expert_width=8, num_experts=16, top_k=3, element_bytes=4)


def test_met_counts_the_draws() -> None:
    draws = list(itertools.combinations(range(8), 3))
    assert met(8, 2, 3) == pytest.approx(sum(any(expert < 2 for expert in draw) for draw in draws) / len(draws))
    assert met(8, 8, 3) == 1.0
    assert met(8, 0, 3) == 0.0


@pytest.mark.parametrize(("nodes", "devices"), [(2, 2), (4, 2), (2, 4)])
def test_bytes_of_every_strategy_by_hand(nodes: int, devices: int) -> None:
    """Copies of a token by enumerating all draws of three experts; experts stand in contiguous order."""
    cluster = Cluster(nodes, devices, 1e6, 1e6)
    of_device = LAYER.num_experts // cluster.devices
    places = [{expert // of_device for expert in draw} for draw in itertools.combinations(range(LAYER.num_experts), LAYER.top_k)]
    counts = {
        "flat": [LAYER.top_k * (nodes - 1) / nodes] * len(places),
        "deduplicated": [float(sum(place // devices != 0 for place in of)) for of in places],
        "hierarchical": [float(len({place // devices for place in of} - {0})) for of in places],
    }
    for way, name in ((flat, "flat"), (deduplicated, "deduplicated"), (hierarchical, "hierarchical")):
        expected = sum(counts[name]) / len(places) * LAYER.tokens * LAYER.row_bytes
        assert sum(phase.nic_bytes for phase in way(cluster, LAYER).phases) == pytest.approx(expected), name


def every_message_s(cluster: Cluster, payload_bytes: float) -> float:
    """The linear all-to-all with each message of each device of all nodes as a task, sending and receiving ports and all."""
    devices = range(cluster.devices)
    node = [device // cluster.devices_per_node for device in devices]
    capacity = {
        f"{kind} {n} {way}": 1.0
        for kind, many in (("nic", cluster.nodes), ("local", cluster.devices))
        for n in range(many)
        for way in ("out", "in")
    }
    tasks = []
    for a, b in itertools.permutations(devices, 2):
        inside = node[a] == node[b]
        rate, cost_s = (cluster.local_bytes_per_s, cluster.local_message_s) if inside else (cluster.nic_bytes_per_s, cluster.nic_message_s)
        port_s = payload_bytes / cluster.devices / rate + cost_s
        ends = (f"local {a} out", f"local {b} in") if inside else (f"nic {node[a]} out", f"nic {node[b]} in")
        tasks.append(
            Task(f"{a} to {b}", 1.0, dict.fromkeys(ends, port_s), latency_s=cluster.exchange_s + (0.0 if inside else cluster.latency_s))
        )
    return max(span.end_s for span in simulate(capacity, tasks).values())


@pytest.mark.parametrize(
    "cluster", [Cluster(2, 2, 1e6, 5e6, nic_message_s=1e-3, local_message_s=2e-3, latency_s=0.01), Cluster(3, 4, 2e6, 1e6, exchange_s=0.2)]
)
def test_one_node_stands_for_all(cluster: Cluster) -> None:
    capacity, tasks = all_to_all_tasks(cluster, 1e6, "linear")
    assert simulate(capacity, tasks)["step"].end_s == pytest.approx(every_message_s(cluster, 1e6))


def test_flat_and_hierarchical_steps_by_hand() -> None:
    """2 nodes x 2, 8 experts, top-1: half the rows cross, a quarter goes to the neighbour, and the slower link is the time, four times."""
    layer = Layer(tokens=100, model_width=10, num_experts=8, top_k=1, element_bytes=1)
    cluster = Cluster(2, 2, nic_bytes_per_s=1000.0, local_bytes_per_s=1e9, nic_message_s=0.5)
    assert step_s(cluster, layer, "flat") == pytest.approx(4 * (2 * 500 / 1000 + 2 * 2 * 0.5), rel=1e-4)
    assert step_s(cluster, layer, "hierarchical") == pytest.approx(4 * (2 * 500 / 1000 + 2 * 1 * 0.5), rel=1e-4)


def test_counts_go_ahead_of_a_dispatch() -> None:
    """Four movements over the network take its latency, and the first one's counts take it once more; hierarchical pays no more."""
    near = Cluster(2, 2, 1e6, 1e9)
    far = dataclasses.replace(near, latency_s=0.5)
    assert step_s(far, LAYER, "flat") - step_s(near, LAYER, "flat") == pytest.approx(2.5)
    assert step_s(far, LAYER, "hierarchical") - step_s(near, LAYER, "hierarchical") == pytest.approx(2.5)


def test_compute_shares_the_cores() -> None:
    layer = dataclasses.replace(LAYER, top_k=1)
    enough = Cluster(1, 4, 1e9, math.inf, cores_per_node=4.0, flop_per_s=1e6)
    scarce = dataclasses.replace(enough, cores_per_node=2.0)
    assert step_s(enough, layer, "flat") == pytest.approx(3 * layer.tokens * layer.row_flop / 1e6)
    assert step_s(scarce, layer, "flat") == pytest.approx(2 * step_s(enough, layer, "flat"))


def test_what_many_senders_lose() -> None:
    pair = Cluster(2, 1, 1e6, 1e9, contention=0.4)
    assert pair.met_nic_bytes_per_s == 1e6
    assert dataclasses.replace(pair, nodes=3).met_nic_bytes_per_s == pytest.approx(0.8e6)
    assert dataclasses.replace(pair, nodes=1001).met_nic_bytes_per_s == pytest.approx(0.6e6, rel=1e-3)


def made_up_rows(truth: Fit, cores: int) -> list[dict[str, object]]:
    rows = []
    for nodes, ranks, rate, name in itertools.product((2, 4), (1, 2, 4), (1e8, 4e8), DISPATCHERS):
        row = {"nodes": nodes, "ranks_per_node": ranks, "link_bit_per_s": rate, "latency_s": 0.0, "strategy": name}
        rows.append({**row, "step_s": step_s(truth.cluster(row, cores), LAYER, name)})
    return rows


def test_the_fit_finds_what_made_the_points(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = Fit(link_share=0.9, contention=0.2, core_s_per_phase=2e-3, core_s_per_message=2e-4, core_s_per_byte=4e-9, exchange_s=5e-4)
    rows = made_up_rows(truth, cores=4)
    found = fit(rows, LAYER, cores=4)
    assert found.link_share == pytest.approx(truth.link_share, rel=0.05)
    assert found.contention == pytest.approx(truth.contention, rel=0.2)
    assert found.core_s_per_phase == pytest.approx(truth.core_s_per_phase, rel=0.2)
    assert max(abs(point["unseen_error"]) for point in with_errors(rows, LAYER, 4, found)) < 0.05
    parts = [tmp_path / "a.json", tmp_path / "b.json"]
    for part, half in zip(parts, (rows[::2], rows[1::2]), strict=True):
        part.write_text(
            json.dumps(
                {"rows": [{**row, "step_s_low": 0.0, "step_s_high": 9.0} for row in half], "shape": dataclasses.asdict(LAYER), "cores": 4}
            )
        )
    write_report(parts, tmp_path / "page.md", json_only=False)
    assert "unseen" in capsys.readouterr().out
    document = json.loads((tmp_path / "page.json").read_text())
    assert len(document["rows"]) == len(rows)
    assert "2048" in (tmp_path / "page.md").read_text()
    assert (tmp_path / "page.svg").read_text().startswith("<svg")
    ends = document["gpus_top4"][-1]
    assert ends["hierarchical_s"] < ends["flat_s"], "at 2,048 devices fewer and larger messages win"


def test_predictions_grow_with_the_cluster() -> None:
    found = predictions(lambda devices: Cluster(devices // 8, 8, 1e9, 1e10), lambda _: LAYER, list(WAYS))
    assert [row["devices"] for row in found] == [8, 16, 32, 64, 128, 256, 512, 1024, 2048]
    assert all(later["flat_s"] >= sooner["flat_s"] for sooner, later in itertools.pairwise(found))


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="measure --out"):
        load([tmp_path / "none.json"])
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(BadData, match=r"bad\.json"):
        load([tmp_path / "bad.json"])


@pytest.mark.netns
@pytest.mark.skipif(REASON is not None, reason=f"no emulated hosts: {REASON}")
def test_a_short_measurement() -> None:
    command = [sys.executable, "-m", "benchmarks.scaling", "measure", "--short", "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=150)
    assert ended.returncode == 0, ended.stderr
    document = json.loads(ended.stdout)
    assert (document["cores"], document["shape"]["tokens"]) == (os.cpu_count(), 64)
    assert [row["strategy"] for row in document["rows"]] == [*DISPATCHERS, "gather"]
    cluster, layer = Cluster(2, 2, 1.0, 1.0), Layer(**document["shape"])
    for row in document["rows"]:
        assert 0 < row["step_s_low"] <= row["step_s"] <= row["step_s_high"]
        expected = 4 * 2 * sum(phase.nic_bytes for way in WAYS[row["strategy"]](cluster, layer) for phase in way.phases)
        assert row["other_node_bytes"] == pytest.approx(expected, rel=0.1), "drawn routing moves what even routing is expected to move"
