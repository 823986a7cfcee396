"""Arrays of small traces, how they are broken, and their files."""

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping
from functools import cache
from random import Random
from typing import Any

import numpy as np

from tests.fuzz.mutations import NUMBERS, TEXTS, mutated_text


def arrays() -> dict[str, np.ndarray]:
    """The arrays of a small trace of 2 layers and 4 experts."""
    rng = np.random.default_rng(0)
    return {
        "experts": np.argsort(rng.random((48, 2, 4)), axis=-1)[..., :2].astype(np.uint16),
        "weights": rng.random((48, 2, 2)).astype(np.float16),
        "sequence": np.repeat(np.arange(12, dtype=np.int32), 4),
        "home": np.tile(np.arange(2, dtype=np.int32), 24),
        "token": np.arange(48, dtype=np.int32),
        "num_experts": np.array(4),
        "format_version": np.array(1),
        "source": np.array("fuzz"),
    }


def change_array(found: dict[str, Any], rng: Random) -> None:
    """Break one of the arrays: its type, shape, a value or its name, or leave it out."""
    name = rng.choice(list(found)) if found else "experts"
    array = found.pop(name, np.zeros(3))
    kinds = ("<u1", "<i8", ">i4", "<f8", "<f2", "?", "<c16", "S3", "<U2", "O", "M8[s]", "<u8", "V2")
    with np.errstate(all="ignore"):
        match rng.randrange(8):
            case 0:
                try:
                    found[name] = np.asarray(array).astype(rng.choice(kinds))
                except (TypeError, ValueError):
                    found[name] = array
            case 1:
                shape = rng.choice([(0,), (), (1,), (2, 0, 2), (48,), (48, 2), (1, 1, 1, 1), (3, 1, 2), (48, 2, 1), (1, 48, 4)])
                found[name] = np.resize(array, shape)
            case 2:
                changed = np.array(array)
                if changed.size and changed.dtype.kind in "iufb":
                    changed.reshape(-1)[rng.randrange(changed.size)] = rng.choice(
                        (0, 1, 3, 4, 100, 65534, 65535 if changed.dtype != np.float16 else 1)
                    )
                found[name] = changed
            case 3:
                found[rng.choice(("expert", "experts2", "../experts", "/etc/x", "a\x1bb", "weights", name.upper()))] = array
            case 4:
                found[name] = np.array(rng.choice([value for value in NUMBERS if not isinstance(value, int) or abs(value) < 2**64]))
            case 5:
                found[name] = np.array(rng.choice([text for text in TEXTS if "\ud800" not in text]))
            case 6:
                found[name] = np.asfortranarray(array) if rng.random() < 0.5 else np.atleast_1d(array)[::-1]
            case _:
                pass  # left out


def npy_bytes(array: Any, rng: Random | None = None) -> bytes:
    """The array as .npy; with `rng` its header is sometimes a lie."""
    file = io.BytesIO()
    np.save(file, np.asarray(array), allow_pickle=True)
    data = file.getvalue()
    if rng is None or rng.random() > 0.05:
        return data
    (length,) = struct.unpack("<H", data[8:10])
    header = data[10 : 10 + length].rstrip()
    lies = (
        *(b"(48, 2, 2)", b"(999999999999,)", b"(-1, 2, 2)", b"(1000000000, 1000000000, 1000000000)", b"(48, 2, 2, )" * 50, b"()"),
        *(b"(48L,)", b"(True,)", b"((1,),)", b"(1e3,)", b"[48]", b"(" * 300 + b")" * 300),
    )
    start, end = header.find(b"("), header.rfind(b")") + 1
    header = header[:start] + rng.choice(lies) + header[end:] if rng.random() < 0.6 else mutated_text(header, rng)
    length = len(header) if rng.random() < 0.8 else rng.choice((0, 1, 65535))
    return data[:8] + struct.pack("<H", min(length, 65535)) + header + data[10 + length :]


def npz_bytes(found: Mapping[str, Any], rng: Random | None = None, compressed: bool = True) -> bytes:
    """The arrays as .npz; with `rng` it is sometimes not what it seems."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
        for name, array in found.items():
            archive.writestr(f"{name}.npy", npy_bytes(array, rng))
        if rng is not None and rng.random() < 0.05:
            archive.writestr(rng.choice(("experts.npy", "readme.txt", "../../x.npy", "x/")), b"not an array")
    data = file.getvalue()
    return zip_bomb() if rng is not None and rng.random() < 0.01 else data


@cache
def zip_bomb(gibibytes: int = 6) -> bytes:
    """An .npz of a few MB whose `experts` would fill so many GiB; its checksum is wrong, which only who has unpacked it all can know."""
    count = gibibytes * 2**30
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<u2", "fortran_order": False, "shape": (count // 4, 2, 1)})
    first = zlib.compressobj(9, zlib.DEFLATED, -15)
    start = first.compress(header.getvalue()) + first.flush(zlib.Z_FULL_FLUSH)
    block = zlib.compressobj(9, zlib.DEFLATED, -15)
    zeros = block.compress(bytes(2**20)) + block.flush(zlib.Z_FULL_FLUSH)
    end = zlib.compressobj(9, zlib.DEFLATED, -15).flush(zlib.Z_FINISH)
    data = start + zeros * (count // 2**20) + end
    size = len(header.getvalue()) + count
    zip64 = struct.pack("<HHQQ", 1, 16, size, len(data))
    name = b"experts.npy"
    fields = struct.pack("<HHHHHIIIHH", 45, 0, 8, 0, 33, 0, 0xFFFFFFFF, 0xFFFFFFFF, len(name), len(zip64))
    local = b"PK\x03\x04" + fields + name + zip64
    central = b"PK\x01\x02" + struct.pack("<H", 45) + fields + struct.pack("<HHHII", 0, 0, 0, 0, 0) + name + zip64
    closing = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 1, 1, len(central), len(local) + len(data), 0)
    return local + data + central + closing
