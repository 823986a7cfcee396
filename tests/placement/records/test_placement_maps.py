"""Placement maps: every form both ways, redundant experts, dense layers, and a clear refusal of what is none."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossdock.errors import BadData, UsageError
from crossdock.placement.records.placement_maps import FORMS, physical_to_logical, plan_of, written
from crossdock.placement.records.plan import EMPTY, Plan
from tests.placement.conftest import random_plan

MAP = [[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 2]]  # 4 experts, 2 redundant, on 3 devices of 2 slots


def full_plan(seed: int, num_devices: int = 3, num_slots: int = 3, num_layers: int = 2) -> Plan:
    """A random plan of 5 experts without an empty slot and without twins on a device."""
    rng = np.random.default_rng(seed)
    while True:
        slots_LRS = np.stack([[rng.permutation(5)[:num_slots] for _ in range(num_devices)] for _ in range(num_layers)])
        if all(len(set(layer.ravel().tolist())) == 5 for layer in slots_LRS):
            return Plan(slots_LRS, 5)


def test_the_map_that_the_documentation_of_vllm_shows_becomes_its_slots():
    plan = plan_of(MAP, num_devices=3)
    assert plan.slots_LRS.tolist() == [[[0, 1], [2, 3], [0, 1]], [[3, 2], [1, 0], [3, 2]]]
    assert plan.num_experts == 4
    assert plan.has_replicas


@pytest.mark.parametrize("form", [form for form in FORMS if form != "vllm-ranks"])
@pytest.mark.parametrize("seed", range(3))
def test_every_form_gives_back_the_plan_with_its_replicas(form, seed):
    plan = full_plan(seed)
    again = plan_of(json.loads(written(plan, form)), num_devices=3)
    assert again.digest == plan.digest


def test_ranks_of_experts_give_back_the_plan_where_layers_agree():
    plan = Plan.from_devices(np.tile([2, 0, 1, 0, 2, 1], (3, 1)), 3)
    value = json.loads(written(plan, "vllm-ranks"))
    assert value == {"expert_to_ep_rank": [2, 0, 1, 0, 2, 1]}
    assert plan_of(value, num_layers=3).digest == plan.digest
    with pytest.raises(BadData, match="layer 1 places experts otherwise than layer 0"):
        written(Plan.from_devices([[0, 1], [1, 0]], 2), "vllm-ranks")
    with pytest.raises(BadData, match="so it has no single device"):
        written(full_plan(0), "vllm-ranks")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 3))
def test_physical_slots_are_in_order_of_device_and_name_every_expert(seed, first_dense):
    plan = full_plan(seed)
    physical_LP = physical_to_logical(plan, first_dense)
    assert physical_LP.shape == (first_dense + 2, 9)
    for layer, device, slot in np.ndindex(2, 3, 3):
        assert physical_LP[first_dense + layer, device * 3 + slot] == plan.slots_LRS[layer, device, slot]
    assert all(set(row.tolist()) == set(range(5)) for row in physical_LP)


def test_dense_layers_of_sglang_are_written_and_left_out_again():
    plan = full_plan(1)
    value = json.loads(written(plan, "sglang", first_dense=3))
    assert value["physical_to_logical_map"][:3] == [[0, 1, 2, 3, 4, 0, 1, 2, 3]] * 3
    assert plan_of(value, num_devices=3, first_dense=3).digest == plan.digest
    assert plan_of(value, num_devices=3).num_layers == 5
    with pytest.raises(BadData, match="5 layers, and 5 are said to be dense"):
        plan_of(value, num_devices=3, first_dense=5)
    with pytest.raises(UsageError, match="MoE layers alone"):
        written(plan, "vllm", first_dense=3)


def test_one_row_stands_for_all_layers():
    plan = plan_of([0, 1, 1, 0], num_devices=2, num_layers=3)
    assert plan.slots_LRS.tolist() == [[[0, 1], [1, 0]]] * 3
    with pytest.raises(BadData, match="2 layers, and 3 are asked for"):
        plan_of(MAP, num_devices=3, num_layers=3)


def test_two_copies_on_one_device_are_one():
    plan = plan_of([[0, 0, 1, 2]], num_devices=2)
    assert plan.slots_LRS.tolist() == [[[0, EMPTY], [1, 2]]]


def test_a_plan_with_an_empty_slot_is_not_written():
    with pytest.raises(BadData, match=r"slot 1 is empty, and 2 slots are.*solve with"):
        written(Plan([[[0, 1, 2], [3, EMPTY, EMPTY]]], 4), "sglang")
    for form in FORMS:
        if form != "vllm-ranks":
            with pytest.raises(BadData, match="empty"):
                written(Plan([[[0, 1], [2, EMPTY]]], 3), form)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"physical_to_logical_map": [[0, 1], [0]]}, "ragged"),
        ({"physical_to_logical_map": [[0, 1.5]]}, "type float64"),
        ({"physical_to_logical_map": [["0", "1"]]}, "give integers"),
        ({"physical_to_logical_map": [[0, -1]]}, "layer 0, place 1 is -1"),
        ({"physical_to_logical_map": [[0, 10**30]]}, "give integers"),
        ({"physical_to_logical_map": []}, "shape"),
        ({"physical_to_logical_map": None}, "shape"),
        ({"logical_count": [[1, 2]]}, "no placement map"),
        ("map", "a str is no placement map"),
        ([[0, 1, 2]], "3 slots a layer do not divide over 2 devices"),
        ([[0, 0, 3, 3]], "holds no copy of expert 1"),
        ({"layer_list": [{"device_list": [{"experts": [0]}]}]}, "device_expert"),
        ({"layer_list": 3}, "layer_list must hold"),
        ({"layer_list": []}, "at least one layer"),
        (
            {"layer_list": [{"device_list": [{"device_expert": [0]}, {"device_expert": [1]}]}, {"device_list": [{"device_expert": [0]}]}]},
            "one number",
        ),
        ({"record_type": "eplb_initial_mapping", "initial_global_assignments": {"1": [0, 1]}}, "keys 0, 1"),
        ({"record_type": "eplb_initial_mapping"}, "keys 0, 1"),
        ({"expert_to_ep_rank": [0, 7]}, "with 2 devices"),
    ],
)
def test_what_is_no_map_is_refused_with_place_and_remedy(value, message):
    with pytest.raises(BadData, match=message):
        plan_of(value, num_devices=2)


def test_devices_must_be_given_where_the_map_does_not_say():
    with pytest.raises(UsageError, match="give the number of devices"):
        plan_of(MAP)


def test_an_unknown_form_names_the_known_ones():
    with pytest.raises(UsageError, match="sglang, vllm"):
        written(random_plan(), "trtllm")


def test_the_forms_read_as_the_other_systems_write_them(tmp_path: Path):
    """The layout of each file, key by key, as the other system's reader takes it."""
    plan = plan_of(MAP, num_devices=3)
    assert json.loads(written(plan, "sglang")) == {"physical_to_logical_map": MAP}
    assert json.loads(written(plan, "vllm")) == MAP
    record = json.loads(written(plan, "vllm-record"))
    assert record["record_type"] == "eplb_initial_mapping"
    assert (record["version"], record["num_redundant_experts"], record["num_slots"]) == (1, 2, 6)
    assert record["initial_global_assignments"] == {"0": MAP[0], "1": MAP[1]}
    assert "\n" not in written(plan, "vllm-record").rstrip("\n")
    ascend = json.loads(written(plan, "vllm-ascend"))
    assert ascend["moe_layer_count"] == 2
    assert ascend["layer_list"][1]["device_count"] == 3
    assert ascend["layer_list"][1]["device_list"][2] == {"device_id": 2, "device_expert": [3, 2]}


def test_many_slots_on_one_device_take_no_memory_in_their_square() -> None:
    slots = np.arange(200_000)
    slots[100_000:] = np.arange(100_000)[::-1]
    plan = plan_of([slots.tolist()], num_devices=1)  # compared each with each they would be 40 GB
    assert np.array_equal(plan.slots_LRS[0, 0, :100_000], np.arange(100_000))
    assert (plan.slots_LRS[0, 0, 100_000:] == EMPTY).all()


def test_the_first_of_several_copies_stays() -> None:
    plan = plan_of([[2, 0, 2, 1, 0, 2], [1, 1, 0, 2, 2, 0]], num_devices=2)
    assert plan.slots_LRS.tolist() == [[[2, 0, EMPTY], [1, 0, 2]], [[1, 0, EMPTY], [2, 0, EMPTY]]]


def test_maps_beyond_reason_are_refused_with_their_numbers() -> None:
    with pytest.raises(BadData, match="16777217 slots, and at most 16777216"):
        plan_of(np.zeros((1, (1 << 24) + 1), dtype=np.int64), num_devices=1)
    with pytest.raises(BadData, match="devices up to 16000000: 1 layers x 16000001 devices x 100 experts are 1600000100, and at most"):
        plan_of({"expert_to_ep_rank": [0] * 99 + [16_000_000]})


@pytest.mark.parametrize(
    "layers", ["abc", [["x"]], [np.zeros(3)], [{"device_list": "abc"}], [{"device_list": [np.int64(1)]}], [{"device_list": [None]}]]
)
def test_a_layer_list_of_anything_else_is_refused(layers: object) -> None:
    with pytest.raises(BadData, match="layer_list must hold objects"):
        plan_of({"moe_layer_count": 1, "layer_list": layers})


def test_an_array_where_a_map_names_its_kind() -> None:
    with pytest.raises(BadData, match="is no placement map"):
        plan_of({"record_type": np.zeros(3), "initial_global_assignments": {}})
