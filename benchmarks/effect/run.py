"""Trains what a round still lacks, population by population, and appends it to a CSV file.

    python benchmarks/effect/run.py --model DIR --data DIR --output FOLDER --round first

Stopped and called again, it goes on where it was: the files in the folder are all it knows. With
several GPUs, a process each: --part 0/2 and --part 1/2.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # called as a script

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from effect.context import Context
from effect.inits import START
from effect.plan import FIRST, SCALES, first_round, given_round, second_round
from effect.population import Lora, Population
from effect.records import Record, Run, append, read
from effect.runs import train_population
from effect.start import Start, scaled
from effect.tasks import CausalTask, causal_task, order
from effect.train import Recipe
from effect.variants import VARIANTS

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
        """What is known of a task: the same samples for every seed."""
        key = (run.task, run.rank, run.samples)
        if key not in self.contexts:
            task = self.task(run.task)
            rows = order(task.train, _CALIBRATION, 1, run.samples)
            chosen = sorted((row for one in rows for row in one), key=lambda row: len(row[0]))
            self.contexts[key] = Context(
                self.load,
                TARGETS,
                run.rank,
                0,
                self._batches(task, chosen),
                self._batches(task, sorted(task.keep, key=lambda row: len(row[0]))),
            )
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
        return [r for task in options.tasks for r in first_round(records, task, options.methods)]
    if options.round == "given":
        grid = (options.methods, options.scales, options.rates, range(options.seeds))
        wanted = [given_round(records, task, *grid, options.samples) for task in options.tasks]
        return [run for runs in wanted for run in runs]
    return second_round(records, options.tasks, range(options.seeds), options.tasks[0])


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument(
        "--data", type=Path, required=True, help="TASK_train, TASK_test, general, keep"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--round", choices=("first", "second", "given"), required=True)
    parser.add_argument("--tasks", nargs="+", default=["gsm8k"])
    parser.add_argument(
        "--methods", nargs="+", default=FIRST, choices=sorted({*START, *VARIANTS}), metavar="METHOD"
    )
    parser.add_argument("--seeds", type=int, default=5, help="of all rounds but the first")
    given = parser.add_argument_group("the given round, which has no other runs than these")
    given.add_argument("--rates", type=float, nargs="+", default=[1e-3, 10**-2.5, 1e-2])
    given.add_argument("--scales", type=float, nargs="+", default=SCALES)
    given.add_argument("--samples", type=int, default=320, help="that a start may look at")
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
