"""Topologies: short and long files, presets, this machine, and one clear message for every malformed file."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from crossdock.errors import BadData, MissingInput
from crossdock.placement.records import topology as topology_module
from crossdock.placement.records.topology import Topology, preset_names

SHORT = """\
nodes: 2
devices_per_node: 2
device: {flop_per_s: 1.0e12, memory_bytes: 8e9}
links:
  same_node: {bytes_per_s: 1e10, latency_s: 1e-5}
  other_node: {bytes_per_s: 1e9, latency_s: 1e-4}
"""
LONG = """\
devices:
  - {node: 0, flop_per_s: 1.0e12, memory_bytes: 8e9}
  - {node: 1, flop_per_s: 2.0e12, memory_bytes: 4e9}
bytes_per_s: [[null, 1e9], [2e9, null]]
latency_s: [[0, 1e-4], [2e-4, 0]]
node_bytes_per_s: 5e8
"""


def loaded(tmp_path: Path, text: str, name: str = "cluster.yaml") -> Topology:
    (tmp_path / name).write_text(text)
    return Topology.load(tmp_path / name)


def test_short_form(tmp_path: Path) -> None:
    topology = loaded(tmp_path, SHORT)
    assert topology.name == "cluster"
    assert topology.node_of_R == (0, 0, 1, 1)
    assert (topology.num_devices, topology.num_nodes) == (4, 2)
    assert topology.link_class_RR.tolist() == [[0, 1, 2, 2], [1, 0, 2, 2], [2, 2, 0, 1], [2, 2, 1, 0]]
    assert topology.bytes_per_s_RR[0].tolist() == [np.inf, 1e10, 1e9, 1e9]
    assert topology.latency_s_RR[0].tolist() == [0.0, 1e-5, 1e-4, 1e-4]
    assert topology.flop_per_s_R.tolist() == [1e12] * 4
    assert topology.memory_bytes_R.tolist() == [8e9] * 4
    assert topology.node_bytes_per_s is None
    assert not topology.measured


def test_card_shared_by_a_node(tmp_path: Path) -> None:
    assert loaded(tmp_path, SHORT.replace("latency_s: 1e-4", "latency_s: 1e-4, shared_by_node: true")).node_bytes_per_s == 1e9


def test_long_form(tmp_path: Path) -> None:
    topology = loaded(tmp_path, LONG)
    assert topology.node_of_R == (0, 1)
    assert topology.flop_per_s_R.tolist() == [1e12, 2e12]
    assert topology.bytes_per_s_RR.tolist() == [[np.inf, 1e9], [2e9, np.inf]]
    assert topology.latency_s_RR.tolist() == [[0, 1e-4], [2e-4, 0]]
    assert topology.node_bytes_per_s == 5e8


UNEVEN = Topology(
    "uneven", (0, 1, 0), np.array([1e12, 2e12, 1e12]), np.full(3, 8e9), np.full((3, 3), 1e9), np.full((3, 3), 1e-5), node_bytes_per_s=3e9
)


@pytest.mark.parametrize(
    ("topology", "short"),
    [
        (Topology.uniform(2, 4), True),
        (Topology.uniform(1, 1), True),
        (Topology.uniform(3, 1, shared_by_node=True), True),
        (Topology.uniform(1, 2, name="a name", measured=True, source="a source"), True),
        (UNEVEN, False),
        (dataclasses.replace(Topology.uniform(2, 2), node_bytes_per_s=5e10), False),
        (dataclasses.replace(Topology.uniform(2, 2), flop_per_s_R=np.array([1e12, 1e12, 1e12, 2e12])), False),
    ],
)
def test_round_trip(tmp_path: Path, topology: Topology, short: bool) -> None:
    topology.save(tmp_path / "again.yaml")
    assert ("devices_per_node" in (tmp_path / "again.yaml").read_text()) == short
    again = Topology.load(tmp_path / "again.yaml")
    assert again.digest == topology.digest
    assert (again.name, again.measured, again.source) == (topology.name, topology.measured, topology.source)


def test_digest_depends_on_figures_alone() -> None:
    base = Topology.uniform(2, 2)
    assert Topology.uniform(2, 2, name="other", source="elsewhere").digest == base.digest
    changed = [
        Topology.uniform(4, 1),
        Topology.uniform(2, 2, flop_per_s=1.0),
        Topology.uniform(2, 2, memory_bytes=1.0),
        Topology.uniform(2, 2, same_node_bytes_per_s=1.0),
        Topology.uniform(2, 2, other_node_latency_s=1.0),
        Topology.uniform(2, 2, shared_by_node=True),
    ]
    assert len({base.digest, *(topology.digest for topology in changed)}) == 7


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_what_their_names_say(name: str) -> None:
    topology = Topology.load(name)
    nodes, devices = re.match(r"(\d+)x(\d+)", name).groups()  # type: ignore[union-attr]
    assert topology.name == name
    assert (topology.num_nodes, topology.num_devices) == (int(nodes), int(nodes) * int(devices))
    assert not topology.measured
    assert topology.source
    assert Topology.load(f"{name}.yaml").digest == topology.digest


def test_presets_cover_the_sizes_that_are_promised() -> None:
    assert {name.split("-")[0] for name in preset_names()} >= {"1x2", "1x4", "1x8", "2x1", "2x2", "2x4", "2x8", "8x8"}


def test_presets_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel carries them beside the module; they win over a checkout."""
    monkeypatch.setattr(topology_module, "__file__", str(tmp_path / "records" / "topology.py"))
    (tmp_path / "topologies").mkdir()
    (tmp_path / "topologies" / "mine.yaml").write_text(SHORT)
    assert preset_names() == ("mine",)
    assert Topology.load("mine").num_devices == 4


def test_a_file_wins_over_a_preset_and_a_directory_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "2x8-nvlink-ib").mkdir()
    assert Topology.load("2x8-nvlink-ib").num_devices == 16
    (tmp_path / "1x8-nvlink").write_text(SHORT)
    assert Topology.load("1x8-nvlink").num_devices == 4


def test_absent_file_names_the_presets() -> None:
    with pytest.raises(MissingInput, match=r"nowhere: no such topology; .*2x8-nvlink-ib"):
        Topology.load("nowhere")


def test_local_says_that_it_is_not_measured() -> None:
    topology = Topology.local(4, nodes=2)
    assert topology.node_of_R == (0, 0, 1, 1)
    assert not topology.measured
    assert "placeholders" in topology.source
    assert (topology.memory_bytes_R * 4 == Topology.local().memory_bytes_R).all()
    with pytest.raises(BadData, match="3 devices do not divide over 2 nodes"):
        Topology.local(3, nodes=2)


MALFORMED: dict[str, tuple[str, str]] = {
    "empty": ("", "mapping"),
    "a list": ("- 1\n", "mapping"),
    "no YAML": ("nodes: [", "cluster.yaml"),
    "unknown key": (SHORT + "node: 3\n", "node"),
    "duplicate key": (SHORT + "nodes: 3\n", "nodes"),
    "no nodes": (SHORT.replace("nodes: 2", "nodes: 0"), "nodes"),
    "nodes of text": (SHORT.replace("nodes: 2", "nodes: two"), "nodes"),
    "half a node": (SHORT.replace("nodes: 2", "nodes: 1.5"), "nodes"),
    "too many devices": (SHORT.replace("nodes: 2", "nodes: 5000"), "5000 nodes x 2 devices; a topology has at most 4096"),
    "negative speed": (SHORT.replace("1e10", "-1e10"), "bytes_per_s"),
    "zero flop": (SHORT.replace("1.0e12", "0"), "flop_per_s"),
    "NaN": (SHORT.replace("1e-5", ".nan"), "latency_s|NaN|nan"),
    "infinite": (SHORT.replace("1e10", ".inf"), "bytes_per_s|inf"),
    "negative latency": (SHORT.replace("1e-5", "-1e-5"), "latency_s"),
    "no memory": (SHORT.replace(", memory_bytes: 8e9", ""), "memory_bytes"),
    "no link inside a node": (re.sub(r"  same_node.*\n", "", SHORT), "links.same_node is absent"),
    "no link between nodes": (re.sub(r"  other_node.*\n", "", SHORT), "links.other_node is absent"),
    "both forms": (LONG + "nodes: 2\n", "nodes"),
    "no devices": (re.sub(r"(?s)devices:.*?bytes_per_s", "devices: []\nbytes_per_s", LONG, count=1), "0 devices|2 rows"),
    "ragged matrix": (LONG.replace("[2e9, null]", "[2e9]"), r"bytes_per_s has 2 rows of lengths \[1, 2\]; with 2 devices it is 2 x 2"),
    "matrix of another size": (LONG.replace("[[0, 1e-4], [2e-4, 0]]", "[[0]]"), "latency_s has 1 rows"),
    "null off the diagonal": (LONG.replace("[null, 1e9]", "[null, null]"), r"bytes_per_s\[0, 1\] is inf"),
    "gap in the nodes": (LONG.replace("node: 1", "node: 2"), r"nodes are numbered \[0, 2\]"),
    "negative node": (LONG.replace("node: 1", "node: -1"), "node"),
    "so slow that no float holds its time": (SHORT.replace("1e10", "1e-320"), r"bytes_per_s.* is 1e-320; .*at least 2\.2.*e-308"),
    "zero bytes per second": (LONG.replace("2e9", "0"), r"bytes_per_s\[1, 0\] is 0"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_file(tmp_path: Path, name: str) -> None:
    text, message = MALFORMED[name]
    with pytest.raises(BadData, match=message) as caught:
        loaded(tmp_path, text)
    assert str(tmp_path / "cluster.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_shapes_are_checked() -> None:
    with pytest.raises(BadData, match=r"flop_per_s_R has shape \(1,\); with 2 devices it is \(2,\)"):
        Topology("x", (0, 1), np.ones(1), np.ones(2), np.ones((2, 2)), np.zeros((2, 2)))
    with pytest.raises(BadData, match="2 nodes x 0 devices"):
        Topology.uniform(2, 0)


def test_a_name_that_no_file_can_have() -> None:
    with pytest.raises(MissingInput, match="no such topology"):
        Topology.load("x" * 5000)
