"""Traces: what they hold, every way to read one, and one clear message for every malformed file."""

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossdock.errors import BadData, MissingInput
from crossdock.placement.records.trace import NO_EXPERT, Trace, concatenate
from tests.placement.conftest import random_trace

EXPERTS = np.array([[[0, 1]], [[2, 3]], [[1, NO_EXPERT]]], dtype=np.uint16)


def full_trace() -> Trace:
    weights_TLK = np.array([[[0.75, 0.25]], [[0.4, 0.6]], [[1.0, 0.0]]], dtype=np.float16)
    return Trace(EXPERTS, 4, weights_TLK, np.array([7, 7, 3]), np.array([0, 1, 0]), np.array([65, 66, 67]), source="by hand")


def test_shape_and_first_choice() -> None:
    trace = full_trace()
    assert (trace.num_tokens, trace.num_layers, trace.top_k, trace.num_experts) == (3, 1, 2, 4)
    assert trace.first_choice_TL.tolist() == [[0], [3], [1]]  # the second token's larger weight stands second
    assert Trace(EXPERTS, 4).first_choice_TL.tolist() == [[0], [2], [1]]
    absent_heavy = Trace(EXPERTS, 4, np.array([[[1, 0]], [[1, 0]], [[-0.5, 0.9]]]))  # the weight of an absent choice says nothing
    assert absent_heavy.first_choice_TL.tolist() == [[0], [2], [1]]


def test_arrays_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="read-only"):
        full_trace().experts_TLK[0, 0, 0] = 1


def test_round_trip_keeps_everything(tmp_path: Path) -> None:
    trace = full_trace()
    trace.save(tmp_path / "trace.npz")
    again = Trace.load(tmp_path / "trace.npz")
    assert again.digest == trace.digest
    assert again.source == "by hand"
    assert again.num_experts_known
    assert again.experts_TLK.dtype == np.uint16
    assert again.weights_TLK is not None
    assert again.weights_TLK.dtype == np.float16
    for name in ("experts_TLK", "weights_TLK", "sequence_T", "home_T", "token_T"):
        np.testing.assert_array_equal(getattr(again, name), getattr(trace, name))


@pytest.mark.parametrize("known", [(), ("home_T",), ("sequence_T", "token_T")])
def test_round_trip_of_what_is_known(tmp_path: Path, known: tuple[str, ...]) -> None:
    trace = Trace(EXPERTS, 4, **{name: np.arange(3) for name in known})
    trace.save(tmp_path / "trace.npz")
    again = Trace.load(tmp_path / "trace.npz")
    assert {name for name in ("weights_TLK", "sequence_T", "home_T", "token_T") if getattr(again, name) is not None} == set(known)
    assert again.digest == trace.digest


def test_digest_tells_traces_apart() -> None:
    trace = full_trace()
    others = [
        Trace(EXPERTS, 5, trace.weights_TLK, trace.sequence_T, trace.home_T, trace.token_T),
        Trace(EXPERTS, 4, trace.weights_TLK, trace.sequence_T, trace.token_T, trace.home_T),
        Trace(EXPERTS[::-1], 4, trace.weights_TLK, trace.sequence_T, trace.home_T, trace.token_T),
        Trace(EXPERTS, 4),
    ]
    assert len({trace.digest, *(other.digest for other in others)}) == 5
    assert Trace(EXPERTS, 4, home_T=np.arange(3)).digest != Trace(EXPERTS, 4, token_T=np.arange(3)).digest
    assert Trace(EXPERTS, 4, source="a").digest == Trace(EXPERTS, 4, source="b").digest


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32, np.int64, np.uint64, ">i4"])
def test_bare_npz_of_any_integer_type(tmp_path: Path, dtype: Any) -> None:
    experts = np.array([[[0, 1]], [[2, 5]]]).astype(dtype)
    np.savez(tmp_path / "bare.npz", experts=experts, something_else=np.zeros(3))
    trace = Trace.load(tmp_path / "bare.npz")
    np.testing.assert_array_equal(trace.experts_TLK, experts)
    assert trace.num_experts == 6  # the largest choice + 1, not rounded
    assert not trace.num_experts_known
    assert trace.source == "bare.npz"
    assert Trace.load(tmp_path / "bare.npz", num_experts=8).num_experts == 8
    assert Trace.load(tmp_path / "bare.npz", num_experts=8).num_experts_known


def test_absent_choices_do_not_count_as_experts(tmp_path: Path) -> None:
    np.savez(tmp_path / "bare.npz", experts=np.array([[[0, 65535]], [[2, 1]]]))
    assert Trace.load(tmp_path / "bare.npz").num_experts == 3


def test_exflow_npy_is_top_1(tmp_path: Path) -> None:
    np.save(tmp_path / "exflow.npy", np.array([[0, 3], [1, 2], [3, 3]]))
    trace = Trace.load(tmp_path / "exflow.npy")
    assert trace.experts_TLK.tolist() == [[[0], [3]], [[1], [2]], [[3], [3]]]


def test_npy_with_choices(tmp_path: Path) -> None:
    np.save(tmp_path / "trace.npy", EXPERTS)
    np.testing.assert_array_equal(Trace.load(tmp_path / "trace.npy").experts_TLK, EXPERTS)


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match=r"nowhere\.npz: no such trace"):
        Trace.load(tmp_path / "nowhere.npz")
    with pytest.raises(MissingInput, match="cannot read"):
        Trace.load(tmp_path)


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def zipped(name: str, data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, data)
    return buffer.getvalue()


def claiming(shape: tuple[int, ...]) -> bytes:
    """An .npy whose header promises `shape` and whose data are those of EXPERTS."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<u2", "fortran_order": False, "shape": shape})
    return buffer.getvalue() + EXPERTS.tobytes()


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


NPZ = npz(experts=EXPERTS, num_experts=4, format_version=1)
MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "neither .npz nor .npy: it is empty"),
    "text": (b"hello, world", "neither .npz nor .npy: it begins with b'hello,'"),
    "pickle": (pickle.dumps({"experts": 1}), "neither .npz nor .npy"),
    "truncated npz": (NPZ[: len(NPZ) // 2], "damaged, truncated"),
    "truncated npz header": (NPZ[:7], "damaged, truncated"),
    "flipped byte": (flipped(NPZ, 200), "damaged, truncated"),
    "header that opens a bracket more": (npy(EXPERTS).replace(b"'shape': (", b"'shape':(("), "damaged, truncated"),
    "truncated npy": (npy(EXPERTS)[:-4], "damaged, truncated"),
    "empty archive": (npz(), "no array named experts among none"),
    "no experts": (npz(routing=EXPERTS), "no array named experts among routing"),
    "object array": (npz(experts=np.array([[[0, None]]], dtype=object)), "holding pickled objects"),
    "object npy": (npy(np.array([[0, None]], dtype=object)), "holding pickled objects"),
    "member that is no array": (zipped("experts", b"not numpy"), "the member experts is no numpy array, or damaged"),
    "more claimed than there is": (zipped("experts.npy", claiming((4, 1, 2))), "damaged, truncated"),
    "absurdly much claimed": (zipped("experts.npy", claiming((10**15, 1, 2))), "damaged, truncated"),
    "rank 1": (npz(experts=np.arange(4)), r"shape \(4,\)"),
    "rank 4": (npz(experts=np.zeros((2, 2, 2, 2), int)), r"shape \(2, 2, 2, 2\)"),
    "zero tokens": (npz(experts=np.zeros((0, 2, 2), int)), "none of them 0"),
    "zero layers": (npz(experts=np.zeros((2, 0, 2), int)), "none of them 0"),
    "zero choices": (npz(experts=np.zeros((2, 2, 0), int)), "none of them 0"),
    "float experts": (npz(experts=np.zeros((2, 2, 1))), "type float64; give integers"),
    "text experts": (npz(experts=np.array([[["a"]]])), "give integers"),
    "negative": (npz(experts=np.array([[[0, 1]], [[2, -3]]])), "token 1, layer 0, choice 1 is expert -3"),
    "beyond 16 bits": (npz(experts=np.array([[[0, 70000]]])), "token 0, layer 0, choice 1 is expert 70000"),
    "nothing chosen": (npz(experts=np.full((2, 2, 1), NO_EXPERT)), "state num_experts"),
    "out of range": (npz(experts=EXPERTS, num_experts=3), "token 1, layer 0, choice 1 is expert 3; with 3 experts it must be 0..2"),
    "no experts stated": (npz(experts=EXPERTS, num_experts=0), "num_experts is 0; give 1 to 65535"),
    "too many stated": (npz(experts=EXPERTS, num_experts=1 << 40), "num_experts is 1099511627776"),
    "num_experts of the wrong type": (npz(experts=EXPERTS, num_experts=4.0), "num_experts has shape .* float64; give one integer"),
    "num_experts of the wrong shape": (npz(experts=EXPERTS, num_experts=[4, 4]), "give one integer"),
    "twice": (npz(experts=np.array([[[0, 1, 2]], [[3, 1, 3]]])), r"token 1, layer 0 names expert 3 twice \(choices 0 and 2\)"),
    "weights of another shape": (npz(experts=EXPERTS, weights=np.ones((3, 2))), r"weights have shape \(3, 2\) and experts \(3, 1, 2\)"),
    "NaN weight": (npz(experts=EXPERTS, weights=np.where(EXPERTS == 3, np.nan, 1)), "weight of token 1, layer 0, choice 1 is nan"),
    "weight beyond float16": (npz(experts=EXPERTS, weights=np.full((3, 1, 2), 1e6)), "choice 0 is inf in float16"),
    "weights of text": (npz(experts=EXPERTS, weights=np.full((3, 1, 2), "x")), "give floating-point numbers"),
    "sequence too short": (npz(experts=EXPERTS, sequence=[0, 1]), r"sequence has shape \(2,\), and there are 3 tokens"),
    "home too long": (npz(experts=EXPERTS, home=[0] * 4), r"home has shape \(4,\), and there are 3 tokens"),
    "token of rank 2": (npz(experts=EXPERTS, token=[[0, 1, 2]]), r"token has shape \(1, 3\)"),
    "home of floats": (npz(experts=EXPERTS, home=[0.0, 1.0, 0.0]), "home is of type float64; give integers"),
    "negative home": (npz(experts=EXPERTS, home=[0, 1, -1]), "home of token 2 is -1"),
    "token beyond 32 bits": (npz(experts=EXPERTS, token=[0, 1 << 40, 1]), "token of token 1 is 1099511627776"),
    "newer format": (npz(experts=EXPERTS, format_version=2), "format_version is 2, and this release reads 1"),
    "misspelt array": (npz(experts=EXPERTS, format_version=1, weight=EXPERTS), "unknown array 'weight' .did you mean 'weights'"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_file(tmp_path: Path, name: str) -> None:
    data, message = MALFORMED[name]
    path = tmp_path / "trace.npz"
    path.write_bytes(data)
    with pytest.raises(BadData, match=message) as caught:
        Trace.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_override_smaller_than_the_largest_expert(tmp_path: Path) -> None:
    full_trace().save(tmp_path / "trace.npz")
    with pytest.raises(BadData, match="state the right number of experts"):
        Trace.load(tmp_path / "trace.npz", num_experts=2)


def test_pickles_are_never_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return (tmp_path / "sprung").touch, ()

    (tmp_path / "trap.npz").write_bytes(npz(experts=np.array([Trap()], dtype=object)))
    (tmp_path / "bare.npz").write_bytes(pickle.dumps(Trap()))
    for name in ("trap.npz", "bare.npz"):
        with pytest.raises(BadData):
            Trace.load(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def test_errors_far_into_a_long_trace_name_their_position() -> None:
    experts_TLK = np.tile(np.array([[[0, 1], [2, 3]]], dtype=np.uint16), (200_000, 1, 1))
    experts_TLK[150_001, 1, 1] = 2
    with pytest.raises(BadData, match="token 150001, layer 1 names expert 2 twice"):
        Trace(experts_TLK, 4)


def test_select() -> None:
    trace = full_trace()
    mask = np.array([True, False, True])
    assert trace.select(mask).digest == trace.select([0, 2]).digest == trace.select(slice(0, 3, 2)).digest
    part = trace.select(mask)
    assert part.sequence_T is not None
    assert part.sequence_T.tolist() == [7, 3]
    assert part.num_experts == 4
    with pytest.raises(BadData, match="none of them 0"):
        trace.select(slice(0, 0))


def test_concatenate_keeps_sequences_apart_and_pads() -> None:
    narrow = Trace(np.array([[[3]], [[0]]]), 4, sequence_T=np.array([0, 2]), home_T=np.array([1, 1]))
    both = concatenate([full_trace(), narrow])
    assert both.experts_TLK[:, 0].tolist() == [[0, 1], [2, 3], [1, NO_EXPERT], [3, NO_EXPERT], [0, NO_EXPERT]]
    assert both.sequence_T is not None
    assert both.sequence_T.tolist() == [7, 7, 3, 8, 10]
    assert both.home_T is not None
    assert both.home_T.tolist() == [0, 1, 0, 1, 1]
    assert both.weights_TLK is None  # one of them does not know
    assert both.token_T is None


def test_concatenate_refuses_other_models() -> None:
    with pytest.raises(BadData, match=r"\(1, 4\), \(1, 5\)"):
        concatenate([full_trace(), Trace(EXPERTS, 5)])
    with pytest.raises(BadData, match="at least one"):
        concatenate([])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 39))
def test_concatenating_the_parts_gives_the_whole(seed: int, cut: int) -> None:
    trace = random_trace(seed, num_homes=4, drop=0.1)
    assert concatenate([trace.select(slice(0, cut)), trace.select(slice(cut, None))]).digest == trace.digest


def test_real_trace(real_trace: Trace, tmp_path: Path) -> None:
    real_trace.save(tmp_path / "again.npz")
    assert Trace.load(tmp_path / "again.npz").digest == real_trace.digest
