"""The tables of docs/evidence.md, from the CSV files alone.

    python benchmarks/effect/tables.py benchmarks/results/effect

A method is compared at its own best rate: that of the least mean loss over the seeds it has. The
differences are paired, seed by seed, to LoRA and to LoRA at its own best magnitude; intervals are
Student's, of the mean of the pairs, at 95%.

The best rate by loss alone may forget much for nothing. So every method is compared once more at
the rate after which general loss is least, of those whose loss is at most 1% above LoRA's: what is
forgotten at equal loss.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # called as a script

from scipy.stats import t as student

from effect.plan import DEFAULT, KEEP, step
from effect.records import RANK, SAMPLES, Record, Variant, at, read

__all__ = [
    "FORMS",
    "LORA",
    "Interval",
    "Tuned",
    "at_equal_loss",
    "at_magnitudes",
    "compared",
    "forms_against",
    "label",
    "paired",
    "retaining",
    "table",
    "tuned",
]

LORA: Variant = ("lora", 1.0, 1.0, 0.0)
FORMS: tuple[Variant, ...] = (DEFAULT, KEEP, ("filet-keep.d0.01.self", *KEEP[1:]))
_EQUAL = 1.01  # losses over each other that count as equal, as in the band


@dataclass(frozen=True)
class Interval:
    """Mean difference of so many pairs, and half the width of its interval at 95%.

    NaN and no interval of a single pair.
    """

    mean: float
    half: float
    pairs: int

    def __str__(self) -> str:
        mean = f"{self.mean:+.4f}"
        return mean if math.isnan(self.half) else f"{mean} ± {self.half:.4f}"


@dataclass(frozen=True)
class Tuned:
    """A variant on a task at its best rate.

    Attributes:
        inside: a rate on either side was tried, and is no better.
        band: rates within 1% of the best loss, the largest over the smallest.
        rates: rate → seed → its record, of the rates that have all seeds.
    """

    variant: Variant
    rate: float
    inside: bool
    band: float
    rates: dict[float, dict[int, Record]]

    @property
    def seeds(self) -> dict[int, Record]:
        return self.rates[self.rate]

    def mean(self, key: str) -> float:
        return sum(getattr(r, key) for r in self.seeds.values()) / len(self.seeds)

    @property
    def loss(self) -> float:
        return self.mean("loss")

    @property
    def general(self) -> float:
        return self.mean("general")


def tuned(
    records: Iterable[Record], task: str, rank: int = RANK, samples: int = SAMPLES
) -> dict[Variant, Tuned]:
    """Every variant at its best rate, by the rates that have all the seeds it has at any rate.

    Of the runs at one rank and with one number of samples.

    Where only some rates were run with all seeds, those of seed 0 say which is best and whether it
    is inside; the differences take all seeds of that rate.
    """
    by: dict[Variant, dict[float, dict[int, Record]]] = defaultdict(lambda: defaultdict(dict))
    for record in at(records, rank, samples):
        if record.task == task:
            by[record.variant][record.rate][record.seed] = record
    found = {}
    for variant, rates in by.items():
        # A rate at which runs diverged is no reason to leave out those that have fewer seeds.
        went = {r: of for r, of in rates.items() if all(math.isfinite(x.loss) for x in of.values())}
        most = max(map(len, (went or rates).values()))
        full = {rate: of for rate, of in rates.items() if len(of) >= most}
        means = {r: sum(x.reached for x in of.values()) / len(of) for r, of in full.items()}
        rate = min(means, key=lambda r: (means[r], r))
        # Each rate's loss and the best one's: over all seeds, or of seed 0 where it has no more.
        both = {rate: (means[rate], means[rate])}
        if 0 in full[rate]:
            own = full[rate][0].reached
            both |= {r: (of[0].reached, own) for r, of in rates.items() if 0 in of}
        both |= {r: (mean, means[rate]) for r, mean in means.items()}
        sides = [both.get(step(rate, side), (math.nan, math.nan)) for side in (-1, 1)]
        inside = all(its >= best for its, best in sides)
        near = [r for r, (its, best) in both.items() if its - best <= (_EQUAL - 1) * abs(best)]
        found[variant] = Tuned(variant, rate, inside, max(near) / min(near), full)
    return found


def retaining(one: Tuned, loss: float) -> Tuned | None:
    """The same at the rate of least general loss, of those whose loss is not above ``loss``."""
    each = [replace(one, rate=rate) for rate in one.rates]
    return min((x for x in each if x.loss <= loss), key=lambda x: x.general, default=None)


def paired(one: Tuned, other: Tuned, key: str = "loss") -> Interval:
    """``one`` less ``other``, over the seeds that both have."""
    seeds = sorted(one.seeds.keys() & other.seeds.keys())
    pairs = [getattr(one.seeds[s], key) - getattr(other.seeds[s], key) for s in seeds]
    if len(pairs) < 2:
        return Interval(pairs[0] if pairs else math.nan, math.nan, len(pairs))
    mean = sum(pairs) / len(pairs)
    spread = math.sqrt(sum((x - mean) ** 2 for x in pairs) / (len(pairs) - 1) / len(pairs))
    return Interval(mean, float(student.ppf(0.975, len(pairs) - 1)) * spread, len(pairs))


def label(variant: Variant) -> str:
    """A variant as a row or a line is named."""
    method, scale, ratio, decay = variant
    name = method + (f" ×{scale:g}" if scale != 1 else "")
    name += f", B {ratio:g}×" if ratio != 1 else ""
    return name + (f", decay {decay:g}" if decay else "")


def compared(found: dict[Variant, Tuned], least: int = 1) -> list[list[str]]:
    """Rows of a table, the best loss first, of the variants with at least so many seeds.

    None where LoRA has too few, to which all are compared.
    """
    loras = [one for v, one in found.items() if v[0] == "lora" and len(one.seeds) >= least]
    if LORA not in found or not loras:
        return []
    reference, best = found[LORA], min(loras, key=lambda one: one.loss)
    rows = []
    for one in sorted(found.values(), key=lambda one: one.loss):
        if len(one.seeds) < least:
            continue
        rate = f"{one.rate:.2g}" + ("" if one.inside else " (edge)")
        rows.append([label(one.variant), rate, f"{one.loss:.4f}", f"{one.general:.3f}"])
        if least > 1:
            right, kept = one.mean("accuracy"), retaining(one, reference.loss * _EQUAL)
            rows[-1].insert(3, "–" if math.isnan(right) else f"{right:.3f}")
            rows[-1] += [str(paired(one, reference)), str(paired(one, best))]
            rows[-1] += [str(paired(one, reference, "general"))]
            rows[-1] += ["–" if kept is None else f"{kept.general:.3f} at {kept.rate:.2g}"]
        else:
            rows[-1] += [f"{one.band:.3g}"]
    return rows


def forms_against(found: dict[Variant, Tuned], least: int) -> list[list[str]]:
    """A header, and for each other variant :data:`FORMS` less it, in loss and general loss."""
    forms = [found[form] for form in FORMS if form in found]
    rows = [["start", *(f"{label(form.variant)}: {key}" for form in forms for key in _MEASURES)]]
    for other in sorted(found.values(), key=lambda one: one.loss):
        if len(other.seeds) >= least and other.variant not in FORMS:
            cells = [str(paired(form, other, key)) for form in forms for key in _MEASURES]
            rows.append([label(other.variant), *cells])
    return rows


def at_magnitudes(found: dict[Variant, Tuned], least: int) -> list[list[str]]:
    """A header, and for each magnitude the methods of :data:`FORMS` less LoRA of it."""
    enough = {variant: one for variant, one in found.items() if len(one.seeds) >= least}
    rows = [["magnitude", *(f"{form[0]}: {key}" for form in FORMS for key in _MEASURES)]]
    for scale in sorted({variant[1] for variant in enough}):
        lora = enough.get(("lora", scale, 1.0, 0.0))
        ours = [enough.get((form[0], scale, 1.0, 0.0)) for form in FORMS]
        if lora is not None and any(ours):
            pairs = [(one, key) for one in ours for key in _MEASURES]
            cells = [str(paired(one, lora, key)) if one else "–" for one, key in pairs]
            rows.append([f"×{scale:g}", *cells])
    return rows


def at_equal_loss(found: dict[Variant, Tuned], least: int) -> list[list[str]]:
    """A header, and each start at its rate of :func:`retaining` LoRA's loss, the best keeper first.

    Beside it the methods of :data:`FORMS`, at theirs, less it in general loss.
    """
    enough = [one for one in found.values() if len(one.seeds) >= least and LORA in found]
    kept = [retaining(one, found[LORA].loss * _EQUAL) for one in enough]
    reached = sorted((one for one in kept if one), key=lambda one: one.general)
    names = [form[0] for form in FORMS]
    ours = [one for one in reached if one.variant[0] in names]
    ours.sort(key=lambda one: (names.index(one.variant[0]), one.variant[1]))
    rows = [["start", "rate", "loss", "general", *(label(one.variant) for one in ours)]]
    for other in reached:
        cells = ["" if one is other else str(paired(one, other, "general")) for one in ours]
        numbers = (f"{other.rate:.2g}", f"{other.loss:.4f}", f"{other.general:.3f}")
        rows.append([label(other.variant), *numbers, *cells])
    return rows


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=5, help="what the second table asks for")
    parser.add_argument("--samples", type=int, default=320, help="that starts have looked at")
    options = parser.parse_args(argv)
    records = at(read(options.folder), samples=options.samples)
    for task in dict.fromkeys(record.task for record in records):
        found = tuned(records, task, samples=options.samples)
        print(f"\n## {task}: at least {options.seeds} paired seeds\n")
        print(table(_PAIRED, compared(found, options.seeds)))
        header, *rest = forms_against(found, options.seeds)
        if header[1:]:
            print(f"\n## {task}: the library's forms less each other start\n")
            print(table(header, rest))
        header, *rest = at_magnitudes(found, options.seeds)
        if rest:
            print(f"\n## {task}: the library's forms less LoRA of the same magnitude\n")
            print(table(header, rest))
        header, *rest = at_equal_loss(found, options.seeds)
        if rest:
            print(f"\n## {task}: general loss at the rate that keeps the most at LoRA's loss\n")
            print(table(header, rest))
        first = tuned([r for r in records if r.seed == 0], task, samples=options.samples)
        print(f"\n## {task}: one seed, every rate\n")
        print(table(_FIRST, compared(first)))


_MEASURES = ("loss", "general")
_FIRST = ["start", "rate", "loss", "general", "band"]
_PAIRED = [
    *("start", "rate", "loss", "right", "general", "loss to LoRA", "loss to the best LoRA"),
    *("general to LoRA", "general at LoRA's loss"),
]

if __name__ == "__main__":
    main()
