"""Problems: what is refused before any solver starts, and how many slots each device has."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from crossdock.errors import BadData, CrossdockError, InfeasiblePlan, UsageError
from crossdock.placement.costs.cost import Workload
from crossdock.placement.records.affinity import Affinity
from crossdock.placement.records.topology import Topology
from crossdock.placement.solvers.problem import Constraints, Pin, Problem
from tests.placement.conftest import random_trace

AFFINITY = Affinity.from_trace(random_trace())  # 3 layers, 8 experts, 40 tokens
WORKLOAD = Workload(model_width=10, expert_width=5, expert_matrices=2, state_bytes_per_parameter=1.0)  # an expert takes 100 bytes


def problem(num_devices: int = 3, memory_bytes: float = 1e9, **fields: Any) -> Problem:
    return Problem(AFFINITY, Topology.uniform(1, num_devices, memory_bytes=memory_bytes), WORKLOAD, **fields)


def test_slots_default_to_one_copy_of_each_expert() -> None:
    assert problem().slots_R.tolist() == [3, 3, 3]
    assert problem(constraints=Constraints(slots=4)).slots_R.tolist() == [4, 4, 4]
    assert problem(constraints=Constraints(slots=100)).slots_R.tolist() == [8, 8, 8]  # a device holds an expert once


def test_memory_limits_slots() -> None:
    """2000 bytes x 0.5 / 3 layers hold 3 experts of 100 bytes in each."""
    constraints = Constraints(slots=8, memory_fraction=0.5)
    assert problem(memory_bytes=2000.0, constraints=constraints).slots_R.tolist() == [3, 3, 3]
    topology = dataclasses.replace(Topology.uniform(1, 3), memory_bytes_R=np.array([600.0, 3000.0, 10_000.0]))
    assert Problem(AFFINITY, topology, WORKLOAD, constraints=constraints).slots_R.tolist() == [1, 5, 8]


def test_scale_from_trace_to_block() -> None:
    assert problem().tokens_per_trace_token == WORKLOAD.tokens_per_rank * 3 / 40


REFUSED: dict[str, tuple[dict[str, Any], type[CrossdockError], str]] = {
    "coherent": ({"mode": "coherent"}, UsageError, "per token; use mode home"),
    "other mode": ({"mode": "away"}, UsageError, "mode is 'away'; choose from home, coherent"),
    "other objective": ({"objective": "beauty"}, UsageError, "objective is 'beauty'; choose from seconds, devices, nodes, hops"),
    "too few slots": (
        {"constraints": Constraints(slots=2)},
        InfeasiblePlan,
        "8 experts do not fit into 6 slots on 3 devices .*; give 3 slots",
    ),
    "too little memory": (
        {"memory_bytes": 300.0, "constraints": Constraints(memory_fraction=1.0)},
        InfeasiblePlan,
        r"8 experts do not fit into 3 slots on 3 devices \(1 each, which is what memory fraction 1 leaves .* 100 bytes",
    ),
    "one expert pinned twice": (
        {"constraints": Constraints(pins=(Pin(0, 5, 0), Pin(0, 5, 2), Pin(0, 5, 2)))},
        InfeasiblePlan,
        "expert 5 of layer 0 is pinned to devices 0, 2, and has one copy; .*--spare-slots 1",
    ),
    "pinned layer": ({"constraints": Constraints(pins=(Pin(3, 0, 0),))}, BadData, r"layer 3 does not exist; it is 0\.\.2"),
    "pinned expert": ({"constraints": Constraints(pins=(Pin(0, 8, 0),))}, BadData, r"expert 8 does not exist; it is 0\.\.7"),
    "pinned device": ({"constraints": Constraints(pins=(Pin(0, 0, -1),))}, BadData, "device -1 does not exist"),
    "too many pins": (
        {"constraints": Constraints(pins=tuple(Pin(1, expert, 2) for expert in range(4)))},
        InfeasiblePlan,
        "4 experts of layer 1 are pinned to device 2, which has 3 slots",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    fields, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        problem(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"load_cap": 0.9}, r"load cap is 0\.9"),
        ({"load_cap": float("nan")}, "load cap is nan"),
        ({"slots": 0}, "slots is 0"),
        ({"memory_fraction": 1.5}, r"memory fraction is 1\.5"),
    ],
)
def test_constraints_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Constraints(**fields)
