"""Files of bounded size, JSON without surprises, names that stay in their folder, and messages that fit a terminal."""

import pickle
from pathlib import Path

import pytest

from crossdock.bounded import MAX_DEPTH, is_plain_name, json_value, read_bytes
from crossdock.errors import MAX_MESSAGE, BadCheckpoint, BadData, MissingInput


def test_a_file_larger_than_allowed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 10)
    assert read_bytes(path, 10, "a plan") == b"x" * 10
    with pytest.raises(BadCheckpoint, match="larger than 9 bytes, the most that is read as a plan"):
        read_bytes(path, 9, "a plan", BadCheckpoint)


@pytest.mark.parametrize(("name", "piece"), [("absent", "does not exist"), (".", "is a directory"), ("a\0b", "a plan")])
def test_no_readable_file(tmp_path: Path, name: str, piece: str) -> None:
    with pytest.raises(MissingInput, match=piece):
        read_bytes(tmp_path / name, 10, "a plan")


def test_a_device_is_no_file() -> None:
    with pytest.raises(MissingInput, match="not a regular file"):
        read_bytes(Path("/dev/zero"), 10, "a plan")


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        (b'{"a": 1, "a": 2}', "'a' stands twice"),
        (b"[NaN]", "NaN is no number"),
        (b"[-Infinity]", "-Infinity is no number"),
        (b"[1", "not JSON"),
        (b"\xff", "byte 0 is not UTF-8"),
        (b"[" * 100_000, "nested deeper than 64 levels"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "nested deeper than 64 levels"),
        (b"1" * 5000, "not JSON"),
    ],
)
def test_json_that_is_refused(text: bytes, piece: str) -> None:
    with pytest.raises(BadData, match=f"^x.json: .*{piece}"):
        json_value(text, "x.json")


def test_json_that_is_read() -> None:
    deepest = b"[" * (MAX_DEPTH - 1) + b"1" + b"]" * (MAX_DEPTH - 1)
    assert json_value(deepest, "x") is not None
    assert json_value(b'{"a": [1, 2.5, null, true]}', "x") == {"a": [1, 2.5, None, True]}


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/x", "a\\b", "C:x", "a\0b", "a\nb", "x" * 256])
def test_names_that_could_leave_their_folder(name: str) -> None:
    assert not is_plain_name(name)


def test_plain_names() -> None:
    assert is_plain_name("shard-00000.safetensors")
    assert is_plain_name("..x")


def test_messages_fit_a_terminal() -> None:
    assert str(BadData("a\x1b[31mb\nc\u202ed")) == "a\\x1b[31mb c\\u202ed"
    long = str(BadData("begin " + "x" * 10_000 + " remedy"))
    assert len(long) < MAX_MESSAGE + 10
    assert long.startswith("begin ")
    assert long.endswith(" remedy")
    assert str(pickle.loads(pickle.dumps(BadData("a message")))) == "a message"
