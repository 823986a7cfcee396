"""A driver's connection to its Ray cluster, and a word to whoever owns it where strangers could use it as well."""

import contextlib
import http.client
import ipaddress
import os
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

from crossdock.errors import PeerLost, Unavailable

_DASHBOARD_S, _CONNECT_S = 2.0, 5.0


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Ray, connected to the cluster at `address` (that of this job or machine where None) until the block ends.

    All that a driver made there ends with its connection: actors, placement groups. Raises `Unavailable` where there is no Ray or no
    cluster, and `PeerLost` where Ray fails inside the block.
    """
    try:
        import ray
    except ImportError as failure:
        raise Unavailable("Ray is not installed; run: pip install 'crossdock[ray]'") from failure
    _check_answers(address or os.environ.get("RAY_ADDRESS", ""))
    try:
        context = ray.init(address=address or "auto", log_to_driver=True, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as failure:
        sends_token = os.environ.get("RAY_AUTH_MODE") == "token"
        remedy = "start one by `ray start --head`, or name it by --address"
        remedy += "" if sends_token else "; where it wants a token, set RAY_AUTH_MODE=token"
        raise Unavailable(f"no Ray cluster answers ({first_line(failure)}); {remedy}") from failure
    try:
        if (warning := open_to_strangers(context.dashboard_url)) is not None:
            say(f"warning: {warning}")
        yield ray
    except ray.exceptions.RayTaskError:  # it holds an exception of our own code, and its traceback
        raise
    except ray.exceptions.RayError as failure:
        raise PeerLost(f"the Ray cluster failed ({first_line(failure)}); see `ray status`, then start the run again") from failure
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Raise `Unavailable` where nothing listens at `host:port`, which Ray would try for minutes; other forms are Ray's to judge."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as failure:
        raise Unavailable(f"no Ray cluster answers at {address} ({failure}); see `ray status` there, or use --address") from failure


def open_to_strangers(dashboard: str | None) -> str | None:
    """What is wrong with a dashboard at `host:port` that other hosts can reach and that serves whoever comes; None where nothing is.

    It is asked as a stranger would, without a token: what is set in this process says little of how the cluster was started.
    """
    if not dashboard or _is_loopback(urllib.parse.urlsplit(f"//{dashboard}").hostname or ""):
        return None
    try:
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"http://{dashboard}/api/version", timeout=_DASHBOARD_S).close()
    except (OSError, http.client.HTTPException):  # it asks for a token, this host does not reach it, or something else answers there
        return None
    return (
        f"the dashboard of this Ray cluster listens on {dashboard} and asks for no token: whoever reaches it can run code as you. Start "
        "the head with --dashboard-host 127.0.0.1, or with RAY_AUTH_MODE=token in every process (docs/launching.md)"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def first_line(failure: BaseException) -> str:
    """What Ray's exceptions begin with; they go on for pages."""
    return next((line.strip() for line in str(failure).splitlines() if line.strip()), "no reason given")


def say(message: str) -> None:
    """Tell whoever started the run; stdout is for its result."""
    print(f"crossdock: {message}", file=sys.stderr, flush=True)
