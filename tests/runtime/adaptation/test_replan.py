"""Whether a new plan is worth its move: weighed on predictions alone."""

import dataclasses

import numpy as np
import pytest

from crossdock.placement.costs.cost import Workload
from crossdock.placement.costs.evaluate import evaluate
from crossdock.placement.records.affinity import Affinity
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.topology import Topology
from crossdock.placement.solvers import solve
from crossdock.placement.solvers.problem import Problem, Solution
from crossdock.placement.strategies.strategy import Strategy
from crossdock.runtime.adaptation.calibrate import Calibrated
from crossdock.runtime.adaptation.replan import weigh
from tests.placement.conftest import random_trace

TRACE = random_trace(3, num_tokens=200, num_homes=4)
WORKLOAD = Workload(tokens_per_rank=32, model_width=64, expert_width=512)
SPEEDS = np.array([1.00e11, 1.02e11, 0.97e11, 1.01e11])  # as measured: alike, and never equal
TOPOLOGY = dataclasses.replace(Topology.uniform(1, 4, same_node_bytes_per_s=1e9), flop_per_s_R=SPEEDS)
CURRENT = Plan.contiguous(3, 8, 4)
STRATEGIES = (Strategy("deduplicated", 1),) * 3


@pytest.fixture(scope="module")
def better() -> Solution:
    return solve(Problem(Affinity.from_trace(TRACE), TOPOLOGY, WORKLOAD), "auto", seconds=2.0)


def calibrated() -> Calibrated:
    return Calibrated(TOPOLOGY, WORKLOAD, evaluate(TRACE, CURRENT, TOPOLOGY, WORKLOAD))


def test_a_better_plan_is_taken_once_there_are_steps_enough(better: Solution) -> None:
    plenty = weigh(better, CURRENT, TRACE, calibrated(), STRATEGIES, 100_000)
    assert plenty.is_accepted
    assert plenty.payback_steps is not None
    assert plenty.payback_steps > 1
    saved_s = plenty.step_before_s - plenty.step_after_s
    assert (plenty.payback_steps - 1) * saved_s < plenty.move.seconds <= plenty.payback_steps * saved_s
    enough = weigh(better, CURRENT, TRACE, calibrated(), STRATEGIES, plenty.payback_steps)
    assert enough.is_accepted
    few = weigh(better, CURRENT, TRACE, calibrated(), STRATEGIES, 1)
    assert (few.is_accepted, few.plan) == (False, CURRENT)
    assert few.as_event()["payback_steps"] > few.as_event()["limit_steps"] == 1


def test_moves_are_saved_by_names_of_devices_that_measure_alike(better: Solution) -> None:
    found = weigh(better, CURRENT, TRACE, calibrated(), STRATEGIES, 0)
    assert found.is_accepted
    assert found.move.moves == len(CURRENT.moves_to(found.plan)) < len(CURRENT.moves_to(better.plan))


def test_a_worse_plan_never_pays(better: Solution) -> None:
    back = dataclasses.replace(better, plan=CURRENT)
    found = weigh(back, better.plan, TRACE, calibrated(), STRATEGIES, 10**9)
    assert (found.is_accepted, found.payback_steps) == (False, None)
    assert found.plan is better.plan
