"""A language model on the bench: its folder, files, samples and starts."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from effect.bench import Bench
from effect.kinds import CausalKind
from effect.population import Population
from effect.records import Run
from effect.runs import evaluate
from effect.train import Member, Recipe
from models import VOCAB, llama

WORDS = [f"w{i}" for i in range(VOCAB - 3)]


def sentence(generator: torch.Generator) -> str:
    count = int(torch.randint(3, 9, (), generator=generator))
    chosen = torch.randint(0, len(WORDS), (count,), generator=generator)
    return " ".join(WORDS[i] for i in chosen)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder, data = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("data")
    vocabulary = {word: i for i, word in enumerate(("<pad>", "<unk>", "<eos>", *WORDS))}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    llama(attention_dropout=0.0, max_position_embeddings=64).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    for name in ("task_train", "task_test", "general", "keep"):
        text = name in ("general", "keep")
        rows = [
            {"text": sentence(generator)}
            if text
            else {"prompt": sentence(generator), "completion": f" {sentence(generator)}"}
            for _ in range(20)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (data / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder, data


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
