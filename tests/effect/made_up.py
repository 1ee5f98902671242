"""Records of runs that nobody ran."""

from __future__ import annotations

import math
from collections.abc import Callable

from effect.records import Record, Run


def record(run: Run, loss: float, general: float = 4.0, accuracy: float = math.nan) -> Record:
    result = {"loss": loss, "middle": loss, "general": general, "accuracy": accuracy}
    return Record.of(run, steps=250, device="CPU", **result)


def valley(run: Run, least: float = 3.162e-3) -> float:
    """A loss that is least at a rate, and rises with the seed."""
    return 1 + abs(math.log10(run.member.rate / least)) + run.member.seed / 100


def played(
    rounds: Callable[[list[Record]], list[Run]],
    loss: Callable[[Run], float] = valley,
    begun: list[Record] | None = None,
) -> list[Record]:
    """What a round has run when it lacks nothing more, after what it has ``begun`` with."""
    records = list(begun or [])
    for _ in range(50):
        wanted = rounds(records)
        if not wanted:
            return records
        records += [record(run, loss(run)) for run in wanted]
    raise AssertionError("the round does not end")
