"""What is still to be run for the paper's Table 4 and its Figures 1, 3 and 5.

Table 4 crosses selections and scalings. Figure 1 trains one group of singular directions at a time,
Figure 3 is by rank, Figure 5 by the samples that a start is chosen by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from effect.groups import GROUPS, KEYS, SCALES
from effect.plan import DEFAULT, KEEP, best, missing, step
from effect.records import ALL, OWN, RANK, SAMPLES, Record, Run, Variant
from effect.train import FROZEN, Member

__all__ = [
    "BY_RANK",
    "BY_SAMPLES",
    "RANKS",
    "SAMPLE_COUNTS",
    "SWEEPS",
    "family",
    "group_round",
    "group_runs",
    "rank_round",
    "sample_round",
    "table4_method",
    "table4_round",
]

RATED_ON = "gsm8k"  # has the first round, and says around which rate another task begins
RANKS = (4, 8, 16, 32, 64, 128)
SAMPLE_COUNTS = (80, 160, 320, 640, ALL)
BY_SAMPLES: tuple[Variant, ...] = (DEFAULT, KEEP)
BY_RANK: tuple[Variant, ...] = (
    ("lora", 1.0, 1.0, 0.0),
    ("pissa", 1.0, 1.0, 0.0),
    ("pissa", 2.0, 1.0, 0.0),
    *BY_SAMPLES,
)
# One rate for all groups of a scale: FILet's and LoRA's of the first round, and PiSSA's, whose
# factors are about as large.
_GROUP_RATES = {"min": 10**-2.5, "max": 1e-3}


def table4_method(selection: str, scaling: str) -> str:
    """The name of a cell of Table 4: "M", "R" or "P", "fisher", "singular" or "constant"."""
    return f"filet-{selection}.{scaling}.relative.untouched"


def family(method: str) -> str:
    """What a start is computed by: the method but for how it trains, of groups their kind."""
    method = method.removesuffix(FROZEN)
    return method.rpartition(".")[0] if method.startswith("groups.") else method


def _rate(
    records: Iterable[Record], task: str, variant: Variant, otherwise: float | None = None
) -> float:
    """The best of seed 0 on the task, else on the task of the first round, else that given."""
    found = best(r for r in records if r.seed == 0 and r.variant == variant)
    for name in (task, RATED_ON):
        if (name, variant) in found:
            return found[name, variant][0]
    if otherwise is not None:
        return otherwise
    raise ValueError(
        f"no run of {variant[0]} ×{variant[1]:g} with seed 0, rank {RANK} and {SAMPLES} samples on "
        f"{task} or {RATED_ON}; expected the first round's"
    )


def table4_round(
    records: Sequence[Record],
    tasks: Sequence[str],
    seeds: Sequence[int],
    thorough: bool,
    otherwise: float = 10**-2.5,
) -> list[Run]:
    """Every selection at every scaling, at three rates and further until the best is inside.

    The three are about the best rate of the first round, or ``otherwise`` where none was run. Each
    has all seeds, ``thorough`` or not.
    """
    found: list[Run] = []
    for task in tasks:
        for selection in "MRP":
            for scaling in ("fisher", "singular", "constant"):
                variant = (table4_method(selection, scaling), 1.0, 1.0, 0.0)
                rate = _rate(records, RATED_ON, variant, otherwise)
                rates = [step(rate, halves) for halves in (-1, 0, 1)]
                found += missing(records, task, variant, seeds, rates)
    return found


def group_runs(task: str, key: str, scale: str, seeds: Sequence[int]) -> list[Run]:
    """All groups of one sort and scale, in their order."""
    rate = step(_GROUP_RATES[scale], 0)
    return [
        Run(task, Member(f"groups.{key}.{scale}.{number:02}", rate, seed=seed), OWN)
        for seed in seeds
        for number in range(GROUPS)
    ]


def group_round(
    records: Sequence[Record], tasks: Sequence[str], seeds: Sequence[int], thorough: bool
) -> list[Run]:
    """One run a group, or with all seeds where ``thorough``."""
    of = seeds if thorough else seeds[:1]
    wanted = [
        run
        for task in tasks
        for key in KEYS
        for scale in SCALES
        for run in group_runs(task, key, scale, of)
    ]
    return _lacking(records, wanted)


def rank_round(
    records: Sequence[Record], tasks: Sequence[str], seeds: Sequence[int], thorough: bool
) -> list[Run]:
    """Figure 3's, at the rate that was best at the rank of the first round."""
    cases = [(v, rank, SAMPLES) for rank in RANKS for v in BY_RANK]
    return _at_known_rates(records, tasks, seeds, thorough, cases)


def sample_round(
    records: Sequence[Record], tasks: Sequence[str], seeds: Sequence[int], thorough: bool
) -> list[Run]:
    """Figure 5's, at the rate that was best with the samples of the first round."""
    cases = [(v, RANK, samples) for samples in SAMPLE_COUNTS for v in BY_SAMPLES]
    return _at_known_rates(records, tasks, seeds, thorough, cases)


def _at_known_rates(
    records: Sequence[Record],
    tasks: Sequence[str],
    seeds: Sequence[int],
    thorough: bool,
    cases: Sequence[tuple[Variant, int, int]],
) -> list[Run]:
    """Variants at ranks and samples; half a decade on either side too where ``thorough``."""
    wanted = []
    for task in tasks:
        for variant, rank, samples in cases:
            method, scale, ratio, decay = variant
            rate = _rate(records, task, variant)
            for halves in (-1, 0, 1) if thorough else (0,):
                at = step(rate, halves)
                wanted += [
                    Run(task, Member(method, at, scale, ratio, decay, seed), rank, samples)
                    for seed in seeds
                ]
    return _lacking(records, wanted)


def _lacking(records: Iterable[Record], wanted: Iterable[Run]) -> list[Run]:
    done = {record.run for record in records}
    return [run for run in wanted if run not in done]


SWEEPS: dict[str, Callable[[Sequence[Record], Sequence[str], Sequence[int], bool], list[Run]]] = {
    "table4": table4_round,
    "groups": group_round,
    "ranks": rank_round,
    "samples": sample_round,
}
