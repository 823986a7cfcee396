"""Plans: the worked example, files, moves, the choice of a replica, and one clear message for every malformed file."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossdock.errors import BadData, MissingInput
from crossdock.placement.records.plan import EMPTY, Move, Plan, choose_replica
from tests.placement.conftest import random_plan

# The example of the glossary in plan.py: 4 experts on 2 devices with 3 slots, expert 0 replicated.
EXAMPLE = Plan(np.array([[[0, 1, -1], [2, 3, 0]]]), 4, method="by hand", objective="seconds", seed=3, cost=1.5, bound=1.0)


def test_example_of_the_glossary() -> None:
    assert (EXAMPLE.num_layers, EXAMPLE.num_devices, EXAMPLE.slots_per_device) == (1, 2, 3)
    assert EXAMPLE.has_replicas
    assert EXAMPLE.slot_LRE.tolist() == [[[0, 1, -1, -1], [2, -1, 0, 1]]]
    chosen_LRE = choose_replica(EXAMPLE, (0, 1))
    assert chosen_LRE[0, 1, 0] == 5
    assert chosen_LRE[0, 1, 1] == 1
    assert chosen_LRE.tolist() == [[[0, 1, 3, 4], [5, 1, 3, 4]]]


def test_slots_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="read-only"):
        EXAMPLE.slots_LRS[0, 0, 0] = 1


def test_contiguous() -> None:
    plan = Plan.contiguous(2, 8, 4)
    assert plan.slots_LRS.tolist() == [[[0, 1], [2, 3], [4, 5], [6, 7]]] * 2
    assert plan.device_of_LE().tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]] * 2
    assert not plan.has_replicas
    assert plan.method == "contiguous"


def test_contiguous_where_experts_do_not_divide() -> None:
    assert Plan.contiguous(1, 5, 3).slots_LRS.tolist() == [[[0, 1], [2, 3], [4, -1]]]
    assert Plan.contiguous(1, 2, 3).slots_LRS.tolist() == [[[0], [1], [-1]]]
    assert Plan.contiguous(1, 2, 2, slots_per_device=2).slots_LRS.tolist() == [[[0, -1], [1, -1]]]


def test_from_devices() -> None:
    plan = Plan.from_devices([[1, 0, 1, 1]], 3, method="mine", seed=4)
    assert plan.slots_LRS.tolist() == [[[1, -1, -1], [0, 2, 3], [-1, -1, -1]]]
    assert plan.device_of_LE().tolist() == [[1, 0, 1, 1]]
    assert (plan.method, plan.seed) == ("mine", 4)
    with pytest.raises(BadData, match=r"devices range over 0\.\.3; with 3 devices they are 0\.\.2"):
        Plan.from_devices([[0, 3]], 3)
    with pytest.raises(BadData, match="holds 3 experts of one layer and has 2 slots"):
        Plan.from_devices([[0, 0, 0]], 3, slots_per_device=2)


def test_devices_of_a_replicated_plan_are_refused() -> None:
    with pytest.raises(BadData, match="layer 0 keeps expert 0 on 2 devices"):
        EXAMPLE.device_of_LE()


def test_digest_is_of_the_placement_alone() -> None:
    assert Plan(EXAMPLE.slots_LRS, 4).digest == EXAMPLE.digest
    assert Plan(EXAMPLE.slots_LRS[:, ::-1], 4).digest != EXAMPLE.digest


def test_model_of_another_shape_is_refused_with_both_shapes() -> None:
    EXAMPLE.check_model(1, 4, 2)
    with pytest.raises(BadData, match=r"1 MoE layers x 4 experts on 2 devices.* 6 layers x 8 experts on 4 devices"):
        EXAMPLE.check_model(6, 8, 4)


@pytest.mark.parametrize("seed", range(3))
def test_round_trip(tmp_path: Path, seed: int) -> None:
    plan = random_plan(seed, num_slots=3)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again.digest == plan.digest
    assert (again.method, again.seed, again.cost, again.bound) == ("random", seed, None, None)


def test_file_has_the_promised_keys(tmp_path: Path) -> None:
    EXAMPLE.save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    value = json.loads(text)
    assert set(value) == {
        *("format_version", "num_layers", "num_experts", "topology_hash", "trace_hash"),
        *("mode", "objective", "method", "seed", "slots", "cost", "bound"),
    }
    assert value["slots"] == EXAMPLE.slots_LRS.tolist()
    again = Plan.load(tmp_path / "plan.json")
    assert (again.objective, again.seed, again.cost, again.bound, again.mode) == ("seconds", 3, 1.5, 1.0, "home")


def test_moves_by_hand() -> None:
    one = Plan(np.array([[[0, 1], [2, 3]]]), 4)
    other = Plan(np.array([[[1, 2], [3, 0]]]), 4)  # expert 1 changes its slot only
    assert one.moves_to(other) == (Move(0, 0, 0, 1), Move(0, 2, 1, 0))
    assert one.moves_to(one) == ()


def test_sources_of_a_spreading_expert_take_turns() -> None:
    one = Plan(np.array([[[0], [0], [1], [-1], [-1]]]), 2)
    other = Plan(np.array([[[0, 1], [0, -1], [0, -1], [0, -1], [0, -1]]]), 2)
    assert one.moves_to(other) == (Move(0, 0, 0, 2), Move(0, 0, 1, 3), Move(0, 0, 0, 4), Move(0, 1, 2, 0))


def test_moves_between_different_models_are_refused() -> None:
    with pytest.raises(BadData, match="asked to serve"):
        EXAMPLE.moves_to(Plan.contiguous(1, 4, 4))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 4), st.integers(2, 4))
def test_moves_applied_give_the_other_plan(seed: int, slots: int, other_slots: int) -> None:
    one, other = random_plan(seed, num_slots=slots), random_plan(seed + 1, num_slots=other_slots)
    holds_LRE = one.slot_LRE != EMPTY
    wanted_LRE = other.slot_LRE != EMPTY
    reached_LRE = holds_LRE & wanted_LRE  # copies that the other plan does not want are dropped
    for move in one.moves_to(other):
        assert holds_LRE[move.layer, move.source, move.expert]
        assert not holds_LRE[move.layer, move.target, move.expert]
        reached_LRE[move.layer, move.target, move.expert] = True
    np.testing.assert_array_equal(reached_LRE, wanted_LRE)
    assert len(one.moves_to(other)) == (wanted_LRE & ~holds_LRE).sum()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([(0, 0, 0, 0), (0, 0, 1, 1), (0, 1, 0, 1), (0, 1, 2, 3), (0, 0, 0, 1)]))
def test_replica_chosen_is_a_nearest_one_and_shares_are_even(seed: int, node_of_R: tuple[int, ...]) -> None:
    plan = random_plan(seed, num_slots=4)
    chosen_LRE = choose_replica(plan, node_of_R)
    for layer in range(plan.num_layers):
        for expert in range(plan.num_experts):
            holders = [device for device in range(4) if expert in plan.slots_LRS[layer, device]]
            equals: dict[tuple[bool, tuple[int, ...]], Counter[int]] = {}
            for home in range(4):
                device, slot = divmod(int(chosen_LRE[layer, home, expert]), plan.slots_per_device)
                assert plan.slots_LRS[layer, device, slot] == expert
                near = [holder for holder in holders if node_of_R[holder] == node_of_R[home]]
                nearest = [home] if home in holders else near or holders
                assert device in nearest
                if device != home:
                    equals.setdefault((bool(near), tuple(nearest)), Counter(dict.fromkeys(nearest, 0)))[device] += 1
            for shares in equals.values():
                assert max(shares.values()) - min(shares.values()) <= 1


def test_turns_start_elsewhere_for_other_experts() -> None:
    """One home between two copies of two experts: each copy holder serves one of them."""
    plan = Plan(np.array([[[0, 1], [0, 1], [2, -1]]]), 3)
    assert choose_replica(plan, (0, 0, 0))[0, 2].tolist() == [0, 3, 4]


def test_nodes_of_another_size_are_refused() -> None:
    with pytest.raises(BadData, match="2 devices, and nodes are given for 3"):
        choose_replica(EXAMPLE, (0, 0, 1))


def test_relabelling_nodes_changes_nothing() -> None:
    plan = random_plan(5, num_slots=4)
    np.testing.assert_array_equal(choose_replica(plan, (0, 0, 1, 1)), choose_replica(plan, (1, 1, 0, 0)))


BROKEN: dict[str, tuple[Any, str]] = {
    "rank 2": ([[0, 1]], r"shape \(1, 2\)"),
    "no slots": (np.zeros((1, 2, 0), int), "none of them 0"),
    "floats": ([[[0.0, 1.0]]], "type float64; give integers"),
    "expert out of range": ([[[0, 1], [2, 4]]], r"layer 0, device 1, slot 1 holds expert 4; with 4 experts it must be 0\.\.3, or -1"),
    "below -1": ([[[0, 1], [2, 3], [-2, -1]]], "device 2, slot 0 holds expert -2"),
    "expert absent": ([[[0, 1], [2, 3]], [[0, 1], [2, -1]]], "layer 1 holds no copy of expert 3"),
    "twice on one device": ([[[0, 0, 1], [2, 3, -1]]], "layer 0: device 0 holds expert 0 2 times; once is enough"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_slots(name: str) -> None:
    slots, message = BROKEN[name]
    with pytest.raises(BadData, match=message):
        Plan(np.array(slots), 4)


def test_fields_are_checked() -> None:
    with pytest.raises(BadData, match="mode is 'away'; choose home or coherent"):
        Plan(EXAMPLE.slots_LRS, 4, mode="away")  # type: ignore[arg-type]
    with pytest.raises(BadData, match="cost is nan"):
        Plan(EXAMPLE.slots_LRS, 4, cost=float("nan"))
    with pytest.raises(BadData, match="num_experts is 0"):
        Plan(EXAMPLE.slots_LRS, 0)


def edited(**changes: Any) -> str:
    value = {"format_version": 1, "num_layers": 1, "num_experts": 4, "slots": [[[0, 1], [2, 3]]]} | changes
    return json.dumps({key: item for key, item in value.items() if item is not None})


MALFORMED: dict[str, tuple[str, str]] = {
    "more experts than any table holds": (edited(num_experts=2**62), "no copy of at least one expert"),
    "a layer without devices": (edited(slots=[[], [[0, 1], [2, 3]]]), "ragged"),
    "empty": ("", "not JSON"),
    "truncated": (edited()[:-4], "not JSON"),
    "a list": ("[]", "mapping"),
    "a number": ("3", "mapping"),
    "deep nesting": ("[" * 100_000, "nested deeper than 64 levels"),
    "NaN": (edited()[:-1] + ', "cost": NaN}', "NaN is no number"),
    "duplicate key": (edited()[:-1] + ', "num_layers": 1}', "'num_layers' stands twice"),
    "unknown key": (edited(slot=1), "slot"),
    "no slots": (edited(slots=None), "slots"),
    "newer format": (edited(format_version=2), "format_version is 2, and this release reads 1"),
    "other number of layers": (edited(num_layers=2), "num_layers is 2, and slots has 1 layers"),
    "other number of experts": (edited(num_experts=3), "holds expert 3; with 3 experts"),
    "ragged": (edited(slots=[[[0, 1], [2]]]), "ragged"),
    "no layers": (edited(slots=[]), "ragged or empty"),
    "text in slots": (edited(slots=[[["a", 1], [2, 3]]]), "slots"),
    "floats in slots": (edited(slots=[[[0.5, 1], [2, 3]]]), "slots"),
    "null in slots": (edited(slots=[[[None, 1], [2, 3]]]), "slots"),
    "huge number in slots": (edited(slots=[[[10**30, 1], [2, 3]]]), "slots"),
    "mode": (edited(mode="away"), "mode"),
    "cost of text": (edited(cost="low"), "cost"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_file(tmp_path: Path, name: str) -> None:
    text, message = MALFORMED[name]
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(BadData, match=message) as caught:
        Plan.load(tmp_path / "plan.json")
    assert str(caught.value).startswith(str(tmp_path / "plan.json"))
    assert "\n" not in str(caught.value)


def test_the_unedited_file_is_fine(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(edited())
    assert Plan.load(tmp_path / "plan.json").digest == Plan.contiguous(1, 4, 2).digest


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match=r"nowhere\.json does not exist; give the path of a plan"):
        Plan.load(tmp_path / "nowhere.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadData, match="is not UTF-8 text"):
        Plan.load(tmp_path / "binary.json")
