"""Control records as bytes, without pickle: what a rank tells the others is data, and reading it runs nothing.

8 bytes   length of the text, little-endian
text      JSON: scalars and lists as they are, everything else an object of one key that names its kind
arrays    the bytes of arrays and byte strings, one after the other
"""

import dataclasses
import enum
import importlib
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pydantic

from crossdock.errors import BadData, CrossdockError

_LENGTH_BYTES = 8
_OUR_PACKAGE = "crossdock."
_NUMBERS = "biufc"  # kinds of numpy types whose bytes are the value


def encoded(value: Any) -> bytes:
    """The bytes of `value`: None, numbers, text, bytes, paths, arrays, enums, errors of ours, dataclasses, models and named
    tuples, and lists, tuples, sets and mappings of them. Raises `TypeError` for anything else."""
    blobs: list[bytes] = []
    text = json.dumps(_told(value, blobs), separators=(",", ":")).encode()
    return b"".join((len(text).to_bytes(_LENGTH_BYTES, "little"), text, *blobs))


def decoded(record: bytes) -> Any:
    """The value that `encoded` made the bytes of. Raises `BadData` for bytes that it did not make."""
    try:
        end = _LENGTH_BYTES + int.from_bytes(record[:_LENGTH_BYTES], "little")
        return _Reader(record, end).value(json.loads(record[_LENGTH_BYTES:end]))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, ImportError, OverflowError, RecursionError) as failure:
        raise BadData(
            f"a control record of {len(record)} bytes cannot be read ({failure}); start all ranks with one Crossdock"
        ) from failure


def _told(value: Any, blobs: list[bytes]) -> Any:
    """`value` as JSON; the bytes of arrays are appended to `blobs`."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list:
        return [_told(item, blobs) for item in value]
    return _told_by_kind(value, blobs)


def _told_by_kind(value: Any, blobs: list[bytes]) -> Mapping[str, Any]:
    match value:
        case enum.Enum():
            return {"enum": [_name_of(type(value)), _told(value.value, blobs)]}
        case tuple() if hasattr(value, "_fields"):
            return {"named": [_name_of(type(value)), [_told(item, blobs) for item in value]]}
        case tuple() | set() | frozenset() if type(value) in _COLLECTIONS.values():
            return {type(value).__name__: [_told(item, blobs) for item in value]}
        case Mapping():
            return {"dict": [[_told(key, blobs), _told(item, blobs)] for key, item in value.items()]}
        case bytes():
            blobs.append(value)
            return {"bytes": len(value)}
        case PurePath():
            return {"path": str(value)}
        case np.ndarray() | np.generic() if value.dtype.kind in _NUMBERS:
            return _told_array(value, blobs)
        case CrossdockError():
            state = [_told(list(value.args), blobs), _told(vars(value), blobs)]
            return {"error": [_name_of(type(value)), *state]}
        case pydantic.BaseModel():
            fields = {name: _told(getattr(value, name), blobs) for name in type(value).model_fields}
            return {"model": [_name_of(type(value)), fields]}
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {field.name: _told(getattr(value, field.name), blobs) for field in dataclasses.fields(value)}
            return {"record": [_name_of(type(value)), fields]}
    raise TypeError(f"a {type(value).__name__} is no part of a control record; send the numbers, texts and arrays that it is made of")


def _told_array(value: Any, blobs: list[bytes]) -> Mapping[str, Any]:
    by_columns = isinstance(value, np.ndarray) and value.ndim > 1 and bool(np.isfortran(value))
    blobs.append(value.tobytes(order="F" if by_columns else "C"))
    kind = "array" if isinstance(value, np.ndarray) else "number"
    return {kind: [value.dtype.str, list(value.shape), "F" if by_columns else "C"]}


class _Reader:
    """Reads one record; its arrays come in the order in which they were written."""

    def __init__(self, record: bytes, at: int) -> None:
        self.record, self.at = memoryview(record), at
        self._read_by_kind: dict[str, Callable[[Any], Any]] = {
            "dict": lambda pairs: {self.value(key): self.value(item) for key, item in pairs},
            "bytes": lambda size: bytes(self._blob(size)),
            "path": Path,
            "array": self._array,
            "number": lambda told: self._array(told)[()],
            "enum": lambda told: _class(told[0], enum.Enum)(self.value(told[1])),
            "named": self._named,
            "error": self._error,
            "record": self._record,
            "model": self._model,
            **{name: self._collection(kind) for name, kind in _COLLECTIONS.items()},
        }

    def value(self, told: Any) -> Any:
        """The value that `_told` put so."""
        if isinstance(told, list):
            return [self.value(item) for item in told]
        if not isinstance(told, dict):
            return told
        ((kind, content),) = told.items()
        return self._read_by_kind[kind](content)

    def _collection(self, kind: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda items: kind(self.value(item) for item in items)

    def _blob(self, size: int) -> memoryview:
        if not 0 <= size <= len(self.record) - self.at:
            raise ValueError(f"{size} bytes are announced and {len(self.record) - self.at} are left")
        self.at += size
        return self.record[self.at - size : self.at]

    def _array(self, told: Any) -> Any:
        dtype, shape, order = np.dtype(told[0]), tuple(told[1]), told[2]
        if dtype.kind not in _NUMBERS:
            raise ValueError(f"an array of {dtype}")
        return np.frombuffer(self._blob(dtype.itemsize * math.prod(shape)), dtype).reshape(shape, order=order).copy(order)

    def _named(self, told: Any) -> Any:
        return _class(told[0], tuple)(*[self.value(item) for item in told[1]])

    def _error(self, told: Any) -> Any:
        kind, args, state = _class(told[0], CrossdockError), self.value(told[1]), self.value(told[2])
        error = kind.__new__(kind, *args)
        error.args = tuple(args)
        vars(error).update(state)
        return error

    def _record(self, told: Any) -> Any:
        """The dataclass with these fields; the rank that sent it has checked them, and nothing is computed again."""
        kind = _class(told[0], object)
        names = {field.name for field in dataclasses.fields(kind)}  # TypeError where it is no dataclass
        if set(told[1]) != names:
            raise ValueError(f"{told[0]} has not the fields {', '.join(told[1])}")
        made: Any = object.__new__(kind)
        for name, content in told[1].items():
            object.__setattr__(made, name, self.value(content))
        return made

    def _model(self, told: Any) -> Any:
        kind = _class(told[0], pydantic.BaseModel)
        if set(told[1]) != set(kind.model_fields):
            raise ValueError(f"{told[0]} has not the fields {', '.join(told[1])}")
        return kind.model_construct(**{name: self.value(content) for name, content in told[1].items()})


_COLLECTIONS: dict[str, Any] = {"tuple": tuple, "set": set, "frozenset": frozenset}


def _name_of(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _class(name: str, base: type) -> Any:
    """The class of that name: of Crossdock's, or of a module that this process has loaded for itself. Nothing else is ever loaded."""
    module_name, _, path = name.partition(":")
    module = sys.modules.get(module_name)
    if module is None and module_name.startswith(_OUR_PACKAGE) and not module_name.endswith("__main__"):
        module = importlib.import_module(module_name)
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part)
    if not isinstance(found, type) or not issubclass(found, base):
        raise ValueError(f"{name} is no {base.__name__}")
    return found
