"""All trials so far, on disk as soon as they are over: a long call that is cut off goes on where it was."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.chaos.runs import Row, Trial
from crossdock import atomic


@dataclass(frozen=True)
class Portion:
    """Some trials of one fault of the command line, done in one go: `number` of a call with this `seed`, from the trial `first` on."""

    name: str
    seed: int
    first: int
    trials: int
    commit: str
    command: str
    rows: tuple[Row, ...]
    seconds: float = 0.0
    """That they took together."""

    @property
    def is_kept(self) -> bool:
        """Whether every promise was."""
        return all(row.is_kept for row in self.rows)


@dataclass(frozen=True)
class Journal:
    """The portions of all calls, one JSON line each in a file beside the table; None: kept in no file."""

    path: Path | None
    portions: tuple[Portion, ...] = ()

    @classmethod
    def read(cls, path: Path | None) -> "Journal":
        """What stands at `path`; a torn last line, of a call that was cut off, is left out."""
        text = path.read_text() if path is not None and path.exists() else ""
        return cls(path, tuple(_portion(json.loads(line)) for line in text.split("\n")[:-1]))

    def without(self, name: str) -> "Journal":
        """As if the fault had never been tried."""
        return self._written(portion for portion in self.portions if portion.name != name)

    def with_portion(self, portion: Portion) -> "Journal":
        """With one more."""
        return self._written((*self.portions, portion))

    def has(self, name: str, seed: int, first: int, trials: int) -> bool:
        """Whether these trials are done."""
        return (name, seed, first, trials) in ((done.name, done.seed, done.first, done.trials) for done in self.portions)

    def rows(self, name: str | None = None) -> list[Row]:
        """Of the fault `name`, or all: the trials of all portions together."""
        together: dict[str, Row] = {}
        for portion in self.portions:
            for row in portion.rows if name in (None, portion.name) else ():
                together.setdefault(row.fault, replace(row, trials=[])).trials.extend(row.trials)
        return list(together.values())

    def seconds_of(self, name: str | None = None) -> float:
        """That the trials of the fault `name`, or all, took."""
        return sum(portion.seconds for portion in self.portions if name in (None, portion.name))

    @property
    def commits(self) -> list[str]:
        """Of all portions."""
        return list(dict.fromkeys(portion.commit for portion in self.portions))

    @property
    def commands(self) -> list[str]:
        """That made them."""
        return list(dict.fromkeys(portion.command for portion in self.portions))

    def _written(self, portions: Iterable[Portion]) -> "Journal":
        journal = replace(self, portions=tuple(portions))
        if self.path is not None:
            atomic.write_text(self.path, "".join(json.dumps(asdict(portion)) + "\n" for portion in journal.portions))
        return journal


def _portion(fields: dict[str, Any]) -> Portion:
    rows = (Row(**{**row, "trials": [Trial(**trial) for trial in row["trials"]]}) for row in fields["rows"])
    return Portion(**{**fields, "rows": tuple(rows)})
