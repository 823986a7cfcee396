"""The placement benchmark: generated routing is what it says, and a small case runs to whole rows."""

import numpy as np

from benchmarks import placement
from benchmarks.placement_instances import drifting_trace
from crossdock.placement.records.affinity import Affinity
from crossdock.placement.records.topology import Topology


def test_generated_routing_is_repeatable_even_and_follows_the_layer_before() -> None:
    trace, again = (drifting_trace(4000, 3, 16, 2, seed=1, width=6) for _ in range(2))
    assert trace.digest == again.digest
    load_LE = Affinity.from_trace(trace).load_LE
    assert (load_LE.max(axis=1) / load_LE.mean(axis=1)).max() < 2.0
    flow_EE = Affinity.from_trace(trace).transitions_LEE[0].astype(float)
    share_EE = flow_EE / flow_EE.sum()
    alone_EE = share_EE.sum(axis=1, keepdims=True) * share_EE.sum(axis=0, keepdims=True)
    information = float((share_EE * np.log(np.maximum(share_EE, 1e-300) / alone_EE)).sum())
    assert 0.3 < information < 2.5
    forgetful = Affinity.from_trace(drifting_trace(4000, 3, 16, 2, seed=1, width=6, memory=0.0)).transitions_LEE[0]
    assert np.abs(forgetful / forgetful.sum() - alone_EE).sum() < np.abs(share_EE - alone_EE).sum()


def test_a_small_case_has_a_row_for_every_method_and_auto_wins() -> None:
    trace = drifting_trace(600, 4, 8, 2, width=6)
    methods = tuple((method, 1.0) for method in ("contiguous", "eplb", "moetuner", "dp", "sweep", "auto"))
    case = placement._generated("8 experts", "hops", trace, Topology.uniform(1, 4), methods, 2.0)
    rows = {row["method"]: row for row in placement.rows_of(case)}
    assert set(rows) == {method for method, _ in methods}
    assert rows["auto"]["objective"] == rows["dp"]["objective"] == min(row["objective"] for row in rows.values())
    assert all(row["gap_moved"] >= 0 and set(placement.COLUMNS) <= set(row) for row in rows.values())
    assert rows["dp"]["gap_cost"] == 0.0
