"""How many of GSM8K's problems are solved after training: answers generated, the number compared.

    python benchmarks/effect/answers.py --model DIR --data DIR --results FOLDER

The rounds compare losses; what they have no number of is right answers where an answer is free.
Here the best rate of each start, by the runs of ``FOLDER``, is trained again with every seed, and
each member answers the test problems of the loss greedily, by transformers' ``generate``. An answer
is right where the number after its "####" is the reference's (Cobbe et al. 2021, arXiv:2110.14168).
Written to FOLDER/answers/gsm8k.csv; called again, what is there is not run again, and the table is
printed.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # called as a script

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.utils.logging import disable_progress_bar

from effect.bench import Bench
from effect.kinds import CausalKind
from effect.lines import read_lines
from effect.plan import DEFAULT, KEEP
from effect.population import Population
from effect.records import Record, Run, Variant, append, read
from effect.tables import LORA, label, paired, table, tuned
from effect.tasks import Row
from effect.train import Member, Recipe
from effect.workers import trained
from filet.model.batch import IGNORED

__all__ = [
    "VARIANTS",
    "Answering",
    "generate",
    "number",
    "prompt_and_answer",
    "rows",
    "solved",
    "wanted",
]

TASK = "gsm8k"
VARIANTS: tuple[Variant, ...] = (
    *(("lora", scale, 1.0, 0.0) for scale in (1.0, 2.0, 4.0)),
    *(("eva", 1.0, 1.0, 0.0), ("pissa", 2.0, 1.0, 0.0)),
    *(("milora", 1.0, 1.0, 0.0), ("olora", 1.0, 1.0, 0.0)),
    *(DEFAULT, KEEP),
)
TOKENS = 256  # of an answer at most: the longest of the references has 244
_TOGETHER = 128  # problems: with 16 members the keys and values of SmolLM2 are 19 GB
_NUMBER = re.compile(r"####\s*\$?(-?[\d,]*\.?\d+)")


def number(answer: str) -> float | None:
    """What stands after the first "####"; None where no number does."""
    found = _NUMBER.search(answer)
    return float(found[1].replace(",", "")) if found else None


def prompt_and_answer(row: Row) -> Row:
    """The ids before the first label, and the labels."""
    ids, labels = row
    begin = int(labels.ne(IGNORED).nonzero()[0])
    return ids[:begin], labels[begin:]


@torch.no_grad()
def generate(
    population: Population, prompts: Sequence[Tensor], tokens: int, pad: int, end: int
) -> Tensor:
    """What every member says to every prompt, greedily.

    Returns:
        (K, N, at most ``tokens``) int64 on the CPU, ``pad`` after the token ``end``.
    """
    # What a token follows stands on its left.
    ids = pad_sequence(list(prompts), True, pad, padding_side="left")
    mask = pad_sequence([torch.ones_like(one) for one in prompts], True, 0, padding_side="left")
    K = population.members
    said = population.model.generate(
        ids.repeat(K, 1).to(population.device),
        attention_mask=mask.repeat(K, 1).to(population.device),
        do_sample=False,
        max_new_tokens=tokens,
        eos_token_id=end,
        pad_token_id=pad,
    )
    return said[:, ids.shape[1] :].view(K, len(prompts), -1).cpu()


class Answering:
    """A bench whose populations answer before they are left."""

    def __init__(self, make: Callable[[torch.device], Bench], device: torch.device) -> None:
        self.bench = make(device)
        assert isinstance(self.bench.kind, CausalKind)
        self.tokenizer = self.bench.kind.tokenizer

    def train(self, runs: Sequence[Run]) -> list[Record]:
        """The records of the runs, ``accuracy`` the share of test problems that are solved."""
        records = self.bench.train(runs)
        assert self.bench.population is not None
        right = solved(self.bench.population, self.bench.task(TASK).test, self.tokenizer)
        return [replace(r, accuracy=share) for r, share in zip(records, right, strict=False)]


def solved(population: Population, rows: Sequence[Row], tokenizer: Any) -> list[float]:
    """Of every member of the population, as it is: the share of rows with the right number.

    Rows that were cut before their number do not count.
    """
    pairs = sorted(map(prompt_and_answer, rows), key=lambda pair: len(pair[0]))
    numbers = ((prompt, number(tokenizer.decode(answer))) for prompt, answer in pairs)
    problems = [(prompt, its) for prompt, its in numbers if its is not None]
    right = torch.zeros(population.members)
    pad = tokenizer.pad_token_id or 0
    for start in range(0, len(problems), _TOGETHER):
        prompts, references = zip(*problems[start : start + _TOGETHER], strict=True)
        said = generate(population, prompts, TOKENS, pad, tokenizer.eos_token_id)
        for k, answers in enumerate(said):
            texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
            right[k] += sum(number(t) == r for t, r in zip(texts, references, strict=True))
    return (right / len(problems)).tolist()


def wanted(records: Iterable[Record], variants: Sequence[Variant]) -> list[Run]:
    """Every variant's seeds at its best rate. ValueError for one that was not run."""
    found = tuned(records, TASK)
    for variant in variants:
        if variant not in found:
            raise ValueError(f"no run of {label(variant)} on {TASK}; expected the second round's")
    return [
        Run(TASK, Member(v[0], found[v].rate, *v[1:], seed))
        for v in variants
        for seed in sorted(found[v].seeds)
    ]


def rows(records: Sequence[Record]) -> list[list[str]]:
    """Of a table: the best first, and less LoRA."""
    found = tuned(records, TASK)
    each = sorted(found.values(), key=lambda one: -one.mean("accuracy"))
    return [
        [
            label(one.variant),
            f"{one.rate:.2g}",
            f"{one.loss:.4f}",
            f"{one.mean('accuracy'):.4f}",
            str(paired(one, found[LORA], "accuracy")) if LORA in found else "–",
        ]
        for one in each
    ]


def bench(options: argparse.Namespace, device: torch.device) -> Bench:
    disable_progress_bar()
    return Bench(options.model, options.data, device, Recipe(), options.members)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="as for run.py")
    parser.add_argument("--results", type=Path, required=True, help="folder of the rounds' files")
    parser.add_argument("--members", type=int, default=16, help="adapters trained side by side")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)
    runs = wanted(read(options.results), VARIANTS)
    path = options.results / "answers" / f"{TASK}.csv"
    records = read_lines(path, Record) if path.exists() else []

    def lacking() -> list[Run]:
        done = {record.run for record in records}
        return [run for run in runs if run not in done]

    make = partial(Answering, partial(bench, options))
    for done in trained(make, lacking, options.members) if lacking() else ():
        append(path, done)
        records.extend(done)
        print(f"{len(lacking())} runs left", file=sys.stderr, flush=True)
    print(table(["start", "rate", "loss", "right", "right to LoRA"], rows(records)))


if __name__ == "__main__":
    main()
