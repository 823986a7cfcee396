"""The ranks of a job compared: what each finds on its host, and what does not fit together; it needs a store, and no process group."""

import contextlib
import json
import platform
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossdock.errors import CrossdockError
from crossdock.launch.doctor.clock import OFFSET_S, offset
from crossdock.launch.doctor.examination import examine, installed
from crossdock.launch.doctor.network import towards
from crossdock.launch.doctor.report import Check, as_json
from crossdock.launch.ranks.rendezvous import LOOPBACK, exchange, open_store
from crossdock.launch.ranks.worker_env import WorkerEnv
from crossdock.launch.request import Request

if TYPE_CHECKING:
    from torch.distributed import Store

MUST_AGREE = ("crossdock", "torch", "numpy", "nccl")
"""What differs in these between ranks breaks a run, or its results."""


@dataclass(frozen=True)
class RankFacts:
    """What a rank knows of its host, as it tells the others."""

    rank: int
    node: int
    host: str
    address: str
    interface: str
    mtu_bytes: int
    versions: Mapping[str, str]
    gpus: int
    sees_run_dir: bool
    ahead_s: float
    uncertain_s: float
    checks: tuple[Check, ...]


def doctor(request: Request, env: WorkerEnv, store: "Store | None") -> dict[str, Any]:
    """The job: every rank looks at its host, all tell one another, and rank 0's result holds the report."""
    run_dir = Path(request.arguments["run_dir"])
    checks = examine(run_dir)
    if env.world_size == 1:
        return as_json(checks)
    store = open_store(env, request.config.parallel.timeout_s) if store is None else store
    assert store is not None
    mark = run_dir / ".crossdock-doctor"
    if env.rank == 0:
        with contextlib.suppress(OSError):  # then nobody sees it, and the check of the disk says why
            run_dir.mkdir(parents=True, exist_ok=True)
            mark.touch()
    exchange(store, env, "doctor/marked", "")
    ahead_s, uncertain_s = offset(store, env.rank, env.world_size)
    facts = _facts(env, checks, mark.exists(), ahead_s, uncertain_s)
    told = exchange(store, env, "doctor/facts", json.dumps(asdict(facts)))
    if env.rank == 0:
        mark.unlink(missing_ok=True)
    facts_R = [_read(text) for text in told]
    found = [*merged(facts_R), *compared(facts_R), _group(request, env, store)]
    ranks = [{"rank": one.rank, "node": one.node, "host": one.host, "address": one.address, "interface": one.interface} for one in facts_R]
    return {**as_json(found), "launcher": env.launcher, "ranks": ranks}


def merged(facts_R: Sequence[RankFacts]) -> list[Check]:
    """What is well once for all, as rank 0 sees it; what is not, for every rank that sees it, ranks that see the same together."""
    found = [check for check in facts_R[0].checks if check.level == "ok"]
    troubles: dict[tuple[str, str, str, str], list[int]] = {}
    for facts in facts_R:
        for check in facts.checks:
            if check.level != "ok":
                troubles.setdefault((check.topic, check.level, check.finding, check.remedy), []).append(facts.rank)
    for (topic, level, finding, remedy), ranks in troubles.items():
        found.append(Check(topic, level, f"{numbers(ranks)}: {finding}", remedy))  # type: ignore[arg-type]
    return found


def compared(facts_R: Sequence[RankFacts]) -> list[Check]:
    """What differs between ranks that must agree; pure."""
    checks = [_places(facts_R)]
    for name in sorted({name for facts in facts_R for name in facts.versions}):
        by_version = _by(facts_R, lambda facts, name=name: facts.versions.get(name, "none"))
        if len(by_version) == 1:
            continue
        finding = "; ".join(f"{numbers(ranks)} {version}" for version, ranks in by_version.items())
        if name in MUST_AGREE:
            checks.append(Check(f"{name} differs", "bad", finding, "install the same version everywhere, from constraints.txt"))
        else:
            checks.append(
                Check(f"{name} differs", "note", finding, "install the same version everywhere: what differs is hard to find later")
            )
    if not any(check.topic.endswith(" differs") for check in checks):
        checks.append(Check("versions", "ok", f"equal on all {len(facts_R)} ranks"))
    checks += [_clocks(facts_R), *_mtu(facts_R), *_gpus(facts_R)]
    if blind := [facts.rank for facts in facts_R if not facts.sees_run_dir]:
        remedy = "name a folder on a file system that all hosts share: run.dir=PATH"
        checks.append(Check("run directory", "bad", f"{numbers(blind)} cannot see what rank 0 writes there", remedy))
    return checks


def _places(facts_R: Sequence[RankFacts]) -> Check:
    hosts = _by(facts_R, lambda facts: f"{facts.host} {facts.interface} {facts.address}")
    return Check("ranks", "ok", "; ".join(f"{numbers(ranks)} on {host}" for host, ranks in hosts.items()))


def _clocks(facts_R: Sequence[RankFacts]) -> Check:
    apart = [facts for facts in facts_R if abs(facts.ahead_s) - facts.uncertain_s > OFFSET_S]
    if apart:
        finding = ", ".join(f"rank {facts.rank} is {-facts.ahead_s:+.2f} s from rank 0 (+-{facts.uncertain_s:.3f} s)" for facts in apart)
        return Check("clocks", "note", finding, "times in events and logs do not compare: let chrony or ntpd keep the clocks of all hosts")
    worst = max(facts_R, key=lambda facts: abs(facts.ahead_s))
    return Check("clocks", "ok", f"within {abs(worst.ahead_s):.4f} s of rank 0 (+-{max(facts.uncertain_s for facts in facts_R):.4f} s)")


def _mtu(facts_R: Sequence[RankFacts]) -> list[Check]:
    by_mtu = _by(facts_R, lambda facts: str(facts.mtu_bytes))
    if len(by_mtu) == 1:
        return []
    finding = "; ".join(f"{numbers(ranks)} {mtu}" for mtu, ranks in by_mtu.items())
    return [Check("MTU differs", "note", finding, "large packets may be lost on the way: set one MTU on all interfaces of this network")]


def _gpus(facts_R: Sequence[RankFacts]) -> list[Check]:
    by_count = _by(facts_R, lambda facts: str(facts.gpus))
    if len(by_count) == 1:
        return []
    finding = "; ".join(f"{numbers(ranks)} {count}" for count, ranks in by_count.items())
    return [Check("GPUs differ", "note", finding, "with device: auto all ranks then train on the CPU unless each has a GPU of its own")]


def _group(request: Request, env: WorkerEnv, store: "Store") -> Check:
    """Whether the ranks form the process groups that a run needs."""
    from crossdock.launch.ranks.worker import joined
    from crossdock.runtime.transport.collectives import barrier

    begin_s = time.monotonic()
    try:
        with contextlib.ExitStack() as held, joined(request.config, env, held, trains=False, store=store) as mesh:
            formed_s = time.monotonic() - begin_s
            trips_s = []
            for _ in range(10):
                begin_s = time.perf_counter()
                barrier(mesh)
                trips_s.append(time.perf_counter() - begin_s)
    except CrossdockError as failure:
        return Check("process group", "bad", str(failure), "see the interfaces above, and what stands between the hosts")
    return Check(
        "process group", "ok", f"formed on {mesh.device.type} in {formed_s:.2f} s; a barrier takes {1e3 * sorted(trips_s)[5]:.2f} ms"
    )


def _facts(env: WorkerEnv, checks: tuple[Check, ...], sees_run_dir: bool, ahead_s: float, uncertain_s: float) -> RankFacts:
    import torch

    peer = env.meeting.host if env.meeting is not None and env.meeting.host and env.spans_hosts else LOOPBACK
    try:
        address, interface = towards(socket.gethostbyname(peer))
    except OSError:
        address, interface = "", None
    versions = {**installed(), "python": platform.python_version()}
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return RankFacts(
        rank=env.rank,
        node=env.node,
        host=socket.gethostname(),
        address=address,
        interface="none" if interface is None else interface.name,
        mtu_bytes=0 if interface is None else interface.mtu_bytes,
        versions=versions,
        gpus=torch.cuda.device_count(),
        sees_run_dir=sees_run_dir,
        ahead_s=ahead_s,
        uncertain_s=uncertain_s,
        checks=checks,
    )


def _read(text: str) -> RankFacts:
    fields = json.loads(text)
    return RankFacts(**{**fields, "checks": tuple(Check(**check) for check in fields["checks"])})


def _by(facts_R: Sequence[RankFacts], key: Any) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for facts in facts_R:
        groups.setdefault(key(facts), []).append(facts.rank)
    return groups


def numbers(ranks: Sequence[int]) -> str:
    """`rank 3`, or `ranks 0-2, 5`."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
