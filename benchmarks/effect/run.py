"""Trains what a round still lacks, population by population, and appends it to a CSV file.

    python benchmarks/effect/run.py --model DIR --data DIR --output FOLDER --round first

Stopped and called again, it goes on where it was: the files in the folder are all it knows. With
several GPUs, a process each: --part 0/2 and --part 1/2. The model is a causal language model or an
image classifier of several data sets; vit.py makes one.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # called as a script

import torch
from transformers.utils.logging import disable_progress_bar

from effect.bench import Bench
from effect.inits import START
from effect.plan import FIRST, RATES, first_round, second_round
from effect.records import Run, append, read
from effect.train import Recipe
from effect.variants import VARIANTS


def subtracts(method: str) -> bool:
    """Whether its start is subtracted from the base: those have populations of their own."""
    zero = method.endswith(".zero") or method in ("lora", "gaussian", "orthogonal", "eva")
    form = method.startswith(("contrast", "eva-ref")) and not method.endswith(".untouched")
    return not zero and not form


def chunk(runs: Sequence[Run], members: int) -> list[Run]:
    """The next population: runs of one task, one kind of adapter and start, of few seeds."""

    def kind(run: Run) -> tuple[Any, ...]:
        method = run.member.method
        return run.task, run.rank, method if method in VARIANTS else subtracts(method)

    alike = [run for run in runs if kind(run) == kind(runs[0])]
    return sorted(alike, key=lambda run: run.member.seed)[:members]


def belongs(run: Run) -> int:
    """A number by which processes share the runs: all of a method's are one process's.

    So what a method computes is computed once. LoRA computes nothing, and has most variants.
    """
    m = run.member
    key = (m.method, m.scale, m.ratio, m.decay) if m.method == "lora" else m.method
    return crc32(repr(key).encode())


def lacking(options: argparse.Namespace) -> list[Run]:
    """What the round still lacks, by the files in the folder."""
    records = read(options.output)
    if options.round == "first":
        given = (options.methods, options.rates)
        return [run for task in options.tasks for run in first_round(records, task, *given)]
    # Rates of a task are its own where it had a first round, otherwise those of the first task.
    had = {record.task for record in read(options.output, "first-*.csv")}
    rated_on = {task: task if task in had else options.tasks[0] for task in options.tasks}
    return second_round(records, rated_on, range(options.seeds))


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
    parser.add_argument("--round", choices=("first", "second"), required=True)
    parser.add_argument("--tasks", nargs="+", default=["gsm8k"])
    parser.add_argument(
        "--methods", nargs="+", default=FIRST, choices=sorted({*START, *VARIANTS}), metavar="METHOD"
    )
    parser.add_argument(
        "--rates", nargs="+", type=float, default=RATES, help="where the first round begins"
    )
    parser.add_argument("--seeds", type=int, default=5, help="of the second round")
    parser.add_argument("--members", type=int, default=16, help="adapters trained side by side")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--part", default="0/1", help="which of how many processes this is")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing after")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)
    begun = time.perf_counter()
    disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    part, parts = map(int, options.part.split("/"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", part % torch.cuda.device_count())
        torch.cuda.set_device(device)
    options.output.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(options.steps, options.batch_size, warmup=max(1, options.steps * 6 // 100))
    bench = Bench(options.model, options.data, device, recipe, options.members)
    while True:
        wanted = [run for run in lacking(options) if belongs(run) % parts == part]
        spent = time.perf_counter() - begun
        if not wanted or spent > options.seconds:
            print(f"[{part}] {len(wanted)} runs left after {spent:.0f} s")
            return
        runs = chunk(wanted, options.members)
        start = time.perf_counter()
        done = bench.train(runs)
        append(options.output / f"{options.round}-{part}.csv", done)
        best = min(done, key=lambda record: record.reached)
        print(
            f"[{part}] {len(runs)} of {len(wanted)} runs on {runs[0].task} in "
            f"{time.perf_counter() - start:.0f} s, best {best.method} ×{best.scale:g} at "
            f"{best.rate:g}: {best.loss:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
