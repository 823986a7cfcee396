"""Interleaved rounds: in every round each variant of every system takes one step, while all others stand still.

All systems' ranks live side by side and wait for orders, so that one machine state serves all; the order within a round rotates. A system
that cannot be installed, built or agree with the right answers leaves a reason in its rows and does not disturb the others.
"""

import ast
import contextlib
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.peers.case import Case
from benchmarks.peers.crew import Crew, CrewLost, Hosts
from benchmarks.peers.environments import SYSTEMS, NotInstalled, install, python_of, variables_of

ADAPTERS = Path(__file__).parent / "adapters"

EXPERTS_ALONE = "experts alone"
"""Our experts on the rows that arrive, with nothing sent: no row of its own, but the bound of all rows."""

TOLERANCE = {"layer fp32": 1e-5, "layer bf16": 2e-2, "model fp32": 1e-3, "model bf16": 0.3}
"""Relative errors up to which a row counts as the same mathematics. In a bf16 model tokens whose logits nearly tie may choose otherwise."""


@dataclass(frozen=True)
class Variant:
    """One row: a system's way of doing the layer."""

    system: str
    name: str
    how: str

    @property
    def ours(self) -> bool:
        return self.system == "crossdock"


@dataclass
class Outcome:
    """What a variant did on one case: errors of its step, then seconds and bytes of each round; or why it did not."""

    variant: Variant
    errors: Mapping[str, float] = field(default_factory=dict)
    step_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    link_bytes: list[int] = field(default_factory=list)
    reason: str = ""


def variants_of(system: str, scopes: Sequence[str] | None = None) -> list[Variant]:
    """The variants that a system's adapter names, read without importing it (it belongs to another environment).

    VARIANTS holds everywhere, and a table like SKEWED_NODES_VARIANTS where all words before VARIANTS are among `scopes` (None: all tables).
    """
    tree = ast.parse((ADAPTERS / f"{SYSTEMS[system].adapter}.py").read_text())
    found = []
    for node in tree.body:
        table = str(getattr(node.targets[0], "id", "")) if isinstance(node, ast.Assign) else ""
        if isinstance(node, ast.Assign) and table.endswith("VARIANTS"):
            where = table.split("_")[:-1]
            if scopes is None or set(where) <= set(scopes):
                found += [Variant(system, name, how) for name, how in ast.literal_eval(node.value).items()]
    return found


def scopes_of(case: Case, hosts: Hosts) -> list[str]:
    """The words that hold for a case on some hosts."""
    return ["LOCAL" if hosts.lab is None else "NODES", case.dtype.upper(), *(["SKEWED"] if case.skewed else [])]


class Stage:
    """All systems' ranks on some hosts; a context manager that ends them. `lost` tells why a system is not there."""

    def __init__(self, systems: Sequence[str], folder: Path, hosts: Hosts, ranks: int) -> None:
        self.systems, self.folder, self.hosts, self.ranks = tuple(systems), folder, hosts, ranks
        self.lost: dict[str, str] = {}
        self._crews: dict[str, Crew] = {}
        self._end = contextlib.ExitStack()

    def __enter__(self) -> "Stage":
        with contextlib.ExitStack() as end:
            logs = Path(end.enter_context(tempfile.TemporaryDirectory(prefix="crossdock-peers-")))
            for number, name in enumerate(self.systems):
                system = SYSTEMS[name]
                try:
                    if install(system, self.folder):
                        print(f"installed {system.environment}", file=sys.stderr)
                except NotInstalled as error:
                    self.lost[name] = f"not installed: {error}"
                    continue
                python, variables = python_of(system, self.folder), variables_of(system, self.folder)
                crew = Crew(system.adapter, python, self.hosts, self.ranks, number, logs / f"{name}.log", variables)
                self._crews[name] = end.enter_context(crew)
            self._end = end.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.close()

    @contextlib.contextmanager
    def built(self, case: Case) -> Iterator[list[Outcome]]:
        """Every variant built on `case` and held against its right answers; those that failed carry their reason."""
        outcomes = []
        with tempfile.TemporaryDirectory(prefix="crossdock-peers-case-") as folder:
            path = Path(folder) / "case.pt"
            case.save(path)
            for name in self.systems:
                for variant in variants_of(name, scopes_of(case, self.hosts)):
                    if variant.name == EXPERTS_ALONE and case.kind == "model":
                        continue
                    outcome = Outcome(variant)
                    outcomes.append(outcome)
                    with self._reporting(outcome):
                        self._crew(variant).order(do="build", variant=variant.name, case=str(path), timeout_s=180)
                        found = self._crew(variant).order(do="check", variant=variant.name, timeout_s=180)
                        outcome.errors = {key: max(answer[key] for answer in found) for key in found[0] if found[0][key] is not None}
            yield outcomes
            for crew in self._crews.values():
                with contextlib.suppress(CrewLost):  # said when it was lost
                    crew.order(do="forget")

    def measure(self, outcomes: Sequence[Outcome], rounds: int, warmup: int = 1) -> None:
        """`rounds` timed steps of every variant, taking turns, after `warmup` rounds that do not count."""
        for outcome in outcomes:
            outcome.step_s, outcome.cpu_s, outcome.link_bytes = [], [], []
        for number in range(-warmup, rounds):
            turn = number % len(outcomes)
            for outcome in [*outcomes[turn:], *outcomes[:turn]]:
                if not outcome.reason:
                    with self._reporting(outcome):
                        self._step(outcome, timed=number >= 0)

    def _step(self, outcome: Outcome, timed: bool) -> None:
        sent_bytes = self.hosts.sent_bytes()
        found = self._crew(outcome.variant).order(do="step", variant=outcome.variant.name)
        step_s = max(answer["step_s"] for answer in found)
        if not timed:
            return
        outcome.step_s.append(step_s)
        outcome.cpu_s.append(sum(answer["cpu_s"] for answer in found) / len(found))
        outcome.link_bytes.append(self.hosts.sent_bytes() - sent_bytes)

    def _crew(self, variant: Variant) -> Crew:
        if variant.system in self.lost:
            raise CrewLost(self.lost[variant.system])
        return self._crews[variant.system]

    @contextlib.contextmanager
    def _reporting(self, outcome: Outcome) -> Iterator[None]:
        try:
            yield
        except CrewLost as error:
            outcome.reason = str(error)
            self.lost.setdefault(outcome.variant.system, str(error))
            print(f"{outcome.variant.name}: {error}", file=sys.stderr)
