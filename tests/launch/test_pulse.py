"""A process of another host is there, has gone, or is out of reach."""

import errno
import socket
import subprocess
import sys

import psutil
import pytest

from crossdock.launch.ranks.pulse import Pulse, _sign, felt

LISTEN = "from crossdock.launch.ranks.pulse import Pulse\npulse = Pulse('127.0.0.1')\nprint(pulse, flush=True)\ninput()"


def test_a_killed_process_is_gone_and_a_stopped_one_is_there() -> None:
    process = subprocess.Popen([sys.executable, "-c", LISTEN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        place = process.stdout.readline().strip()
        assert felt({3: place}, 30.0) == {3: "there"}
        psutil.Process(process.pid).suspend()
        assert felt({3: place}, 30.0) == {3: "there"}
        process.kill()
        process.wait()
        assert felt({3: place}, 30.0) == {3: "gone"}


def test_all_are_asked_at_once_and_one_that_does_not_answer_is_out_of_reach() -> None:
    pulse, closed = Pulse("127.0.0.1"), Pulse("127.0.0.1")
    gone = str(closed)
    closed.close()
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, socket.create_connection(full.getsockname()):
        silent = " ".join(map(str, full.getsockname()))  # its system drops further connections without a word
        assert felt({0: str(pulse), 1: gone, 2: silent}, 0.3) == {0: "there", 1: "gone", 2: "unreachable"}
    assert felt({}, 1.0) == {}


def test_a_way_that_is_not_there_says_nothing_of_the_process() -> None:
    assert [_sign(code) for code in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ETIMEDOUT)] == ["unreachable"] * 3


def test_an_address_that_is_not_of_this_host_cannot_be_listened_on() -> None:
    with pytest.raises(OSError, match=r"assign requested address"):
        Pulse("192.0.2.1")
