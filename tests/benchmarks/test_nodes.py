"""Emulated nodes end to end: training under torchrun, the probe, and counted bytes against the interfaces' own counters."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import netlab
from benchmarks.netlab import Lab

ROOT = Path(__file__).parents[2]
REASON = netlab.unavailable_reason()
pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(REASON is not None, reason=f"no emulated hosts: {REASON}"),
]


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    monkeypatch.chdir(ROOT)
    with Lab(2, 1e9) as lab:
        yield lab


@pytest.mark.parametrize("dispatch", ["flat", "deduplicated"])
def test_the_interfaces_count_what_the_ledger_counts(lab: Lab, dispatch: str) -> None:
    """A row is 2 KB, so that frames' headers, counts and metadata stay below 5 %."""
    outputs = lab.ranks(["-m", "tests.benchmarks.traffic_rank", lab.name, dispatch, "4"], ranks_per_node=2, timeout_s=60)
    reports = {report["node"]: report for report in map(json.loads, outputs)}
    tokens = {node: report["counted"]["tokens"] for node, report in reports.items()}
    assert min(tokens.values()) > 10_000_000
    for node, report in reports.items():
        assert tokens[node] <= report["sent"] <= 1.05 * tokens[node]
        assert tokens[1 - node] <= report["received"] <= 1.05 * tokens[1 - node]


def test_training_under_torchrun_reaches_its_target_on_two_nodes(lab: Lab, tmp_path: Path) -> None:
    overrides = [f"run.dir={tmp_path}/run", "parallel.expert=4", "train.steps=6", "capture.steps=2", "train.eval_batches=1"]
    lab.torchrun(["-m", "crossdock", "train", "configs/tiny.yaml", *overrides], ranks_per_node=2, timeout_s=120)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["exit_code"], result["reached_step"], result["world_size"]) == ("done", 0, 6, 4)
    assert result["bytes"]["counted"] == result["bytes"]["predicted"]
    assert result["bytes"]["counted"]["other_node"] > 0
    environment = json.loads((tmp_path / "run" / "env.json").read_text())
    assert environment["node_of_rank"] == [0, 0, 1, 1]


def test_the_probe_finds_the_link_and_that_a_node_shares_it(lab: Lab, tmp_path: Path) -> None:
    """Physics bounds the figures from above, a busy machine only lowers them."""
    lab.set_rate(200e6)
    lab.torchrun(["-m", "crossdock", "probe", "--out", str(tmp_path / "measured.yaml")], ranks_per_node=2, timeout_s=120)
    from crossdock.placement.records.topology import Topology

    topology = Topology.load(tmp_path / "measured.yaml")
    assert topology.node_of_R == (0, 0, 1, 1)
    assert topology.node_bytes_per_s is not None, "two devices behind one link, and the probe gives each its own"
    assert 0.4 * 25e6 < topology.node_bytes_per_s < 1.3 * 25e6
    assert topology.bytes_per_s_RR[0, 1] > 2 * topology.bytes_per_s_RR[0, 2], "inside a node nothing is shaped"
