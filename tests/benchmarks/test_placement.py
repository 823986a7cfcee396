"""The placement benchmark: generated routing is what it says, and a small case runs to whole rows."""

import numpy as np
import pytest

from benchmarks import placement, placement_transfer
from benchmarks.placement_instances import drifting_trace, joined_pairs
from crossdock.placement.records.affinity import Affinity
from crossdock.placement.records.topology import Topology
from crossdock.placement.records.trace import NO_EXPERT, Trace


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


def test_joined_layers_hold_the_choices_of_both() -> None:
    experts_TLK = np.array([[[0, 3], [1, 2], [2, NO_EXPERT], [3, NO_EXPERT], [0, 1]]], dtype=np.uint16)
    joined = joined_pairs(Trace(experts_TLK, 4))
    assert joined.num_experts == 8
    assert joined.experts_TLK.tolist() == [[[0, 3, 5, 6], [2, NO_EXPERT, 7, NO_EXPERT]]]


def test_a_small_case_has_a_row_for_every_method_and_auto_wins() -> None:
    trace = drifting_trace(600, 4, 8, 2, width=6)
    methods = tuple((method, 1.0) for method in ("contiguous", "eplb", "moetuner", "dp", "sweep", "auto"))
    case = placement._generated("8 experts", "hops", trace, Topology.uniform(1, 4), methods, 2.0)
    rows = {row["method"]: row for row in placement.rows_of(case)}
    assert set(rows) == {method for method, _ in methods}
    assert rows["auto"]["objective"] == rows["dp"]["objective"] == min(row["objective"] for row in rows.values())
    assert all(row["gap_moved"] >= 0 and set(placement.COLUMNS) <= set(row) for row in rows.values())
    assert rows["dp"]["gap_cost"] == 0.0


def test_the_transfer_table_has_a_row_for_every_way_that_finds_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    known, other = (drifting_trace(4096, 2, 16, 2, seed=seed, width=6) for seed in (1, 2))
    rows = list(placement_transfer.transfer_rows("one to other", known, other, 0.5))
    refused = capsys.readouterr().out.count("one to other, ")
    assert len(rows) + refused == len(placement_transfer.WAYS) + len(placement_transfer.BOTH) + len(placement_transfer.RE_PLANNED)
    assert all(set(placement_transfer.COLUMNS) >= set(row) - {"load"} for row in rows)
    of_way = {(row["plan"], row["cap"], row["pieces"]): row for row in rows}
    capped = of_way["auto", 1.1, 1]
    assert capped["load"] <= 1.1 + 1e-9 < capped["load_held_out"]
    assert capped["load_held_out"] >= capped["load_mean"] >= 1.0
    assert of_way["eplb, 2 spare slots", None, None]["memory"] == 2.0
    assert 0.0 < of_way["balance, re-planned", None, None]["moves"] <= 1.0
