"""The bound for problems too large for a linear program over ports, against that program."""

import numpy as np
import pytest

from crossdock.placement.costs.cost import Workload
from crossdock.placement.records.affinity import Affinity
from crossdock.placement.records.topology import Topology
from crossdock.placement.solvers.certificates import bounds
from crossdock.placement.solvers.problem import Problem
from tests.placement.conftest import random_trace


@pytest.mark.parametrize("nodes", [1, 2, 4])
@pytest.mark.parametrize("dispatch", ["deduplicated", "flat"])
def test_without_a_program_the_bound_is_no_higher_and_near(nodes: int, dispatch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(Affinity.from_trace(random_trace()), Topology.uniform(nodes, 8 // nodes), Workload(dispatch=dispatch))  # type: ignore[arg-type]
    monkeypatch.setattr(bounds, "EXACT", -1.0)
    program_L = bounds.layer_seconds(problem)
    monkeypatch.setattr(bounds, "MOST_ENTRIES", 0)
    mean_L = bounds.layer_seconds(problem)
    assert (mean_L <= program_L * (1 + 1e-9)).all()
    np.testing.assert_allclose(mean_L, program_L, rtol=1e-6)


def test_unequal_links_lower_the_bound_without_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    even = Topology.uniform(1, 4)
    speed_RR = even.bytes_per_s_RR * np.where(np.arange(4) == 2, 3.0, 1.0)
    uneven = Topology(
        name="uneven",
        node_of_R=even.node_of_R,
        flop_per_s_R=even.flop_per_s_R,
        memory_bytes_R=even.memory_bytes_R,
        bytes_per_s_RR=speed_RR,
        latency_s_RR=even.latency_s_RR,
        node_bytes_per_s=None,
    )
    problem = Problem(Affinity.from_trace(random_trace()), uneven, Workload())
    program_L = bounds.layer_seconds(problem)
    monkeypatch.setattr(bounds, "MOST_ENTRIES", 0)
    assert (bounds.layer_seconds(problem) <= program_L * (1 + 1e-9)).all()


def test_where_all_devices_are_alike_no_program_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def program(*arguments: object, **named: object) -> None:
        raise AssertionError("the even spread is the best one, and its value is known")

    monkeypatch.setattr(bounds, "linprog", program)
    problem = Problem(Affinity.from_trace(random_trace()), Topology.uniform(4, 2, shared_by_node=True), Workload())
    assert (bounds.layer_seconds(problem) > 0).all()
