"""What a solver is asked and what it answers: the problem with its constraints, and the solution."""

from dataclasses import dataclass, field
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from crossdock.errors import BadData, InfeasiblePlan, UsageError
from crossdock.placement.costs.coherent import Context
from crossdock.placement.costs.cost import Workload
from crossdock.placement.records.affinity import Affinity
from crossdock.placement.records.plan import Mode, Objective, Plan
from crossdock.placement.records.topology import Topology

OBJECTIVES: tuple[str, ...] = get_args(Objective)


@dataclass(frozen=True)
class Pin:
    """Expert `expert` of layer `layer` has a copy on device `device`."""

    layer: int
    expert: int
    device: int


@dataclass(frozen=True)
class Constraints:
    """What a plan must keep to.

    load_cap          the busiest device of a layer gets at most this multiple of the mean load, 1.0 or more; None for no cap
    slots             slots of every device in every layer; None for as many as one copy of each expert needs
    spare_slots       in place of slots: so many more than one copy of each expert needs, for copies of hot experts
    spare_bytes       in place of slots: as many more as fit into so much memory of each device, with optimizer state, over all layers
    replicas          at most so many copies in a layer beyond the first of every expert; without slots they get just the room they need
    memory_fraction   share of each device's memory that experts with their optimizer state may take, over all layers; None for no limit
    pins              copies that must be where they are
    """

    load_cap: float | None = None
    slots: int | None = None
    memory_fraction: float | None = None
    pins: tuple[Pin, ...] = ()
    spare_slots: int | None = None
    spare_bytes: float | None = None
    replicas: int | None = None

    def __post_init__(self) -> None:
        if self.load_cap is not None and not (np.isfinite(self.load_cap) and self.load_cap >= 1.0):
            raise UsageError(f"load cap is {self.load_cap}; the busiest device is never below the mean, so give 1.0 or more")
        if self.slots is not None and self.slots < 1:
            raise UsageError(f"slots is {self.slots}; give at least 1")
        if self.memory_fraction is not None and not 0.0 < self.memory_fraction <= 1.0:
            raise UsageError(f"memory fraction is {self.memory_fraction}; give more than 0 and at most 1")
        rooms = [name for name in ("slots", "spare_slots", "spare_bytes") if getattr(self, name) is not None]
        if len(rooms) > 1:
            raise UsageError(f"{' and '.join(rooms).replace('_', ' ')} both say how many slots there are; give one of them")
        if self.spare_slots is not None and self.spare_slots < 0:
            raise UsageError(f"spare slots is {self.spare_slots}; give 0 or more")
        if self.spare_bytes is not None and not (np.isfinite(self.spare_bytes) and self.spare_bytes >= 0):
            raise UsageError(f"spare bytes is {self.spare_bytes}; give a finite number, 0 or more")
        if self.replicas is not None and self.replicas < 0:
            raise UsageError(f"replicas is {self.replicas}; give 0 or more")

    @property
    def asks_for_replicas(self) -> bool:
        """Whether copies are asked for by name, and not merely possible for want of better use of `slots`."""
        return bool(self.spare_slots or self.replicas or self.spare_bytes is not None)


@dataclass(frozen=True, eq=False)
class Problem:
    """Place the experts that `affinity` counted on `topology` for `workload`.

    mode        "home": tokens return to their home after every layer; "coherent": they stay with their expert until the last layer, which
                takes one expert per token and objective seconds or hops
    objective   "seconds" of the predicted step; mean distinct "devices" or "nodes" of a token's experts in one layer; "hops", the
                fraction of consecutive layers whose first choices live on different devices
    node_weight what a hop to another node counts, beside 1 for one within the node (objective hops: two-level costs); 1 or more
    also        other routing of the same model: a robust plan keeps to the load cap on all of it. Methods dp, columns and, for objective
                devices, auto plan for it; plans of other methods are checked against it
    context     what attention and dense layers ask of the devices in mode coherent
    Raises `UsageError`, `BadData` and `InfeasiblePlan`.
    """

    affinity: Affinity
    topology: Topology
    workload: Workload
    mode: Mode = "home"
    objective: Objective = "seconds"
    constraints: Constraints = field(default_factory=Constraints)
    node_weight: float = 1.0
    also: tuple[Affinity, ...] = ()
    context: Context = field(default_factory=Context)

    def __post_init__(self) -> None:
        self._check_mode()
        if self.objective not in OBJECTIVES:
            raise UsageError(f"objective is {self.objective!r}; choose from {', '.join(OBJECTIVES)}")
        if not (np.isfinite(self.node_weight) and self.node_weight >= 1.0):
            raise UsageError(
                f"node weight is {self.node_weight}; a hop to another node costs no less than one within it, so give 1.0 or more"
            )
        for other in self.also:
            if (other.num_layers, other.num_experts) != (self.num_layers, self.num_experts):
                raise BadData(
                    f"other routing has {other.num_layers} layers x {other.num_experts} experts, and the first {self.num_layers} x "
                    f"{self.num_experts}; give traces of one model"
                )
        self._check_room()
        self._check_pins()
        if self.constraints.asks_for_replicas:
            self._check_replicas()

    @property
    def num_layers(self) -> int:
        return self.affinity.num_layers

    @property
    def num_experts(self) -> int:
        return self.affinity.num_experts

    @property
    def num_devices(self) -> int:
        return self.topology.num_devices

    @property
    def slots_R(self) -> NDArray[np.int64]:
        """int64 [R]: how many experts of one layer each device may hold."""
        wanted = self._slots_wanted
        slots_R = np.full(self.num_devices, min(wanted, self.num_experts), dtype=np.int64)
        if self.constraints.memory_fraction is None:
            return slots_R
        layer_bytes_R = self.topology.memory_bytes_R * self.constraints.memory_fraction / self.num_layers
        return np.minimum(slots_R, (layer_bytes_R // self.workload.expert_state_bytes).astype(np.int64))

    @property
    def wants_replicas(self) -> bool:
        """Whether experts may have several copies: the constraints say how many slots there are."""
        return self.constraints.slots is not None or self.constraints.asks_for_replicas

    @property
    def plan_slots(self) -> int | None:
        """Slots that a plan is written with; None for as many as it fills. A rank keeps memory for those alone that it fills."""
        if self.constraints.slots is not None and self.constraints.memory_fraction is None:
            return self.constraints.slots
        return int(self.slots_R.max()) if self.wants_replicas else None

    @property
    def _slots_wanted(self) -> int:
        """Slots per device and layer, before memory has its say."""
        constraints = self.constraints
        fewest = -(-self.num_experts // self.num_devices)
        if constraints.spare_bytes is not None:
            if self.workload.expert_state_bytes == 0:
                raise UsageError(
                    "spare bytes buy slots at the size of an expert's state, and the workload's state_bytes_per_parameter is 0"
                )
            return fewest + int(constraints.spare_bytes // (self.num_layers * self.workload.expert_state_bytes))
        if constraints.spare_slots is not None:
            return fewest + constraints.spare_slots
        return constraints.slots or fewest + -(-(constraints.replicas or 0) // self.num_devices)

    @property
    def loads(self) -> list[NDArray[np.int64]]:
        """int64 [L, E] of each routing that the load cap is about; the problem's own is the first."""
        return [self.affinity.load_LE, *(other.load_LE for other in self.also)]

    @property
    def hop_cost_RR(self) -> NDArray[np.float64]:
        """float64 [R, R]: what a token's step from device r to device s counts under objective hops: 0, 1, or
        `node_weight` between nodes."""
        return np.array([0.0, 1.0, self.node_weight])[self.topology.link_class_RR]

    @property
    def tokens_per_trace_token(self) -> float:
        """Tokens of one micro-batch over all devices for every token of the trace: scales counts of the trace to counts of the block."""
        return self.workload.tokens_per_rank * self.num_devices / self.affinity.num_tokens

    def _check_mode(self) -> None:
        if self.mode not in get_args(Mode):
            raise UsageError(f"mode is {self.mode!r}; choose from {', '.join(get_args(Mode))}")
        if self.mode == "home":
            return
        if self.affinity.top_k != 1:
            raise UsageError(
                f"mode coherent keeps a token with its one expert, and this routing has {self.affinity.top_k} per token; use mode home"
            )
        if self.objective not in ("seconds", "hops"):
            raise UsageError(f"in mode coherent a token is on one device; objective {self.objective} says nothing, choose seconds or hops")

    def _check_room(self) -> None:
        num_slots, fewest = int(self.slots_R.sum()), -(-self.num_experts // self.num_devices)
        if num_slots >= self.num_experts:
            return
        each = f"{self.slots_R.min()} to {self.slots_R.max()}" if self.slots_R.min() < self.slots_R.max() else f"{self.slots_R.min()}"
        where = f"{num_slots} slots on {self.num_devices} devices ({each} each"
        fraction = self.constraints.memory_fraction
        if fraction is not None and self._slots_wanted * self.num_devices >= self.num_experts:
            raise InfeasiblePlan(
                f"{self.num_experts} experts do not fit into {where}, which is what memory fraction {fraction:g} leaves them at "
                f"{self.workload.expert_state_bytes:,.0f} bytes with optimizer state in each of {self.num_layers} layers); give a higher "
                "memory fraction or more devices"
            )
        raise InfeasiblePlan(f"{self.num_experts} experts do not fit into {where}); give {fewest} slots per device or more devices")

    def _check_replicas(self) -> None:
        constraints, state_bytes = self.constraints, self.workload.expert_state_bytes
        if self.mode != "home" or self.objective == "hops":
            raise UsageError(
                f"copies of experts are priced in mode home under objectives seconds, devices and nodes, and this is mode {self.mode}, "
                f"objective {self.objective}; choose one of those, or ask for no copies"
            )
        if constraints.spare_bytes is not None and constraints.spare_bytes < self.num_layers * state_bytes:
            raise InfeasiblePlan(
                f"spare bytes {constraints.spare_bytes:,.0f} hold no copy: a slot in each of {self.num_layers} layers takes "
                f"{self.num_layers * state_bytes:,.0f} bytes with optimizer state; give at least that"
            )
        if constraints.memory_fraction is not None and int(self.slots_R.sum()) <= self.num_experts:
            raise InfeasiblePlan(
                f"memory fraction {constraints.memory_fraction:g} leaves no room for copies: {self.slots_R.min()} to {self.slots_R.max()} "
                f"slots on {self.num_devices} devices hold {self.num_experts} experts and no more, at {state_bytes:,.0f} bytes for each "
                f"in each of {self.num_layers} layers; give a higher fraction, or ask for no copies"
            )

    def _check_pins(self) -> None:
        pinned_LR = np.zeros((self.num_layers, self.num_devices), dtype=np.int64)
        for pin in set(self.constraints.pins):
            for name, value, size in (
                ("layer", pin.layer, self.num_layers),
                ("expert", pin.expert, self.num_experts),
                ("device", pin.device, self.num_devices),
            ):
                if not 0 <= value < size:
                    raise BadData(f"{pin}: {name} {value} does not exist; it is 0..{size - 1}")
            pinned_LR[pin.layer, pin.device] += 1
        if (pinned_LR > self.slots_R).any():
            layer, device = np.argwhere(pinned_LR > self.slots_R)[0]
            raise InfeasiblePlan(
                f"{pinned_LR[layer, device]} experts of layer {layer} are pinned to device {device}, "
                f"which has {self.slots_R[device]} slots; unpin some"
            )
        self._check_pinned_copies()

    def _check_pinned_copies(self) -> None:
        """Experts that are pinned to several devices need copies; how many fit is for the solver to say."""
        for layer, expert in {(pin.layer, pin.expert): None for pin in self.constraints.pins}:
            devices = sorted({pin.device for pin in self.constraints.pins if (pin.layer, pin.expert) == (layer, expert)})
            if len(devices) > 1 and not (self.wants_replicas and self.mode == "home" and self.objective != "hops"):
                raise InfeasiblePlan(
                    f"expert {expert} of layer {layer} is pinned to devices {', '.join(map(str, devices))}, and has one copy; "
                    "pin it to one of them, or give slots for copies, such as --spare-slots 1, under mode home and no objective hops"
                )


@dataclass(frozen=True, eq=False)
class Solution:
    """A solver's answer.

    `cost` is the objective's value under `plan` (seconds of a step, or a mean per token), `bound` a proven lower bound on it, or None.
    `seconds` is how long the search took and `stopped_by` why it ended: "done", "optimal", "seconds", "iterations".
    """

    plan: Plan
    cost: float
    bound: float | None
    seconds: float
    stopped_by: str
