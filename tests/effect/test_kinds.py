"""A language model on the bench: its folder, files, samples and starts."""

from __future__ import annotations

import pytest
import torch
from language import write_folders

from effect.bench import Bench
from effect.kinds import CausalKind
from effect.population import Population
from effect.records import Run
from effect.runs import evaluate
from effect.train import Member, Recipe


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("data")
    write_folders(*found)
    return found


def test_a_context_has_the_tasks_samples_and_their_padding(folders):
    recipe = Recipe(steps=3, batch_size=4, warmup=1)
    bench = Bench(*folders, torch.device("cpu"), recipe, 2)
    assert type(bench.kind) is CausalKind and len(bench.kind.targets) == 7
    runs = [Run("task", Member(m, 1e-2), 4, samples=20) for m in ("lora", "contrast.d0.01")]
    context, task = bench.context(runs[0]), bench.task("task")
    rows = sorted(task.train, key=lambda row: len(row[0]))
    seen = [
        tuple(ids[mask.bool()].tolist())
        for batch in context.batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert sorted(seen) == sorted(tuple(ids.tolist()) for ids, _ in rows)
    # The model's own mean loss of all labels is what a population starts from.
    model, sums, terms = context.load(), 0.0, 0
    for batch in context.batches:
        count = int((batch["labels"][:, 1:] != -100).sum())
        sums, terms = sums + float(model(**batch).loss) * count, terms + count
    population = Population(bench.kind.model, [bench.start(run) for run in runs])
    losses, _ = evaluate(population, task, rows, 4)
    assert losses == pytest.approx(2 * [sums / terms], rel=1e-5)
    before, _ = evaluate(population, task, task.test, 4)
    population.close()
    for record in bench.train(runs):
        assert record.loss < before[0] and 0 < record.general < 20


def test_a_missing_file_is_named(folders, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"has no other_train.jsonl or other_train.jsonl.gz"
    ):
        CausalKind(*folders, torch.device("cpu"), torch.float32).task("other")
