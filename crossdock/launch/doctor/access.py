"""Who may reach this host's services and jobs: the job's secret, Ray's authentication, dashboards that listen beyond loopback."""

import ipaddress
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from crossdock.errors import CrossdockError
from crossdock.launch.doctor.report import Check
from crossdock.launch.ranks.worker_env import job_secret, signs_nothing

SERVICES = {
    8265: "Ray's dashboard",
    6379: "Ray's head",
    10_001: "Ray's client server",
    6006: "TensorBoard",
    3000: "Grafana",
    9090: "Prometheus",
}


def access(environ: Mapping[str, str] = os.environ) -> list[Check]:
    """What can be read from the environment, the home folder and the listening sockets."""
    token = Path(environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    checks = [_secret(environ), *ray_authentication(environ, token)]
    is_on = environ.get("RAY_AUTH_MODE") == "token"
    return [*checks, *beyond_loopback(_listening(), ray_is_authenticated=is_on)]


def _secret(environ: Mapping[str, str]) -> Check:
    try:
        secret = job_secret(environ)
    except CrossdockError as failure:
        return Check(
            "job secret", "bad", str(failure), "write a new one: (umask 077; openssl rand -hex 32 > FILE), and set CROSSDOCK_SECRET_FILE"
        )
    if secret is not None:
        return Check("job secret", "ok", "handed down to this process")
    if signs_nothing(environ):
        finding = "ranks on several hosts, and none was handed down: what they tell each other is not signed"
        return Check(
            "job secret",
            "note",
            finding,
            "write one that all hosts can read (umask 077; openssl rand -hex 32 > FILE), and set "
            "CROSSDOCK_SECRET_FILE, as `crossdock launch torchrun` prints it",
        )
    return Check("job secret", "ok", "none handed down: one is made for each job on one host, under mpirun, Slurm scripts and Ray")


def ray_authentication(environ: Mapping[str, str], token: Path) -> list[Check]:
    """Ray's own token authentication, where there is Ray."""
    mode = environ.get("RAY_AUTH_MODE")
    there = token.is_file()
    checks = []
    if there and stat.S_IMODE(token.stat().st_mode) & 0o077:
        checks.append(Check("Ray token", "note", f"{token} can be read by others", f"chmod 600 {token}"))
    if mode == "token" and not (there or environ.get("RAY_AUTH_TOKEN")):
        checks.append(
            Check("Ray authentication", "bad", f"RAY_AUTH_MODE is token, and there is no token in {token}", "ray get-auth-token --generate")
        )
    elif mode is None and there:
        remedy = "set RAY_AUTH_MODE=token (or =disabled) for head and clients: `ray start` turns it on by itself, `ray job submit` does not"
        checks.append(Check("Ray authentication", "note", f"{token} is there, and RAY_AUTH_MODE is not set", remedy))
    else:
        checks.append(Check("Ray authentication", "ok", f"RAY_AUTH_MODE is {mode or 'not set, and there is no token: off'}"))
    return checks


def beyond_loopback(listening: Iterable[tuple[str, int]], *, ray_is_authenticated: bool) -> list[Check]:
    """A finding for every known service that other hosts can reach; `listening` are the addresses and ports of this host's sockets."""
    checks = []
    for port, service in SERVICES.items():
        open_to = sorted({address for address, at in listening if at == port and not _is_loopback(address)})
        if not open_to:
            continue
        where = f"{service} listens on {', '.join(open_to)}:{port}"
        if service.startswith("Ray") and ray_is_authenticated:
            checks.append(Check("open service", "ok", f"{where}, with token authentication"))
        else:
            remedy = (
                "whoever reaches it can run code as you: set RAY_AUTH_MODE=token"
                if service.startswith("Ray")
                else "whoever reaches it can read your runs"
            )
            checks.append(Check("open service", "note", where, f"{remedy}; let it listen on 127.0.0.1, and tunnel to it by ssh -L"))
    return checks or [Check("open services", "ok", "no dashboard listens beyond loopback")]


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.split("%")[0]).is_loopback


def _listening() -> set[tuple[str, int]]:
    import psutil

    try:
        found = psutil.net_connections("inet")
    except psutil.Error:  # not allowed here; then nothing is known of the services of others
        return set()
    return {(entry.laddr.ip, entry.laddr.port) for entry in found if entry.laddr and entry.status == psutil.CONN_LISTEN}
