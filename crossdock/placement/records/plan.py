"""The plan: which device holds which expert of every MoE layer; its file, its checks, and the moves from one plan to another.

Words used throughout placement:

    expert    a logical expert, 0 .. E-1, the unit that the model knows
    device    one member of the expert-parallel group, 0 .. R-1; data-parallel copies of the group share one plan
    slot      a physical place for one expert; a device has at most S of them in a layer, and -1 marks one that is empty. Empty slots
              stand last and are there in the table alone: a rank keeps memory for the experts that it holds, which may be none
    global slot   device * S + slot, so that one number names both
    replica   one of several copies of an expert in a layer, each on its own device
    home      the device on which a token's sequence, attention and residual stream live
    copy      one row of width D sent from a home to a device: flat dispatch sends one for every (token, expert),
              de-duplicated dispatch one for every (token, distinct device); hierarchical dispatch sends one for every
              (token, distinct node), and from there one for every (token, distinct device)

A worked example: 4 experts on 2 devices with 3 slots, expert 0 replicated.

    slots_LRS[0] = [[0, 1, -1],      device 0: global slots 0, 1, 2
                    [2, 3,  0]]      device 1: global slots 3, 4, 5

A token at home on device 1 that chose experts 0 and 1 uses global slots 5 (its own copy of 0) and 1 (the only copy of 1), on two devices.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crossdock import atomic
from crossdock.bounded import json_value, read_bytes
from crossdock.errors import BadData
from crossdock.strict_yaml import Document, StrictModel, validated

FORMAT_VERSION = 1
EMPTY = -1
MAX_BYTES = 1 << 28
"""The most that is read as a plan: a hundred layers of half a million slots."""

Mode = Literal["home", "coherent"]
Objective = Literal["seconds", "devices", "nodes", "hops"]


@dataclass(frozen=True)
class Move:
    """One expert's weights and optimizer state travel from device `source` to device `target`."""

    layer: int
    expert: int
    source: int
    target: int


@dataclass(frozen=True, eq=False)
class Plan:
    """Where every expert of every MoE layer lives.

    `slots_LRS` is int32 [L, R, S] of logical experts, -1 where a slot is empty; empty slots given among filled ones are moved behind
    them. Every expert has at least one slot in every layer, and a device holds an expert at most once. `cost` and `bound` are in the unit
    of `objective` (seconds of a step, or a count per token); None where nobody computed them. Raises `BadData`, with the place and the
    remedy, where the slots break a rule.
    """

    slots_LRS: NDArray[np.int32]
    num_experts: int
    mode: Mode = "home"
    objective: str = ""
    method: str = ""
    seed: int = 0
    topology_hash: str = ""
    trace_hash: str = ""
    cost: float | None = None
    bound: float | None = None

    def __post_init__(self) -> None:
        slots_LRS = np.array(self.slots_LRS)
        if slots_LRS.ndim != 3 or 0 in slots_LRS.shape:
            raise BadData(f"slots have shape {slots_LRS.shape}; give [layers, devices, slots], none of them 0")
        if slots_LRS.dtype.kind not in "iu":
            raise BadData(f"slots are of type {slots_LRS.dtype}; give integers, -1 for an empty slot")
        if self.num_experts < 1:
            raise BadData(f"num_experts is {self.num_experts}; it must be at least 1")
        if self.mode not in ("home", "coherent"):
            raise BadData(f"mode is {self.mode!r}; choose home or coherent")
        for name, value in (("cost", self.cost), ("bound", self.bound)):
            if value is not None and not np.isfinite(value):
                raise BadData(f"{name} is {value}; give a finite number or leave it out")
        _check_slots(slots_LRS, self.num_experts)
        empty_last_LRS = np.argsort(slots_LRS == EMPTY, axis=2, kind="stable")
        slots_LRS = np.take_along_axis(slots_LRS, empty_last_LRS, axis=2).astype(np.int32)
        slots_LRS.setflags(write=False)
        object.__setattr__(self, "slots_LRS", slots_LRS)

    @classmethod
    def contiguous(cls, num_layers: int, num_experts: int, num_devices: int, slots_per_device: int | None = None) -> "Plan":
        """What frameworks do that do not plan: consecutive experts on consecutive devices, in blocks that differ by one at most."""
        device_E = np.repeat(np.arange(num_devices), _block_sizes(num_experts, num_devices))
        return cls.from_devices(np.tile(device_E, (num_layers, 1)), num_devices, slots_per_device, method="contiguous")

    @classmethod
    def from_devices(cls, device_LE: ArrayLike, num_devices: int, slots_per_device: int | None = None, **fields: Any) -> "Plan":
        """A plan with one copy of every expert, from `device_LE` int [L, E]: the device of each expert.

        Slots of a device are filled in ascending order of expert. `slots_per_device` defaults to the fullest device's need.
        `fields` are the remaining fields of `Plan`. Raises `BadData` where a device is out of range or holds more than its slots.
        """
        device_LE = np.asarray(device_LE)
        if device_LE.ndim != 2 or device_LE.dtype.kind not in "iu":
            raise BadData(f"devices have shape {device_LE.shape} and type {device_LE.dtype}; give integers [layers, experts]")
        if device_LE.size and not 0 <= device_LE.min() <= device_LE.max() < num_devices:
            raise BadData(
                f"devices range over {device_LE.min()}..{device_LE.max()}; with {num_devices} devices they are 0..{num_devices - 1}"
            )
        num_layers, num_experts = device_LE.shape
        holds_LRE = device_LE[:, None, :] == np.arange(num_devices)[None, :, None]
        need = int(holds_LRE.sum(axis=2).max(initial=0))
        num_slots = need if slots_per_device is None else slots_per_device
        if need > num_slots:
            raise BadData(f"a device holds {need} experts of one layer and has {num_slots} slots; give {need} slots or move experts")
        slots_LRS = np.full((num_layers, num_devices, num_slots), EMPTY, dtype=np.int32)
        layer_H, device_H, expert_H = np.nonzero(holds_LRE)
        slots_LRS[layer_H, device_H, (np.cumsum(holds_LRE, axis=2) - 1)[layer_H, device_H, expert_H]] = expert_H
        return cls(slots_LRS, num_experts, **fields)

    @property
    def num_layers(self) -> int:
        return int(self.slots_LRS.shape[0])

    @property
    def num_devices(self) -> int:
        return int(self.slots_LRS.shape[1])

    @property
    def slots_per_device(self) -> int:
        return int(self.slots_LRS.shape[2])

    @cached_property
    def held_LR(self) -> NDArray[np.int64]:
        """int64 [L, R]: experts that device r holds in layer l, and so the slots that it keeps memory for."""
        held_LR = np.count_nonzero(self.slots_LRS != EMPTY, axis=2).astype(np.int64)
        held_LR.setflags(write=False)
        return held_LR

    @cached_property
    def slot_LRE(self) -> NDArray[np.int32]:
        """int32 [L, R, E]: the slot (0 .. S-1) in which device r holds expert e of layer l, -1 where it does not."""
        slot_LRE = np.full((self.num_layers, self.num_devices, self.num_experts), EMPTY, dtype=np.int32)
        layer_H, device_H, slot_H = np.nonzero(self.slots_LRS != EMPTY)
        slot_LRE[layer_H, device_H, self.slots_LRS[layer_H, device_H, slot_H]] = slot_H
        slot_LRE.setflags(write=False)
        return slot_LRE

    @cached_property
    def has_replicas(self) -> bool:
        """Whether any expert of any layer has more than one copy."""
        return bool(self.held_LR.sum() > self.num_layers * self.num_experts)

    @cached_property
    def digest(self) -> str:
        """sha256 of the placement alone: two plans that put every expert in the same slots agree, whoever made them."""
        header = json.dumps([FORMAT_VERSION, self.num_experts, list(self.slots_LRS.shape)])
        return hashlib.sha256(header.encode() + self.slots_LRS.astype("<i4").tobytes()).hexdigest()

    def device_of_LE(self) -> NDArray[np.int32]:
        """int32 [L, E]: the device of every expert. Raises `BadData` where an expert has several copies."""
        holds_LRE = self.slot_LRE != EMPTY
        count_LE = holds_LRE.sum(axis=1)
        if self.has_replicas:
            layer, expert = np.argwhere(count_LE > 1)[0]
            raise BadData(
                f"layer {layer} keeps expert {expert} on {count_LE[layer, expert]} devices, so it has no single device; "
                "use a plan without replicas"
            )
        return holds_LRE.argmax(axis=1).astype(np.int32)

    def moves_to(self, other: "Plan") -> tuple[Move, ...]:
        """The transfers that turn this plan into `other`: one for every device that gains an expert; losing a copy needs none.

        Sorted by layer, expert and target. Where an expert has several copies, its gains take turns among them as sources. A change of
        slot on the same device is no move. Raises `BadData` where the two plans are of different shapes.
        """
        other.check_model(self.num_layers, self.num_experts, self.num_devices)
        held_LER = np.swapaxes(self.slot_LRE != EMPTY, 1, 2)
        gains_LER = np.swapaxes(other.slot_LRE != EMPTY, 1, 2) & ~held_LER
        moves, turns = [], dict[tuple[int, int], int]()
        for layer, expert, target in np.argwhere(gains_LER).tolist():
            sources = np.flatnonzero(held_LER[layer, expert])
            turn = turns.get((layer, expert), 0)
            turns[layer, expert] = turn + 1
            moves.append(Move(layer, expert, int(sources[turn % len(sources)]), target))
        return tuple(moves)

    def check_model(self, num_layers: int, num_experts: int, num_devices: int, name: Path | str = "the plan") -> None:
        """Raise `BadData`, with both shapes and the `name` of a file, unless this plan is for such a model on so many devices."""
        mine = (self.num_layers, self.num_experts, self.num_devices)
        asked = (num_layers, num_experts, num_devices)
        if mine != asked:
            raise BadData(
                "{} is for {} MoE layers x {} experts on {} devices, and it is asked to serve {} layers x {} experts on {} devices; "
                "solve a plan for the latter".format(name, *mine, *asked)
            )

    @classmethod
    def load(cls, path: Path | str) -> "Plan":
        """Read a plan file. Raises `MissingInput` where it cannot be read and `BadData`, with the file's name, where it is malformed."""
        path = Path(path)
        value = json_value(read_bytes(path, MAX_BYTES, "a plan, the JSON that `crossdock plan solve` wrote"), str(path))
        file = validated(_PlanFile, Document(value=value, name=str(path), line_of={}), error=BadData)
        try:
            if file.format_version != FORMAT_VERSION:
                raise BadData(f"format_version is {file.format_version}, and this release reads {FORMAT_VERSION}; solve the plan again")
            slots_LRS = _array_of(file.slots)
            if len(slots_LRS) != file.num_layers:
                raise BadData(f"num_layers is {file.num_layers}, and slots has {len(slots_LRS)} layers; make them agree")
            fields = file.model_dump(exclude={"format_version", "num_layers", "slots"})
            return cls(slots_LRS.astype(np.int32), **fields)
        except BadData as error:
            raise BadData(f"{path}: {error}") from error

    def save(self, path: Path | str) -> None:
        """Write the plan file atomically: JSON, one line for each layer's slots."""
        head = {
            "format_version": FORMAT_VERSION,
            "num_layers": self.num_layers,
            "num_experts": self.num_experts,
            "topology_hash": self.topology_hash,
            "trace_hash": self.trace_hash,
            "mode": self.mode,
            "objective": self.objective,
            "method": self.method,
            "seed": self.seed,
            "cost": self.cost,
            "bound": self.bound,
        }
        lines = [f'  "{key}": {json.dumps(value, allow_nan=False)},' for key, value in head.items()]
        layers = [f"    {json.dumps(layer, separators=(',', ':'))}" for layer in self.slots_LRS.tolist()]
        atomic.write_text(Path(path), "\n".join(["{", *lines, '  "slots": [', ",\n".join(layers), "  ]", "}", ""]))


def choose_replica(plan: Plan, node_of_R: Sequence[int]) -> NDArray[np.int32]:
    """int32 [L, R, E]: the global slot (device * S + slot) that a token at home on device r uses for expert e of layer l.

    The nearest copy wins: on the home itself, else on the home's node, else on another node. Homes that are equally near to several
    copies take turns among them, in ascending order of home and of device, starting at a turn that depends on the expert, so that no
    copy gets more than its share. The same function serves the evaluator, the solvers and the runtime.
    """
    node_R = np.asarray(node_of_R)
    if node_R.shape != (plan.num_devices,):
        raise BadData(f"the plan is for {plan.num_devices} devices, and nodes are given for {len(node_R)}; give one node per device")
    slot_LRE = plan.slot_LRE
    chosen_LRE = choose_devices(slot_LRE != EMPTY, node_R, np.arange(plan.num_experts))
    slot_of_chosen_LRE = np.take_along_axis(slot_LRE, chosen_LRE, axis=1)
    return (chosen_LRE * plan.slots_per_device + slot_of_chosen_LRE).astype(np.int32)


def choose_devices(holds_LRX: NDArray[np.bool_], node_R: NDArray[np.int64], expert_X: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [L, R, X]: the device whose copy each home uses, by the rule of `choose_replica`, where `holds_LRX` bool [L, R, X] says which
    devices hold which of the experts `expert_X`; -1 where nobody holds one."""
    chosen_LRX = np.where(holds_LRX, np.arange(len(node_R))[None, :, None], EMPTY)
    everyone_R = np.ones(len(node_R), dtype=bool)
    for members_R in [*(node_R == node for node in np.unique(node_R)), everyone_R]:
        _take_turns(chosen_LRX, holds_LRX, np.flatnonzero(members_R), expert_X)
    return chosen_LRX


def _take_turns(
    chosen_LRE: NDArray[np.int64], holds_LRE: NDArray[np.bool_], members_M: NDArray[np.int64], expert_E: NDArray[np.int64]
) -> None:
    """Give the homes among `members_M` that still lack a copy the copies held among `members_M`, in turn. Writes into `chosen_LRE`."""
    holds_LME = holds_LRE[:, members_M]
    waiting_LME = chosen_LRE[:, members_M] == EMPTY
    num_copies_LE = holds_LME.sum(axis=1)
    turn_LME = np.cumsum(waiting_LME, axis=1) - 1 + expert_E
    copy_LME = turn_LME % np.maximum(num_copies_LE, 1)[:, None, :]
    holders_first_LME = np.argsort(~holds_LME, axis=1, kind="stable")
    holder_LME = members_M[np.take_along_axis(holders_first_LME, copy_LME, axis=1)]
    served_LME = waiting_LME & (num_copies_LE > 0)[:, None, :]
    chosen_LRE[:, members_M] = np.where(served_LME, holder_LME, chosen_LRE[:, members_M])


class _PlanFile(StrictModel):
    format_version: int
    num_layers: int
    num_experts: int
    topology_hash: str = ""
    trace_hash: str = ""
    mode: Mode = "home"
    objective: str = ""
    method: str = ""
    seed: int = 0
    slots: list[list[list[int]]]
    cost: float | None = None
    bound: float | None = None


def _block_sizes(num_experts: int, num_devices: int) -> list[int]:
    small, larger = divmod(num_experts, num_devices)
    return [small + 1] * larger + [small] * (num_devices - larger)


def _check_slots(slots_LRS: NDArray[np.integer[Any]], num_experts: int) -> None:
    num_layers, num_devices, num_slots = slots_LRS.shape
    outside = np.argwhere((slots_LRS < EMPTY) | (slots_LRS >= num_experts))
    if len(outside):
        layer, device, slot = outside[0]
        raise BadData(
            f"layer {layer}, device {device}, slot {slot} holds expert {slots_LRS[layer, device, slot]}; "
            f"with {num_experts} experts it must be 0..{num_experts - 1}, or -1 for empty"
        )
    if num_experts > num_devices * num_slots:  # said before the table is made: a mistyped number would make it huge
        raise BadData(
            f"a layer holds no copy of at least one expert ({num_experts} experts, {num_devices} devices x {num_slots} slots); "
            "give every expert a slot"
        )
    layer_H, device_H, slot_H = np.nonzero(slots_LRS != EMPTY)
    held_LRE = np.zeros((num_layers, num_devices, num_experts), dtype=np.int32)
    np.add.at(held_LRE, (layer_H, device_H, slots_LRS[layer_H, device_H, slot_H]), 1)
    twice = np.argwhere(held_LRE > 1)
    if len(twice):
        layer, device, expert = twice[0]
        raise BadData(f"layer {layer}: device {device} holds expert {expert} {held_LRE[layer, device, expert]} times; once is enough")
    absent = np.argwhere(held_LRE.sum(axis=1) == 0)
    if len(absent):
        layer, expert = absent[0]
        raise BadData(
            f"layer {layer} holds no copy of expert {expert} ({num_experts} experts, {num_devices} devices x {num_slots} slots, "
            f"{len(absent)} missing in all layers); give every expert a slot"
        )


def _array_of(slots: list[list[list[int]]]) -> NDArray[np.int64]:
    shapes = {(len(layer), len(device)) for layer in slots for device in layer or [[]]}
    if len(shapes) != 1:
        raise BadData(f"slots is ragged or empty: (devices, slots) of its layers are {sorted(shapes)}; pad with -1 to one shape")
    try:
        return np.array(slots, dtype=np.int64)
    except OverflowError as error:
        raise BadData(f"slots holds a number beyond 64 bits: {error}; experts are small integers") from error
