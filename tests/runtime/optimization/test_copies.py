"""Gradients of copies: the ledger counts what the planner predicts, link class by link class, and copies stay equal to the bit."""

import dataclasses

import numpy as np
import pytest
import torch

from crossdock.placement.costs.cost import Workload
from crossdock.placement.costs.replication import gradient_bytes, gradient_bytes_by_class
from crossdock.placement.records.plan import EMPTY, Plan
from crossdock.placement.records.topology import Topology
from crossdock.runtime.data import DataState
from crossdock.runtime.transport.ledger import bytes_by_class
from tests.pool import Pool
from tests.runtime import tiny

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}


def steps_with_copies(rank: int, world_size: int, folder: str, plan: Plan, dtype: str) -> tuple[tuple[int, ...], dict[str, np.ndarray]]:
    """Two steps: bytes that the copies of this rank sent in the second, and the state after it."""
    steps = tiny.stepper(rank, world_size, folder, plan, dtype=DTYPES[dtype])
    state = steps.after(DataState())
    tiny.run_steps(steps, 0, 1)
    done = steps.run(1, state, (), stop_asked=False)
    return bytes_by_class(done.flights, "gradients"), tiny.census(steps.engine)


@pytest.mark.parametrize(
    ("world_size", "expert_parallel", "extra_slots", "dtype"),
    [(2, 2, 3, "fp64"), (2, 2, 2, "fp32"), (4, 4, 3, "fp32"), (4, 4, 6, "bf16"), (4, 2, 2, "fp64"), (4, 4, 0, "fp32")],
)
def test_the_ledger_counts_what_the_planner_predicts(
    ranks: Pool, folder: str, world_size: int, expert_parallel: int, extra_slots: int, dtype: str
) -> None:
    plan = tiny.random_plan(expert_parallel, seed=3, extra_slots=extra_slots)
    results = ranks.run(world_size, steps_with_copies, folder, plan, dtype)
    counted = [sum(counts) for counts in zip(*(sent for sent, _ in results), strict=True)]
    expert = next(values for key, values in results[0][1].items() if key.endswith("outer/weight"))
    workload = Workload(model_width=tiny.MODEL.model_width, expert_width=expert.shape[0], gradient_bytes=8 if dtype == "fp64" else 4)
    topology = dataclasses.replace(Topology.uniform(2, expert_parallel // 2), node_of_R=tuple(rank % 2 for rank in range(expert_parallel)))
    predicted = gradient_bytes_by_class(gradient_bytes(plan, workload), topology)
    assert counted == [number * (world_size // expert_parallel) for number in predicted]
    copies = np.count_nonzero(plan.slots_LRS != EMPTY) - plan.num_layers * plan.num_experts
    assert sum(predicted) == 2 * copies * workload.expert_parameters * workload.gradient_bytes  # 2 (m - 1) gradients for m copies
    assert (copies > 0) == plan.has_replicas == (extra_slots > 1)
    tiny.merged([census for _, census in results])  # raises where copies differ in a bit


def flights_of_a_step(rank: int, world_size: int, folder: str, plan: Plan) -> list[tuple[int, str, str, float]]:
    """The flights of one step by launch: layer, kind, direction and moment."""
    steps = tiny.stepper(rank, world_size, folder, plan, config=tiny.TRAIN.model_copy(update={"accumulate": 2}))
    flights = steps.run(0, DataState(), (), stop_asked=False).flights
    return sorted(((f.layer, f.kind, f.direction, f.launched_s) for f in flights), key=lambda flight: flight[3])


@pytest.mark.parametrize(("world_size", "expert_parallel"), [(2, 2), (4, 2)])
def test_gradients_of_a_layer_set_out_before_the_layers_below_are_done(
    ranks: Pool, folder: str, world_size: int, expert_parallel: int
) -> None:
    """Once a step, not once a micro-batch; where other groups hold the same slots, behind their sums."""
    plan = tiny.random_plan(expert_parallel, seed=3, extra_slots=3)
    for flights in ranks.run(world_size, flights_of_a_step, folder, plan):
        gradients = [number for number, (_, kind, _, _) in enumerate(flights) if kind == "gradients"]
        below = max(number for number, (layer, kind, way, _) in enumerate(flights) if (layer, kind, way) == (0, "tokens", "backward"))
        assert [flights[number][0] for number in gradients] == [1, 0]
        assert (gradients[0] < below) == (world_size == expert_parallel)
