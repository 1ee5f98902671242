"""Batches as users have them: masks of every kind, tensors whose rows are no samples, no labels.

What is right is the same everywhere: the energies of the same samples without padding, whole.
"""

from __future__ import annotations

import copy
import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import (
    BertForMultipleChoice,
    BertForSequenceClassification,
    DebertaConfig,
    DebertaForSequenceClassification,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

import filet
from filet import FiletConfig
from filet.loss.sampling import uniform
from filet.model.batch import first_samples, is_divisible
from filet.model.inputs import Inputs
from models import (
    CLASSES,
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


def padded(side: str = "right") -> list[dict[str, Tensor]]:
    return list(loader(case("llama").samples, 4, side))


# Masks.


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

_TEXT = {
    "vocab_size": VOCAB + 8,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_IMAGE, _START, _END = VOCAB, VOCAB + 1, VOCAB + 2  # tokens


@functools.cache
def qwen2_vl() -> Case:
    """Images as patches of all samples in one tensor, two of four images in the first sample."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = Qwen2VLConfig(
        text_config={**_TEXT, "rope_parameters": rope},
        vision_config={
            "depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "mlp_ratio": 2, "in_channels": 3,
        },
        image_token_id=_IMAGE, vision_start_token_id=_START, vision_end_token_id=_END,
    )  # fmt: skip
    model = randomised(Qwen2VLForConditionalGeneration(config))
    generator = torch.Generator().manual_seed(0)
    samples = []
    for images in (2, 1, 1):
        ids = [3, *[_START, _IMAGE, _END] * images, 4, 5, 6]
        samples.append(
            {
                "input_ids": torch.tensor(ids),
                "labels": torch.tensor([i if i < VOCAB else -100 for i in ids]),
                "pixel_values": torch.randn(4 * images, 3 * 2 * 4 * 4, generator=generator),
                "image_grid_thw": torch.tensor([[1, 2, 2]] * images),
                "mm_token_type_ids": torch.tensor([int(i == _IMAGE) for i in ids]),
            }
        )
    targets = [name for name in linears(model, "lm_head") if "language_model" in name]
    return Case(model, samples, targets, shift=True)


@functools.cache
def llava() -> Case:
    """As many images as samples, but two are of the first and none of the second."""
    config = LlavaConfig(
        text_config={"model_type": "llama", **_TEXT},
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
        },
        image_token_index=_IMAGE, image_seq_length=4, vision_feature_layer=-1,
    )  # fmt: skip
    model = randomised(LlavaForConditionalGeneration(config))
    generator = torch.Generator().manual_seed(0)
    samples = []
    for images in (2, 0):
        ids = [3, *[_IMAGE] * 4 * images, 4, 5, 6]
        sample = {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor([i if i < VOCAB else -100 for i in ids]),
        }
        if images:
            sample["pixel_values"] = torch.randn(images, 3, 8, 8, generator=generator)
        samples.append(sample)
    targets = [name for name in linears(model, "lm_head") if "language_model" in name]
    return Case(model, samples, targets, shift=True)


def with_images(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    longest = max(len(sample["input_ids"]) for sample in samples)
    batch: dict[str, Tensor] = {}
    for key in ("input_ids", "labels", "mm_token_type_ids"):
        if key in samples[0]:
            fill = -100 if key == "labels" else 0
            batch[key] = torch.stack(
                [nn.functional.pad(s[key], (0, longest - len(s[key])), value=fill) for s in samples]
            )
    batch["attention_mask"] = torch.stack(
        [(torch.arange(longest) < len(s["input_ids"])).long() for s in samples]
    )
    for key in ("pixel_values", "image_grid_thw"):
        if key in samples[0]:
            batch[key] = torch.cat([s[key] for s in samples if key in s])
    return batch


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
    config = FiletConfig(fisher="sampled", seed=3)
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
    found = [float(uniform(config, batch, i, 1)) for batch in (text, pictures) for i in range(2)]
    assert found == expected


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


# What a model's code would trip over, said beforehand.


def changed(kind: str, **change: Any) -> list[dict[str, Any]]:
    """The first batch of a case, and a second one with other entries."""
    first = collate(case(kind).samples[:4])
    return [first, {**first, **{key: make(first[key]) for key, make in change.items()}}]


def shorter(values: Tensor) -> Tensor:
    return values[:, :-1].contiguous()


_CAUSAL = ("llama", "gpt2", "opt")
_TAGGED = ("bert tokens", "bert masked", "albert")


@pytest.mark.parametrize("kind", [*_CAUSAL, *_TAGGED])
def test_labels_of_another_shape(kind: str) -> None:
    said = (
        r"^labels of batch 1 has shape \(4, 8\); expected \(4, 9\), one for each token of input_ids"
    )
    with pytest.raises(ValueError, match=said):
        energies_of(peft_of(case(kind)), changed(kind, labels=shorter))
    if kind in _CAUSAL:  # by the shift every label of a row becomes -100
        with pytest.raises(ValueError, match=r"^labels of batch 1 has shape \(4, 9, 1\); expected"):
            energies_of(peft_of(case(kind)), changed(kind, labels=lambda v: v.unsqueeze(2)))


@pytest.mark.parametrize("kind", [*_CAUSAL, *_TAGGED, "bert class"])
def test_a_mask_of_another_shape(kind: str) -> None:
    for change, shape in ((shorter, "4, 8"), (lambda mask: mask[:1], "1, 9")):
        said = rf"^attention_mask of batch 1 has shape \({shape}\); expected \(4, 9\), 1 or 0 for"
        with pytest.raises(ValueError, match=said):
            energies_of(peft_of(case(kind)), changed(kind, attention_mask=change))


@pytest.mark.parametrize("kind", [*_CAUSAL, *_TAGGED, "bert class", "t5", "bart"])
def test_ids_that_are_no_integers(kind: str) -> None:
    said = r"^input_ids of batch 1 is torch\.float32; expected torch\.int64 or torch\.int32"
    with pytest.raises(ValueError, match=said):
        energies_of(peft_of(case(kind)), changed(kind, input_ids=Tensor.float))
    whole = energies_of(peft_of(case(kind)), changed(kind, input_ids=Tensor.int))
    assert_energies(whole, energies_of(peft_of(case(kind)), changed(kind)), 0)


@pytest.mark.parametrize("kind", [*_CAUSAL, *_TAGGED, "bert class", "vit"])
def test_labels_of_another_dtype(kind: str) -> None:
    said = r"^labels of batch 1 is torch\.{} \(4,.*\); expected torch\.int64, .*as \w+ has it"
    with pytest.raises(ValueError, match=said.format("float32")):
        energies_of(peft_of(case(kind)), changed(kind, labels=Tensor.float))
    if kind in _CAUSAL:  # whose loss is computed here
        found = energies_of(peft_of(case(kind)), changed(kind, labels=Tensor.int))
        assert_energies(found, energies_of(peft_of(case(kind)), changed(kind)), 0)
    else:
        with pytest.raises(ValueError, match=said.format("int32")):
            energies_of(peft_of(case(kind)), changed(kind, labels=Tensor.int))


def classifier(model: nn.Module) -> Any:
    return peft_of(Case(model, case("bert class").samples, linears(model, "classifier")))


def labelled(labels: Tensor) -> list[dict[str, Any]]:
    return [{**collate(case("bert class").samples[:4]), "labels": labels}]


def test_several_labels_are_floating_numbers() -> None:
    config = copy.deepcopy(case("bert class").model.config)
    config.problem_type = "multi_label_classification"
    peft_model = classifier(randomised(BertForSequenceClassification(config)))
    hot = torch.eye(CLASSES, dtype=torch.int64)[:4]
    with pytest.raises(
        ValueError, match=r"^labels of batch 0 is torch\.int64 \(4, 5\); .*float32 of"
    ):
        energies_of(peft_model, labelled(hot))
    assert energies_of(peft_model, labelled(hot.float()))
    # A model that is not told takes the dtype for it.
    config.problem_type = None
    peft_model = classifier(randomised(BertForSequenceClassification(config)))
    assert energies_of(peft_model, labelled(hot.float()))


def test_classes_of_a_model_that_converts_them() -> None:
    config = DebertaConfig(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=1,
        num_attention_heads=3, max_position_embeddings=16, num_labels=CLASSES,
    )  # fmt: skip
    peft_model = classifier(randomised(DebertaForSequenceClassification(config)))
    classes = torch.arange(4)
    expected = energies_of(peft_model, labelled(classes))
    assert_energies(energies_of(peft_model, labelled(classes.float())), expected, 0)


class _Lenient(LlamaForCausalLM):
    """A model of one's own, which takes what that of transformers does not."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **more: Any
    ) -> Any:
        missing = input_ids.shape[1] - attention_mask.shape[1]
        mask = nn.functional.pad(attention_mask, (0, missing))
        return super().forward(input_ids.long(), mask, labels=labels.long(), **more)


def test_nothing_is_asked_where_it_is_not_known() -> None:
    llama = case("llama").model
    own = _Lenient(llama.config)
    own.load_state_dict(llama.state_dict())
    c = Case(own, case("llama").samples, case("llama").targets)
    batch = collate(c.samples[:3])
    assert bool((batch["attention_mask"][:, -1] == 0).sum() == 2)
    odd = {**batch, "input_ids": batch["input_ids"].float(), "labels": batch["labels"].float()}
    Inputs(own).checked(odd, 0)
    with pytest.raises(ValueError, match=r"^input_ids of batch 0 is torch\.float32"):
        Inputs(llama).checked(odd, 0)
    # By a key of which it is not known what it does; by one mask or another for all keys.
    for more in (
        {"labels": batch["labels"][:, -2:], "logits_to_keep": 2},
        {"shift_labels": batch["labels"], "labels": batch["labels"][:, :1]},
        {"past_key_values": None, "attention_mask": torch.ones(3, 20) * (torch.arange(20) > 1)},
        {"attention_mask": torch.ones(1, 9, dtype=torch.int64)},
    ):
        Inputs(llama).checked({**batch, **more}, 0)
    vision = qwen2_vl()
    Inputs(vision.model).checked({**with_images(vision.samples), "labels": torch.zeros(3, 2)}, 0)


# Arguments.


def test_a_dataloader_is_not_a_batch_and_a_name_not_a_dataloader() -> None:
    c = case("llama")
    peft_model, batches = peft_of(c), loader(c.samples)
    batch = next(iter(batches))
    for wrong, said in (
        (batches, "^batch is a DataLoader; expected one batch, a dict .*next"),
        (iter(padded()), "^batch is a list_iterator; expected one batch"),
        (padded(), "^batch is a list; expected one batch"),
        (
            {k: v.tolist() for k, v in batch.items()},
            "^input_ids of batch 0 is a list; .*DataLoader",
        ),
    ):
        with pytest.raises(TypeError, match=said):
            filet.estimate(peft_model, wrong)
    with pytest.raises(TypeError, match=r"^batch is a DataLoader; expected one batch"):
        filet.estimate(peft_model, batches, forward_fn=lambda model, batch: model(**batch))
    for path in ("train.jsonl", Path("train.jsonl")):
        with pytest.raises(
            TypeError, match=r"^dataloader is the .* 'train.jsonl'; expected batches"
        ):
            filet.collect_statistics(peft_model, path, show_progress_bar=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"samples": 3}, "^config is {'samples': 3}; expected a filet.FiletConfig"),
        ({}, "^config is {}; expected a filet.FiletConfig"),
        (LoraConfig(r=2), "^config is a LoraConfig; expected a filet.FiletConfig"),
        (FiletConfig, "^config is a type; expected a filet.FiletConfig"),
    ],
    ids=["dict", "empty", "LoraConfig", "class"],
)
def test_settings_of_another_kind(config: Any, said: str, tmp_path: Path) -> None:
    peft_model, batches = peft_of(case("llama")), padded()
    statistics = filet.collect_statistics(peft_model, batches, show_progress_bar=False)
    for call in (
        lambda: filet.collect_statistics(peft_model, batches, config),
        lambda: filet.initialize_lora_filet_weights(peft_model, batches, config),
        lambda: filet.apply_statistics(peft_model, statistics, config),
        lambda: filet.estimate(peft_model, batches[0], config),
        lambda: filet.initialize_folder(tmp_path, batches, tmp_path / "a", LoraConfig(), config),
    ):
        with pytest.raises(TypeError, match=said):
            call()


def test_arguments_in_one_anothers_place(tmp_path: Path) -> None:
    peft_model, batches = peft_of(case("llama")), padded()
    with pytest.raises(TypeError, match=r"^statistics is a str; expected filet.Statistics, .*load"):
        filet.apply_statistics(peft_model, "statistics.safetensors")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^lora_config is a FiletConfig; expected a LoraConfig"):
        filet.initialize_folder(tmp_path, batches, tmp_path / "a", FiletConfig())  # type: ignore[arg-type]
