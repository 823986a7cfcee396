"""The skewed layer's routing and packing: shares that hold exactly, and the load that no static packing gets below."""

import numpy as np
import pytest

from benchmarks.skew import RANKS, Shape, main, packed
from crossdock.placement.records.plan import Plan
from crossdock.placement.records.topology import Topology
from crossdock.placement.strategies.gather import GatherCost, choose_gathered


@pytest.mark.parametrize("skewed", [False, True])
def test_shares_hold_on_every_rank(skewed: bool) -> None:
    shape = Shape(tokens=1000)
    counts_RE = np.array([np.bincount(shape.chosen(skewed, rank), minlength=shape.num_experts) for rank in range(RANKS)])
    assert (counts_RE.sum(axis=1) == shape.tokens).all()
    assert np.abs(counts_RE - shape.shares(skewed) * shape.tokens).max() <= 1.0
    assert not np.array_equal(shape.chosen(skewed, 0), shape.chosen(skewed, 1))


def test_zipf() -> None:
    share_E = np.sort(Shape().shares(True))[::-1]
    assert share_E.sum() == pytest.approx(1.0)
    assert share_E[0] / share_E[1] == pytest.approx(2**1.2)


def test_packing_leaves_the_hottest_expert_alone() -> None:
    share_E = Shape().shares(True)
    plan = packed(share_E)
    device_E = plan.device_of_LE()[0]
    load_R = np.bincount(device_E, weights=share_E, minlength=RANKS)
    assert load_R.max() == pytest.approx(share_E.max())  # so no packing is better
    assert load_R.max() * RANKS == pytest.approx(1.46, abs=0.01)
    assert (device_E == device_E[share_E.argmax()]).sum() == 1


def test_gathering_evens_the_load() -> None:
    shape = Shape()
    topology = Topology.uniform(2, 2, flop_per_s=6e10, same_node_bytes_per_s=1e9, other_node_bytes_per_s=1.25e8, shared_by_node=True)
    load_RE = np.array([np.bincount(shape.chosen(True, rank), minlength=16) for rank in range(RANKS)])
    choice = choose_gathered(GatherCost(load_RE, Plan.contiguous(1, 16, RANKS), 0, topology, shape.workload, 4))
    assert int(load_RE.sum(axis=0).argmax()) in choice.experts
    assert choice.block_s < 0.75 * choice.block_without_s


def test_what_it_refuses() -> None:
    with pytest.raises(SystemExit):
        main(["--rates", "fast"])
