"""The results of the accuracy tables: one JSON file for each table, written after each row, whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What one row measures; two rows of one case are never there."""

    table: str
    recipe: str
    share: float  # of the dense model's MACs
    iterations: int
    seed: int
    rate: float  # of learning; 0 where nothing is trained

    @classmethod
    def of(cls, row: Row) -> Case:
        """Return what a row measures."""
        return cls(**{name: row[name] for name in cls.__dataclass_fields__})

    def matches(self, row: Row) -> bool:
        return all(row[name] == value for name, value in asdict(self).items())


@dataclass(frozen=True)
class Store:
    """The rows and the trials of learning rates of one table, in a file; two processes may add to it."""

    file: Path

    def read(self, kind: str) -> list[Row]:
        """Return what is there of a kind: `rows`, `trials` or `latency`."""
        return json.loads(self.file.read_text()).get(kind, []) if self.file.is_file() else []

    def has(self, kind: str, case: Case) -> bool:
        return any(case.matches(row) for row in self.read(kind))

    def add(self, kind: str, row: Row) -> None:
        """Add a row, in place of an older one of the same case."""
        case = Case.of(row)
        with self._locked():
            found = json.loads(self.file.read_text()) if self.file.is_file() else {}
            found[kind] = [old for old in found.get(kind, []) if not case.matches(old)] + [row]
            part = self.file.with_suffix('.part')
            lines = {k: '[\n' + ',\n'.join(json.dumps(each) for each in rows) + '\n]' for k, rows in found.items()}
            part.write_text('{' + ',\n'.join(f'{json.dumps(k)}: {text}' for k, text in lines.items()) + '}\n')
            os.replace(part, self.file)

    def rate(self, case: Case, tried: int) -> float | None:
        """Return the learning rate that did best on the held-out pictures for a recipe, at `tried` iterations."""
        wanted = {'table': case.table, 'recipe': case.recipe, 'share': case.share, 'iterations': tried}
        trials = [row for row in self.read('trials') if all(row[k] == v for k, v in wanted.items())]
        return max(trials, key=lambda row: row['held_out'])['rate'] if trials else None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.with_suffix('.lock').open('w') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
