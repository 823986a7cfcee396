"""Mutations of valid input, by bytes, by words and by structure; all randomness comes from the `random.Random` that is handed in."""

import copy
import json
import re
from collections.abc import Callable
from random import Random
from typing import Any

NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 7, 64, 127, 255, 256, 4096, 65534, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**40),
    *(-(2**31) - 1, -(2**63), -(2**63) - 1, 10**400, 0.5, -0.0, 1e-320, 1e-300, 1e300, 1.8e308, float("nan"), float("inf"), -float("inf")),
)
TEXTS = (
    *("", " ", "0", "-1", "1e400", "0x10", "0o17", "12:30", "nan", ".nan", ".inf", "null", "true", "no", "~", "a" * 5000, "9" * 5000),
    *("..", "../../etc/passwd", "/dev/zero", "/proc/self/mem", "a/b", "\x00", "a\x00b", "\n", "\r\n", "\t", "\x1b[31mred", "\x7f", "\\"),
    *(
        "\u00e9",
        "e\u0301",
        "\u202e",
        "\u2028",
        "\ufeff",
        "\U0001f600",
        "\ud800",
        "\uffff",
        "%s%n",
        "{0}",
        "{self}",
        "[red]",
        "[/]",
        "${HOME}",
    ),
    *("home", "coherent", "seconds", "auto", "cpu", "float32", "bool", "manifest.json", "2x8-nvlink-ib", "kind", "experts"),
)
WORDS = (
    *(
        "&a",
        "*a",
        "!!python/object/apply:os.system",
        "!!binary",
        "---",
        "...",
        "%YAML 1.1",
        "? ",
        ": ",
        "- ",
        "- - ",
        "[",
        "]",
        "{",
        "}",
        "|",
    ),
    *(
        ">-",
        "'",
        '"',
        "#",
        ",",
        "@",
        "`",
        "\t",
        "\n",
        "\x00",
        "\x1b",
        "\u0085",
        "\u2028",
        "\ufeff",
        "<<: ",
        "true",
        "null",
        ".nan",
        "-.inf",
    ),
    *("1e400", "10000000000000000000000", "1_000", "0x", "0b1", "1:2:3", "2026-01-01", "NaN", "Infinity", "1e-400"),
)
_TOKEN = re.compile(rb"[A-Za-z_][A-Za-z_0-9]*|[-+]?[0-9][0-9.eE+-]*|\s+|[^\sA-Za-z0-9_]")


def mutated_bytes(data: bytes, rng: Random) -> bytes:
    """One to four changes of single bits, bytes and spans."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        data = rng.choice(_BYTE_CHANGES)(data, rng)
    return data


def mutated_text(data: bytes, rng: Random) -> bytes:
    """One to four changes of tokens and lines, as a person or a bad editor makes them."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        data = rng.choice(_TEXT_CHANGES)(data, rng)
    return data


def mutated_value(value: Any, rng: Random) -> Any:
    """A copy of a tree of mappings, lists and scalars with one to three changes at places that are drawn evenly from its nodes."""
    box = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(box))
        if not places:  # the whole may have become a scalar, or an empty mapping
            return value
        holder, key = rng.choice(places)
        rng.choice(_VALUE_CHANGES)(holder, key, rng)
    return box[0] if box else None


def replacement(rng: Random) -> Any:
    """Something that may stand anywhere and fits hardly anywhere."""
    return rng.choice(
        (
            lambda: rng.choice(NUMBERS),
            lambda: rng.choice(NUMBERS),
            lambda: rng.choice(TEXTS),
            lambda: rng.choice((None, True, False, [], {}, [[]], [None], {"": 1}, {"a": {"b": {}}})),
            lambda: rng.randrange(-(10**6), 10**6),
            lambda: nested(rng.choice((2, 31, 32, 33, 200))),
            lambda: [rng.choice(NUMBERS)] * rng.choice((1, 3, 1000)),
        )
    )()


def nested(depth: int) -> Any:
    """A list in a list, and so on."""
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def json_text(value: Any, rng: Random) -> bytes:
    """JSON with what Python's writer allows beyond the standard; sometimes with a key twice."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.8)
    if rng.random() < 0.03 and text.startswith("{") and len(text) > 2:
        text = text[:-1] + ", " + text[1:]
    return text.encode("utf-8", "surrogatepass")


def _places(holder: Any) -> Any:
    """Every (mapping or list, key or position) under `holder`; of long lists the first few and the last."""
    keys = list(holder) if isinstance(holder, dict) else [*range(min(8, len(holder))), *range(max(8, len(holder) - 1), len(holder))]
    for key in keys:
        yield holder, key
        if isinstance(holder[key], dict | list):
            yield from _places(holder[key])


# ---- bytes


def _flip(data: bytes, rng: Random) -> bytes:
    if not data:
        return b"\x00"
    changed = bytearray(data)
    changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _overwrite(data: bytes, rng: Random) -> bytes:
    at, count = _span(data, rng)
    fill = rng.choice((b"\x00", b"\xff", b"\x7f", b"\x80", bytes([rng.randrange(256)])))
    return data[:at] + fill * count + data[at + count :]


def _remove(data: bytes, rng: Random) -> bytes:
    at, count = _span(data, rng)
    return data[:at] + data[at + count :]


def _repeat(data: bytes, rng: Random) -> bytes:
    at, count = _span(data, rng)
    return data[: at + count] + data[at : at + count] * rng.choice((1, 2, 50)) + data[at + count :]


def _insert(data: bytes, rng: Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice((1, 4, 8, 64))) + data[at:]


def _cut(data: bytes, rng: Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _move(data: bytes, rng: Random) -> bytes:
    at, count = _span(data, rng)
    rest = data[:at] + data[at + count :]
    to = rng.randrange(len(rest) + 1)
    return rest[:to] + data[at : at + count] + rest[to:]


def _span(data: bytes, rng: Random) -> tuple[int, int]:
    at = rng.randrange(len(data) + 1)
    return at, min(len(data) - at, rng.choice((1, 2, 4, 8, 16, 256)))


_BYTE_CHANGES: tuple[Callable[[bytes, Random], bytes], ...] = (_flip, _flip, _overwrite, _remove, _repeat, _insert, _cut, _move)


# ---- words and lines


def _change_token(data: bytes, rng: Random) -> bytes:
    tokens = _TOKEN.findall(data)
    if not tokens:
        return rng.choice(WORDS).encode()
    at = rng.randrange(len(tokens))
    tokens[at] = rng.choice(
        (
            lambda: rng.choice(WORDS).encode(),
            lambda: rng.choice(TEXTS).encode("utf-8", "surrogatepass"),
            lambda: repr(rng.choice(NUMBERS)).encode(),
            lambda: rng.choice(tokens),
            lambda: tokens[at] + tokens[at][-1:],
            lambda: b"'" + tokens[at] + b"'",
            lambda: b"",
        )
    )()
    return b"".join(tokens)


def _change_number(data: bytes, rng: Random) -> bytes:
    found = list(re.finditer(rb"[-+]?[0-9][0-9.eE+-]*", data))
    if not found:
        return _change_token(data, rng)
    span = rng.choice(found)
    return data[: span.start()] + repr(rng.choice(NUMBERS)).encode() + data[span.end() :]


def _change_lines(data: bytes, rng: Random) -> bytes:
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    match rng.randrange(6):
        case 0:
            lines.insert(at, rng.choice(lines))
        case 1:
            del lines[at]
        case 2:
            lines[at] = b" " * rng.randrange(1, 5) + lines[at]
        case 3:
            lines[at] = lines[at].lstrip()
        case 4:
            lines[at] = b"\t" + lines[at]
        case _:
            other = rng.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
    return b"\n".join(lines)


def _insert_word(data: bytes, rng: Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(WORDS).encode() + data[at:]


def _nest(data: bytes, rng: Random) -> bytes:
    at, depth = rng.randrange(len(data) + 1), rng.choice((3, 33, 1000, 20_000))
    return data[:at] + rng.choice((b"[", b"{a: ", b"- ")) * depth + data[at:]


_TEXT_CHANGES: tuple[Callable[[bytes, Random], bytes], ...] = (
    *(_change_token, _change_token, _change_number, _change_number, _change_lines, _change_lines, _insert_word, _nest, mutated_bytes),
)


# ---- values


def _replace(holder: Any, key: Any, rng: Random) -> None:
    holder[key] = replacement(rng)


def _nudge(holder: Any, key: Any, rng: Random) -> None:
    value = holder[key]
    if isinstance(value, int | float) and not isinstance(value, bool):
        holder[key] = rng.choice((value + 1, value - 1, -value, value * 2, _real(value), str(value), value * 1000, bool(value)))
    elif isinstance(value, str):
        holder[key] = rng.choice((value + "x", value[:-1], value.upper(), value * 2, [value], rng.choice(TEXTS)))
    else:
        _replace(holder, key, rng)


def _real(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number beyond all floats
        return float("inf")


def _delete(holder: Any, key: Any, rng: Random) -> None:
    del holder[key]


def _rename(holder: Any, key: Any, rng: Random) -> None:
    if isinstance(holder, dict):
        holder[rng.choice((str(key) + "s", str(key)[1:], str(key).upper(), rng.choice(TEXTS)))] = holder.pop(key)
    else:
        holder.insert(key, replacement(rng))


def _wrap(holder: Any, key: Any, rng: Random) -> None:
    holder[key] = rng.choice(([holder[key]], {"a": holder[key]}, [holder[key], holder[key]]))


def _grow(holder: Any, key: Any, rng: Random) -> None:
    if isinstance(holder, list):
        holder[:] = holder * rng.choice((2, 3, 100 if len(holder) < 10 else 2))
    else:
        holder.update({f"{key}{number}": copy.deepcopy(holder[key]) for number in range(rng.choice((1, 3, 50)))})


def _exchange(holder: Any, key: Any, rng: Random) -> None:
    other = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    holder[key], holder[other] = holder[other], holder[key]


_VALUE_CHANGES: tuple[Callable[[Any, Any, Random], None], ...] = (
    _replace,
    _replace,
    _nudge,
    _nudge,
    _delete,
    _rename,
    _wrap,
    _grow,
    _exchange,
)
