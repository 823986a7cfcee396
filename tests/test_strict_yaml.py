"""Strict YAML: what scalars mean, what is refused, and that every message names its place."""

import math
from pathlib import Path
from typing import Any, Literal

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossdock import strict_yaml
from crossdock.errors import BadConfig, BadData, MissingInput
from crossdock.strict_yaml import Document, StrictModel, dump, load, parse, validated


class Optimizer(StrictModel):
    steps: int = pydantic.Field(3, gt=0)
    rate: float = 1e-3
    enabled: bool = True
    kind: Literal["adam", "plain"] = "adam"


class Settings(StrictModel):
    train: Optimizer = Optimizer()
    maybe: Optimizer | None = None
    several: tuple[Optimizer, ...] = ()
    folder: Path | None = None
    matrix: list[list[float]] = []


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-2.5E+3", -2500.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("no", "no"),
        ("off", "off"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("12:30", "12:30"),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("1_000", "1_000"),
        ("2020-01-01", "2020-01-01"),
        ("null", None),
        ("~", None),
        ("", None),
        ("-.inf", -math.inf),
        ('"1e-4"', "1e-4"),
        ("'true'", "true"),
        ("=", "="),
        ("<<", "<<"),
    ],
)
def test_a_scalar_means_what_yaml_1_2_says(text: str, value: Any) -> None:
    found = parse(f"key: {text}", "f").value["key"]
    assert found == value
    assert type(found) is type(value)


def test_keys_are_always_strings() -> None:
    assert parse("no: 1\n1: 2\nnull: 3\n1e3: 4", "f").value == {"no": 1, "1": 2, "null": 3, "1e3": 4}


def test_a_document_knows_the_line_of_everything() -> None:
    document = parse("a:\n  b: 1\n  c:\n    - x\n    - {d: 2}\n", "f.yaml")
    assert document.where(("a", "b")) == "f.yaml:2"
    assert document.where(("a", "c", 1, "d")) == "f.yaml:5"
    assert document.where(("a", "nothing", "here")) == "f.yaml:1"
    assert Document({"b": 1}, "f.yaml", {("a",): 1}, {("b",): "override b=1"}).where(("b", "c")) == "override b=1"


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a: 1\nb: 2\na: 3", ["f:3", "`a`", "line 1"]),
        ("a: {b: 1, b: 2}", ["f:1", "`a.b`"]),
        ("a: &x 1\nb: *x", ["f:1", "&x", "write the value out"]),
        ("a: &x [*x]", ["f:1", "&x"]),
        ("b: *x", ["f:1", "*x"]),
        ("a: !!python/object/apply:os.system [ls]", ["f:1", "tag"]),
        ("a: !local 1", ["f:1", "tag"]),
        ("a:\n\tb: 1", ["f:2", "tab"]),
        ("a: [1, 2", ["f:", "flow"]),
        ("a: b: c", ["f:1", "colons"]),
        ("a: 'b", ["f:1", "quote"]),
        ("a: .nan", ["f:1", ".nan", "finite"]),
        ("a: 1e999", ["f:1", "1e999", "too large"]),
        ("a: 99999999999999999999", ["f:1", "64 bits"]),
        ("a: " + "9" * 10_000, ["f:1", "64 bits"]),
        ("a: 1\n---\nb: 2", ["f:2", "second document"]),
        ("? [a]\n: 1", ["f:1", "key must be plain"]),
        ("a: \x00", ["f:1", "binary"]),
        ("\n".join(f"{'  ' * level}a:" for level in range(40)), ["f:", "deeper than 32"]),
        ("[" * 100_000, ["f:1", "deeper than 32"]),
    ],
)
def test_malformed_text_is_refused_with_its_place(text: str, pieces: list[str]) -> None:
    with pytest.raises(BadData) as refused:
        parse(text, "f", error=BadData)
    assert "\n" not in str(refused.value)
    for piece in pieces:
        assert piece in str(refused.value)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("train:\n  stepz: 1", ["f:2", "unknown key `train.stepz`", "did you mean `train.steps`?", "enabled"]),
        ("several:\n  - {steps: 1}\n  - {stpes: 1}", ["f:3", "`several[1].stpes`", "`several[1].steps`"]),
        ("maybe: {rat: 1.0}", ["`maybe.rat`", "`maybe.rate`"]),
        ("train: {steps: 1e3}", ["`train.steps`", "1000.0", "integer", "write 1000"]),
        ("train: {steps: '3'}", ['"3" (string)', "integer", "without quotes"]),
        ("train: {steps: true}", ["true (boolean)", "integer"]),
        ("train: {steps: 0}", ["`train.steps` is 0", "greater than 0"]),
        ("train: {rate: .inf}", ["inf", "finite"]),
        ("train: {enabled: no}", ['"no"', "true or false"]),
        ("train: {enabled: 1}", ["1 (integer)", "true or false"]),
        ("train: {kind: adm}", ['"adm"', "did you mean adam?", "plain"]),
        ("folder: 3", ["`folder` is 3", "quotes"]),
        ("train: 3", ["`train` is 3", "mapping"]),
        ("matrix: [[1, x]]", ["`matrix[0][1]`", '"x"', "number"]),
        ("", ["f", "found nothing", "train, maybe"]),
        ("- 1", ["f:1", "found a list"]),
        ("train: {steps: 0, rate: x}", ["and 1 more"]),
    ],
)
def test_a_model_says_what_is_wrong_and_what_to_write(text: str, pieces: list[str]) -> None:
    with pytest.raises(BadConfig) as refused:
        validated(Settings, parse(text, "f"))
    assert "\n" not in str(refused.value)
    for piece in pieces:
        assert piece in str(refused.value)


def test_a_model_takes_lists_for_tuples_and_strings_for_paths() -> None:
    settings = validated(Settings, parse("folder: a/b\nseveral: [{steps: 010}]\nmatrix: [[1, 2.5]]", "f"))
    assert settings == Settings(folder=Path("a/b"), several=(Optimizer(steps=10),), matrix=[[1.0, 2.5]])


def test_an_error_raised_inside_a_validator_keeps_its_words() -> None:
    class Even(StrictModel):
        count: int

        @pydantic.field_validator("count")
        @classmethod
        def check(cls, count: int) -> int:
            if count % 2:
                raise BadConfig(f"{count} is odd; choose {count + 1}")
            return count

    with pytest.raises(BadConfig, match=r"f:1: `count`: 3 is odd; choose 4"):
        validated(Even, parse("count: 3", "f"))


@pytest.mark.parametrize(
    ("content", "kind", "pieces"),
    [
        (None, MissingInput, ["does not exist"]),
        (b"a: 1\nb: \xff\xfe", BadConfig, [":2", "0xff", "offset 8", "UTF-8"]),
        (b"#" * (strict_yaml.MAX_BYTES + 1), BadConfig, [str(strict_yaml.MAX_BYTES)]),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, content: bytes | None, kind: type[Exception], pieces: list[str]) -> None:
    path = tmp_path / "f.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(kind) as refused:
        load(path)
    for piece in (*pieces, str(path)):
        assert piece in str(refused.value)


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="is a directory"):
        load(tmp_path)


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_bytes(b"\xef\xbb\xbfa: 1")
    assert load(tmp_path / "f.yaml").value == {"a": 1}


_leaves = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=12)
)
_awkward = st.sampled_from(
    ["1e-4", "no", "off", "010", "0o7", "12:30", "~", "", "null", "1_000", ".inf", ".nan", "- a", "a: b", "#", "&x", "2020-01-01"]
)
_keys = st.text(max_size=6) | _awkward


@given(
    st.recursive(_leaves | _awkward, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_keys, inner, max_size=4), max_leaves=12)
)
def test_what_is_dumped_reads_back_equal(value: Any) -> None:
    again = parse(dump({"value": value}), "f").value["value"]
    assert again == value
    assert repr(again) == repr(value)  # 1, 1.0 and True are equal, and not the same


@given(st.text(max_size=60))
def test_any_text_parses_or_is_refused_in_one_line(text: str) -> None:
    message = ""
    try:
        parse(text, "f")
    except BadConfig as refused:
        message = str(refused)
    assert "\n" not in message


def test_more_values_than_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict_yaml, "MAX_NODES", 10)
    assert strict_yaml.parse("[1, 2, 3, 4, 5, 6, 7, 8, 9]", "f").value == [*range(1, 10)]
    with pytest.raises(BadConfig, match="f:1: more than 10 values"):
        strict_yaml.parse("[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]", "f")
