"""What control records may hold comes back as it was, and nothing else is read."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossdock.errors import BadConfig, BadData, NonFiniteLoss
from crossdock.placement.records.plan import Plan
from crossdock.runtime.adaptation.windows import record_of
from crossdock.runtime.checkpoints.manifest import Shard
from crossdock.runtime.transport.carrier import Carrier, CarrierTimes
from crossdock.runtime.transport.ledger import Flight
from crossdock.runtime.transport.records import decoded, encoded

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
KEYS = st.integers() | st.text() | st.tuples(st.integers(), st.text())
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(KEYS, inner) | st.frozensets(st.integers()) | st.sets(st.text())
    ),
    max_leaves=20,
)


@given(VALUES)
def test_values_come_back_with_their_types(value: Any) -> None:
    back = decoded(encoded(value))
    assert back == value
    assert repr(back) == repr(value) or isinstance(value, set | frozenset | dict | list | tuple)


def test_numbers_that_are_none_come_back() -> None:
    assert math.isnan(decoded(encoded(math.nan)))
    assert decoded(encoded([math.inf, -math.inf, -0.0])) == [math.inf, -math.inf, -0.0]


@pytest.mark.parametrize("dtype", ["?", "<u2", "<i8", ">i4", "<f2", "<f8", "<c16"])
def test_arrays_come_back_in_their_order_and_can_be_written(dtype: str) -> None:
    for array in (
        np.arange(24).astype(dtype).reshape(2, 3, 4),
        np.zeros((0, 3), dtype),
        np.asfortranarray(np.arange(6).astype(dtype)[:, None] + 1),
    ):
        turned = array.T if array.ndim > 1 else array
        for sent in (array, turned):
            back = decoded(encoded({"a": sent, "b": b"xyz", "c": sent[..., :1]}))
            assert back["a"].dtype == sent.dtype
            assert np.array_equal(back["a"], sent)
            assert back["a"].strides == np.array(sent, order="K").strides or 0 in sent.shape
            assert np.array_equal(back["c"], sent[..., :1])
            assert back["b"] == b"xyz"
            assert back["a"].flags.writeable
    number = np.float64(0.1)
    assert decoded(encoded(number)) == number
    assert type(decoded(encoded(np.int32(3)))) is np.int32


def test_our_own_classes_come_back() -> None:
    plan = Plan(np.array([[[0, 1], [2, 3]]], dtype=np.int32), 4, method="hand")
    back = decoded(encoded((plan, Path("a/b"), Carrier("torch", "auto", times={"torch": CarrierTimes(1.0, 2.0)}))))
    assert back[0].digest == plan.digest
    assert back[1] == Path("a/b")
    assert back[2].times["torch"].score_s == CarrierTimes(1.0, 2.0).score_s
    shard = Shard(file="a", bytes=3, sha256="x")
    assert decoded(encoded((shard, {"t": shard}))) == (shard, {"t": shard})
    flights = [Flight(0, "dispatch", "forward", "tokens", (1, 2, 3), 0.0, 1.0, 2.0)]
    assert decoded(encoded(record_of(flights))) == record_of(flights)


@pytest.mark.parametrize("error", [BadData("x: wrong"), BadConfig("y"), NonFiniteLoss("z")])
def test_errors_come_back_to_be_raised(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)) as raised:
        raise decoded(encoded(error))
    assert vars(raised.value).items() >= vars(error).items()


@pytest.mark.parametrize("value", [len, int, object(), lambda: 0, OSError("x"), np.array([object()]), np.array(["text"])])
def test_anything_else_is_not_sent(value: Any) -> None:
    with pytest.raises(TypeError, match="no part of a control record"):
        encoded({"a": [value]})


def made(told: Any, arrays: bytes = b"") -> bytes:
    text = json.dumps(told).encode()
    return len(text).to_bytes(8, "little") + text + arrays


@pytest.mark.parametrize(
    "told",
    [
        {"record": ["os:system", {}]},
        {"record": ["crossdock.errors:BadData", {}]},
        {"record": ["crossdock.placement.records.plan:Plan", {"slots_LRS": 1}]},
        {"model": ["crossdock.runtime.checkpoints.manifest:Shard", {"file": "x"}]},
        {"model": ["subprocess:Popen", {}]},
        {"named": ["subprocess:Popen", ["true"]]},
        {"named": ["builtins:eval", ["1"]]},
        {"error": ["builtins:SystemExit", [], {"dict": []}]},
        {"enum": ["builtins:int", 1]},
        {"record": ["crossdock.nowhere:X", {}]},
        {"record": ["not loaded:X", {}]},
        {"array": ["|O", [1], "C"]},
        {"array": ["<f8", [1 << 60], "C"]},
        {"array": ["<f8", [-1], "C"]},
        {"array": ["<f8", [0, 1 << 70], "C"]},
        {"record": ["crossdock.__main__:X", {}]},
        {"bytes": 9},
        {"bytes": -1},
        {"unknown": 1},
        {"dict": [[{"dict": []}, 1]]},
        {},
        {"a": 1, "b": 2},
    ],
)
def test_what_encoded_does_not_make_is_refused(told: Any) -> None:
    with pytest.raises(BadData, match="cannot be read"):
        decoded(made(told, b"12345678"))


@pytest.mark.parametrize(
    "record", [b"", b"123", b"\xff" * 8, b"\x05" + bytes(7) + b"{{{{{", made([[]])[:-1], made("x")[:8] + b"\xff\xff\xff"]
)
def test_damaged_bytes_are_refused(record: bytes) -> None:
    with pytest.raises(BadData, match="cannot be read"):
        decoded(record)


def test_reading_loads_no_foreign_module(tmp_path: Path) -> None:
    """A name in a record must not make a process import what it has not: imports run code."""
    (tmp_path / "trap.py").write_text("import pathlib\npathlib.Path('sprung').touch()\nclass X: pass\n")
    code = (
        "from crossdock.runtime.transport.records import decoded\n"
        "from crossdock.errors import BadData\n"
        'text = b\'{"record": ["trap:X", {}]}\'\n'
        "try:\n    decoded(len(text).to_bytes(8, 'little') + text)\nexcept BadData:\n    print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "refused\n"
    assert not (tmp_path / "sprung").exists()
