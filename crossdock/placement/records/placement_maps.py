"""Placement maps of serving systems, both ways: which logical expert every physical slot of a layer holds, slots in order of device.

    sglang       {"physical_to_logical_map": [[...], ...]}: what `--init-expert-location` takes; vLLM's saved EPLB state has the same key
    vllm         [[...], ...], a list for every MoE layer, or one list for all: vLLM's initial expert map
    vllm-record  {"record_type": "eplb_initial_mapping", "initial_global_assignments": {"0": [...]}, ...}: one line, vLLM's offline mapping
    vllm-ascend  {"moe_layer_count": .., "layer_list": [{"device_list": [{"device_expert": [...]}]}]}
    vllm-ranks   {"expert_to_ep_rank": [...]}: the device of every expert, the same in every layer

Redundant experts are experts that stand in several slots. SGLang counts all layers of the model, dense ones included: `first_dense` says
how many dense layers come before the first MoE layer; their rows are ignored here, and written as consecutive experts.
"""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossdock.errors import BadData, UsageError
from crossdock.placement.records.plan import EMPTY, Plan

IntArray = NDArray[np.int64]

MAX_SLOTS = 1 << 24
"""Slots of all layers together that are read: a hundred layers of a hundred thousand."""
MAX_CELLS = 1 << 26
"""Layers x devices x experts of a map that names devices: a hundred layers of 800 experts on as many devices."""
RECORD = "eplb_initial_mapping"


def plan_of(
    value: Any, *, num_devices: int | None = None, num_experts: int | None = None, num_layers: int | None = None, first_dense: int = 0
) -> Plan:
    """The plan that a map, read from JSON or given with arrays in place of lists, describes.

    `num_devices` must be given where the map says nothing of devices, `num_layers` where it has one row for all layers. Two copies of an
    expert on one device are one, and leave a slot empty. Raises `BadData`, with place and remedy, for what is no such map.
    """
    if isinstance(value, dict) and "expert_to_ep_rank" in value:
        device_LE = _repeated(_matrix(value["expert_to_ep_rank"], "expert_to_ep_rank"), num_layers)
        num_found = int(device_LE.max()) + 1 if num_devices is None else num_devices
        if device_LE.size * num_found > MAX_CELLS:
            layers, experts = device_LE.shape
            raise BadData(
                f"expert_to_ep_rank names devices up to {device_LE.max()}: {layers} layers x {num_found} devices x {experts} experts are "
                f"{device_LE.size * num_found}, and at most {MAX_CELLS} are read; number the devices from 0 without gaps"
            )
        return Plan.from_devices(device_LE, num_found, method="imported")
    slots_LRS = _slots(value, num_devices, num_layers)
    if not 0 <= first_dense < len(slots_LRS):
        raise BadData(f"the map has {len(slots_LRS)} layers, and {first_dense} are said to be dense; give fewer dense layers")
    slots_LRS = _without_twins(slots_LRS[first_dense:])
    return Plan(slots_LRS.astype(np.int32), int(slots_LRS.max()) + 1 if num_experts is None else num_experts, method="imported")


def written(plan: Plan, form: str, *, first_dense: int = 0) -> str:
    """The text of the map in one of FORMS. Raises `UsageError` for an unknown form, `BadData` where the plan does not fit the form."""
    if form not in FORMS:
        raise UsageError(f"format is {form!r}; choose from {', '.join(FORMS)}")
    if first_dense and form != "sglang":
        raise UsageError(f"format {form} has rows for MoE layers alone; leave the number of dense layers out")
    return FORMS[form](plan, first_dense)


def physical_to_logical(plan: Plan, first_dense: int = 0) -> IntArray:
    """int64 [first_dense + L, R * S]: the expert of every physical slot. Raises `BadData` where one is empty: those systems have none."""
    empty = np.argwhere(plan.slots_LRS == EMPTY)
    if len(empty):
        layer, device, slot = empty[0]
        raise BadData(
            f"layer {layer}, device {device}, slot {slot} is empty, and {len(empty)} slots are; a placement map fills every slot: "
            "solve with as many slots as experts, or with replicas that fill them"
        )
    physical_LP = plan.slots_LRS.reshape(plan.num_layers, -1).astype(np.int64)
    dense_P = np.arange(physical_LP.shape[1]) % plan.num_experts
    return np.concatenate([np.tile(dense_P, (first_dense, 1)), physical_LP])


def _sglang(plan: Plan, first_dense: int) -> str:
    return _rows_text('{"physical_to_logical_map": [', physical_to_logical(plan, first_dense), "]}")


def _vllm(plan: Plan, first_dense: int) -> str:
    return _rows_text("[", physical_to_logical(plan), "]")


def _vllm_record(plan: Plan, first_dense: int) -> str:
    physical_LP = physical_to_logical(plan)
    record = {
        "record_type": RECORD,
        "version": 1,
        "num_redundant_experts": physical_LP.shape[1] - plan.num_experts,
        "num_slots": physical_LP.shape[1],
        "initial_global_assignments": {str(layer): row for layer, row in enumerate(physical_LP.tolist())},
    }
    return json.dumps(record) + "\n"


def _vllm_ascend(plan: Plan, first_dense: int) -> str:
    physical_to_logical(plan)  # raises where a slot is empty
    layers = [
        {
            "layer_id": layer,
            "device_count": plan.num_devices,
            "device_list": [{"device_id": device, "device_expert": slots_S} for device, slots_S in enumerate(slots_RS)],
        }
        for layer, slots_RS in enumerate(plan.slots_LRS.tolist())
    ]
    return json.dumps({"moe_layer_count": plan.num_layers, "layer_list": layers}, indent=1) + "\n"


def _vllm_ranks(plan: Plan, first_dense: int) -> str:
    device_LE = plan.device_of_LE()
    differing = np.flatnonzero((device_LE != device_LE[0]).any(axis=1))
    if len(differing):
        raise BadData(
            f"layer {differing[0]} places experts otherwise than layer 0, and format vllm-ranks has one placement for all layers; use vllm"
        )
    return json.dumps({"expert_to_ep_rank": device_LE[0].tolist()}) + "\n"


FORMS: dict[str, Callable[[Plan, int], str]] = {
    "sglang": _sglang,
    "vllm": _vllm,
    "vllm-record": _vllm_record,
    "vllm-ascend": _vllm_ascend,
    "vllm-ranks": _vllm_ranks,
}


def _rows_text(opening: str, rows_LP: IntArray, closing: str) -> str:
    """One line for each layer, so that two files can be compared line by line."""
    return opening + "\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows_LP.tolist()) + "\n" + closing + "\n"


def _slots(value: Any, num_devices: int | None, num_layers: int | None) -> IntArray:
    """[L, R, S] of a map of any form but vllm-ranks."""
    if isinstance(value, dict) and "layer_list" in value:
        return _of_ascend(value["layer_list"], num_devices)
    if isinstance(value, dict) and _is_record(value):
        physical_LP = _of_record(value)
    elif isinstance(value, dict) and "physical_to_logical_map" in value:
        physical_LP = _matrix(value["physical_to_logical_map"], "physical_to_logical_map")
    elif isinstance(value, list | np.ndarray):
        physical_LP = _matrix(value, "the map")
    else:
        what = f"an object with the keys {sorted(map(str, value))[:6]}" if isinstance(value, dict) else f"a {type(value).__name__}"
        raise BadData(
            f"{what} is no placement map; give physical_to_logical_map, a list of lists, layer_list, expert_to_ep_rank or a line of record "
            f"type {RECORD}"
        )
    physical_LP = _repeated(physical_LP, num_layers)
    if num_devices is None:
        raise UsageError(f"the map has {physical_LP.shape[1]} slots a layer and says nothing of devices; give the number of devices")
    if num_devices < 1 or physical_LP.shape[1] % num_devices:
        raise BadData(
            f"{physical_LP.shape[1]} slots a layer do not divide over {num_devices} devices; give the number that they were made for"
        )
    return physical_LP.reshape(len(physical_LP), num_devices, -1)


def _is_record(value: dict[str, Any]) -> bool:
    kind = value.get("record_type")  # of a .pt file it may be an array
    return isinstance(kind, str) and kind == RECORD


def _of_record(value: dict[str, Any]) -> IntArray:
    rows = value.get("initial_global_assignments")
    if not isinstance(rows, dict) or set(rows) != {str(layer) for layer in range(len(rows))} or not rows:
        raise BadData("initial_global_assignments must be an object with the keys 0, 1, ... of all MoE layers; was the line cut off?")
    return _matrix([rows[str(layer)] for layer in range(len(rows))], "initial_global_assignments")


def _of_ascend(layers: Any, num_devices: int | None) -> IntArray:
    try:
        held = [[device["device_expert"] for device in layer["device_list"]] for layer in layers]
    except (TypeError, KeyError, IndexError) as error:
        raise BadData(
            "layer_list must hold objects with a device_list of objects with a device_expert each; one of them is missing or something else"
        ) from error
    counts = {len(layer) for layer in held}
    if len(counts) != 1 or 0 in counts:
        raise BadData(f"the layers of layer_list are for {sorted(counts)} devices; give one number of devices, and at least one layer")
    num_found = counts.pop()
    if num_devices not in (None, num_found):
        raise BadData(f"layer_list is for {num_found} devices, and {num_devices} are asked for; leave the number out")
    return _matrix([device for layer in held for device in layer], "device_expert").reshape(len(held), num_found, -1)


def _matrix(value: Any, name: str) -> IntArray:
    """A list, or a list of lists, of integers as int64 [rows, columns]."""
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise BadData(f"{name} is ragged: its layers differ in length; give every layer as many numbers") from error
    if array.size > MAX_SLOTS:
        raise BadData(f"{name} has {array.size} slots, and at most {MAX_SLOTS} are read; give the layers that you need")
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2) or array.size == 0:
        raise BadData(f"{name} has shape {array.shape} and type {array.dtype}; give integers, one list for each layer")
    matrix = np.atleast_2d(array)
    if int(matrix.min()) < 0 or int(matrix.max()) >= MAX_SLOTS:
        layer, column = np.argwhere((matrix < 0) | (matrix >= MAX_SLOTS))[0]
        raise BadData(f"{name}: layer {layer}, place {column} is {matrix[layer, column]}; give numbers from 0, every place filled")
    return matrix.astype(np.int64)


def _repeated(rows: IntArray, num_layers: int | None) -> IntArray:
    """A single row for every layer; more rows must be as many as asked for."""
    if num_layers is None or len(rows) == num_layers:
        return rows
    if len(rows) > 1:
        raise BadData(f"the map has {len(rows)} layers, and {num_layers} are asked for; leave the number out")
    if num_layers * rows.shape[1] > MAX_SLOTS:
        raise UsageError(f"{num_layers} layers of {rows.shape[1]} slots are more than the {MAX_SLOTS} that are read")
    return np.repeat(rows, num_layers, axis=0)


def _without_twins(slots_LRS: IntArray) -> IntArray:
    """The same with EMPTY for every further copy of an expert on one device. Takes memory in proportion to the slots."""
    order_LRS = np.argsort(slots_LRS, axis=2, kind="stable")  # copies side by side, the first in front
    sorted_LRS = np.take_along_axis(slots_LRS, order_LRS, axis=2)
    sorted_LRS[:, :, 1:][sorted_LRS[:, :, 1:] == sorted_LRS[:, :, :-1]] = EMPTY
    distinct_LRS = np.empty_like(slots_LRS)
    np.put_along_axis(distinct_LRS, order_LRS, sorted_LRS, axis=2)
    return distinct_LRS
