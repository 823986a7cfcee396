"""The ranks of one system: started in its own environment, on this host or on emulated ones, and led by orders (see `rank`)."""

import contextlib
import json
import os
import queue
import socket
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.netlab import Lab

FIRST_PORT = 29_600  # any port is free in a fresh namespace
ROOT = Path(__file__).resolve().parents[2]


class CrewLost(Exception):
    """A rank failed or did not answer; the message says which and why. The crew has been ended."""


@dataclass(frozen=True)
class Hosts:
    """Where ranks run: this host and its loopback, or the emulated hosts of a laboratory, with equally many ranks each."""

    lab: Lab | None = None

    @property
    def num_nodes(self) -> int:
        return 1 if self.lab is None else self.lab.nodes

    def command(self, node: int, arguments: list[str]) -> list[str]:
        """`arguments` as a command of this machine that runs them on host `node`."""
        return arguments if self.lab is None else self.lab.command(node, arguments)

    def meeting(self, number: int) -> dict[str, str]:
        """Variables by which the ranks of crew `number` find each other and the interface to use."""
        if self.lab is not None:
            return {"MASTER_ADDR": self.lab.address(0), "MASTER_PORT": str(FIRST_PORT + number), **_interface("eth0")}
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port(number)), **_interface("lo")}

    def sent_bytes(self) -> int:
        """Bytes that the busiest host has sent over its link so far, headers included; on one host those over the loopback."""
        if self.lab is not None:
            return max(self.lab.counters(node).sent_bytes for node in range(self.lab.nodes))
        for line in Path("/proc/net/dev").read_text().splitlines():
            if line.strip().startswith("lo:"):
                return int(line.partition(":")[2].split()[8])
        raise RuntimeError("this host has no loopback interface")


def _free_port(number: int) -> int:
    """A port below those that systems hand out by themselves: the ranks of other crews take theirs from there in the meantime."""
    first = 20_000 + (os.getpid() * 16 + number) % 12_000
    for port in range(first, first + 700):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(f"no free port from {first} to {first + 700}")


def _interface(name: str) -> dict[str, str]:
    return {"GLOO_SOCKET_IFNAME": name, "TP_SOCKET_IFNAME": name}


class Crew:
    """All ranks of `adapter`; a context manager that ends them."""

    def __init__(
        self, adapter: str, python: str, hosts: Hosts, ranks: int, number: int, log: Path, variables: Mapping[str, str] | None = None
    ) -> None:
        self.adapter, self.log = adapter, log
        per_node = ranks // hosts.num_nodes
        meeting = hosts.meeting(number)
        self._processes: list[subprocess.Popen[str]] = []
        self._answers: list[queue.Queue[str | None]] = []
        with log.open("a") as stderr:
            for rank in range(ranks):
                node, local_rank = divmod(rank, per_node)
                environment = {
                    **os.environ, **meeting, **(variables or {}), "OMP_NUM_THREADS": "1",
                    "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(local_rank),
                    "LOCAL_WORLD_SIZE": str(per_node), "LOCAL_SIZE": str(per_node), "GROUP_RANK": str(node),
                }  # fmt: skip
                environment.pop("PYTHONPATH", None)
                command = hosts.command(node, [python, "-m", "benchmarks.peers.rank", adapter])
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=environment, cwd=ROOT, text=True, bufsize=1
                )
                answers: queue.Queue[str | None] = queue.Queue()
                threading.Thread(target=_listen, args=(process, answers), daemon=True).start()
                self._processes.append(process)
                self._answers.append(answers)

    def order(self, timeout_s: float = 120.0, **order: Any) -> list[dict[str, Any]]:
        """Give all ranks one order and return their answers by rank; raises `CrewLost` at the first failure or after `timeout_s`."""
        line = json.dumps(order) + "\n"
        for rank, process in enumerate(self._processes):
            assert process.stdin is not None
            try:
                process.stdin.write(line)
                process.stdin.flush()
            except OSError:
                self._lose(f"rank {rank} has ended: {self._last_words()}")
        deadline_s = time.monotonic() + timeout_s
        found: dict[int, dict[str, Any]] = {}
        while len(found) < len(self._processes):
            for rank, answers in enumerate(self._answers):
                if rank in found:
                    continue
                try:
                    text = answers.get(timeout=0.0005 if len(self._processes) > 1 else 0.05)
                except queue.Empty:
                    continue
                if text is None:
                    self._lose(f"rank {rank} ended: {self._last_words()}")
                found[rank] = json.loads(text or "{}")
                if "error" in found[rank]:
                    self._lose(f"rank {rank}: {found[rank]['error']}")
            if time.monotonic() > deadline_s:
                missing = [rank for rank in range(len(self._processes)) if rank not in found]
                self._lose(f"ranks {missing} did not answer {order['do']!r} within {timeout_s:.0f} s")
        return [found[rank] for rank in range(len(self._processes))]

    def close(self) -> None:
        """End all ranks; a second call finds nothing to do."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lose(self, reason: str) -> None:
        self.close()
        raise CrewLost(reason)

    def _last_words(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip() if lines else "it said nothing"


def _listen(process: subprocess.Popen[str], answers: "queue.Queue[str | None]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        answers.put(line)
    answers.put(None)
