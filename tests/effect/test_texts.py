"""A third kind of model: texts through the frozen classes of several data sets, by BERT."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from classifiers import MEMBERS, RANK, RECIPE, alone, start_of
from torch import nn
from transformers import BertConfig

import oracle
from effect import run as script
from effect.bench import Bench
from effect.kinds import ClassKind
from effect.plan import FIRST
from effect.population import Population
from effect.records import Run, read
from effect.runs import evaluate, train_population
from effect.tasks import order
from effect.texts import BertMeanForSequenceClassification, Texts, write_texts
from effect.train import Member, Recipe
from filet_kernels import fisher_energies
from models import VOCAB, randomised

CPU = torch.device("cpu")


def texts(seed: int, count: int):
    """Of every class half of the tokens are from another third of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        label = int(torch.randint(0, 2, (), generator=generator))
        length = int(torch.randint(3, 12, (), generator=generator))
        ids = torch.randint(1, VOCAB, (length,), generator=generator)
        ids[::2] = ids[::2] % 9 + 1 + 9 * label
        rows.append((ids.tolist(), label))
    return rows


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny BERT with classes of two data sets, and their files."""
    folder, data = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("data")
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=32,
        id2label=dict(enumerate(["a/no", "a/yes", "b/no", "b/yes"])),
    )
    randomised(BertMeanForSequenceClassification(config)).save_pretrained(folder)
    for seed, name in enumerate("ab"):
        write_texts(data / f"{name}_train.npz", texts(seed, 40))
        write_texts(data / f"{name}_test.npz", texts(seed + 2, 10))
    return folder, data


@pytest.fixture(scope="module")
def bench(folders):
    return Bench(*folders, CPU, Recipe(steps=3, batch_size=4, warmup=1), 2)


def run_of(method: str, seed: int = 0, task: str = "a") -> Run:
    return Run(task, Member(method, rate=1e-2, seed=seed), RANK, samples=24)


def logits_of(model, ids):
    """Of one text without padding: the mean of the last states through the classifier."""
    hidden = model.bert(ids.unsqueeze(0)).last_hidden_state
    return F.linear(hidden.mean(1), model.classifier.weight, model.classifier.bias)


def loss_of(model, rows, first=0):
    """The mean over texts, each by itself: nothing is padded."""
    losses = [F.cross_entropy(logits_of(model, ids), label[None] - first) for ids, label in rows]
    return torch.stack(losses).mean()


def test_files_hold_what_was_written(tmp_path):
    rows = [([5, 3, 65535], 1), ([7], 0), ([9, 9], 1)]
    write_texts(tmp_path / "x.npz", rows)
    form = Texts(BertConfig(), CPU)
    found = form.read(tmp_path / "x.npz", None)
    assert [(ids.tolist(), int(label)) for ids, label in found] == rows
    assert all(x.dtype == torch.int64 for row in found for x in row)
    assert len(form.read(tmp_path / "x.npz", 2)) == 2
    with pytest.raises(ValueError, match="ids are 1 to 65536; expected 0 to 65535"):
        write_texts(tmp_path / "x.npz", [([1, 65536], 0)])
    np.savez(tmp_path / "x.npz", ids=np.arange(4), lengths=np.array([2, 3]), labels=np.zeros(2))
    with pytest.raises(ValueError, match=r"ids of .*x.npz are \(4,\); expected \(5,\)"):
        form.read(tmp_path / "x.npz", None)


def test_a_gpu_gets_few_lengths_and_padding_changes_nothing(bench, folders):
    form = Texts(bench.kind.base.config, torch.device("cuda"))
    rows = bench.task("a").test
    inputs = form.arguments(form.batch([ids for ids, _ in rows]))
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (10, 32)
    model = bench.kind.load("a")
    with torch.no_grad():
        found = model(**inputs).logits
        for one, mask, row, (ids, _) in zip(*inputs.values(), found, rows, strict=True):
            assert torch.equal(one[: len(ids)], ids) and int(mask[: len(ids)].sum()) == len(ids)
            assert not one[len(ids) :].any() and not mask[len(ids) :].any()
            assert torch.allclose(row, logits_of(model, ids)[0], atol=1e-5)


def test_no_value_is_waited_for(bench):
    """Tensors without values go through: so they do while a graph is captured."""
    task, model = bench.task("a"), copy.deepcopy(bench.kind.model).to("meta")
    inputs, _ = task.batch(task.test, torch.device("meta"))
    assert task.run(model, inputs).shape == (10, 48)


def test_a_task_is_one_data_set_and_forgets_the_others(bench):
    assert type(bench.kind) is ClassKind and type(bench.kind.form) is Texts
    task = bench.task("a")
    assert (len(task.train), len(task.test), len(task.general), len(task.keep)) == (40, 10, 10, 40)
    population = Population(bench.kind.model, 2 * [bench.start(run_of("lora"))])
    general, shares = evaluate(population, task, task.general, 4, asked=True)
    population.close()
    model, rows = bench.kind.load("b"), bench.task("b").test
    assert general == pytest.approx(2 * [float(loss_of(model, rows, 2))], rel=1e-5)
    right = [int(logits_of(model, ids).argmax()) + 2 == int(label) for ids, label in rows]
    assert shares == 2 * [pytest.approx(sum(right) / 10)]


def test_padding_is_no_part_of_what_a_start_looks_at(bench, one_thread):
    """Moments of texts one by one, by autograd in float64, of every linear layer of the encoder."""
    context = bench.context(run_of("lora", task="b"))
    assert any(not batch["attention_mask"].all() for batch in context.batches)
    task, model = bench.task("b"), bench.kind.load("b").double()
    rows = [row for one in order(task.train, 12345, 1, 24) for row in one]
    layers = {n: x for n, x in model.bert.named_modules() if isinstance(x, nn.Linear)}
    assert set(context.targets) == {f"bert.{name}" for name in layers} and len(layers) == 12
    seen = {name: [] for name in layers}
    sides = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.weight.requires_grad_()
        layer.register_forward_hook(lambda _, x, y, name=name: seen[name].append((x[0][0], y)))
    loss = sum(F.cross_entropy(logits_of(model, ids), label[None] - 2) for ids, label in rows)
    for name in layers:
        outputs = [y for _, y in seen[name]]
        sides[name] = [g[0] for g in torch.autograd.grad(loss, outputs, retain_graph=True)]
    for name in layers:
        x, g = torch.cat([x for x, _ in seen[name]]).detach(), torch.cat(sides[name])
        moments = context.moments[f"bert.{name}"]
        assert len(x) == sum(len(ids) for ids, _ in rows)
        for found, truth in (
            (moments.S_X, x.T @ x / len(x)),
            (moments.S_Y, g.T @ g / len(x)),
            (moments.G, g.T @ x / len(rows)),
        ):
            assert torch.allclose(found, truth, atol=1e-4 * float(truth.abs().max()))
        W = layers[name].weight.detach()
        energies = fisher_energies(W, context.statistics.moments[f"bert.{name}"])
        truth = oracle.fisher_energies(W, x, g / len(rows))
        assert ((energies - truth).abs() / truth).max() < 1e-3
        seen[name].clear()
    with torch.no_grad():
        for ids, _ in task.keep:
            logits_of(model, ids)
    for name in layers:
        x = torch.cat([x for x, _ in seen[name]])
        truth = x.T @ x / len(x)
        found = context.keep_moments[f"bert.{name}"]
        assert torch.allclose(found, truth, atol=1e-4 * float(truth.abs().max()))


@pytest.mark.parametrize("method", FIRST)
def test_every_start_of_the_first_round_takes_texts(bench, method, one_thread):
    starts = bench.start(run_of(method, seed=1))
    assert list(starts) == bench.kind.targets
    assert all(x.A.isfinite().all() and x.B.isfinite().all() for x in starts.values())
    record = bench.train([run_of(method, seed=1)])[0]
    assert (record.task, record.method, record.device) == ("a", method, "CPU")
    assert 0 < record.loss < 10 and 0 < record.general < 10 and 0 <= record.accuracy <= 1
    if method == "kasa":  # it drops some of W
        return
    task, population = bench.task("a"), bench.population
    expected = copy.deepcopy(bench.kind.load("a"))
    expected.classifier = nn.Identity()
    population.load(2 * [starts])
    with torch.no_grad():
        found = population.run(task, task.batch(2 * task.test, CPU)[0])
        truth = [expected.bert(ids[None]).last_hidden_state.mean(1) for ids, _ in task.test]
    assert torch.allclose(found, torch.cat(truth).repeat(2, 1), atol=1e-4)


def test_a_population_on_padded_texts_is_as_many_separate_runs(folders):
    """The separate runs have no padding: every text goes alone through PEFT's model."""
    bench = Bench(*folders, CPU, RECIPE, len(MEMBERS))
    starts = [start_of(bench, "b", member) for member in MEMBERS]
    population = Population(bench.kind.model, starts)
    results = train_population(population, bench.task("b"), MEMBERS, RECIPE)
    population.close()
    for member, result in zip(MEMBERS, results, strict=True):
        expected = alone(bench, "b", member, partial(loss_of, first=2))
        assert result.losses == pytest.approx(expected, rel=1e-5)
        assert abs(expected[0] - expected[-1]) > 0.01
        assert 0 <= result.accuracy <= 1


def test_a_round_on_both_tasks(folders, tmp_path, one_thread):
    model, data = map(str, folders)
    given = ["--model", model, "--data", data, "--output", str(tmp_path), "--members", "4"]
    given += ["--steps", "2", "--batch-size", "4", "--tasks", "a", "b", "--samples", "24"]
    given += ["--methods", "lora", "--rates", "1e-3", "--scales", "1", "--seeds", "2"]
    script.main([*given, "--round", "given"])
    assert {(r.task, r.seed) for r in read(tmp_path)} == {(t, s) for t in "ab" for s in (0, 1)}
