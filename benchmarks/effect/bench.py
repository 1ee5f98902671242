"""One model, its tasks, and the starts on them, for :mod:`effect.run` to train populations of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from effect.context import Context
from effect.inits import START
from effect.kinds import kind_of
from effect.population import Lora, Population
from effect.records import ALL, Record, Run
from effect.runs import train_population
from effect.start import Start, scaled
from effect.tasks import Row, Task, order
from effect.train import FROZEN, Recipe
from effect.variants import VARIANTS

__all__ = ["Bench"]

SEEDED = ("lora", "gaussian", "orthogonal", *VARIANTS)  # and the random choice of directions
OF_WEIGHTS = (*SEEDED, "pissa", "olora", "milora")
_CALIBRATION = 12345  # seed of the samples by which starts are chosen: the same for all
_BATCH = 16  # of those samples


@dataclass
class Bench:
    """What is computed once for many runs on one model: tasks, contexts, starts, a population."""

    folder: Path
    data: Path
    device: torch.device
    recipe: Recipe
    members: int
    contexts: dict[tuple[Any, ...], Context] = field(default_factory=dict)
    starts: dict[tuple[Any, ...], Mapping[str, Start]] = field(default_factory=dict)
    tasks: dict[str, Task] = field(default_factory=dict)

    def __post_init__(self) -> None:
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.kind = kind_of(self.folder, self.data, self.device, dtype)
        self.population: Population | None = None
        self.shape: Any = None

    def task(self, name: str) -> Task:
        if name not in self.tasks:
            self.tasks[name] = self.kind.task(name)
        return self.tasks[name]

    def context(self, run: Run) -> Context:
        """What is known of a task: the same samples for every seed and rank."""
        key = (run.task, run.samples)
        if key not in self.contexts:
            task = self.task(run.task)
            samples = len(task.train) if run.samples == ALL else run.samples
            rows = order(task.train, _CALIBRATION, 1, samples)
            self.contexts[key] = Context(
                partial(self.kind.load, run.task),
                self.kind.targets,
                run.rank,
                0,
                self._batches(task, [row for one in rows for row in one]),
                self._batches(task, task.keep),
            )
        self.contexts[key].rank = run.rank
        return self.contexts[key]

    def _batches(self, task: Task, rows: Sequence[Row]) -> list[dict[str, torch.Tensor]]:
        rows = sorted(rows, key=lambda row: len(row[0]))
        parts = [rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH)]
        return [self.kind.batch(task, part) for part in parts]

    def start(self, run: Run) -> Mapping[str, Start]:
        """Where the run starts; what depends on neither seed nor task is computed once."""
        member = run.member
        method = member.method.removesuffix(FROZEN)
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
            self.population, self.shape = Population(self.kind.model, starts, adapter), shape
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
