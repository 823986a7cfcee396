"""The cost model: examples worked by hand, and what must hold for any counts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossdock.errors import BadConfig, MissingInput
from crossdock.placement.costs.cost import Window, Workload, block_cost, makespan, step_seconds, transfer_seconds
from crossdock.placement.records.topology import Topology

# Bytes per second and latencies in powers of ten, so that seconds can be read off.
FOUR = Topology.uniform(
    2,
    2,
    flop_per_s=1e6,
    same_node_bytes_per_s=1000.0,
    same_node_latency_s=0.001,
    other_node_bytes_per_s=100.0,
    other_node_latency_s=0.01,
)
SMALL = Workload(tokens_per_rank=4, model_width=10, expert_width=5, wire="bf16", expert_matrices=2)


def test_makespan_of_the_three_regimes() -> None:
    assert makespan(1, 3, 5, 2, 4) == 3 + 5 + 4  # both transfers exposed
    assert makespan(4, 3, 5, 6, 4) == 4 + 5 + 6  # both hidden
    assert makespan(0, 3, 5, 0, 4) == 3 + 5 + 4  # an ordinary block
    np.testing.assert_array_equal(makespan([1, 4], 3, 5, [2, 6], 4), [12, 15])


def test_transfer_takes_the_busiest_port() -> None:
    sent_RR = np.array(
        [
            [999, 30, 20, 10],
            [0, 0, 5, 0],
            [0, 15, 0, 0],
            [0, 50, 0, 0],
        ]
    )
    # other node: device 0 sends 20 + 10, device 1 receives 15 + 50: 65 / 100 + 0.01. Same node: 30 / 1000 + 0.001.
    # The diagonal costs nothing.
    assert transfer_seconds(sent_RR, FOUR) == pytest.approx(0.66)
    # without the traffic between nodes its latency stays: every rank takes part in the collective
    assert transfer_seconds(sent_RR * (FOUR.link_class_RR < 2), FOUR) == pytest.approx(0.031)
    assert transfer_seconds(np.zeros((4, 4)), FOUR) == pytest.approx(0.01)


def test_card_shared_by_a_node_adds_up_its_devices() -> None:
    shared = replace(FOUR, node_bytes_per_s=100.0)
    sent_RR = np.zeros((4, 4))
    sent_RR[0, 2] = sent_RR[1, 3] = 30.0
    assert transfer_seconds(sent_RR, FOUR) == pytest.approx(0.31)
    assert transfer_seconds(sent_RR, shared) == pytest.approx(0.61)
    assert transfer_seconds(sent_RR.T, shared) == pytest.approx(0.61)
    sent_RR[3, 1] = 30.0  # the other way: the card is full duplex
    sent_RR[0, 1] = 100.0  # inside the node: not on the card
    assert transfer_seconds(sent_RR, shared) == pytest.approx(0.61)


def test_shared_card_of_three_nodes_sends_and_receives() -> None:
    """One node sends to two, or two send to one: either way one card carries both."""
    shared = Topology.uniform(3, 2, other_node_bytes_per_s=100.0, other_node_latency_s=0.0, same_node_latency_s=0.0, shared_by_node=True)
    sent_RR = np.zeros((6, 6))
    sent_RR[0, 2] = sent_RR[1, 4] = 30.0
    assert transfer_seconds(sent_RR, shared) == pytest.approx(0.6)
    assert transfer_seconds(sent_RR.T, shared) == pytest.approx(0.6)


def test_one_device_sends_nothing() -> None:
    assert transfer_seconds([[1e9]], Topology.uniform(1, 1)) == 0.0


def test_slow_links_of_a_matrix_count_one_by_one() -> None:
    speed_RR = np.array([[np.inf, 100.0, 10.0], [100.0, np.inf, 100.0], [10.0, 100.0, np.inf]])
    topology = Topology("matrix", (0, 0, 0), np.ones(3), np.ones(3), speed_RR, np.zeros((3, 3)))
    sent_RR = np.array([[0, 50, 20], [0, 0, 0], [0, 0, 0]])
    assert transfer_seconds(sent_RR, topology) == pytest.approx(50 / 100 + 20 / 10)


def test_block_by_hand() -> None:
    copies_RR = np.zeros((4, 4))
    copies_RR[0, 2] = 2  # 2 copies x 10 x 2 bytes = 40 bytes to another node: 0.4 + 0.01 s each way
    rows_R = [1, 3, 5, 0]  # 5 rows x 2 x (2 x 10 x 5) flop at 1e6 flop/s: 0.001 s
    block = block_cost(copies_RR, rows_R, FOUR, SMALL)
    assert block.dispatch_s == pytest.approx(0.41)
    assert block.combine_s == pytest.approx(0.41)
    assert block.expert_s == pytest.approx(0.001)
    assert block.forward_s == pytest.approx(0.41 + 0.001 + 0.41)
    assert block.backward_s == pytest.approx(0.41 + 0.002 + 0.41)
    assert block.exposed_s == pytest.approx(4 * 0.41)
    assert block.total_s == pytest.approx(block.forward_s + block.backward_s)


def test_each_window_hides_its_own_transfer() -> None:
    """Asymmetric links tell the directions apart: home to expert takes 1 s, expert to home 4 s."""
    speed_RR = np.array([[np.inf, 40.0], [10.0, np.inf]])
    topology = Topology("asymmetric", (0, 1), np.full(2, 1e3), np.ones(2), speed_RR, np.zeros((2, 2)))
    copies_RR = np.array([[0, 2], [0, 0]])

    def cost(**window: float) -> Any:
        return block_cost(copies_RR, [0, 1], topology, replace(SMALL, window=Window(**window)))

    bare = cost()
    assert (bare.dispatch_s, bare.combine_s, bare.expert_s) == (1.0, 4.0, pytest.approx(0.2))
    assert (bare.forward_s, bare.backward_s, bare.exposed_s) == (pytest.approx(5.2), pytest.approx(5.4), pytest.approx(10.0))
    dispatch = cost(dispatch_forward_s=3.0)
    assert (dispatch.forward_s, dispatch.backward_s, dispatch.exposed_s) == (pytest.approx(7.2), pytest.approx(5.4), pytest.approx(9.0))
    combine = cost(combine_forward_s=3.0)
    assert (combine.forward_s, combine.backward_s, combine.exposed_s) == (pytest.approx(5.2), pytest.approx(5.4), pytest.approx(7.0))
    gradient_of_combine = cost(combine_backward_s=3.0)  # travels from home to expert: 1 s
    assert (gradient_of_combine.backward_s, gradient_of_combine.exposed_s) == (pytest.approx(7.4), pytest.approx(9.0))
    gradient_of_dispatch = cost(dispatch_backward_s=3.0)  # travels from expert to home: 4 s
    assert (gradient_of_dispatch.backward_s, gradient_of_dispatch.exposed_s) == (pytest.approx(5.4), pytest.approx(7.0))


def test_below_the_window_locality_is_worth_nothing() -> None:
    hidden = replace(SMALL, window=Window(1.0, 1.0, 1.0, 1.0))
    far, near = np.zeros((4, 4)), np.zeros((4, 4))
    far[0, 2] = near[0, 1] = 3
    rows_R = [1, 2, 3, 4]
    assert block_cost(far, rows_R, FOUR, SMALL).total_s > block_cost(near, rows_R, FOUR, SMALL).total_s
    assert block_cost(far, rows_R, FOUR, hidden).total_s == block_cost(near, rows_R, FOUR, hidden).total_s
    assert block_cost(far, [1, 2, 3, 5], FOUR, hidden).total_s > block_cost(far, rows_R, FOUR, hidden).total_s
    assert block_cost(far, rows_R, FOUR, hidden).exposed_s == 0.0


def test_turns_with_windows_of_their_own_are_averaged_after_the_maximum() -> None:
    copies = np.zeros((4, 4))
    copies[0, 2] = 3
    rows_R = [1, 2, 3, 4]
    bare, hidden = (replace(SMALL, window=Window(*(seconds,) * 4)) for seconds in (0.0, 1.0))
    both = replace(SMALL, window=Window(0.5, 0.5, 0.5, 0.5), turn_windows=(bare.window, hidden.window))
    costs = [block_cost(copies, rows_R, FOUR, workload) for workload in (bare, hidden, both)]
    for name in ("forward_s", "backward_s", "exposed_s"):
        first, second, mean = (float(getattr(cost, name)) for cost in costs)
        assert mean == pytest.approx((first + second) / 2)
    assert costs[2].exposed_s > block_cost(copies, rows_R, FOUR, replace(both, turn_windows=())).exposed_s


def test_slowest_device_counts_not_the_busiest() -> None:
    uneven = replace(FOUR, flop_per_s_R=np.array([1e6, 1e6, 1e6, 2e5]))
    assert block_cost(np.zeros((4, 4)), [9, 9, 9, 2], uneven, SMALL).expert_s == pytest.approx(2 * SMALL.row_flop / 2e5)


def test_step_by_hand() -> None:
    workload = replace(SMALL, other_s=7.0, micro_batches=3, expert_overhead_s=0.5)
    copies_LRR, rows_LR = np.zeros((2, 4, 4)), np.zeros((2, 4))
    copies_LRR[1, 0, 2] = 2
    rows_LR[1, 2] = 5
    quiet, busy = 4 * 0.01 + 2 * 0.5, 4 * 0.41 + 0.001 + 0.002 + 2 * 0.5
    assert step_seconds(block_cost(copies_LRR, rows_LR, FOUR, workload), workload) == pytest.approx(3 * (quiet + busy) + 7.0)


counts = st.integers(0, 2**32 - 1)


@settings(max_examples=30, deadline=None)
@given(counts, st.booleans())
def test_layers_at_once_equal_layers_one_by_one(seed: int, shared: bool) -> None:
    rng = np.random.default_rng(seed)
    topology = replace(FOUR, node_bytes_per_s=100.0 if shared else None)
    copies_LRR, rows_LR = rng.integers(0, 9, (3, 4, 4)), rng.integers(0, 9, (3, 4))
    together = block_cost(copies_LRR, rows_LR, topology, SMALL)
    for layer in range(3):
        alone = block_cost(copies_LRR[layer], rows_LR[layer], topology, SMALL)
        for name in ("dispatch_s", "combine_s", "expert_s", "forward_s", "backward_s", "exposed_s"):
            assert getattr(together, name)[layer] == pytest.approx(getattr(alone, name))


@settings(max_examples=30, deadline=None)
@given(counts, st.booleans())
def test_more_bytes_never_take_less_time(seed: int, shared: bool) -> None:
    rng = np.random.default_rng(seed)
    topology = replace(FOUR, node_bytes_per_s=50.0 if shared else None)
    sent_RR, more_RR = rng.random((4, 4)) * 100, rng.random((4, 4)) * 10
    assert transfer_seconds(sent_RR + more_RR, topology) >= transfer_seconds(sent_RR, topology)


@settings(max_examples=30, deadline=None)
@given(counts, st.booleans())
def test_relabelling_equal_devices_changes_no_time(seed: int, shared: bool) -> None:
    rng = np.random.default_rng(seed)
    topology = replace(FOUR, node_bytes_per_s=50.0 if shared else None)
    sent_RR = rng.random((4, 4)) * 100
    order = [1, 0, 3, 2] if rng.random() < 0.5 else [3, 2, 1, 0]  # inside the nodes, or the nodes themselves
    assert transfer_seconds(sent_RR[np.ix_(order, order)], topology) == pytest.approx(float(transfer_seconds(sent_RR, topology)))


def test_workload_derives_sizes() -> None:
    assert SMALL.copy_bytes == 20
    assert SMALL.expert_parameters == 100
    assert SMALL.row_flop == 200
    assert SMALL.expert_state_bytes == 1800


def test_workload_files(tmp_path: Path) -> None:
    (tmp_path / "workload.yaml").write_text("model_width: 512\ndispatch: flat\nother_s: 1e-3\nwindow: {combine_forward_s: 2e-4}\n")
    workload = Workload.load(tmp_path / "workload.yaml")
    assert workload == replace(Workload(), model_width=512, dispatch="flat", other_s=1e-3, window=Window(combine_forward_s=2e-4))
    (tmp_path / "workload.json").write_text(json.dumps(workload.to_mapping()))
    assert Workload.load(tmp_path / "workload.json") == workload
    assert Workload.from_mapping(workload.to_mapping()) == workload
    turns = replace(workload, turn_windows=(Window(1e-3), Window()))
    (tmp_path / "turns.json").write_text(json.dumps(turns.to_mapping()))
    assert Workload.load(tmp_path / "turns.json") == turns
    assert Workload.from_mapping({}) == Workload()
    with pytest.raises(MissingInput):
        Workload.load(tmp_path / "nowhere.yaml")


MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"model_widht": 3}, "model_width"),
    "unknown window": ({"window": {"dispatch_s": 1.0}}, "dispatch_"),
    "text": ({"model_width": "wide"}, "model_width"),
    "half an element": ({"model_width": 1.5}, "model_width"),
    "zero": ({"tokens_per_rank": 0}, "tokens_per_rank"),
    "negative seconds": ({"other_s": -1.0}, "other_s"),
    "other dispatch": ({"dispatch": "two hops"}, "dispatch"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_workload(name: str) -> None:
    mapping, message = MALFORMED[name]
    with pytest.raises(BadConfig, match=message) as caught:
        Workload.from_mapping(mapping, "work.yaml")
    assert str(caught.value).startswith("work.yaml")


def test_values_built_in_code_are_checked_too() -> None:
    with pytest.raises(BadConfig, match=r"model_width is 2\.0; give an integer"):
        Workload(model_width=2.0)  # type: ignore[arg-type]
    with pytest.raises(BadConfig, match="wire is 'fp4'; choose from fp64, fp32, bf16, int8"):
        Workload(wire="fp4")  # type: ignore[arg-type]
    with pytest.raises(BadConfig, match=r"window\.dispatch_forward_s is nan"):
        Window(dispatch_forward_s=float("nan"))
    with pytest.raises(BadConfig, match="choose from deduplicated, flat, hierarchical"):
        Workload(dispatch="both")  # type: ignore[arg-type]


def test_answers_of_unequal_ways_are_priced_apart() -> None:
    even = Topology.uniform(2, 2)
    assert even.is_symmetric
    speed_RR = even.bytes_per_s_RR.copy()
    speed_RR[0, 3] /= 4.0
    uneven = replace(even, bytes_per_s_RR=speed_RR)
    assert not uneven.is_symmetric
    sent_RR = np.random.default_rng(0).integers(0, 50, (4, 4)).astype(float)
    there, back = block_cost(sent_RR, np.zeros(4), uneven, Workload()), block_cost(sent_RR.T, np.zeros(4), uneven, Workload())
    assert there.combine_s == pytest.approx(float(back.dispatch_s))
    assert there.combine_s != there.dispatch_s
    same = block_cost(sent_RR, np.zeros(4), even, Workload())
    assert same.combine_s == pytest.approx(float(block_cost(sent_RR.T, np.zeros(4), even, Workload()).dispatch_s))
