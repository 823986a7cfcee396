"""SGLang's recorder: every mode's dump, made as SGLang makes it, becomes the trace that was recorded."""

import numpy as np
import pytest

from crossdock.errors import BadData
from crossdock.placement.records.recorder import MAX_LOAD_TOKENS, trace_of, trace_of_csv, trace_of_loads
from crossdock.placement.records.trace import NO_EXPERT, Trace
from tests.placement.conftest import random_trace

DENSE = 1  # layers of the model before its first MoE layer
SLOTS = np.array([[0, 1, 2, 3, 4, 5, 6, 7, 3, 5], [7, 6, 5, 4, 3, 2, 1, 0, 7, 2], [0, 2, 4, 6, 1, 3, 5, 7, 0, 0]])


def recorded(trace: Trace, passes: list[int], columns: int = 8, **extra) -> dict:
    """What mode per_token writes: physical slots of all layers of the model, `columns` wide, -1 for none."""
    rng = np.random.default_rng(7)
    logical_LP = np.concatenate([np.tile(np.arange(10) % 8, (DENSE, 1)), SLOTS])
    slot_TLK = np.full((trace.num_tokens, DENSE + trace.num_layers, columns), -1, dtype=np.int32)
    for token, layer, choice in np.ndindex(trace.experts_TLK.shape):
        expert = trace.experts_TLK[token, layer, choice]
        if expert != NO_EXPERT:
            slot_TLK[token, DENSE + layer, choice] = rng.choice(np.flatnonzero(SLOTS[layer] == expert))
    ends = np.cumsum(passes)
    records = [
        {
            "forward_pass_id": number,
            "rank": 0,
            "gatherer_key": "primary",
            "input_ids": list(range(end - size, end)),
            "positions": list(range(size)),
            "extend_seq_lens": [size - size // 2, size // 2],
            "forward_mode": 1,
            "topk_ids_of_layer": slot_TLK[end - size : end].swapaxes(0, 1),
            "misc_objects": [],
        }
        for number, (size, end) in enumerate(zip(passes, ends, strict=True))
    ]
    return {"records": [record | extra for record in records], "last_physical_to_logical_map": logical_LP}


def test_a_per_token_dump_gives_back_every_choice_through_redundant_experts():
    trace = random_trace(num_tokens=40, drop=0.1)
    again = trace_of(recorded(trace, [10, 24, 6]), "dump.pt")
    whole_T = (trace.experts_TLK != NO_EXPERT).any(axis=(1, 2))
    assert np.array_equal(again.experts_TLK, trace.experts_TLK[whole_T])
    assert again.num_experts == 8
    assert np.array_equal(again.token_T, np.arange(40)[whole_T])
    assert np.array_equal(again.sequence_T, np.repeat(np.arange(6), [5, 5, 12, 12, 3, 3])[whole_T])
    assert "dump.pt" in again.source


def test_decoded_tokens_have_no_known_sequence():
    again = trace_of(recorded(random_trace(), [40], extend_seq_lens=None), "dump.pt")
    assert again.sequence_T is None
    assert again.num_tokens == 40


def test_tokens_that_pad_a_batch_are_left_out():
    dump = recorded(random_trace(), [40])
    dump["records"][0]["topk_ids_of_layer"][:, 5:9] = -1
    again = trace_of(dump, "dump.pt")
    assert again.num_tokens == 36
    assert again.token_T.tolist() == [*range(5), *range(9, 40)]


def test_a_stat_dump_keeps_the_loads_and_promises_nothing_else():
    count_SLE = np.zeros((3, 4, 8), dtype=np.int32)
    count_SLE[:, 1:] = np.random.default_rng(0).integers(0, 30, (3, 3, 8))
    count_LE = count_SLE.sum(axis=0)[1:]
    count_SLE[0, 1, 0] += count_LE.sum(axis=1).max() - count_LE[0].sum()  # the first MoE layer is the fullest
    count_LE = count_SLE.sum(axis=0)[1:]
    trace = trace_of({"rank": 0, "logical_count": count_SLE, "average_utilization_rate_over_window": None}, "stat.pt")
    assert trace.top_k == 1
    assert "loads alone" in trace.source
    for layer in range(3):
        chosen_T = trace.experts_TLK[:, layer, 0]
        assert np.bincount(chosen_T[chosen_T != NO_EXPERT], minlength=8).tolist() == count_LE[layer].tolist()


def test_counts_of_passes_go_through_the_map():
    count_LP = np.arange(40).reshape(4, 10) + 1
    count_LP[0] = 0  # dense
    dump = {
        "records": [{"rank": 0, "gatherer_key": "primary", "global_physical_count": count_LP} for _ in range(2)],
        "last_physical_to_logical_map": np.concatenate([np.tile(np.arange(10) % 8, (1, 1)), SLOTS]),
    }
    trace = trace_of(dump, "per_pass.pt")
    for layer in range(3):
        chosen_T = trace.experts_TLK[:, layer, 0]
        expected_E = [2 * count_LP[layer + 1][SLOTS[layer] == expert].sum() for expert in range(8)]
        assert np.bincount(chosen_T[chosen_T != NO_EXPERT], minlength=8).tolist() == expected_E


def test_counts_beyond_any_trace_are_scaled_to_within_one_token():
    count_LE = np.array([[10**9, 3 * 10**9, 0, 6 * 10**9 + 1]])
    trace = trace_of_loads(count_LE, "much")
    assert trace.num_tokens == MAX_LOAD_TOKENS
    load_E = np.bincount(trace.experts_TLK[:, 0, 0], minlength=4)
    assert np.abs(load_E - count_LE[0] * (MAX_LOAD_TOKENS / count_LE.sum())).max() <= 1.0


def test_layers_of_loads_are_as_good_as_independent():
    trace = trace_of_loads(np.full((2, 4), 5000), "even")
    pairs_EE = np.zeros((4, 4))
    np.add.at(pairs_EE, tuple(trace.experts_TLK[:, :, 0].T.astype(int)), 1)
    assert np.abs(pairs_EE / 20000 - 1 / 16).max() < 0.01


def test_the_csv_of_early_versions():
    text = "layer_id,expert_id,count\n3,0,2\n3,2,1\n4,1,3\n"
    trace = trace_of_csv(text, "old.csv", 4)
    assert (trace.num_tokens, trace.num_layers, trace.num_experts) == (3, 2, 4)
    assert sorted(trace.experts_TLK[:, 0, 0].tolist()) == [0, 0, 2]
    assert trace.experts_TLK[:, 1, 0].tolist() == [1, 1, 1]
    for damaged, message in (
        ("", "absent"),
        ("a,b\n", "first line is 'a,b'"),
        ("layer_id,expert_id,count\n1,2\n", "line 2"),
        ("layer_id,expert_id,count\n1,x,2\n", "line 2"),
        ("layer_id,expert_id,count\n", "0 lines"),
        ("layer_id,expert_id,count\n1,70000,2\n", "below 65535"),
    ):
        with pytest.raises(BadData, match=message):
            trace_of_csv(damaged, "old.csv")


def _without(key: str) -> dict:
    dump = recorded(random_trace(), [40])
    del dump["records"][0][key]
    return dump


@pytest.mark.parametrize(
    ("dump", "message"),
    [
        ([], "a list is no dump"),
        ({}, "no keys"),
        ({"physical_to_logical_map": [[0]]}, "crossdock plan import"),
        ({"records": []}, "records is empty"),
        ({"records": [{}]}, "last_physical_to_logical_map has shape"),
        ({"logical_count": [1, 2]}, "2 or 3 dimensions"),
        ({"logical_count": [[0, 0]]}, "no expert was chosen"),
        ({"logical_count": [[-1, 2]]}, "layer 0, expert 0 was chosen -1 times"),
        (_without("topk_ids_of_layer"), "global_physical_count of record 0"),
        (recorded(random_trace(), [40]) | {"last_physical_to_logical_map": SLOTS}, "has 4 layers, and last_physical_to_logical_map 3"),
        (recorded(random_trace(), [40], input_ids=[1, 2]), "for 2 tokens, and 40 chose"),
        (recorded(random_trace(), [40], extend_seq_lens=[7]), "from 7 to 7, and 40 tokens chose"),
        (recorded(random_trace(), [40], extend_seq_lens=[-3, 43]), "from -3 to 43, and 40"),
        (recorded(random_trace(), [40], topk_ids_of_layer=np.full((4, 40, 2), 10)), "disable-shared-experts-fusion"),
        (recorded(random_trace(), [40], topk_ids_of_layer=np.full((4, 40, 2), -1)), "no token chose"),
        (recorded(random_trace(), [40], topk_ids_of_layer=np.full((4, 40, 2), 0.5)), "type float64"),
    ],
)
def test_what_is_no_dump_is_refused(dump, message):
    with pytest.raises(BadData, match=message):
        trace_of(dump, "dump.pt")


def test_small_files_do_not_take_large_memory() -> None:
    """Each of these would have taken tens of gigabytes."""
    far = "layer_id,expert_id,count\n" + "".join(f"{layer},{65_000},1\n" for layer in range(5_000))
    with pytest.raises(BadData, match="5000 layers of experts up to 65000 are 325005000 counts, and at most 4194304"):
        trace_of_csv(far, "x.csv")
    with pytest.raises(BadData, match=r"from 40 to 4611686018427387904, and 40 tokens chose"):
        trace_of(recorded(random_trace(), [40], extend_seq_lens=[40, 1 << 62]), "dump.pt")
    records = [{"global_physical_count": np.ones((9_000, 1), dtype=np.int64)}]
    dump = {"records": records, "last_physical_to_logical_map": np.full((9_000, 1), 60_000)}
    with pytest.raises(BadData, match="9000 layers of experts up to 60000"):
        trace_of(dump, "dump.pt")
    wide = trace_of({"logical_count": np.full((50_000, 1), 1_000_000)}, "dump.pt")
    assert wide.num_tokens * wide.num_layers <= 1 << 27
    with pytest.raises(BadData, match="counts of 70000 experts"):
        trace_of({"logical_count": np.ones((1, 70_000), dtype=np.int64)}, "dump.pt")


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("layer_id,expert_id,count\n0,70000,1\n", "line 2 counts expert 70000 of layer 0"),
        ("layer_id,expert_id,count\n0,1,999999999999999\n", "was chosen 999999999999999 times"),
        ("layer_id,expert_id,count\n0,1,3\r5\n", "line 2"),
        ("layer_id,expert_id,count\n0,1," + "9" * 200_000 + "\n", "line 2"),
        ("layer_id,expert_id,count\n", "0 lines"),
    ],
)
def test_counts_that_are_none(text: str, piece: str) -> None:
    with pytest.raises(BadData, match=piece):
        trace_of_csv(text, "x.csv")


def test_a_csv_is_read_line_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many lines for few experts take the memory of the few."""
    import tracemalloc

    text = "layer_id,expert_id,count\n" + "0,1,2\n1,0,3\n" * 50_000
    tracemalloc.start()
    trace = trace_of_csv(text, "x.csv")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert trace.num_tokens == 100_000
    assert peak_bytes < 6_000_000  # the lists of all lines would take three times that
