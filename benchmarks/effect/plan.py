"""What is still to be run, from what has been: two rounds, at one rank and number of samples.

The first finds every method's rate: one seed, half-decades, extended until the best is inside. The
second compares at it: paired seeds, the best rate and its neighbours, on several tasks. Beside them
stands a round of what is given and nothing more.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

from effect.records import Record, Run, Variant, at
from effect.train import Member

__all__ = [
    "CONTROLS",
    "DEFAULT",
    "FIRST",
    "KEEP",
    "RATES",
    "SCALES",
    "SECOND",
    "best",
    "first_round",
    "given_round",
    "missing",
    "second_round",
    "step",
]

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
    *("filet-keep.d0.01.both", "filet-keep.d0.01.frozen", "lora.frozen"),
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
# What the library does by default, without and with keep=.
DEFAULT: Variant = ("filet-M-orthogonal.fisher.relative.zero", 2.0, 1.0, 0.0)
KEEP: Variant = ("filet-keep.d0.01", 2.0, 1.0, 0.0)
# What the second round compares, each at the better of its two magnitudes in the first on GSM8K.
SECOND: tuple[Variant, ...] = (
    *CONTROLS,
    ("pissa", 2.0, 1.0, 0.0),
    ("milora", 1.0, 1.0, 0.0),
    ("olora", 1.0, 1.0, 0.0),
    KEEP,
    ("filet-M.fisher.relative.zero", 2.0, 1.0, 0.0),
    DEFAULT,
    ("filet-M.fisher.relative.untouched", 2.0, 1.0, 0.0),
    ("eva", 1.0, 1.0, 0.0),
    ("lora-ga", 1.0, 1.0, 0.0),
    ("orthogonal", 1.0, 1.0, 0.0),
    ("filet-M-orthogonal.constant.relative.untouched", 2.0, 1.0, 0.0),
    ("cg-lora", 2.0, 1.0, 0.0),
    ("farss", 1.0, 1.0, 0.0),
    ("corda-kpm", 2.0, 1.0, 0.0),
    ("corda-ipm", 2.0, 1.0, 0.0),
    ("dora", 2.0, 1.0, 0.0),
    ("lora-dash", 2.0, 1.0, 0.0),
    ("neat", 1.0, 1.0, 0.0),
    ("kasa", 1.0, 1.0, 0.0),
)


def step(rate: float, halves: int) -> float:
    """The rate so many half-decades from another, as a number that is the same every time."""
    return float(f"{10 ** (round(2 * math.log10(rate)) / 2 + halves / 2):.4g}")


def best(records: Iterable[Record]) -> dict[tuple[str, Variant], tuple[float, float]]:
    """Of each task and variant, the rate of the least mean loss over seeds, and that loss.

    Of the runs at the rank and samples of the rounds.
    """
    losses: dict[tuple[str, Variant], dict[float, list[float]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for record in at(records):
        losses[record.task, record.variant][record.rate].append(record.reached)
    found = {}
    for key, by_rate in losses.items():
        means = {rate: sum(of) / len(of) for rate, of in by_rate.items()}
        rate = min(means, key=lambda rate: (means[rate], rate))
        found[key] = (rate, means[rate])
    return found


def _open(found: dict[float, float], rates: Sequence[float]) -> list[float]:
    """The rates that are missing until the best has one tried on either side."""
    untried = [rate for rate in rates if rate not in found]
    if untried:
        return untried
    least = min(found, key=lambda rate: (found[rate], rate))
    sides = [step(least, -1), step(least, 1)]
    return [rate for rate in sides if rate not in found and _LOWEST <= rate <= _HIGHEST]


def missing(
    records: Sequence[Record],
    task: str,
    variant: Variant,
    seeds: Sequence[int],
    rates: Sequence[float],
) -> list[Run]:
    """What a variant lacks on a task: the rates asked for, and more while the best is outermost.

    A run at another rank or with other samples does not count.
    """
    method, scale, ratio, decay = variant
    by_rate: dict[float, dict[int, float]] = defaultdict(dict)
    for record in at(records):
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
    scales: Sequence[float] = SCALES,
    rates: Sequence[float] = RATES,
) -> list[Run]:
    """Every method at some magnitudes with seed 0; with "lora" the controls.

    ``rates``, rounded to half-decades, are where it begins.
    """
    variants: list[Variant] = [
        (method, scale, 1.0, 0.0)
        for method in methods
        for scale in (scales if method not in _UNSCALED else (1.0,))
    ]
    if "lora" in methods:
        variants += [variant for variant in CONTROLS if variant not in variants]
    rates = [step(rate, 0) for rate in rates]
    return [run for v in variants for run in missing(records, task, v, (0,), rates)]


def second_round(
    records: Sequence[Record],
    tasks: Sequence[str],
    seeds: Sequence[int],
    rated_on: str,
    variants: Sequence[Variant] = SECOND,
    otherwise: float = RATES[1],
) -> list[Run]:
    """Each variant at the rate that was best for it, and its neighbours, with paired seeds.

    Best by seed 0 on the task itself, where that was run, else on ``rated_on``, else by LoRA there,
    else ``otherwise``.
    """
    reached = best(record for record in records if record.seed == 0)
    found: list[Run] = []
    for task in tasks:
        for variant in variants:
            places = [(task, variant), (rated_on, variant), (rated_on, variants[0])]
            rate = next((reached[place][0] for place in places if place in reached), otherwise)
            rates = [step(rate, halves) for halves in (-1, 0, 1)]
            found += missing(records, task, variant, seeds, rates)
    return found


def given_round(
    records: Sequence[Record],
    task: str,
    methods: Sequence[str],
    scales: Sequence[float],
    rates: Sequence[float],
    seeds: Sequence[int],
    samples: int,
) -> list[Run]:
    """Every method at every scale and rate with every seed."""
    done = {record.run for record in records}
    runs = [
        Run(task, Member(method, step(rate, 0), scale, seed=seed), samples=samples)
        for method in methods
        for scale in (scales if method not in _UNSCALED else (1.0,))
        for rate in rates
        for seed in seeds
    ]
    return [run for run in runs if run not in done]
