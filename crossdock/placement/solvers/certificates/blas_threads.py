"""One BLAS thread for a while: who runs a thread per core and lets each of them start as many again waits fifty times longer."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_NAMES = [f"{prefix}openblas_{{}}_num_threads{suffix}" for prefix in ("scipy_", "") for suffix in ("64_", "")]


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """Holds every OpenBLAS that this process has loaded (numpy and scipy bring one each) to one thread inside the block; Linux alone."""
    switches = _switches()
    before = [get() for get, _ in switches]
    try:
        for _, set_to in switches:
            set_to(1)
        yield
    finally:
        for (_, set_to), number in zip(switches, before, strict=True):
            set_to(number)


def _switches() -> list[tuple[Callable[[], int], Callable[[int], None]]]:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    libraries = sorted({words[5] for line in maps.read_text().splitlines() if len(words := line.split(maxsplit=5)) == 6})
    found: list[tuple[Callable[[], int], Callable[[int], None]]] = []
    for path in libraries:
        if "openblas" not in Path(path).name:
            continue
        library = ctypes.CDLL(path)
        for name in _NAMES:
            if hasattr(library, name.format("get")):
                found.append((getattr(library, name.format("get")), getattr(library, name.format("set"))))
                break
    return found
