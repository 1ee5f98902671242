"""How many runs of PEFT, one after the other, a population is worth.

    python benchmarks/effect/throughput.py --model DIR --data DIR --task gsm8k

A step of K members by :func:`effect.runs.train_population`, whose members see batches of five
seeds as in the rounds, against a step of PEFT's LoRA with torch's fused AdamW, clip and schedule:
the same model, rank, targets, batch size and dtype. Times are of many steps less few, so that what
is done once (the test, and what CUDA captures) is in neither; the median of rounds that alternate.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # called as a script

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from effect.bench import Bench
from effect.population import Population
from effect.records import RANK, Run
from effect.runs import train_population
from effect.tasks import order
from effect.train import Member, Recipe
from shapes import CUDA, DEVICE, synchronize

__all__ = ["alone", "seconds_a_step", "together"]

_RATE, _SEEDS = 1e-3, 5

Train = Callable[[int], None]  # so many steps


def together(bench: Bench, task: str, rank: int = RANK) -> Train:
    """``bench.members`` runs as a population, on the bench's own model."""
    members = [Member("lora", _RATE, seed=k % _SEEDS) for k in range(bench.members)]
    starts = [bench.start(Run(task, member, rank)) for member in members]
    population = Population(bench.kind.model, starts)
    tested = copy.copy(bench.task(task))
    tested.test, tested.general = tested.test[:1], []  # its time is in no step

    def train(steps: int) -> None:
        population.load(starts)
        train_population(population, tested, members, replace(bench.recipe, steps=steps))

    return train


def alone(bench: Bench, task: str, rank: int = RANK) -> Train:
    """One run as PEFT makes it, on a copy of the bench's model."""
    kind, recipe, data = bench.kind, bench.recipe, bench.task(task)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(kind.targets))
    model = get_peft_model(copy.deepcopy(kind.model), config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    half = kind.model.dtype == torch.bfloat16

    def train(steps: int) -> None:
        of = replace(recipe, steps=steps)
        optimizer = torch.optim.AdamW(parameters, lr=_RATE, weight_decay=0, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, of.factor)
        for rows in order(data.train, 0, of.batch_size, steps):
            with torch.autocast(bench.device.type, torch.bfloat16, enabled=half):
                loss = model(**kind.batch(data, rows)).loss
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, of.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    return train


def seconds_a_step(trains: Sequence[Train], few: int, many: int, rounds: int) -> list[float]:
    """The median of each, after one call of each that is not timed."""

    def seconds(train: Train, steps: int) -> float:
        synchronize()
        begun = time.perf_counter()
        train(steps)
        synchronize()
        return time.perf_counter() - begun

    for train in trains:
        train(many)
    found: list[list[float]] = [[] for _ in trains]
    for _ in range(rounds):
        for times, train in zip(found, trains, strict=True):
            times.append((seconds(train, many) - seconds(train, few)) / (many - few))
    return [statistics.median(times) for times in found]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="as for run.py")
    parser.add_argument("--task", default="gsm8k")
    parser.add_argument("--members", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, nargs=2, default=(10, 60), metavar=("FEW", "MANY"))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)
    if not 0 < options.steps[0] < options.steps[1]:
        parser.error(f"--steps {options.steps[0]} {options.steps[1]}: expected 0 < FEW < MANY")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)
    recipe = Recipe(batch_size=options.batch_size)
    bench = Bench(options.model, options.data, DEVICE, recipe, options.members)
    one = alone(bench, options.task)  # a copy of the model before a population is in it
    both = seconds_a_step([together(bench, options.task), one], *options.steps, options.rounds)
    name = torch.cuda.get_device_name() if CUDA else "CPU"
    print(
        f"{name}: a step of {options.members} together {both[0] * 1e3:.0f} ms, of PEFT alone "
        f"{both[1] * 1e3:.0f} ms: {options.members * both[1] / both[0]:.1f} times the throughput"
    )


if __name__ == "__main__":
    main()
