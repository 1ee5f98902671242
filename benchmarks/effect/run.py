"""Trains what a round still lacks, population by population, and appends it to a CSV file.

    python benchmarks/effect/run.py --model DIR --data DIR --output FOLDER --round first

Stopped and called again, it goes on where it was: the files in the folder are all it knows. Every
GPU has a process of its own. The model is a causal language model, or a classifier of several data
sets of images or texts; vit.py and minilm.py make one of each.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # called as a script

import torch
from transformers.utils.logging import disable_progress_bar

from effect.bench import Bench
from effect.inits import START
from effect.plan import FIRST, RATES, SCALES, SECOND, first_round, given_round, second_round
from effect.records import Record, Run, append, read
from effect.sweeps import SWEEPS, table4_round
from effect.train import Recipe
from effect.variants import VARIANTS
from effect.workers import trained


def lacking(options: argparse.Namespace, records: Sequence[Record]) -> list[Run]:
    """What the round still lacks."""
    methods = options.methods or FIRST
    if options.round == "first":
        of = methods, options.scales, options.rates
        return [run for task in options.tasks for run in first_round(records, task, *of)]
    seeds = range(options.seeds)
    if options.round == "given":
        grid = (methods, options.scales, options.rates, seeds, options.samples)
        return [run for task in options.tasks for run in given_round(records, task, *grid)]
    middle = sorted(options.rates)[len(options.rates) // 2]
    if options.round == "table4":
        return table4_round(records, options.tasks, seeds, options.thorough, middle)
    if options.round in SWEEPS:
        return SWEEPS[options.round](records, options.tasks, seeds, options.thorough)
    variants = [v for v in SECOND if options.methods is None or v[0] in options.methods]
    return second_round(records, options.tasks, seeds, options.tasks[0], variants, middle)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder of TASK_train and TASK_test; of a language model's also general and keep",
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--round", choices=("first", "second", "given", *SWEEPS), required=True)
    parser.add_argument("--tasks", nargs="+", default=["gsm8k"])
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=sorted({*START, *VARIANTS}),
        metavar="METHOD",
        help="of first, second and given; all that the round has where left out",
    )
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, help="of A and B")
    parser.add_argument("--seeds", type=int, default=5, help="of all rounds but the first")
    parser.add_argument(
        "--thorough", action="store_true", help="ranks, samples: three rates; groups: all seeds"
    )
    parser.add_argument(
        "--rates", type=float, nargs="+", default=RATES, help="all of given, where others begin"
    )
    parser.add_argument("--samples", type=int, default=320, help="of given, for a start to look at")
    parser.add_argument("--members", type=int, default=16, help="adapters trained side by side")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing after")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)
    begun = time.perf_counter()
    options.output.mkdir(parents=True, exist_ok=True)
    records = read(options.output)
    for done in trained(
        partial(bench, options),
        lambda: lacking(options, records),
        options.members,
        more=lambda: time.perf_counter() - begun < options.seconds,
    ):
        append(options.output / f"{options.round}.csv", done)
        records.extend(done)
        best = min(done, key=lambda record: record.reached)
        print(
            f"{time.perf_counter() - begun:.0f} s: {len(done)} runs on {best.task}, best "
            f"{best.method} ×{best.scale:g} at {best.rate:g}: {best.loss:.4f}",
            flush=True,
        )
    print(f"{len(lacking(options, records))} runs left")


def bench(options: argparse.Namespace, device: torch.device) -> Bench:
    """What a process makes, for its device."""
    disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    recipe = Recipe(options.steps, options.batch_size, warmup=max(1, options.steps * 6 // 100))
    return Bench(options.model, options.data, device, recipe, options.members)


if __name__ == "__main__":
    main()
