"""A Ray head with a dashboard, in a session of its own, as `ray start --head` makes it, and jobs submitted to it from a shell."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from crossdock.errors import Unavailable

RAY = Path(sys.executable).with_name("ray")
START_S, JOB_S, END_S = 180.0, 240.0, 60.0


@dataclass(frozen=True)
class Head:
    """`address` is where jobs are submitted, `cluster` where drivers join; `environment` is what a client needs; `folder` is Ray's own."""

    address: str
    cluster: str
    folder: Path
    environment: Mapping[str, str]

    def submit(
        self, working_dir: Path, *entrypoint: str, options: tuple[str, ...] = (), environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """`ray job submit ... -- ENTRYPOINT`, to the end of the job."""
        command = [str(RAY), "job", "submit", "--address", self.address, "--working-dir", str(working_dir), *options, "--", *entrypoint]
        env = dict(self.environment if environment is None else environment)
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=JOB_S, check=False)

    def uploaded(self) -> set[str]:
        """What the copies of working directories on this node hold."""
        copies = self.folder.glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*/*")
        return {path.name for path in copies}


@contextlib.contextmanager
def ray_head(cores: int, *, with_token: bool, dashboard_host: str = "127.0.0.1") -> Iterator[Head]:
    """A fresh head on `cores` cores; with authentication by token, or with none. Its temporary folder is short: sockets lie in it.

    Raises `Unavailable` where it does not come up.
    """
    with tempfile.TemporaryDirectory(prefix="xr", dir="/tmp") as text:
        folder = Path(text)
        environment = _environment(folder, with_token)
        gcs, dashboard, client, agent = _free_ports(4)
        command = [str(RAY), "start", "--head", "--block", f"--num-cpus={cores}", f"--port={gcs}", f"--dashboard-host={dashboard_host}"]
        command += [f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"]
        command += [f"--temp-dir={folder / 'r'}", "--object-store-memory=100000000", "--disable-usage-stats"]
        process = None
        try:
            with (folder / "head.log").open("wb") as log:
                process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            address = f"http://127.0.0.1:{dashboard}"
            _wait_for(f"{address}/api/version", process, folder / "head.log")
            yield Head(address, f"127.0.0.1:{gcs}", folder / "r", environment)
        finally:
            if process is not None:
                _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """The head and all that it started: in order where it obeys, by force what is left; its processes lead sessions of their own."""
    started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=END_S)
    finally:
        for left in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the session is its own


def _environment(folder: Path, with_token: bool) -> dict[str, str]:
    """Ours, less any token that lies about in the home of whoever runs the tests, and with the commands of this Python."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = f"{RAY.parent}{os.pathsep}{environment['PATH']}"
    environment |= {"HOME": str(folder), "PATH": path, "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "OMP_NUM_THREADS": "1"}
    if not with_token:
        return environment | {"RAY_AUTH_MODE": "disabled"}
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    return environment | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as open_sockets:
        sockets = [open_sockets.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def _wait_for(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline_s = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline_s:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except urllib.error.HTTPError as refusal:  # it answers, and asks for a token
            if refusal.code == 401:
                return
        except OSError:
            pass
        time.sleep(0.2)
    said = log.read_text(errors="replace").strip().splitlines()
    raise Unavailable(f"no Ray head answers at {url} within {START_S:g} s; it said last: {said[-1] if said else 'nothing'}")
