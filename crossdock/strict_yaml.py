"""YAML without surprises: YAML 1.2 scalars, duplicate keys and aliases refused, sizes capped, and every error names its line.

PyYAML reads `1e-4` as a string, `no` as False, `010` as 8, `12:30` as 750, keeps the last of two equal keys, and expands aliases without
bound. Here plain scalars follow the core schema of YAML 1.2 (yaml.org/spec/1.2.2, 10.3.2): `1e-4` is a float, `no`, `off` and `12:30` are
strings, `010` is ten, `0o10` is eight. Keys are always strings.
"""

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, get_args

import pydantic
import yaml

from crossdock.bounded import read_bytes
from crossdock.errors import BadConfig, CrossdockError

MAX_BYTES = 16 * 2**20
MAX_DEPTH = 32
MAX_NODES = 1_000_000
_SHOWN_KEYS = 20

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_TRUE = frozenset({"true", "True", "TRUE"})
_FALSE = frozenset({"false", "False", "FALSE"})
_DECIMAL = re.compile(r"[-+]?[0-9]+")
_OCTAL = re.compile(r"0o[0-7]+")
_HEXADECIMAL = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITY = re.compile(r"[-+]?\.(inf|Inf|INF)")
_NOT_A_NUMBER = frozenset({".nan", ".NaN", ".NAN"})

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
KeyPath = tuple[str | int, ...]


class StrictModel(pydantic.BaseModel):
    """Base of every configuration model: unknown keys, NaN, infinities and guessed conversions are errors; instances are frozen."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


Model = TypeVar("Model", bound=pydantic.BaseModel)


class Contradiction(BadConfig):
    """A value that does not go with the others. Models raise it when they are checked as a whole, so that its line is told nevertheless.

    key: where the value stands below the model that raises, as in `replan.at_step`.
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = tuple(key.split("."))


@dataclass(frozen=True)
class Document:
    """A parsed document: its value, the name that errors show, and the line (from 1) of every key and item by its path."""

    value: Any
    name: str
    line_of: Mapping[KeyPath, int]
    origin_of: Mapping[KeyPath, str] = field(default_factory=lambda: MappingProxyType({}))  # values that came from elsewhere, by path

    def where(self, path: KeyPath = ()) -> str:
        """`file.yaml:12` for the key or item at `path`, or for the nearest thing around it that has a line."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.origin_of:
                return self.origin_of[path[:length]]
            if path[:length] in self.line_of:
                return f"{self.name}:{self.line_of[path[:length]]}"
        return self.name


def load(path: Path, error: type[CrossdockError] = BadConfig) -> Document:
    """Read one YAML document of at most 16 MiB.

    Raises `MissingInput` where there is no readable file, `error` where its content is malformed.
    """
    path = Path(path)
    data = read_bytes(path, MAX_BYTES, "a YAML file", error)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        line = data.count(b"\n", 0, failure.start) + 1
        raise error(
            f"{path}:{line}: byte 0x{data[failure.start]:02x} at offset {failure.start} is not UTF-8 text; is this a binary file?"
        ) from failure
    return parse(text, str(path), error)


def parse(text: str, name: str, error: type[CrossdockError] = BadConfig) -> Document:
    """Parse one YAML document; `name` stands for the file in messages. Raises `error` for anything malformed."""
    if len(text) > MAX_BYTES:
        raise error(f"{name}: {len(text)} characters, and at most {MAX_BYTES} are read as YAML")
    try:
        return _Builder(text, name, error).document()
    except yaml.MarkedYAMLError as failure:
        mark = failure.problem_mark or failure.context_mark
        where = f"{name}:{mark.line + 1}" if mark is not None else name
        raise error(f"{where}: {_readable_problem(failure, text)}") from None
    except yaml.reader.ReaderError as failure:
        line = text.count("\n", 0, failure.position) + 1
        raise error(f"{name}:{line}: character {failure.character!r} is not allowed in YAML; is this a binary file?") from None
    except UnicodeError:  # lone surrogates, which cannot be handed to the parser
        raise error(f"{name}: holds characters that are not valid Unicode; save it as UTF-8") from None


def dump(value: Any) -> str:
    """Text that `parse` reads back to an equal value: mappings in their own order, short lists on one line."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=False, width=120)


def validated(model: type[Model], document: Document, error: type[CrossdockError] = BadConfig) -> Model:
    """The document as an instance of `model`; raises `error` with one line: where, which key, what is wrong, what was perhaps meant."""
    if not isinstance(document.value, dict):
        found = "nothing" if document.value is None else f"a {_kind(document.value)}"
        raise error(f"{document.where()}: a mapping of keys to values is expected, found {found}; known keys: {_shown(model.model_fields)}")
    try:
        # JSON mode: strict about numbers, strings and booleans, while lists may become tuples and strings may become paths
        return model.model_validate_json(json.dumps(document.value))
    except pydantic.ValidationError as failure:
        details = failure.errors(include_url=False)
        message = _describe(model, document, details[0])
        more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
        raise error(f"{message}{more}") from None


def nearest(word: str, known: list[str] | tuple[str, ...]) -> str | None:
    """The known word most like `word`, or None when none is alike."""
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return found[0] if found else None


class _Builder:
    """Builds values from parser events, so that no alias is ever expanded and no tag ever constructs an object."""

    def __init__(self, text: str, name: str, error: type[CrossdockError]) -> None:
        self.events: Iterator[Any] = yaml.parse(text, Loader=_Loader)
        self.name, self.error = name, error
        self.line_of: dict[KeyPath, int] = {}
        self.num_nodes = 0

    def document(self) -> Document:
        value: Any = None
        num_documents = 0
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                num_documents += 1
                if num_documents > 1:
                    raise self.fail(event, "a second document begins here; one file holds one document: remove the `---` line")
            elif isinstance(event, yaml.NodeEvent):
                self.line_of[()] = _line(event)
                value = self.node(event, ())
        return Document(value, self.name, MappingProxyType(self.line_of))

    def node(self, event: Any, path: KeyPath) -> Any:
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES:
            raise self.fail(event, f"more than {MAX_NODES} values; is this the right file?")
        if isinstance(event, yaml.AliasEvent):
            raise self.fail(event, f"alias `*{event.anchor}`: aliases are not supported; write the value out")
        if event.anchor is not None:
            raise self.fail(event, f"anchor `&{event.anchor}`: anchors are not supported; write the value out where it is needed")
        if event.tag is not None:
            raise self.fail(event, f"tag `{event.tag}`: tags are not supported; write a plain or a quoted value")
        if isinstance(event, yaml.ScalarEvent):
            return event.value if event.style else self.plain(event)  # quoted and block scalars are strings
        if len(path) >= MAX_DEPTH:
            raise self.fail(event, f"nested deeper than {MAX_DEPTH} levels; is this the right file?")
        return self.mapping(path) if isinstance(event, yaml.MappingStartEvent) else self.sequence(path)

    def mapping(self, path: KeyPath) -> dict[str, Any]:
        value: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            if isinstance(event, yaml.AliasEvent):
                raise self.fail(event, f"alias `*{event.anchor}`: aliases are not supported; write the value out")
            if not isinstance(event, yaml.ScalarEvent) or event.tag is not None or event.anchor is not None:
                raise self.fail(event, "a key must be plain text, without anchor or tag")
            key = event.value
            here = (*path, key)
            if key in value:
                raise self.fail(event, f"key `{dotted(here)}` stands here and in line {self.line_of[here]}; keep one of the two")
            self.line_of[here] = _line(event)
            value[key] = None  # claims the key before the value is read
            value[key] = self.node(next(self.events), here)
        return value

    def sequence(self, path: KeyPath) -> list[Any]:
        value: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            here = (*path, len(value))
            self.line_of[here] = _line(event)
            value.append(self.node(event, here))
        return value

    def plain(self, event: Any) -> Any:
        try:
            return plain_scalar(event.value)
        except ValueError as failure:
            raise self.fail(event, str(failure)) from None

    def fail(self, event: Any, message: str) -> CrossdockError:
        return self.error(f"{self.name}:{_line(event)}: {message}")


def plain_scalar(text: str) -> Any:
    """The value of an unquoted scalar after YAML 1.2's core schema; raises `ValueError` for NaN and for numbers out of range."""
    if text in _NULL:
        return None
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    for pattern, base in ((_DECIMAL, 10), (_OCTAL, 8), (_HEXADECIMAL, 16)):
        if pattern.fullmatch(text):
            if len(text) > 40 or not -(2**63) <= (number := int(text, base)) < 2**64:
                raise ValueError(f"{text[:40]} does not fit in 64 bits; write a smaller number, or quote it")
            return number
    if _FLOAT.fullmatch(text):
        if not math.isfinite(value := float(text)):
            raise ValueError(f"{text[:40]} is too large for a float (at most 1.8e308)")
        return value
    if _INFINITY.fullmatch(text):
        return -math.inf if text.startswith("-") else math.inf
    if text in _NOT_A_NUMBER:
        raise ValueError(f"{text} is not a number; write a finite number, or null to leave it out")
    return text


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would take for something other than a string; writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^(?:{_FLOAT.pattern})$"), list("-+.0123456789"))
_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(f"^(?:{_DECIMAL.pattern}|{_OCTAL.pattern}|{_HEXADECIMAL.pattern})$"), list("-+0123456789")
)


def dotted(path: KeyPath) -> str:
    """`("train", "steps")` as `train.steps`, `("links", 0)` as `links[0]`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


def _readable_problem(failure: yaml.MarkedYAMLError, text: str) -> str:
    mark = failure.problem_mark
    lines = text.splitlines()
    line = lines[mark.line] if mark is not None and mark.line < len(lines) else ""
    if "\t" in line[: len(line) - len(line.lstrip())] or (failure.problem and "'\\t'" in failure.problem):
        return "a tab in the indentation or before a value; YAML indents with spaces"
    problem = " ".join(str(part) for part in (failure.context, failure.problem) if part)
    return f"{problem or 'not valid YAML'}; check the indentation, the colons and the quotes"


def _describe(model: type[pydantic.BaseModel], document: Document, detail: Any) -> str:
    kind, given = detail["type"], detail["input"]
    path = _as_written(tuple(detail["loc"]), document.value, kind)
    where, key = document.where(path), dotted(path)
    if kind == "union_tag_invalid":
        path, kind, given = (*path, detail["ctx"]["discriminator"].strip("'")), "literal_error", detail["ctx"]["tag"]
        detail = {"ctx": {"expected": detail["ctx"]["expected_tags"]}}
        where, key = document.where(path), dotted(path)
    if kind == "union_tag_not_found":
        path, kind = (*path, detail["ctx"]["discriminator"].strip("'")), "missing"
        key = dotted(path)
    if kind == "extra_forbidden":
        known = _fields_at(model, tuple(detail["loc"])[:-1])
        parent = path[:-1]
        guess = nearest(str(path[-1]), tuple(known))
        hint = f"did you mean `{dotted((*parent, guess))}`? " if guess else ""
        return f"{where}: unknown key `{key}`; {hint}known keys{f' of `{dotted(parent)}`' if parent else ''}: {_shown(known)}"
    if kind == "missing":
        return f"{where}: key `{key}` is missing; add it"
    if kind == "value_error":
        cause = detail.get("ctx", {}).get("error", detail["msg"])
        where = document.where((*path, *cause.key)) if isinstance(cause, Contradiction) else where
        return f"{where}: {f'`{key}`: ' if key else ''}{cause}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", str(detail["ctx"]["expected"]))
        guess = nearest(str(given), tuple(choices))
        hint = f"did you mean {guess}? " if guess else ""
        return f"{where}: `{key}` is {_value(given)}; {hint}choose from: {', '.join(choices) or detail['ctx']['expected']}"
    expectation = detail["msg"].removeprefix("Input should be ").removeprefix("a valid ").removeprefix("Input should ")
    expected = _EXPECTED.get(kind, expectation)
    return f"{where}: `{key}` is {_value(given)}; expected {expected}{_cure(kind, given)}"


def _as_written(path: KeyPath, value: Any, kind: str) -> KeyPath:
    """`path` without the labels that pydantic puts in for the member of a union, which nobody wrote."""
    written: list[str | int] = []
    for depth, part in enumerate(path, start=1):
        is_inside = isinstance(value, list) if isinstance(part, int) else isinstance(value, dict) and part in value
        if is_inside:
            value = value[part]
            written.append(part)
        elif kind == "missing" and depth == len(path):
            written.append(part)
    return tuple(written)


_EXPECTED = {
    "bool_type": "true or false",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a string",
    "model_type": "a mapping of keys to values",
    "dict_type": "a mapping of keys to values",
    "list_type": "a list",
    "tuple_type": "a list",
    "path_type": "a path",
}


def _cure(kind: str, given: Any) -> str:
    if kind == "bool_type":
        return "; write it in full, without quotes"
    if kind in ("int_type", "int_from_float") and isinstance(given, float) and given.is_integer():
        return f"; write {int(given)}"
    if kind in ("int_type", "float_type") and isinstance(given, str):
        return "; write digits alone, without quotes, units or separators"
    if kind == "string_type" and given is not None and not isinstance(given, dict | list):
        return "; put it in quotes"
    return ""


def _value(given: Any) -> str:
    if given is None:
        return "empty (null)"
    if isinstance(given, dict | list):
        return f"a {_kind(given)} of {len(given)}"
    text = json.dumps(given) if isinstance(given, str | bool) else repr(given)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({_kind(given)})"


def _kind(value: Any) -> str:
    names = {dict: "mapping", list: "list", str: "string", bool: "boolean", int: "integer", float: "float"}
    return names.get(type(value), type(value).__name__)


def _shown(known: Any) -> str:
    names = list(known)
    return ", ".join(names[:_SHOWN_KEYS]) + (", ..." if len(names) > _SHOWN_KEYS else "")


def _fields_at(model: type[pydantic.BaseModel], path: KeyPath) -> list[str]:
    """Names of the fields that the model at `path` under `model` knows; empty where that is not a model."""
    here: list[Any] = [model]
    for part in path:
        found: list[Any] = []
        for candidate in here:
            if isinstance(part, str) and _is_model(candidate) and part in candidate.model_fields:
                found.append(candidate.model_fields[part].annotation)
            elif isinstance(part, int) or not _is_model(candidate) or _has_tag(candidate, part):
                found.append(candidate)
        here = [option for annotation in found for option in _models_in(annotation)]
    return sorted({name for candidate in here if _is_model(candidate) for name in candidate.model_fields})


def _has_tag(model: type[pydantic.BaseModel], tag: str) -> bool:
    """Whether `tag` names this member of a union told apart by a field that has one possible value."""
    return any(get_args(field.annotation) == (tag,) for field in model.model_fields.values())


def _models_in(annotation: Any) -> list[Any]:
    if _is_model(annotation):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _is_model(candidate: Any) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, pydantic.BaseModel)
