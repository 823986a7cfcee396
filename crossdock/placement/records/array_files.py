"""Reading .npy and .npz files whose headers may lie: nothing is allocated before it is known to be there."""

import math
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossdock.errors import BadData, MissingInput

MAX_BYTES = 16 * 2**30
"""The most that the arrays of a file may unpack to: a compressed file of a few MB can promise more than any machine has."""
SUSPICIOUS_BYTES, MAX_RATIO = 2**30, 100
"""Above so many bytes, a file that shrinks them more than so often is a zip bomb: recorded routing compresses less than 10-fold."""


def read_array(path: Path, name: str = "") -> NDArray[Any]:
    """The array of an .npy file, or the one called `name` of an .npz.

    Raises `MissingInput` where the file cannot be read, `BadData`, with its name, where it is damaged or holds pickled objects.
    """
    try:
        if zipfile.is_zipfile(path):
            return _member(path, name)
        with path.open("rb") as file:
            check_header(file, path.stat().st_size, path.name)
        return np.asarray(np.load(path, allow_pickle=False))
    except OSError as error:
        raise MissingInput(f"{path}: cannot read it: {error.strerror or error}; check the path") from error
    except BadData as error:
        raise BadData(f"{path}: {error}") from error
    except MemoryError:
        raise
    except Exception as error:  # of damaged bytes the readers of zip and numpy raise anything
        why = " ".join(str(error).split())[:160]
        raise BadData(f"{path}: damaged, or holding pickled objects ({why}); save it with numpy.save or numpy.savez") from error


def _member(path: Path, name: str) -> NDArray[Any]:
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if member.filename == f"{name}.npy"]
        if len(members) != 1:
            held = ", ".join(archive.namelist()[:10]) or "none"
            raise BadData(f"{len(members)} arrays named {name or '(no name)'} among {held}; name one array so, or give an .npy")
        check_room(members[0].file_size)
        with archive.open(members[0]) as file:
            check_header(file, members[0].file_size, name)
    with np.load(path, allow_pickle=False) as archive:
        return np.asarray(archive[name])


def check_header(file: Any, num_bytes: int, name: str) -> None:
    """Raise `BadData` unless the array that the .npy header promises is one of plain values in exactly so many bytes, header included."""
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(file)
    except ValueError as error:
        raise BadData(f"the member {name.removesuffix('.npy')} is no numpy array, or damaged; write it with numpy.savez") from error
    if version not in read_header:
        raise BadData(f"{name} is of .npy version {version[0]}.{version[1]}, and 1.0 and 2.0 are read; write it with numpy.save")
    shape, _, dtype = read_header[version](file)
    if dtype.hasobject:
        return  # numpy's reader refuses it, and says why
    promised = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or promised != num_bytes - file.tell():
        raise BadData(
            f"damaged, truncated or no trace: {name} promises {promised} bytes of {shape} {dtype}, and "
            f"{num_bytes - file.tell()} are there; copy or record it again"
        )
    check_room(promised)


def check_room(num_bytes: int) -> None:
    """Raise `BadData` where so many bytes are more than is read, or than half of this machine's memory."""
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    if num_bytes > min(MAX_BYTES, room):
        raise BadData(
            f"its arrays unpack to {num_bytes} bytes, and at most {min(MAX_BYTES, room)} are read here (16 GiB, or half of the memory); "
            "select fewer tokens, or is this another file?"
        )
