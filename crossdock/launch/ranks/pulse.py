"""Whether processes of other hosts are there: each rank listens on a port that nobody serves, and its system answers for it.

A connection is refused as soon as the process has gone, whatever ended it. It is taken as long as the process is there, be it stopped.
Where there is no answer at all the host is lost or cut off. Nothing is read from such a connection, and nothing is written to it.
"""

import errno
import selectors
import socket
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Literal

Sign = Literal["gone", "there", "unreachable"]
_WAITING = (errno.EINPROGRESS, errno.EWOULDBLOCK)
_BACKLOG = 1024


class Pulse:
    """The listening socket of this process, for as long as it lives."""

    def __init__(self, host: str) -> None:
        """Listen on an address of this host, on a free port. Raises `OSError`."""
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.bind(address)
        self._socket.listen(_BACKLOG)

    def __str__(self) -> str:
        """Where others can feel it."""
        host, port = self._socket.getsockname()[:2]
        return f"{host} {port}"

    def close(self) -> None:
        """As if the process had gone."""
        self._socket.close()


def felt(place_of: Mapping[int, str], within_s: float) -> dict[int, Sign]:
    """The sign of each process whose pulse is at a place, as `str(Pulse)` writes it; all are asked at once."""
    signs: dict[int, Sign] = {}
    with selectors.DefaultSelector() as selector, ExitStack() as sockets:
        for rank, place in place_of.items():
            host, port = place.rsplit(" ", 1)
            family, _, _, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)[0]
            connection = sockets.enter_context(socket.socket(family, socket.SOCK_STREAM))
            connection.setblocking(False)
            code = connection.connect_ex(address)
            if code in _WAITING:
                selector.register(connection, selectors.EVENT_WRITE, rank)
            else:
                signs[rank] = _sign(code)
        deadline_s = time.monotonic() + within_s
        while selector.get_map() and (left_s := deadline_s - time.monotonic()) > 0:
            for key, _ in selector.select(left_s):
                assert isinstance(key.fileobj, socket.socket)
                signs[key.data] = _sign(key.fileobj.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
                selector.unregister(key.fileobj)
    return {rank: signs.get(rank, "unreachable") for rank in place_of}


def _sign(code: int) -> Sign:
    return "there" if code == 0 else "gone" if code == errno.ECONNREFUSED else "unreachable"
