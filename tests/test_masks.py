"""Masks of every kind, batches without a label, and tensors whose rows are no samples.

What is right is the same everywhere: the energies of the same samples without padding, whole.
"""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForMultipleChoice, LlavaConfig, LlavaForConditionalGeneration

import filet
from batch_cases import IMAGE, TEXT, padded, qwen2_vl, with_images
from filet import FiletConfig
from filet.loss.summed import SummedLoss
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
    truth,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def of_llama(batches: list[dict[str, Any]], forward_fn: Any = None, **config: Any) -> Any:
    return energies_of(peft_of(case("llama")), batches, forward_fn, **config)


def causal_and_padding(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, T, T) of queries and keys, boolean or additive, as transformers takes them."""
    length = mask.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool).tril() & (mask != 0)[:, None, None, :]
    allowed = allowed | torch.eye(length, dtype=torch.bool)  # no row without a key
    if dtype == torch.bool:
        return allowed
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(dtype).min)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("side", ["right", "left"])
def test_masks_of_queries_and_keys_need_one_of_tokens_beside(side: str, dtype: torch.dtype) -> None:
    batches = [
        {
            **batch,
            "attention_mask": causal_and_padding(batch["attention_mask"], dtype),
            "position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp_min(0),
            "tokens": batch["attention_mask"],
        }
        for batch in padded(side)
    ]
    assert_energies(of_llama(batches, token_mask="tokens"), truth("llama"), 1e-4)
    assert "tokens" in batches[0]  # the user's batch is as it was
    without = [{k: v for k, v in batch.items() if k != "tokens"} for batch in batches]
    with pytest.raises(ValueError, match=r"mask is (additive, )?of shape \(4, 1, 9, 9\), from"):
        of_llama(without)
    counted_too = of_llama(without, token_mask=None)
    name = "model.layers.0.mlp.down_proj"
    off = ((counted_too[name] - truth("llama")[name]).abs() / truth("llama")[name]).max()
    assert off > 0.1  # which is why it is not done in silence


def test_draws_by_a_mask_of_another_name() -> None:
    """A sample's draw does not depend on its padding, whatever the mask is called."""
    renamed = [
        {"tokens" if key == "attention_mask" else key: value for key, value in batch.items()}
        for batch in padded("right")
    ]
    expected = of_llama(padded("right"), fisher="sampled")
    assert_energies(of_llama(renamed, token_mask="tokens", fisher="sampled"), expected, 1e-4)


def test_no_mask_counts_every_token_where_that_is_said() -> None:
    """Block masks of rows packed without padding: all positions are tokens."""
    samples = case("llama").samples[:4]
    lengths = [len(sample["input_ids"]) for sample in samples]
    row = {key: torch.cat([s[key] for s in samples]).unsqueeze(0) for key in samples[0]}
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    row["labels"][0, starts] = -100  # what would be predicted across a border
    owner = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    allowed = (owner[:, None] == owner) & torch.ones(len(owner), len(owner)).tril().bool()
    row["attention_mask"] = allowed[None, None]
    row["position_ids"] = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    expected = of_llama(list(loader(samples, 1)))
    assert_energies(of_llama([row], token_mask=None), expected, 1e-4)
    with pytest.raises(ValueError, match=r"FiletConfig\(token_mask=\.\.\.\)"):
        of_llama([row])


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (torch.zeros(4, 9) - 1e9, r"additive, of shape \(4, 9\)"),
        (torch.ones(36), r"attention_mask is of shape \(36,\)"),
        ([[1] * 9] * 4, "attention_mask is list"),
    ],
    ids=["additive", "flat", "list"],
)
def test_masks_that_do_not_tell_are_refused(mask: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        of_llama([{**padded()[0], "attention_mask": mask}])


def renamed(batch: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {name if key == "attention_mask" else key: value for key, value in batch.items()}


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_a_mask_of_another_name_for_a_forward_fn(fisher: str) -> None:
    def forward_fn(model: Any, batch: Any) -> Any:
        names = {"keep_mask": "attention_mask"}
        return model(**{names.get(key, key): value for key, value in batch.items()})

    batches = [renamed(batch, "keep_mask") for batch in padded()]
    for batch in batches:  # what stands in the padding must not matter
        batch["labels"] = batch["labels"].masked_fill(batch["keep_mask"] == 0, -100)
    named = of_llama(batches, forward_fn, token_mask="keep_mask", fisher=fisher)
    alone = of_llama(list(loader(case("llama").samples, 1)), fisher=fisher)
    assert_energies(named, alone, 1e-4)
    with pytest.warns(UserWarning, match=r"FiletConfig\(token_mask='keep_mask'\)"):
        of_llama(batches, forward_fn, fisher=fisher)
    with pytest.raises(ValueError, match="token_mask='no_such' is not in the batch, which has inp"):
        of_llama(batches, forward_fn, token_mask="no_such", fisher=fisher)


def test_the_decoder_has_a_mask_of_its_own() -> None:
    c = case("t5")
    batch = collate(c.samples[:4])
    mask = torch.ones(4, 1, 9, 9)
    with pytest.raises(ValueError, match=r"decoder_attention_mask is of shape \(4, 1, 9, 9\)"):
        energies_of(peft_of(c), [{**batch, "decoder_attention_mask": mask}])


def test_token_mask_is_a_name() -> None:
    with pytest.raises(ValueError, match="token_mask=3; expected a name, or None"):
        FiletConfig(token_mask=3)  # type: ignore[arg-type]


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


@functools.cache
def llava() -> Case:
    """As many images as samples, but two are of the first and none of the second."""
    config = LlavaConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
        },
        image_token_index=IMAGE, image_seq_length=4, vision_feature_layer=-1,
    )  # fmt: skip
    model = randomised(LlavaForConditionalGeneration(config))
    generator = torch.Generator().manual_seed(0)
    samples = []
    for images in (2, 0):
        ids = [3, *[IMAGE] * 4 * images, 4, 5, 6]
        sample = {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor([i if i < VOCAB else -100 for i in ids]),
        }
        if images:
            sample["pixel_values"] = torch.randn(images, 3, 8, 8, generator=generator)
        samples.append(sample)
    targets = [name for name in linears(model, "lm_head") if "language_model" in name]
    return Case(model, samples, targets, shift=True)


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


def test_the_draw_of_a_sample_stays_what_it_is() -> None:
    """Of text and of pictures, from one version to the next."""
    loss = SummedLoss(FiletConfig(fisher="sampled", seed=3), nn.Linear(1, 1))
    ids = torch.tensor([[3, 4, 5, 0], [6, 7, 8, 9]])
    text = {
        "input_ids": ids,
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
        "labels": ids,
        "token_type_ids": ids * 0,
        "position_ids": torch.arange(4).expand(2, 4),
    }
    pictures = {"pixel_values": torch.arange(24.0).view(2, 3, 2, 2), "labels": torch.arange(2)}
    expected = [0.11264118215436747, 0.5553817246628461, 0.7108794740072868, 0.703958782999395]
    found = [float(loss.uniform(batch, i, 1)) for batch in (text, pictures) for i in range(2)]
    assert found == expected


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
