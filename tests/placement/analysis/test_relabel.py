"""Relabelling against brute force over all renamings of the topology, and evaluations that it must leave alone."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossdock.placement.analysis.relabel import relabelled, renamed
from crossdock.placement.costs.evaluate import evaluate
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.topology import Topology
from crossdock.placement.solvers.problem import Pin
from tests.placement.conftest import random_plan, random_trace
from tests.placement.solvers.test_replicas import WORKLOAD

TOPOLOGIES = {
    "1x4": Topology.uniform(1, 4),
    "2x2": Topology.uniform(2, 2),
    "3x2": Topology.uniform(3, 2),
    "2x3": Topology.uniform(2, 3),
    "one fast": dataclasses.replace(Topology.uniform(2, 2), flop_per_s_R=np.array([2e14, 1e14, 1e14, 1e14])),
    "fast pairs": dataclasses.replace(Topology.uniform(2, 3), flop_per_s_R=np.array([2e14, 1e14, 1e14, 1e14, 2e14, 1e14])),
}


def single_plan(seed: int, num_devices: int) -> Plan:
    """One copy of each of 8 experts in 3 layers, anywhere."""
    return Plan.from_devices(np.random.default_rng(seed).integers(0, num_devices, (3, 8)), num_devices)


def renamings(topology: Topology) -> list[np.ndarray]:
    """Every renaming of devices that leaves speeds and links what they are."""
    found = []
    for order in itertools.permutations(range(topology.num_devices)):
        name_R = np.array(order)
        links = (topology.link_class_RR, topology.bytes_per_s_RR)
        if np.array_equal(topology.flop_per_s_R[name_R], topology.flop_per_s_R) and all(
            np.array_equal(values[np.ix_(name_R, name_R)], values) for values in links
        ):
            found.append(name_R)
    return found


def assert_same_evaluation(one: Plan, other: Plan, topology: Topology, seed: int, *, hops: bool) -> None:
    trace = random_trace(seed)
    first, second = (evaluate(trace, plan, topology, WORKLOAD) for plan in (one, other))
    for name in ("bytes_by_class", "devices_per_token", "nodes_per_token", "load_max_over_mean", "gradient_s", "step_s", "moved"):
        assert getattr(first, name) == pytest.approx(getattr(second, name), rel=1e-12), name
    if hops:
        assert first.cross_device_hops == pytest.approx(second.cross_device_hops, rel=1e-12)
        assert first.cross_node_hops == pytest.approx(second.cross_node_hops, rel=1e-12)


@pytest.mark.parametrize("name", TOPOLOGIES)
@given(seed=st.integers(0, 9999), together=st.booleans())
@settings(max_examples=12)
def test_moves_are_the_fewest_and_no_evaluation_changes(name: str, seed: int, together: bool) -> None:
    topology = TOPOLOGIES[name]
    old, new = (single_plan(number, topology.num_devices) for number in (seed, seed + 1))
    found = relabelled(new, old, topology, together=together)
    names = renamings(topology)
    if together:
        least = min(len(old.moves_to(renamed(new, np.tile(name_R, (3, 1))))) for name_R in names)
    else:
        alone = [[len(old.moves_to(renamed(new, _one(layer, name_R)))) for name_R in names] for layer in range(3)]
        stay = len(old.moves_to(new))
        least = stay + sum(min(counts) - stay for counts in alone)
    assert len(old.moves_to(found)) == least
    assert_same_evaluation(new, found, topology, seed, hops=together)


def _one(layer: int, name_R: np.ndarray) -> np.ndarray:
    name_LR = np.tile(np.arange(len(name_R)), (3, 1))
    name_LR[layer] = name_R
    return name_LR


@given(seed=st.integers(0, 9999), name=st.sampled_from(sorted(TOPOLOGIES)))
@settings(max_examples=60)
def test_with_copies_nothing_changes_either(seed: int, name: str) -> None:
    topology = TOPOLOGIES[name]
    old, new = (random_plan(number, num_devices=topology.num_devices, num_slots=4) for number in (seed, seed + 1))
    found = relabelled(new, old, topology)
    assert len(old.moves_to(found)) <= len(old.moves_to(new))
    assert_same_evaluation(new, found, topology, seed, hops=True)


@given(seed=st.integers(0, 9999))
@settings(max_examples=40)
def test_a_renamed_plan_comes_back_without_a_move(seed: int) -> None:
    rng = np.random.default_rng(seed)
    old, topology = random_plan(seed), TOPOLOGIES["2x2"]
    names = renamings(topology)
    new = renamed(old, np.stack([names[rng.integers(len(names))] for _ in range(3)]))
    assert old.moves_to(relabelled(new, old, topology)) == ()


@given(seed=st.integers(0, 9999))
@settings(max_examples=40)
def test_pins_stay_where_they_are(seed: int) -> None:
    old, new = random_plan(seed), random_plan(seed + 1)
    device_LE = new.device_of_LE()
    pins = [Pin(layer, expert, int(device_LE[layer, expert])) for layer, expert in ((0, 3), (0, 5), (2, 1))]
    found = relabelled(new, old, TOPOLOGIES["1x4"], pins=pins)
    assert all(found.slot_LRE[pin.layer, pin.device, pin.expert] >= 0 for pin in pins)


def test_measured_speeds_are_alike_within_a_tolerance() -> None:
    speeds = np.array([1.00e14, 1.03e14, 0.98e14, 1.01e14])
    measured = dataclasses.replace(Topology.uniform(1, 4), flop_per_s_R=speeds)
    old = random_plan(7)
    new = renamed(old, np.tile([1, 0, 3, 2], (3, 1)))
    assert relabelled(new, old, measured) is new
    assert old.moves_to(relabelled(new, old, measured, tolerance=0.1)) == ()
