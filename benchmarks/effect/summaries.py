"""What the paper's Table 4 and Figures 1, 3 and 5 show, as numbers, from records.

A variant is at its own best rate, and differences are paired by seed: see :mod:`effect.tables`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scipy.stats import spearmanr

from effect.groups import KEYS, SCALES
from effect.records import OWN, RANK, SAMPLES, Record, Variant
from effect.sweeps import table4_method
from effect.tables import LORA, label, paired, tuned

__all__ = [
    "SCALINGS",
    "SELECTIONS",
    "Cell",
    "Correlation",
    "Difference",
    "GroupLine",
    "Point",
    "correlations",
    "group_lines",
    "points",
    "table4",
    "verdict",
]

SELECTIONS = ("M", "R", "P")
SCALINGS = ("fisher", "singular", "constant")


@dataclass(frozen=True)
class Cell:
    """Of Table 4: a selection and a scaling on a task. ``inside``: no better rate beside it."""

    task: str
    selection: str
    scaling: str
    rate: float
    inside: int
    seeds: int
    loss: float
    general: float
    accuracy: float


@dataclass(frozen=True)
class Difference:
    """Of two selections at one scaling, ``pair`` "M − R" or "R − P": mean ± half at 95%."""

    task: str
    scaling: str
    pair: str
    measure: str
    mean: float
    half: float
    pairs: int


def table4(records: Iterable[Record], task: str) -> tuple[list[Cell], list[Difference]]:
    """The cells that were run, and the differences of selections that both were."""
    found = tuned(records, task)
    cells, differences = [], []
    for scaling in SCALINGS:
        by = {s: found.get((table4_method(s, scaling), 1.0, 1.0, 0.0)) for s in SELECTIONS}
        for selection, one in by.items():
            if one is not None:
                means = [one.mean(key) for key in ("loss", "general", "accuracy")]
                at = (one.rate, int(one.inside), len(one.seeds))
                cells.append(Cell(task, selection, scaling, *at, *means))
        for first, second in (("M", "R"), ("R", "P")):
            left, right = by[first], by[second]
            if left is None or right is None:
                continue
            for measure in ("loss", "general", "accuracy"):
                its = paired(left, right, measure)
                pair = f"{first} − {second}"
                of = (task, scaling, pair, measure, its.mean, its.half, its.pairs)
                differences.append(Difference(*of))
    return cells, differences


def verdict(differences: Sequence[Difference]) -> str:
    """Whether the losses of a task are in the paper's order, M below R below P at every scaling.

    Confirmed where every interval is below 0, refuted where one is above it.
    """
    losses = [d for d in differences if d.measure == "loss"]
    if len(losses) < 2 * len(SCALINGS):
        return f"incomplete: {len(losses)} of {2 * len(SCALINGS)} differences"
    if min(d.pairs for d in losses) < 2:
        against = [d for d in losses if not d.mean < 0]
        return "one seed: " + ("in the paper's order" if not against else _against(against))
    against = [d for d in losses if d.mean - d.half > 0]
    if against:
        return "refuted: " + _against(against)
    unsure = [d for d in losses if not d.mean + d.half < 0]
    if unsure:
        return "undecided: 0 is within " + ", ".join(f"{d.pair} ({d.scaling})" for d in unsure)
    return f"confirmed: all {len(losses)} intervals are below 0"


def _against(differences: Sequence[Difference]) -> str:
    return "against the paper's order in " + ", ".join(
        f"{d.pair} ({d.scaling})" for d in differences
    )


@dataclass(frozen=True)
class GroupLine:
    """A group of singular directions that was trained; number 0 has the largest keys."""

    task: str
    key: str
    scale: str
    number: int
    rate: float
    seeds: int
    loss: float
    general: float


@dataclass(frozen=True)
class Correlation:
    """Spearman's of the key with the loss: below 0, large keys are better to train."""

    task: str
    key: str
    scale: str
    groups: int
    rho: float
    p: float


def group_lines(records: Sequence[Record], task: str) -> list[GroupLine]:
    """Every group that was run, means over its seeds; a run that diverged has infinite loss."""
    by: dict[tuple[str, float], list[Record]] = {}
    for record in records:
        if record.task == task and record.rank == OWN and record.method.startswith("groups."):
            by.setdefault((record.method, record.rate), []).append(record)
    found = []
    for (method, rate), of in by.items():
        _, key, scale, number = method.split(".")
        loss = sum(r.reached for r in of) / len(of)
        general = sum(r.general for r in of) / len(of)
        found.append(GroupLine(task, key, scale, int(number), rate, len(of), loss, general))
    return sorted(found, key=lambda line: (line.key, line.scale, line.number))


def correlations(lines: Sequence[GroupLine]) -> list[Correlation]:
    """Of every sort and scale of one task. The keys fall with the number of the group."""
    found = []
    for key in KEYS:
        for scale in SCALES:
            of = [line for line in lines if (line.key, line.scale) == (key, scale)]
            if len(of) > 2:
                its = spearmanr([-line.number for line in of], [line.loss for line in of])
                rho, p = float(its.statistic), float(its.pvalue)
                found.append(Correlation(of[0].task, key, scale, len(of), rho, p))
    return found


@dataclass(frozen=True)
class Point:
    """A variant at a rank and a number of samples; less LoRA at the rank, mean ± half at 95%."""

    task: str
    start: str
    rank: int
    samples: int
    rate: float
    seeds: int
    loss: float
    general: float
    difference: float
    half: float
    pairs: int


def points(
    records: Sequence[Record],
    task: str,
    variants: Iterable[Variant],
    ranks: Sequence[int] = (RANK,),
    samples: Sequence[int] = (SAMPLES,),
) -> list[Point]:
    """Those that were run. LoRA, which looks at no samples, has those of the first round."""
    found = []
    for rank in ranks:
        lora = tuned(records, task, rank).get(LORA)
        for count in samples:
            at = tuned(records, task, rank, count)
            for variant in variants:
                if variant not in at:
                    continue
                one = at[variant]
                less = paired(one, lora) if lora else None
                difference = (less.mean, less.half, less.pairs) if less else (math.nan, math.nan, 0)
                of = (one.rate, len(one.seeds), one.loss, one.general, *difference)
                found.append(Point(task, label(variant), rank, count, *of))
    return found
