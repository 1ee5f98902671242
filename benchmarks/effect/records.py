"""Runs and what became of them, in CSV files: what is there has been done."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from effect.train import Member

__all__ = ["Record", "Run", "Variant", "append", "read"]

# Method, scale of A and B, rate of B over A's, weight decay: what is tuned by the rate alone.
Variant = tuple[str, float, float, float]


@dataclass(frozen=True)
class Run:
    """A member, and what it is trained on."""

    task: str
    member: Member
    rank: int = 32
    samples: int = 320


@dataclass(frozen=True)
class Record:
    """A line of a file: a run, and its result. NaN where there is none."""

    task: str
    method: str
    scale: float
    rate: float
    ratio: float
    decay: float
    seed: int
    rank: int
    samples: int
    steps: int
    loss: float
    middle: float
    general: float
    accuracy: float
    device: str

    @classmethod
    def of(cls, run: Run, **result: Any) -> Record:
        """The line of a run; ``result`` has the steps and what follows."""
        m = run.member
        of_member = (m.method, m.scale, m.rate, m.ratio, m.decay, m.seed)
        return cls(run.task, *of_member, run.rank, run.samples, **result)

    @property
    def run(self) -> Run:
        m = Member(self.method, self.rate, self.scale, self.ratio, self.decay, self.seed)
        return Run(self.task, m, self.rank, self.samples)

    @property
    def variant(self) -> Variant:
        return (self.method, self.scale, self.ratio, self.decay)

    @property
    def reached(self) -> float:
        """The loss, infinite where the run diverged."""
        return self.loss if math.isfinite(self.loss) else math.inf


def read(folder: Path, pattern: str = "*.csv") -> list[Record]:
    """All lines of the CSV files in a folder. ValueError for a file of other columns."""
    hints = get_type_hints(Record)
    names = [field.name for field in fields(Record)]
    found: list[Record] = []
    for path in sorted(folder.glob(pattern)):
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != names:
                raise ValueError(f"{path} has the columns {reader.fieldnames}; expected {names}")
            found += [Record(**{k: hints[k](v) for k, v in row.items()}) for row in reader]
    return found


def append(path: Path, records: Iterable[Record]) -> None:
    """Add lines to a file, all of them or none, with the header where it is new."""
    lines: list[dict[str, Any]] = [asdict(record) for record in records]
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Record)])
        if new:
            writer.writeheader()
        writer.writerows(lines)
