"""Faults of nodes and of the network between them, on emulated hosts under torchrun (root, Linux)."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.chaos.runs import EVERY, STEPS, Row, Trial, Workshop, ended, errors_of, lines, result_of, wait_for_steps
from benchmarks.netlab import Lab
from benchmarks.netlab.lab import PORT
from benchmarks.netlab.links import ip
from crossdock.launch.ranks.faults import Fault

TIMEOUT_S = 4.0
CUT_S = 8.0
NODES = 2
SLOW_BIT_PER_S = 400e3
REPLACED_S = 1.0
"""After which whoever supervises the nodes has put a lost one back."""


def _agent(lab: Lab, node: int, workshop: Workshop, directory: Path, *overrides: str) -> "subprocess.Popen[str]":
    """torchrun on one node; stdout and stderr as `Workshop.start` has them."""
    options = ["--nnodes", str(NODES), "--nproc-per-node", "1", "--local-addr", lab.address(node), "--max-restarts", "20"]
    options += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{lab.address(0)}:{PORT}", "--rdzv-id", directory.name]
    options += ["--monitor-interval", "0.1", "--rdzv-conf", "keep_alive_interval=1,keep_alive_max_attempt=60,join_timeout=120"]
    command = lab.command(node, [sys.executable, "-m", "torch.distributed.run", *options, "-m", "crossdock"])
    # a store that agents share with ranks keeps what a lost node wrote, and the next rendezvous reads it
    interface = {"GLOO_SOCKET_IFNAME": "eth0", "TP_SOCKET_IFNAME": "eth0", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return workshop.start(directory, f"parallel.timeout_s={TIMEOUT_S}", *overrides, command=command, environment=interface)


@contextlib.contextmanager
def _on_nodes(lab: Lab, workshop: Workshop, directory: Path, *overrides: str) -> Iterator[list["subprocess.Popen[str]"]]:
    agents = [_agent(lab, node, workshop, directory, *overrides) for node in range(NODES)]
    try:
        yield agents
    finally:
        for agent in agents:
            _end(agent)


def _end(agent: "subprocess.Popen[str]") -> None:
    """Leave nothing of its session, however the trial went."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(agent.pid, signal.SIGKILL)
    agent.wait()


def _pause(step: int, seconds: float) -> Fault:
    """Time for a blow from outside to strike while this step is made."""
    return Fault("sleep", 0, "backward", step, seconds=seconds)


def _wait_for_blame(directory: Path, begin_s: float, limit_s: float) -> tuple[str, float | None]:
    """What the run says was lost, and after how many seconds it did."""
    while time.monotonic() - begin_s < limit_s:
        message = str(result_of(directory).get("message", ""))
        if "(process " in message:  # before the roll was called it only says that a collective failed
            return message, time.monotonic() - begin_s
        time.sleep(0.02)
    return "", None


def _resumed_s(directory: Path, known: int, begin_s: float, limit_s: float) -> float | None:
    """Seconds until the run has resumed once more than the `known` times."""
    while time.monotonic() - begin_s < limit_s:
        if sum(event["event"] == "resumed" for event in lines(directory / "events.jsonl")) > known:
            return time.monotonic() - begin_s
        time.sleep(0.02)
    return None


def node_losses(workshop: Workshop, lab: Lab, trials: int, seed: int) -> list[Row]:
    """SIGKILL of every process of a node, its agent included; a new agent comes in its place."""
    draw, row = random.Random(seed), Row("SIGKILL of a whole emulated node (torchrun)", "named, goes on when a node comes back, bitwise")
    for _ in range(trials):
        directory, step = workshop.directory(), draw.randint(EVERY + 1, STEPS - 1)
        with _on_nodes(lab, workshop, directory, workshop.script(directory, [_pause(step, 0.5)])) as agents:
            wait_for_steps(directory, step - 1)
            begin_s = time.monotonic()
            for pid in subprocess.run(["ip", "netns", "pids", lab.namespace(1)], capture_output=True, text=True, check=True).stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            agents[1].wait()
            message, detection_s = _wait_for_blame(directory, begin_s, 30.0)
            time.sleep(max(0.0, REPLACED_S - (time.monotonic() - begin_s)))
            agents[1] = _agent(lab, 1, workshop, directory)
            recovery_s = _resumed_s(directory, 0, begin_s, 120.0)
            codes = [ended(agent) for agent in agents]
        row.trials.append(_judged(workshop, directory, codes, "rank 1" in message, message, detection_s, recovery_s))
    return [row]


def partitions(workshop: Workshop, lab: Lab, trials: int, seed: int) -> list[Row]:
    """A link that carries nothing for some seconds, longer than the ranks wait for one another."""
    draw = random.Random(seed)
    row = Row("network partition (torchrun)", f"named in timeout ({TIMEOUT_S:g} s) + 3 s, goes on when the link is back, bitwise")
    for _ in range(trials):
        directory, step = workshop.directory(), draw.randint(EVERY + 1, STEPS - 1)
        with _on_nodes(lab, workshop, directory, workshop.script(directory, [_pause(step, 0.5)])) as agents:
            wait_for_steps(directory, step - 1)
            begin_s = time.monotonic()
            ip(lab.namespace(1), "link set eth0 down")
            message, detection_s = _wait_for_blame(directory, begin_s, 30.0)
            time.sleep(max(0.0, CUT_S - (time.monotonic() - begin_s)))
            ip(lab.namespace(1), "link set eth0 up")
            back_s = time.monotonic()
            recovery_s = _resumed_s(directory, 0, back_s, 120.0)
            codes = [ended(agent) for agent in agents]
        row.trials.append(_judged(workshop, directory, codes, "rank 1" in message, message, detection_s, recovery_s))
    return [row]


def slow_links(workshop: Workshop, lab: Lab, trials: int, seed: int) -> list[Row]:
    """A link that falls to a crawl for some seconds: nobody is lost, and nobody must be blamed."""
    draw, row = random.Random(seed), Row("slow link (torchrun)", "no restart, nobody blamed, bitwise")
    for _ in range(trials):
        directory, step = workshop.directory(), draw.randint(2, STEPS // 2)
        with _on_nodes(lab, workshop, directory) as agents:
            wait_for_steps(directory, step)
            lab.set_rate(SLOW_BIT_PER_S)
            time.sleep(2.0)
            lab.set_rate(None)
            codes = [ended(agent) for agent in agents]
        quiet = not result_of(directory).get("message") and not any(
            event["event"] == "resumed" for event in lines(directory / "events.jsonl")
        )
        row.trials.append(_judged(workshop, directory, codes, quiet, str(result_of(directory).get("message")), None, None))
    return [row]


def kills_under_torchrun(workshop: Workshop, trials: int, seed: int) -> list[Row]:
    """SIGKILL and SIGSTOP of ranks that torchrun --max-restarts starts again."""
    draw, rows = random.Random(seed), []
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "5",
        "-m",
        "crossdock",
    ]
    for act, limit in (("kill", "2 s"), ("stop", f"timeout ({TIMEOUT_S:g} s) + 3 s")):
        row = Row(f"{act} of a rank under torchrun --max-restarts", f"named in {limit}, goes on, bitwise")
        for _ in range(trials):
            directory = workshop.directory()
            fault = Fault(act, draw.randrange(2), "in_flight", draw.randint(EVERY + 1, STEPS - 1))
            overrides = [workshop.script(directory, [fault]), f"parallel.timeout_s={TIMEOUT_S}"]
            process = workshop.start(directory, *overrides, command=torchrun)
            try:
                wait_for_steps(directory, fault.step - 1)
                begin_s = time.monotonic()
                message, detection_s = _wait_for_blame(directory, begin_s, 60.0)
                recovery_s = _resumed_s(directory, 0, begin_s, 120.0)
                code = ended(process)
            finally:
                _end(process)
            named = f"rank {fault.rank} (" in message
            row.trials.append(_judged(workshop, directory, [code], named, message, detection_s, recovery_s))
        rows.append(row)
    return rows


def _judged(
    workshop: Workshop, directory: Path, codes: list[int], named: bool, message: str, detection_s: float | None, recovery_s: float | None
) -> Trial:
    survived = codes == [0] * len(codes) and result_of(directory).get("status") == "done"
    note = "" if survived and named else f"exit codes {codes}; blamed: {message[:300]} {'' if survived else errors_of(directory)}"
    return Trial(survived, named, survived and workshop.is_undisturbed(directory), detection_s, recovery_s, note)
