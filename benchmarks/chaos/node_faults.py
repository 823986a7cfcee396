"""Faults of nodes and of the network between them, on emulated hosts under the torchrun that `crossdock launch` prints (root, Linux)."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.chaos.runs import (
    EVERY,
    LIMIT_S,
    NUM_RANKS,
    STEPS,
    Aftermath,
    Row,
    Workshop,
    end_session,
    ended,
    judged,
    lines,
    script_of,
    wait_for_steps,
)
from benchmarks.netlab import Lab
from benchmarks.netlab.lab import PORT
from benchmarks.netlab.links import ip
from crossdock.launch.ranks.faults import Fault, log_of, struck
from crossdock.launch.scripts import allocation
from crossdock.launch.scripts.allocation import Run, Shape

TIMEOUT_S = 4.0
CUT_S = 8.0
NODES = 2
RESTARTS = 20
FOUR_RANKS = ("parallel.expert=4", "topology=2x2-local")
SLOW_BIT_PER_S = 400e3
REPLACED_S = 1.0
"""After which whoever supervises the nodes has put a lost one back."""


class Nodes:
    """torchrun on the hosts of a laboratory, and whoever supervises it there: puts back agents that end badly, where that is asked."""

    def __init__(self, lab: Lab, workshop: Workshop, directory: Path, ranks_per_node: int, *overrides: str) -> None:
        self.lab, self.workshop, self.directory, self.ranks_per_node = lab, workshop, directory, ranks_per_node
        self.overrides = (f"parallel.timeout_s={TIMEOUT_S}", *overrides)
        self.agents = [self._agent(node) for node in range(NODES)]
        self.codes: list[list[int]] = [[] for _ in range(NODES)]

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, *_: object) -> None:
        for agent in self.agents:
            end_session(agent)

    def kill(self, node: int) -> None:
        """SIGKILL for every process of a node at once, its agent included."""
        found = subprocess.run(["ip", "netns", "pids", self.lab.namespace(node)], capture_output=True, text=True, check=True).stdout
        for pid in found.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def ended(self, limit_s: float = LIMIT_S, *, supervises: bool = False) -> bool:
        """Wait for the end of all agents; says whether it is a good one. supervises: one that ended badly is put back a little later."""
        deadline_s = time.monotonic() + limit_s
        while time.monotonic() < deadline_s:
            codes = [agent.poll() for agent in self.agents]
            if all(code == 0 for code in codes) or (None not in codes and not supervises):
                break
            for node, code in enumerate(codes):
                if code and supervises:
                    self.codes[node].append(code)
                    time.sleep(REPLACED_S)
                    self.agents[node] = self._agent(node)
            time.sleep(0.05)
        return all(agent.poll() == 0 for agent in self.agents)

    def _agent(self, node: int) -> "subprocess.Popen[str]":
        shape = Shape(NODES, self.ranks_per_node, gpus=False, cores_per_rank=1)
        run = Run(self.directory.name, self.directory, "", ())
        command = allocation.torchrun(shape, run, self.lab.address(0), PORT, RESTARTS)
        launcher = command[: command.index("-m")]
        inside = [
            *launcher[: launcher.index("torchrun")],
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--local-addr",
            self.lab.address(node),
        ]
        inside += [*launcher[launcher.index("torchrun") + 1 :], "-m", "crossdock"]
        interface = {"GLOO_SOCKET_IFNAME": "eth0", "TP_SOCKET_IFNAME": "eth0"}
        return self.workshop.start(self.directory, *self.overrides, command=self.lab.command(node, inside), environment=interface)


def _pause(step: int, seconds: float) -> Fault:
    """Time for a blow from outside to strike while this step is made."""
    return Fault("sleep", 0, "backward", step, seconds=seconds)


def node_losses(workshop: Workshop, lab: Lab, trials: int, seed: int) -> list[Row]:
    """SIGKILL of every process of a node, its agent included; a new agent comes in its place.

    The node that does not hold torchrun's rendezvous, whose peer goes on waiting; and the one that does, with which the other agent ends.
    """
    draw, rows = random.Random(seed), []
    for node, which in ((1, "a node"), (0, "the node of the rendezvous")):
        promise = "all its ranks named in 2 s, goes on in 15 s when it is back, bitwise"
        row = Row(f"SIGKILL of {which}, 2 x 2 ranks (torchrun)", promise, [], 2.0, 15.0)
        for _ in range(trials):
            directory, step = workshop.directory(), draw.randint(EVERY + 1, STEPS - 1)
            with Nodes(lab, workshop, directory, 2, workshop.script(directory, [_pause(step, 0.5)]), *FOUR_RANKS) as nodes:
                wait_for_steps(directory, step - 1, nodes.agents)
                blow_s = time.monotonic()
                nodes.kill(node)
                is_done = nodes.ended(supervises=True)
            after = Aftermath.of(directory, blow_s)
            named = f"ranks {2 * node}, {2 * node + 1} (all of node{node})" in after.blame
            row.trials.append(judged(workshop, directory, is_done, named, after, *FOUR_RANKS))
        rows.append(row)
    return rows


def partitions(workshop: Workshop, lab: Lab, trials: int, seed: int) -> list[Row]:
    """A link that carries nothing for some seconds, longer than the ranks wait for one another."""
    draw = random.Random(seed)
    promise = f"named in timeout ({TIMEOUT_S:g} s) + 3 s, goes on in 15 s when the link is back, bitwise"
    row = Row("network partition (torchrun)", promise, [], TIMEOUT_S + 3.0, 15.0)
    for _ in range(trials):
        directory, step = workshop.directory(), draw.randint(EVERY + 1, STEPS - 1)
        with Nodes(lab, workshop, directory, 1, workshop.script(directory, [_pause(step, 0.5)])) as nodes:
            wait_for_steps(directory, step - 1, nodes.agents)
            blow_s = time.monotonic()
            ip(lab.namespace(1), "link set eth0 down")
            time.sleep(CUT_S)
            ip(lab.namespace(1), "link set eth0 up")
            back_s = time.monotonic()
            is_done = nodes.ended()
        after = Aftermath.of(directory, blow_s, back_s)
        row.trials.append(judged(workshop, directory, is_done, "rank 1 (" in after.blame, after))
    return [row]


def slow_links(workshop: Workshop, lab: Lab, trials: int, seed: int) -> list[Row]:
    """A link that falls to a crawl for some seconds: nobody is lost, and nobody must be blamed."""
    draw, row = random.Random(seed), Row("slow link (torchrun)", "no restart, nobody blamed, bitwise")
    for _ in range(trials):
        directory, step = workshop.directory(), draw.randint(2, STEPS // 2)
        with Nodes(lab, workshop, directory, 1) as nodes:
            wait_for_steps(directory, step, nodes.agents)
            lab.set_rate(SLOW_BIT_PER_S)
            time.sleep(2.0)
            lab.set_rate(None)
            is_done = nodes.ended()
        told = [event for event in lines(directory / "events.jsonl") if event["event"] in ("rank_lost", "resumed")]
        row.trials.append(judged(workshop, directory, is_done, not told, Aftermath(str(told or ""))))
    return [row]


def kills_under_torchrun(workshop: Workshop, trials: int, seed: int) -> list[Row]:
    """SIGKILL and SIGSTOP of ranks that torchrun --max-restarts starts again."""
    draw, rows = random.Random(seed), []
    launcher = ["--standalone", "--nproc-per-node", str(NUM_RANKS), "--max-restarts", "5"]
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, "-m", "crossdock"]
    blows_of = (("kill", "SIGKILL", "2 s", 2.0), ("stop", "SIGSTOP", f"timeout ({TIMEOUT_S:g} s) + 3 s", TIMEOUT_S + 3.0))
    for act, blow, limit, limit_s in blows_of:
        row = Row(f"{blow} of a rank (torchrun --max-restarts)", f"named in {limit}, goes on in 15 s, bitwise", [], limit_s, 15.0)
        for number in range(trials):
            directory = workshop.directory()
            fault = Fault(act, number % NUM_RANKS, draw.choice(("in_flight", "backward", "optimizer")), draw.randint(EVERY + 1, STEPS - 1))
            overrides = [workshop.script(directory, [fault]), f"parallel.timeout_s={TIMEOUT_S}"]
            process = workshop.start(directory, *overrides, command=command)
            try:
                code = ended(process)
            finally:
                end_session(process)
            blows = struck(log_of(script_of(directory)))
            after = Aftermath.of(directory, blows[0]["monotonic_s"]) if blows else Aftermath("it never struck")
            row.trials.append(judged(workshop, directory, code == 0, f"rank {fault.rank} (" in after.blame, after))
        rows.append(row)
    return rows
