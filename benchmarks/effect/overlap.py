"""How far the directions that are chosen for two tasks are the same, layer by layer, as a CSV file.

    python benchmarks/effect/overlap.py --model DIR --data DIR --output overlap.csv

Two subspaces of r dimensions overlap by the mean squared cosine of their principal angles,
‖Qᵀ Q'‖² / r of orthonormal bases Q and Q' (n, r). Random subspaces overlap by r / n on average. A
task with itself is two samples of it that share no row: what is below that tells tasks apart, and
not samples. Every sample has a seed of its own, so that a random choice of directions (filet-R) has
the overlap that comes of the directions to choose from.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # called as a script

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from effect.bench import Bench
from effect.inits import START
from effect.lines import write_lines
from effect.records import RANK, SAMPLES, Run
from effect.start import Start
from effect.train import Member, Recipe
from filet.report.compare import basis, mean_squared_cosine

__all__ = ["Overlap", "again", "compare", "full_basis", "measure"]

METHODS = (
    *(f"filet-{selection}.fisher.relative.zero" for selection in "MR"),
    *("contrast.d0.01", "eva-ref"),
)
TASKS = ("gsm8k", "boolq", "openbookqa", "arc_easy")
_OTHER = " again"  # ends the name of the second sample of a task


@dataclass(frozen=True)
class Overlap:
    """A line of the file: two tasks and a layer. ``random`` is r / n."""

    method: str
    task: str
    other: str
    layer: str
    rank: int
    width: int
    overlap: float
    random: float


def full_basis(A: Tensor) -> Tensor:
    """A :func:`basis` of A (r, n); ValueError where it spans fewer than r dimensions."""
    found = basis(A)
    if found.shape[1] < len(A):
        raise ValueError(f"A's {len(A)} rows span {found.shape[1]} dimensions; expected {len(A)}")
    return found


def compare(
    method: str, bases: Mapping[str, Mapping[str, Tensor]], tasks: Sequence[str]
) -> list[Overlap]:
    """Every pair of tasks, and every task with another sample of it.

    ``bases`` has those of every layer by task; under the name of :func:`again`, of the other
    sample.
    """
    found = []
    for task, other in itertools.combinations_with_replacement(tasks, 2):
        second = bases[again(task) if other == task else other]
        for layer, Q in bases[task].items():
            n, r = Q.shape
            overlap = round(mean_squared_cosine(Q, second[layer]), 4)
            found.append(Overlap(method, task, other, layer, r, n, overlap, round(r / n, 4)))
    return found


def again(task: str) -> str:
    return task + _OTHER


def _split(bench: Bench, task: str, samples: int) -> None:
    """Two tasks of one, with every other row each, and no more to keep than is looked at."""
    whole = bench.task(task)
    keep = whole.keep[:samples]
    for name, first in ((task, 0), (again(task), 1)):
        bench.tasks[name] = replace(whole, name=name, train=whole.train[first::2], keep=keep)


def _bases(starts: Mapping[str, Start]) -> dict[str, Tensor]:
    return {layer: full_basis(start.A).cpu() for layer, start in starts.items()}


def measure(
    bench: Bench, tasks: Sequence[str], methods: Sequence[str], rank: int, samples: int
) -> list[Overlap]:
    """The overlaps of every method, each sample of a task looked at once."""
    bases: dict[str, dict[str, dict[str, Tensor]]] = {method: {} for method in methods}
    for task in tasks:
        _split(bench, task, samples)
    for seed, name in enumerate([*tasks, *map(again, tasks)]):
        context = bench.context(Run(name, Member("lora", 0.0), rank, samples))
        context.seed = seed
        for method in methods:
            bases[method][name] = _bases(START[method](context))
        bench.contexts.clear()  # of many gigabytes
        print(f"{name}: {samples} samples", file=sys.stderr, flush=True)
    return [line for method in methods for line in compare(method, bases[method], tasks)]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="as for run.py")
    parser.add_argument("--output", type=Path, required=True, help="the CSV file")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=START, metavar="METHOD")
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of a task, and to keep")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)
    disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(options.model, options.data, device, Recipe(), 1)
    lines = measure(bench, options.tasks, options.methods, options.rank, options.samples)
    write_lines(options.output, Overlap, lines)


if __name__ == "__main__":
    main()
