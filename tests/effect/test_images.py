"""A second kind of model: images through the frozen classes of several data sets."""

from __future__ import annotations

import copy
import gzip
import struct

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from classifiers import MEMBERS, RANK, RECIPE, alone, start_of
from torch import nn
from transformers import Dinov2Config, Dinov2ForImageClassification

from effect import run as script
from effect.bench import Bench
from effect.images import Images, pixels
from effect.kinds import ClassKind, kind_of
from effect.loss import class_losses
from effect.plan import FIRST, SECOND
from effect.population import Population
from effect.records import Run, read
from effect.runs import evaluate, train_population
from effect.tasks import order
from effect.train import Member, Recipe
from effect.vit import digits, idx, resized_positions
from models import case, randomised

CPU = torch.device("cpu")
CLASSES, SIDE = 3, 6


def images(seed: int, count: int):
    """Of every class another half of the image is bright."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    grey = torch.randint(0, 60, (count, SIDE, SIDE), generator=generator)
    for image, label in zip(grey, labels, strict=True):
        image[2 * int(label) : 2 * int(label) + 2] += 150
    return {"images": grey.to(torch.uint8).numpy(), "labels": labels.to(torch.uint8).numpy()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny Dinov2 with classes of two data sets, and their files."""
    folder, data = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("data")
    config = Dinov2Config(
        image_size=8,
        patch_size=4,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        mlp_ratio=2,
        id2label=dict(enumerate(f"{s}/{i}" for s in "ab" for i in range(CLASSES))),
    )
    randomised(Dinov2ForImageClassification(config)).save_pretrained(folder)
    for seed, name in enumerate("ab"):
        np.savez(data / f"{name}_train.npz", **images(seed, 40))
        np.savez(data / f"{name}_test.npz", **images(seed + 2, 10))
    return folder, data


@pytest.fixture(scope="module")
def bench(folders):
    return Bench(*folders, CPU, Recipe(steps=3, batch_size=4, warmup=1), 2)


def run_of(method: str, seed: int = 0, task: str = "a") -> Run:
    return Run(task, Member(method, rate=1e-2, seed=seed), RANK, samples=24)


def test_losses_are_among_the_classes_of_the_labels_own_data_set():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 5, generator=generator, requires_grad=True)
    labels = torch.tensor([0, 4, -100, 1, 3, 2, 2, 0])
    groups = torch.tensor([0, 0, 1, 1, 1])
    found = class_losses(logits, labels, 2, groups, asked=True)
    (weights,) = torch.autograd.grad(found.sums[1], logits)
    z, sums, right = logits.detach().double(), [0.0, 0.0], [0, 0]
    expected = torch.zeros(8, 5, dtype=torch.float64)
    for row, label in enumerate(labels.tolist()):
        if label == -100:
            continue
        own = slice(0, 2) if label < 2 else slice(2, 5)
        p = z[row, own].softmax(0)
        sums[row // 4] -= float(p[label - own.start].log())
        right[row // 4] += int(p.argmax()) + own.start == label
        if row >= 4:
            expected[row, own] = p
            expected[row, label] -= 1
    assert found.sums.tolist() == pytest.approx(sums) and found.terms == [3, 4]
    assert found.right.tolist() == right
    assert torch.allclose(weights.double(), expected, atol=1e-6)
    assert class_losses(logits, labels, 2, groups).right is None


def test_images_are_resized_with_equal_channels():
    grey = torch.tensor([[[0, 255], [255, 0]]], dtype=torch.uint8)
    found = pixels(grey, 4)
    assert found.shape == (1, 3, 4, 4) and found.dtype == torch.float32
    # Corners are the pixels' own; between the first two lie weights of a quarter.
    line = torch.tensor([0, 0.25, 0.75, 1.0])
    for channel, (mean, spread) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
        assert torch.allclose(found[0, channel, 0], (line - mean) / spread, atol=1e-6)


def test_a_task_is_one_data_set_and_forgets_the_others(bench, folders):
    task = bench.task("a")
    assert (len(task.train), len(task.test), len(task.general), len(task.keep)) == (40, 10, 10, 40)
    with np.load(folders[1] / "b_test.npz") as file:
        grey, labels = torch.tensor(file["images"]), torch.tensor(file["labels"]).long()
    with torch.no_grad():
        logits = bench.kind.load("b")(pixel_values=pixels(grey, 8)).logits
    assert logits.shape == (10, CLASSES)
    population = Population(bench.kind.model, 2 * [bench.start(run_of("lora"))])
    general, shares = evaluate(population, task, task.general, 4, asked=True)
    population.close()
    assert general == pytest.approx(2 * [float(F.cross_entropy(logits, labels))], rel=1e-5)
    assert shares == 2 * [pytest.approx(float((logits.argmax(1) == labels).float().mean()))]
    with pytest.raises(ValueError, match="expected one of the model's"):
        bench.task("c")


def test_a_context_has_the_tasks_samples_as_the_model_takes_them(bench):
    for name in "ab":
        context, task = bench.context(run_of("lora", task=name)), bench.task(name)
        rows = [row for one in order(task.train, 12345, 1, 24) for row in one]
        grey, labels = (torch.stack(part) for part in zip(*rows, strict=True))
        whole = {key: torch.cat([x[key] for x in context.batches]) for key in context.batches[0]}
        assert torch.equal(whole["pixel_values"], pixels(grey, 8))
        assert torch.equal(whole["labels"], labels - CLASSES * "ab".index(name))
        assert sum(len(x["labels"]) for x in context.keep) == 40
        # The model's own loss is that of the benchmark.
        model, population = (
            context.load(),
            Population(bench.kind.model, [bench.start(run_of("lora"))]),
        )
        loss = float(model(**whole).loss)
        assert evaluate(population, task, rows, 8)[0] == [pytest.approx(loss, rel=1e-5)]
        population.close()
    assert len(context.targets) == 12 and "classifier" not in context.targets


def test_loading_draws_no_random_number(bench):
    state = torch.get_rng_state()
    bench.kind.load("a")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", FIRST)
def test_every_start_of_the_first_round_takes_images(bench, method, one_thread):
    run = run_of(method, seed=1)
    starts = bench.start(run)
    assert list(starts) == bench.kind.targets
    assert all(x.A.isfinite().all() and x.B.isfinite().all() for x in starts.values())
    record = bench.train([run])[0]
    assert (record.task, record.method, record.device) == ("a", method, "CPU")
    assert 0 < record.loss < 10 and 0 < record.general < 10 and 0 <= record.accuracy <= 1
    if method == "kasa":  # it drops some of W
        return
    rows = bench.task("a").batch(bench.task("a").test, CPU)[0]
    population = bench.population
    expected = copy.deepcopy(bench.kind.load("a"))
    expected.classifier = nn.Identity()
    population.load(2 * [starts])
    with torch.no_grad():
        found = population.run(bench.task("a"), {"images": rows["images"].repeat(2, 1, 1)})
        truth = expected(pixel_values=pixels(rows["images"], 8)).logits
    assert torch.allclose(found, truth.repeat(2, 1), atol=1e-4)


def loss_of(model, rows):
    grey, labels = (torch.stack(part) for part in zip(*rows, strict=True))
    logits = model(pixel_values=pixels(grey, 8)).logits
    return F.cross_entropy(logits, labels - CLASSES)


def test_a_population_of_layers_with_biases_is_as_many_separate_runs(folders):
    bench = Bench(*folders, CPU, RECIPE, len(MEMBERS))
    starts = [start_of(bench, "b", member) for member in MEMBERS]
    population = Population(bench.kind.model, starts)
    results = train_population(population, bench.task("b"), MEMBERS, RECIPE)
    population.close()
    for member, result in zip(MEMBERS, results, strict=True):
        expected = alone(bench, "b", member, loss_of)
        assert result.losses == pytest.approx(expected, rel=1e-5)
        assert abs(expected[0] - expected[-1]) > 0.01
        assert 0 <= result.accuracy <= 1


def test_a_round_on_both_tasks(folders, tmp_path, one_thread):
    model, data = map(str, folders)
    given = ["--model", model, "--data", data, "--output", str(tmp_path), "--members", "8"]
    given += ["--steps", "2", "--batch-size", "4", "--tasks", "a", "b", "--methods", "pissa"]
    script.main([*given, "--round", "first"])
    first = read(tmp_path)
    assert {r.task for r in first} == {"a", "b"} and {r.seed for r in first} == {0}
    assert script.lacking(script.parse_arguments([*given, "--round", "first"]), first) == []
    wanted = script.lacking(script.parse_arguments([*given, "--round", "second"]), first)
    assert {r.task for r in wanted} == {"a", "b"} and {r.member.method for r in wanted} == {"pissa"}
    every = script.parse_arguments([*given[:-2], "--round", "second"])
    assert {v[0] for v in SECOND} == {r.member.method for r in script.lacking(every, first)}


def test_table_4_begins_at_a_given_rate(folders, tmp_path):
    model, data = map(str, folders)
    given = ["--model", model, "--data", data, "--output", str(tmp_path), "--tasks", "a"]
    options = script.parse_arguments([*given, "--round", "table4", "--rates", "3.162e-4"])
    assert {r.member.rate for r in script.lacking(options, [])} == {1e-4, 3.162e-4, 1e-3}


def test_a_folder_says_what_kind_it_holds(folders, tmp_path):
    kind = kind_of(*folders, CPU, torch.float32)
    assert type(kind) is ClassKind and type(kind.form) is Images
    case("bert class").model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="BertForSequenceClassification; expected a model"):
        kind_of(tmp_path, tmp_path, CPU, torch.float32)


# How the folder of the real model is made.


def test_files_of_bytes_are_read_in_their_shape(tmp_path):
    path = tmp_path / "x.gz"
    values = bytes(range(24))
    path.write_bytes(gzip.compress(b"\0\0\x08\x03" + struct.pack(">3I", 2, 3, 4) + values))
    assert torch.equal(idx(path), torch.arange(24, dtype=torch.uint8).view(2, 3, 4))
    path.write_bytes(gzip.compress(b"\0\0\x0d\x01" + struct.pack(">I", 1) + values))
    with pytest.raises(ValueError, match="expected an IDX file of bytes"):
        idx(path)


def test_digits_are_shuffled_and_none_is_in_both_parts(tmp_path):
    path = tmp_path / "x.csv"
    table = np.arange(20)[:, None].repeat(785, 1)  # pixels and label say the row
    np.savetxt(path, table, fmt="%d", delimiter=",")
    (images, labels), test = digits(path, 5)
    assert images.shape == (15, 28, 28) and images.dtype == torch.uint8
    assert torch.equal(images[:, 0, 0], labels)
    assert sorted([*labels.tolist(), *test[1].tolist()]) == list(range(20))
    assert test[1].tolist() != list(range(5))


def test_positions_are_resized_as_dinov2_does():
    config = Dinov2Config(image_size=20, patch_size=4, hidden_size=8, num_attention_heads=2)
    config.num_hidden_layers = 1
    model = randomised(Dinov2ForImageClassification(config)).dinov2.embeddings
    expected = model.interpolate_pos_encoding(torch.zeros(1, 1 + 9, 8), 12, 12)
    found = resized_positions(model.position_embeddings, 3)
    assert found.shape == (1, 10, 8) and torch.equal(found, expected)
