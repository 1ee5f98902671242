"""Batches as users have them: masks of every kind, tensors whose rows are no samples, no labels.

What is right is the same everywhere: the energies of the same samples without padding, whole.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForMultipleChoice

import filet
from filet import FiletConfig
from filet.model.batch import first_samples, is_divisible
from models import (
    VOCAB,
    Case,
    assert_energies,
    case,
    collate,
    energies_of,
    linears,
    loader,
    mean_and_terms,
    peft_of,
    randomised,
    true_energies,
)
from passes import of_llama, padded
from pictures import llava, qwen2_vl, with_images

pytestmark = pytest.mark.usefixtures("one_thread")


# No label at all.


def test_no_label_is_an_error() -> None:
    batches = [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in padded()]
    peft_model = peft_of(case("llama"))
    before = {name: p.clone() for name, p in peft_model.named_parameters()}
    for config in (FiletConfig(), FiletConfig(fisher="sampled")):
        with pytest.raises(ValueError, match="no position of the 12 samples has a label"):
            filet.initialize_lora_filet_weights(
                peft_model, batches, config, show_progress_bar=False
            )
    assert all(torch.equal(p, before[name]) for name, p in peft_model.named_parameters())
    some = [batches[0], padded()[1]]
    assert filet.collect_statistics(peft_model, some, show_progress_bar=False).loss_terms > 0


def test_no_label_that_anything_predicts_is_an_error() -> None:
    """A causal model predicts no first token."""
    batch = padded()[0]
    labels = torch.full_like(batch["labels"], -100)
    labels[:, 0] = 3
    with pytest.raises(ValueError, match="no position of the 4 samples has a label"):
        of_llama([{**batch, "labels": labels}])


def test_a_forward_fn_that_counts_no_term_is_an_error() -> None:
    c = case("perceptron")
    batches = [{**b, "labels": torch.full_like(b["labels"], -100)} for b in loader(c.samples)]

    def no_terms(model: Any, batch: Any) -> Any:
        return mean_and_terms(model, batch)[0].nan_to_num(0.0), 0

    with pytest.raises(ValueError, match="no position of the 12 samples has a label"):
        energies_of(peft_of(c), batches, no_terms)


# Tensors whose rows are no samples.


@pytest.mark.parametrize("kind", [qwen2_vl, llava])
def test_a_batch_with_images_goes_through_whole(kind: Any) -> None:
    c = kind()
    peft_model, batch = peft_of(c), with_images(c.samples)
    whole = energies_of(peft_model, [batch])
    assert_energies(whole, energies_of(peft_model, [with_images([s]) for s in c.samples]), 1e-4)
    statistics = filet.collect_statistics(
        peft_model, [batch], FiletConfig(samples=1), show_progress_bar=False
    )
    assert statistics.samples == len(c.samples)  # not one of three, nor three called one
    assert_energies(energies_of(peft_model, [batch], samples=1), whole, 0)


@pytest.mark.parametrize("kind", [qwen2_vl, llava])
def test_a_batch_with_images_is_planned_whole(kind: Any) -> None:
    c = kind()
    plan = filet.estimate(peft_of(c), with_images(c.samples))
    assert plan.length == max(len(sample["input_ids"]) for sample in c.samples)
    first = {key: batch for key, batch in reversed(with_images(c.samples).items())}
    assert next(iter(first)) != "input_ids"  # images first: the ids still say how many samples
    assert str(filet.estimate(peft_of(c), first)).splitlines()[1:3] == str(plan).splitlines()[1:3]


@pytest.mark.parametrize("kind", [qwen2_vl, llava])
def test_sampled_labels_of_a_batch_with_images(kind: str) -> None:
    """The draw of a sample is its own, wherever its patches lie in the batch."""
    c = kind()
    whole = energies_of(peft_of(c), [with_images(c.samples)], fisher="sampled")
    turned = energies_of(peft_of(c), [with_images(c.samples[::-1])], fisher="sampled")
    alone = energies_of(peft_of(c), [with_images([s]) for s in c.samples], fisher="sampled")
    assert_energies(whole, alone, 1e-4)
    if kind is qwen2_vl:  # each of llava's batches has an image first
        assert_energies(turned, alone, 1e-4)


def with_axes(size: int, axes: int) -> dict[str, Tensor]:
    """Texts for a model of images, with positions of three axes and maybe the text's own first."""
    ids = torch.randint(3, VOCAB, (size, 7), generator=torch.Generator().manual_seed(size))
    batch = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    batch["attention_mask"][0, -2:] = 0
    batch["position_ids"] = torch.arange(7).expand(axes, size, 7).clone()
    return batch


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
@pytest.mark.parametrize("axes", [3, 4])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_positions_of_several_axes(size: int, axes: int, fisher: str) -> None:
    c, batch = qwen2_vl(), with_axes(size, axes)
    plain = {key: value for key, value in batch.items() if key != "position_ids"}
    found = energies_of(peft_of(c), [batch], fisher=fisher, samples=2)
    assert_energies(found, energies_of(peft_of(c), [plain], fisher=fisher), 1e-4)
    assert not is_divisible(batch) and is_divisible(plain)
    assert first_samples(batch, 1) is batch
    assert filet.estimate(peft_of(c), batch).length == 7


def test_positions_of_samples_are_rows() -> None:
    plain = {key: value for key, value in with_axes(3, 3).items() if key != "position_ids"}
    batch = {**plain, "position_ids": torch.arange(7).expand(3, 7)}
    assert first_samples(batch, 2)["position_ids"].shape == (2, 7)
    choices = {key: value.unsqueeze(1).expand(3, 3, 7) for key, value in batch.items()}
    assert first_samples(choices, 2)["position_ids"].shape == (2, 3, 7)


def test_one_row_of_positions_is_that_of_all_samples() -> None:
    """The draw of a sample is the same alone, where that row is its own."""
    c = case("llama")
    samples = [{k: v[:3] for k, v in s.items()} for s in c.samples]
    batches = [{**b, "position_ids": torch.arange(3).unsqueeze(0)} for b in loader(samples, 4)]
    ones = [{**b, "position_ids": torch.arange(3).unsqueeze(0)} for b in loader(samples, 1)]
    found = of_llama(batches, fisher="sampled")
    assert_energies(found, of_llama(ones, fisher="sampled"), 1e-4)


# Several choices a sample.


def test_choices_have_a_mask_of_their_own_shape() -> None:
    """(samples, choices, tokens); those of a sample are of one length, and so without padding."""
    model = case("bert class").model
    model = randomised(BertForMultipleChoice(model.config))
    generator = torch.Generator().manual_seed(0)
    samples = []
    for index, length in enumerate((5, 9, 3)):
        ids = torch.randint(3, VOCAB, (2, length), generator=generator)
        labels = torch.tensor(index % 2)
        samples.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    batch = {
        key: torch.stack([nn.functional.pad(s[key], (0, 9 - s[key].shape[1])) for s in samples])
        for key in ("input_ids", "attention_mask")
    }
    batch["labels"] = torch.stack([sample["labels"] for sample in samples])
    c = Case(model, samples, [name for name in linears(model) if "encoder" in name])
    expected = true_energies(model, c.targets, samples)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_energies(energies_of(peft_of(c), [batch]), expected, 1e-4)
    ones = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(3)]
    drawn = energies_of(peft_of(c), ones, fisher="sampled")
    assert_energies(energies_of(peft_of(c), [batch], fisher="sampled"), drawn, 1e-4)
    with pytest.raises(ValueError, match=r"attention_mask is of shape \(3, 2, 1, 9\), from which"):
        energies_of(peft_of(c), [{**batch, "attention_mask": batch["attention_mask"][:, :, None]}])


# Towers.


class Gathered(nn.Module):
    """Takes the tokens of one sort out of their samples, as a mixture's expert does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        rows = (x[..., 0] > 0).nonzero(as_tuple=True)
        return torch.zeros_like(x).index_put(rows, self.inner(x[rows]))


@pytest.mark.parametrize("kind", [qwen2_vl, llava])
def test_a_tower_has_no_padding(kind: Any) -> None:
    """Nor what brings its output to the text; an expert of the text has."""
    c = kind()
    model = copy.deepcopy(c.model)
    batch, single = with_images(c.samples), [with_images([s]) for s in c.samples]
    everything = Case(model, c.samples, linears(model, "lm_head"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = energies_of(peft_of(everything), [batch])
    assert_energies(found, energies_of(peft_of(everything), single), 1e-4)
    layer = model.model.language_model.layers[0]
    layer.mlp = Gathered(layer.mlp)
    experts = Case(model, c.samples, linears(model, "lm_head"))
    with pytest.warns(UserWarning, match="so padding counts there") as caught:
        energies_of(peft_of(experts), [batch])
    message = next(str(w.message) for w in caught if "padding" in str(w.message))
    assert "language_model.layers.0.mlp.inner.up_proj" in message and "vis" not in message


def test_a_batch_of_rows_is_cut_to_the_samples() -> None:
    statistics = filet.collect_statistics(
        peft_of(case("llama")), padded(), FiletConfig(samples=6), show_progress_bar=False
    )
    assert statistics.samples == 6
    found = of_llama(padded(), samples=6)
    assert_energies(found, of_llama(list(loader(case("llama").samples[:6], 1))), 1e-4)


def test_batches_that_are_no_dicts_are_cut_where_rows_are_samples() -> None:
    c = case("perceptron")

    def forward_fn(model: Any, batch: Any) -> Any:
        ids, labels = batch[:2]
        return mean_and_terms(model, {"input_ids": ids, "labels": labels})

    def taken(*more: Any) -> int:
        batch = collate(c.samples)
        batches = [(batch["input_ids"], batch["labels"], *more)]
        return filet.collect_statistics(
            peft_of(c), batches, FiletConfig(samples=5), "default", forward_fn, False
        ).samples

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert taken() == taken(torch.tensor(2.0), "name", None) == 5
        assert taken(torch.zeros(3, 12)) == taken([torch.zeros(12)]) == 12
