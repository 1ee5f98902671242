"""Trains what a round still lacks, population by population, and appends it to a CSV file.

    python benchmarks/effect/run.py --model DIR --data DIR --output FOLDER --round first

Stopped and called again, it goes on where it was: the files in the folder are all it knows. Every
GPU has a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # called as a script

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from effect.context import Context
from effect.inits import START
from effect.plan import FIRST, SCALES, first_round, second_round
from effect.population import Lora, Population
from effect.records import ALL, Record, Run, append, read
from effect.runs import train_population
from effect.start import Start, scaled
from effect.sweeps import SWEEPS
from effect.tasks import CausalTask, causal_task, order
from effect.train import Recipe
from effect.variants import VARIANTS
from effect.workers import trained

OPTIONS = {
    "boolq": ("true", "false"),
    **dict.fromkeys(
        ("arc_easy", "arc_challenge", "openbookqa"), ("answer1", "answer2", "answer3", "answer4")
    ),
}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SEEDED = ("lora", "gaussian", "orthogonal", *VARIANTS)  # and the random choice of directions
OF_WEIGHTS = (*SEEDED, "pissa", "olora", "milora")
_CALIBRATION = 12345  # seed of the samples by which starts are chosen: the same for all


@dataclass
class Bench:
    """One model and its tasks, with what is computed once."""

    folder: Path
    data: Path
    device: torch.device
    recipe: Recipe
    members: int
    contexts: dict[tuple[Any, ...], Context] = field(default_factory=dict)
    starts: dict[tuple[Any, ...], Mapping[str, Start]] = field(default_factory=dict)
    tasks: dict[str, CausalTask] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.base = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        self.base = self.base.to(self.device).requires_grad_(False).eval()
        self.model = self.load().to(self.dtype)
        self.population: Population | None = None
        self.shape: Any = None

    def load(self) -> Any:
        """The base model anew, float32."""
        return copy.deepcopy(self.base)

    def task(self, name: str) -> CausalTask:
        if name not in self.tasks:
            choice = name in OPTIONS
            task = self.tasks[name] = causal_task(
                name,
                self._file(f"{name}_train"),
                self._file(f"{name}_test"),
                self.tokenizer,
                general=self._file("general"),
                keep=self._file("keep"),
                options=OPTIONS.get(name, ()),
                tests=512 if choice else 256,
            )
            task.multiple = 32 if self.device.type == "cuda" else 1
        return self.tasks[name]

    def _file(self, name: str) -> Path:
        for path in (self.data / f"{name}.jsonl.gz", self.data / f"{name}.jsonl"):
            if path.exists():
                return path
        raise FileNotFoundError(f"{self.data} has no {name}.jsonl or {name}.jsonl.gz")

    def context(self, run: Run) -> Context:
        """What is known of a task: the same samples for every seed and rank."""
        key = (run.task, run.samples)
        if key not in self.contexts:
            task = self.task(run.task)
            samples = len(task.train) if run.samples == ALL else run.samples
            rows = order(task.train, _CALIBRATION, 1, samples)
            chosen = sorted((row for one in rows for row in one), key=lambda row: len(row[0]))
            self.contexts[key] = Context(
                self.load,
                TARGETS,
                run.rank,
                0,
                self._batches(task, chosen),
                self._batches(task, sorted(task.keep, key=lambda row: len(row[0]))),
            )
        self.contexts[key].rank = run.rank
        return self.contexts[key]

    def _batches(self, task: CausalTask, rows: Sequence[Any]) -> list[dict[str, torch.Tensor]]:
        found = []
        for start in range(0, len(rows), 16):
            part = rows[start : start + 16]
            inputs, labels = task.batch(part, self.device)
            lengths = torch.tensor([len(ids) for ids, _ in part]).unsqueeze(1)
            mask = (torch.arange(labels.shape[1]) < lengths).long()
            rest = {"attention_mask": mask.to(self.device), "labels": labels.to(self.device)}
            found.append({**inputs, **rest})
        return found

    def start(self, run: Run) -> Mapping[str, Start]:
        """Where the run starts; what depends on neither seed nor task is computed once."""
        member = run.member
        method = member.method
        seed = member.seed if method in SEEDED or method.startswith("filet-R") else 0
        key = (method, seed, run.rank, *(() if method in OF_WEIGHTS else (run.task, run.samples)))
        if key not in self.starts:
            context = self.context(run)
            context.seed = seed
            begin = VARIANTS[method].starts if method in VARIANTS else START[method]
            self.starts[key] = begin(context)
        if member.scale == 1:
            return self.starts[key]
        return {name: scaled(start, member.scale) for name, start in self.starts[key].items()}

    def train(self, runs: Sequence[Run]) -> list[Record]:
        """At most ``members`` runs of one task, as one population."""
        full = [*runs, *(self.members - len(runs)) * [runs[-1]]]
        starts = [self.start(run) for run in full]
        rests = [0 if s.A0 is None else s.A0.shape[0] for one in starts for s in one.values()]
        method = runs[0].member.method
        adapter = VARIANTS[method].adapter if method in VARIANTS else Lora
        shape = (runs[0].rank, max(rests), adapter)
        if shape != self.shape:
            if self.population is not None:
                self.population.close()
            self.population = None
            self.population, self.shape = Population(self.model, starts, adapter), shape
        else:
            assert self.population is not None
            self.population.load(starts)
        task, members = self.task(runs[0].task), [run.member for run in full]
        results = train_population(self.population, task, members, self.recipe)
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        return [
            Record.of(
                run,
                steps=self.recipe.steps,
                loss=result.loss,
                middle=result.middle,
                general=result.general,
                accuracy=result.accuracy,
                device=device,
            )
            for run, result in zip(runs, results, strict=False)
        ]


def lacking(options: argparse.Namespace, records: Sequence[Record]) -> list[Run]:
    """What the round still lacks."""
    if options.round == "first":
        of = options.methods, options.scales
        return [run for task in options.tasks for run in first_round(records, task, *of)]
    seeds = range(options.seeds)
    if options.round in SWEEPS:
        return SWEEPS[options.round](records, options.tasks, seeds, options.thorough)
    return second_round(records, options.tasks, seeds, options.tasks[0])


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument(
        "--data", type=Path, required=True, help="TASK_train, TASK_test, general, keep"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--round", choices=("first", "second", *SWEEPS), required=True)
    parser.add_argument("--tasks", nargs="+", default=["gsm8k"])
    parser.add_argument(
        "--methods", nargs="+", default=FIRST, choices=sorted({*START, *VARIANTS}), metavar="METHOD"
    )
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, help="of A and B")
    parser.add_argument("--seeds", type=int, default=5, help="of all rounds but the first")
    parser.add_argument(
        "--thorough", action="store_true", help="ranks, samples: three rates; groups: all seeds"
    )
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
