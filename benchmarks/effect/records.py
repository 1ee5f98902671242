"""Runs and what became of them, in CSV files: what is there has been done."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effect.lines import read_lines, write_lines
from effect.train import Member

__all__ = ["ALL", "OWN", "RANK", "SAMPLES", "Record", "Run", "Variant", "append", "at", "read"]

RANK, SAMPLES = 32, 320  # where starts are compared
OWN = 0  # in place of a rank: the method has its own
ALL = 0  # in place of a number of samples

# Method, scale of A and B, rate of B over A's, weight decay: what is tuned by the rate alone.
Variant = tuple[str, float, float, float]


@dataclass(frozen=True)
class Run:
    """A member, and what it is trained on.

    Attributes:
        rank: r of every layer, or :data:`OWN`.
        samples: how many of the task's a start is chosen by, or :data:`ALL`.
    """

    task: str
    member: Member
    rank: int = RANK
    samples: int = SAMPLES


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


def at(records: Iterable[Record], rank: int = RANK, samples: int = SAMPLES) -> list[Record]:
    """Those of one rank and one number of samples: others are not to be compared with them."""
    return [record for record in records if (record.rank, record.samples) == (rank, samples)]


def read(folder: Path) -> list[Record]:
    """All lines of all CSV files in a folder. ValueError for a file of other columns."""
    return [line for path in sorted(folder.glob("*.csv")) for line in read_lines(path, Record)]


def append(path: Path, records: Iterable[Record]) -> None:
    """Add lines to a file, all of them or none, with the header where it is new."""
    write_lines(path, Record, records, add=True)
