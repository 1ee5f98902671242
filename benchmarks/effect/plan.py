"""What is still to be run, from what has been: two rounds.

The first finds every method's rate: one seed, half-decades, extended until the best is inside. The
second compares at it: paired seeds, the best rate and its neighbours, on several tasks.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from effect.records import Record, Run, Variant
from effect.train import Member

__all__ = ["CONTROLS", "FIRST", "RATES", "SCALES", "best", "first_round", "second_round", "step"]

SCALES = (1.0, 2.0)
_UNSCALED = ("kasa",)  # its diagonal, and what it drops of W, are not A and B
RATES = (1e-3, 10**-2.5, 1e-2)
_LOWEST, _HIGHEST = 1e-5, 1.0

FIRST = (
    *("lora", "orthogonal", "pissa", "olora", "milora", "eva", "corda-kpm", "corda-ipm"),
    *("lora-ga", "farss", "cg-lora", "whitened.zero", "eva-ref", "eva-ref.p-0.25"),
    *(f"filet-{s}.fisher.relative.{start}" for s in "MRP" for start in ("zero", "untouched")),
    *(f"filet-{s}.singular.relative.untouched" for s in "MRP"),
    *(f"filet-{s}.constant.relative.untouched" for s in "MRP"),
    "filet-M.constant.relative.zero",
    "filet-M.fisher.mean.untouched",
    "filet-M.fisher.sum.untouched",
    "filet-M-orthogonal.fisher.relative.zero",
    "filet-M-orthogonal.fisher.relative.untouched",
    "filet-M-orthogonal.constant.relative.zero",
    "filet-M-orthogonal.constant.relative.untouched",
    *("contrast.d0.1", "contrast.d0.01", "contrast.d0.001", "contrast.d0.01.untouched"),
    *("contrast-row.d0.1", "contrast-row.d0.01", "contrast-row.d0.001"),
    *("contrast.d0.01.p0.25", "contrast.d0.01.p0.5"),
    *("dora", "kasa", "neat", "lora-dash"),
)

# LoRA in all the ways in which a gain could be had without choosing directions.
CONTROLS: tuple[Variant, ...] = (
    ("lora", 1.0, 1.0, 0.0),
    ("lora", 2.0, 1.0, 0.0),
    ("lora", 4.0, 1.0, 0.0),
    ("lora", 8.0, 1.0, 0.0),
    ("lora", 1.0, 4.0, 0.0),
    ("lora", 1.0, 16.0, 0.0),
    ("lora", 1.0, 1.0, 0.3),
    ("lora", 4.0, 1.0, 0.3),
)
# Those the tables name, whatever they reach.
_NAMED = ("lora", "orthogonal", "pissa", "olora", "milora", "eva", "corda-ipm", "lora-ga")


def step(rate: float, halves: int) -> float:
    """The rate so many half-decades from another, as a number that is the same every time."""
    return float(f"{10 ** (round(2 * math.log10(rate)) / 2 + halves / 2):.4g}")


def best(records: Iterable[Record]) -> dict[tuple[str, Variant], tuple[float, float]]:
    """Of each task and variant, the rate of the least mean loss over seeds, and that loss."""
    losses: dict[tuple[str, Variant], dict[float, list[float]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for record in records:
        losses[record.task, record.variant][record.rate].append(record.reached)
    found = {}
    for key, by_rate in losses.items():
        means = {rate: sum(of) / len(of) for rate, of in by_rate.items()}
        rate = min(means, key=lambda rate: (means[rate], rate))
        found[key] = (rate, means[rate])
    return found


def _open(found: dict[float, float], rates: Sequence[float]) -> list[float]:
    """The rates that are missing until the best has one tried on either side."""
    missing = [rate for rate in rates if rate not in found]
    if missing:
        return missing
    least = min(found, key=lambda rate: (found[rate], rate))
    sides = [step(least, -1), step(least, 1)]
    return [rate for rate in sides if rate not in found and _LOWEST <= rate <= _HIGHEST]


def _missing(
    records: Sequence[Record],
    task: str,
    variant: Variant,
    seeds: Sequence[int],
    rates: Sequence[float],
) -> list[Run]:
    """What a variant lacks on a task: the rates asked for, and more while the best is outermost."""
    method, scale, ratio, decay = variant
    by_rate: dict[float, dict[int, float]] = defaultdict(dict)
    for record in records:
        if record.task == task and record.variant == variant and record.seed in seeds:
            by_rate[record.rate][record.seed] = record.reached
    whole = {rate: sum(of.values()) for rate, of in by_rate.items() if len(of) == len(seeds)}
    return [
        Run(task, Member(method, rate, scale, ratio, decay, seed))
        for rate in _open(whole, rates)
        for seed in seeds
        if seed not in by_rate[rate]
    ]


def first_round(
    records: Sequence[Record],
    task: str,
    methods: Sequence[str] = FIRST,
    rates: Sequence[float] = RATES,
) -> list[Run]:
    """Every method at two magnitudes, and the controls, with seed 0.

    ``rates``, rounded to half-decades, are where it begins.
    """
    variants = [
        (method, scale, 1.0, 0.0)
        for method in methods
        for scale in (SCALES if method not in _UNSCALED else (1.0,))
    ]
    variants += [variant for variant in CONTROLS if variant not in variants]
    rates = [step(rate, 0) for rate in rates]
    return [run for v in variants for run in _missing(records, task, v, (0,), rates)]


def second_round(
    records: Sequence[Record], rated_on: Mapping[str, str], seeds: Sequence[int], count: int = 10
) -> list[Run]:
    """The best ``count`` methods of the first round, each at its better scale, and the controls.

    ``rated_on`` says of every task on which task's first round that is, and the best rates.
    """
    found: list[Run] = []
    for task, rated in rated_on.items():
        first = [r for r in records if r.task == rated and r.seed == 0]
        reached = {variant: value for (_, variant), value in best(first).items()}
        chosen: dict[str, Variant] = {}
        for variant in sorted(reached, key=lambda v: reached[v][1]):
            if variant not in CONTROLS:
                chosen.setdefault(variant[0], variant)
        named = [chosen[method] for method in _NAMED if method in chosen]
        for variant in dict.fromkeys([*CONTROLS, *named, *list(chosen.values())[:count]]):
            rate = reached[variant][0]
            rates = [step(rate, halves) for halves in (-1, 0, 1)]
            found += _missing(records, task, variant, seeds, rates)
    return found
