"""The summed loss behind whatever a model or a forward_fn returns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    BertForSequenceClassification,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    ViTForImageClassification,
)

from models import (
    LENGTHS,
    VOCAB,
    Case,
    assert_energies,
    case,
    energies_of,
    linears,
    loader,
    mean_and_terms,
    peft_of,
    randomised,
    true_energies,
    truth,
)
from passes import FLOAT32, models_own, statistics_of

pytestmark = pytest.mark.usefixtures("one_thread")


def summed(model: Any, batch: dict[str, Tensor]) -> Tensor:
    loss, terms = mean_and_terms(model, batch)
    return loss * terms


class WithLoss(nn.Module):
    """A perceptron with labels of its own, and a loss of any reduction."""

    def __init__(self, reduction: str = "mean", factor: float = 1.0) -> None:
        super().__init__()
        self.inner = case("perceptron").model
        self.reduction, self.factor = reduction, factor

    def forward(self, input_ids: Tensor, labels: Tensor, **_: Any) -> SimpleNamespace:
        logits = self.inner(input_ids)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction=self.reduction)
        return SimpleNamespace(loss=loss * self.factor, logits=logits)


def with_loss(reduction: str = "mean", factor: float = 1.0) -> PeftModel:
    c = case("perceptron")
    return peft_of(Case(WithLoss(reduction, factor), c.samples, c.targets))


def perceptron_truth() -> dict[str, Tensor]:
    return {f"inner.{name}": energies for name, energies in truth("perceptron").items()}


@pytest.mark.parametrize("given", ["auto", "told"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reduction(reduction: str, given: str) -> None:
    config = {"loss_reduction": reduction} if given == "told" else {}
    found = energies_of(with_loss(reduction), loader(case("perceptron").samples), **config)
    assert_energies(found, perceptron_truth(), FLOAT32)


@pytest.mark.parametrize(
    ("forward_fn", "config"),
    [
        (mean_and_terms, {}),
        (summed, {"loss_reduction": "sum"}),
        (lambda model, batch: mean_and_terms(model, batch)[0], {}),
        (lambda model, batch: (summed(model, batch), 1), {}),
    ],
    ids=["mean and terms", "sum", "bare mean", "sum as one term"],
)
def test_forward_fn(forward_fn: Callable[[Any, Any], Any], config: dict[str, str]) -> None:
    c = case("perceptron")
    statistics = statistics_of(peft_of(c), loader(c.samples), forward_fn, **config)
    found = energies_of(peft_of(c), loader(c.samples), forward_fn, **config)
    expected = truth("perceptron")
    if forward_fn.__name__ == "<lambda>" and statistics.loss_terms == 3:  # three batches
        labels = sum(int((s["labels"] != -100).sum()) for s in c.samples)
        expected = {n: e * (labels / 3) ** 2 for n, e in expected.items()}
    assert_energies(found, expected, FLOAT32)


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_reduction_told(kind: str) -> None:
    """Whether the labels are shifted is found all the same: GPT-2's class does not say it."""
    c = case(kind)
    found = energies_of(peft_of(c), loader(c.samples), loss_reduction="mean")
    assert_energies(found, truth(kind), FLOAT32)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reduction_is_not_settled_by_a_single_term(reduction: str) -> None:
    """The mean and the sum of one term are the same: the batches after it tell."""
    samples = copy.deepcopy(case("perceptron").samples)
    for sample in samples[:2]:
        sample["labels"][1:] = -100
    c = case("perceptron")
    expected = true_energies(c.model, c.targets, samples)
    found = energies_of(with_loss(reduction), loader(samples, 1))
    assert_energies(found, {f"inner.{n}": e for n, e in expected.items()}, FLOAT32)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("kind", ["llama", "bert tokens"])
def test_a_sample_without_a_label(kind: str, batch_size: int) -> None:
    """Its positions count and its gradient is zero, also where it is a batch by itself (the mean
    over no term is NaN)."""
    c = case(kind)
    samples = [dict(sample) for sample in c.samples]
    for index in (0, 5):
        samples[index]["labels"] = torch.full_like(samples[index]["labels"], -100)
    expected = true_energies(c.model, c.targets, samples, c.shift)
    assert_energies(energies_of(peft_of(c), loader(samples, batch_size)), expected, FLOAT32)


def test_loss_that_fits_no_reduction() -> None:
    batches = loader(case("perceptron").samples)
    with pytest.raises(ValueError, match=r"neither the mean nor the sum.*loss_reduction"):
        energies_of(with_loss(factor=1.5), batches)
    # The user knows better: a weighted loss is what it is.
    found = energies_of(with_loss(factor=1.5), batches, loss_reduction="mean")
    expected = {n: 1.5**2 * e for n, e in perceptron_truth().items()}
    assert_energies(found, expected, FLOAT32)


def test_losses_that_cannot_be_used() -> None:
    c = case("perceptron")
    peft_model = peft_of(c)
    keys = "input_ids, attention_mask, labels"
    message = f"^the model returned a Tensor without a scalar loss; .* batch, which has {keys}, or"
    with pytest.raises(ValueError, match=message):
        statistics_of(peft_model, loader(c.samples))
    unlabelled = [{k: v for k, v in s.items() if k != "labels"} for s in c.samples]
    with pytest.raises(ValueError, match="no 'labels' but input_ids, attention_mask, so"):
        statistics_of(peft_model, loader(unlabelled), lambda m, b: m(**b).square().mean())
    with pytest.raises(TypeError, match="gave a Tensor"):
        statistics_of(peft_model, [torch.ones(2, 3, dtype=torch.int64)])
    with pytest.raises(ValueError, match="batch 0 has no gradient"):

        def detached(model: Any, batch: Any) -> Any:
            loss, terms = mean_and_terms(model, batch)
            return loss.detach(), terms

        statistics_of(peft_model, loader(c.samples), detached)


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
@pytest.mark.parametrize("kind", ["llama", "bert class"])
def test_labels_of_another_name(kind: str, fisher: str) -> None:
    """The message says what the batch has."""
    c = case(kind)
    for batch in loader(c.samples):
        none = {**batch, "labels": None}
        with pytest.raises(ValueError, match=r"batch, which has input_ids, attention_mask, labels"):
            statistics_of(peft_of(c), [none], fisher=fisher)
        batch["some_label"] = batch.pop("labels")
        forward_fn = lambda model, batch: model(input_ids=batch["input_ids"])  # noqa: E731
        with pytest.raises(ValueError, match=r"which has input_ids, attention_mask, some_label"):
            statistics_of(peft_of(c), [batch], forward_fn, fisher=fisher)


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
@pytest.mark.parametrize("where", ["batch", "config"])
@pytest.mark.parametrize("kind", ["llama", "bert class"])
def test_a_model_that_returns_a_tuple(kind: str, where: str, fisher: str) -> None:
    c = case(kind)
    peft_model, batches = peft_of(c), list(loader(c.samples))
    if where == "batch":
        batches = [{**batch, "return_dict": False} for batch in batches]
    else:
        peft_model.base_model.model.config.return_dict = False
    said = r"^return_dict=False in the" if where == "config" else r"expected .*return_dict=True"
    with pytest.raises(ValueError, match=said):
        statistics_of(peft_model, batches, fisher=fisher)


def test_logits_of_one_sample_and_class_are_no_number_of_terms() -> None:
    config = copy.deepcopy(case("bert class").model.config)
    config.num_labels, config.return_dict = 1, False
    model = randomised(BertForSequenceClassification(config))
    sample = case("bert class").samples[0] | {"labels": torch.tensor(0.3)}
    c = Case(model, [sample], linears(model))
    with pytest.raises(ValueError, match=r"expected .*return_dict=True"):
        statistics_of(peft_of(c), loader([sample]), models_own)


@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("ignored", [255, 3])
def test_labels_that_a_segmentation_ignores(classes: int, ignored: int) -> None:
    """Its configuration names the label that does not count, in batches that have many and few."""
    config = SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16],
        patch_sizes=[3, 3], strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
        decoder_hidden_size=8, num_labels=classes, semantic_loss_ignore_index=ignored,
    )  # fmt: skip
    model = randomised(SegformerForSemanticSegmentation(config))
    generator = torch.Generator().manual_seed(1)
    batches = []
    for share in (0.05, 0.95):
        labels = torch.randint(0, min(classes, 3), (2, 16, 16), generator=generator)
        hidden = torch.rand(labels.shape, generator=generator) < share
        images = torch.randn(2, 3, 16, 16, generator=generator)
        batches.append({"pixel_values": images, "labels": labels.masked_fill(hidden, ignored)})
    c = Case(model, [], linears(model))

    def counted(model: Any, batch: Any) -> Any:
        labels = batch["labels"]  # with one class, transformers' mean is over all of them
        return model(**batch).loss, (labels != (ignored if classes > 1 else -100)).sum()

    expected = energies_of(peft_of(c), batches, counted)
    assert_energies(energies_of(peft_of(c), batches, loss_reduction="mean"), expected, 0)


def test_labels_of_another_task_are_ignored_by_none() -> None:
    """Image classifiers share their configuration with those that segment."""
    c = case("vit")
    model = copy.deepcopy(c.model)
    assert type(model) is ViTForImageClassification
    model.config.semantic_loss_ignore_index = 3
    found = energies_of(peft_of(Case(model, c.samples, c.targets)), loader(c.samples))
    assert_energies(found, truth("vit"), FLOAT32)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert masked", "bert tokens", "t5"])
def test_items_counted_by_a_trainer_change_nothing(kind: str) -> None:
    """By ``num_items_in_batch`` a model divides its summed loss: of the batch or of many."""
    c = case(kind)
    plain = energies_of(peft_of(c), loader(c.samples))
    for items in (torch.tensor(7), 10_000):
        counted = [batch | {"num_items_in_batch": items} for batch in loader(c.samples)]
        found = energies_of(peft_of(c), counted)
        assert all(torch.equal(found[name], plain[name]) for name in plain)
    assert_energies(plain, truth(kind), FLOAT32)


def test_items_that_a_forward_fn_divides_by() -> None:
    """Its mean over that many terms is exact; of a bare loss nobody knows what divided it."""
    c = case("llama")
    counted = [
        batch | {"num_items_in_batch": batch["labels"].ne(-100).sum() + 5}
        for batch in loader(c.samples)
    ]
    terms = sum(int(batch["num_items_in_batch"]) for batch in counted)
    labels = sum(int((s["labels"][1:] != -100).sum()) for s in c.samples)

    def divided(model: Any, batch: Any) -> Any:
        return model(**batch).loss, batch["num_items_in_batch"]

    found = energies_of(peft_of(c), counted, divided)
    expected = {name: e * (labels / terms) ** 2 for name, e in truth("llama").items()}
    assert_energies(found, expected, FLOAT32)
    for reduction in ("auto", "mean", "sum"):
        with pytest.raises(ValueError, match=r"^the batch has num_items_in_batch.*\(loss, terms\)"):
            energies_of(peft_of(c), counted, models_own, loss_reduction=reduction)


def test_regression_counts_every_label() -> None:
    c = case("perceptron")
    samples = [s | {"labels": torch.randn(s["labels"].shape[0], VOCAB)} for s in c.samples]

    def squared(model: Any, batch: Any) -> Tensor:
        return F.mse_loss(model(batch["input_ids"]), batch["labels"])

    one = [{k: v.unsqueeze(0) for k, v in s.items()} for s in samples]
    found = energies_of(peft_of(c), one, squared)
    statistics = statistics_of(peft_of(c), one, squared)
    assert statistics.loss_terms == VOCAB * sum(LENGTHS)
    counted = energies_of(
        peft_of(c), one, lambda m, b: (squared(m, b), b["labels"].numel()), fisher="empirical"
    )
    assert_energies(found, counted, 1e-6)
