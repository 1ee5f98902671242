"""Batches and arguments that do not fit are refused in their own words."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import (
    BertForSequenceClassification,
    DebertaConfig,
    DebertaForSequenceClassification,
    GemmaConfig,
    GPTJConfig,
    GPTJForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    RobertaConfig,
    RobertaForCausalLM,
    SiglipVisionConfig,
)

import filet
from filet import FiletConfig
from filet.model.inputs import Inputs
from models import (
    CLASSES,
    VOCAB,
    Case,
    Perceptron,
    assert_energies,
    case,
    collate,
    energies_of,
    linears,
    loader,
    mean_and_terms,
    peft_of,
    randomised,
    truth,
)
from passes import FLOAT32, models_own, padded, rows, statistics_of
from pictures import qwen2_vl, with_images

pytestmark = pytest.mark.usefixtures("one_thread")


# Batches that the model cannot take, said in their own words.


def refused(kind: str, batches: Any, message: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=message) as caught:
        statistics_of(peft_of(case(kind)), batches)
    assert "\n" not in str(caught.value)


def test_ids_beyond_the_embeddings() -> None:
    for kind in ("llama", "bert tokens", "t5"):
        first, second = (dict(collate(part)) for part in (case(kind).samples[:4],) * 2)
        for wrong, place in ((VOCAB, (1, 2)), (-1, (0, 0)), (VOCAB + 7, (2, -1))):  # one is padding
            second["input_ids"] = first["input_ids"].clone()
            second["input_ids"][place] = wrong
            message = (
                rf"^input_ids of batch 1 has {wrong}; expected 0 … {VOCAB - 1}, .*resize_token"
            )
            refused(kind, [first, second], message)


def test_ids_of_pictures_may_lie_beyond_the_words() -> None:
    """PaliGemma looks up something else there."""
    text = GemmaConfig(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        image_size=4, patch_size=2,
    )  # fmt: skip
    config = PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_id=VOCAB, projection_dim=8
    )
    inputs = Inputs(PaliGemmaForConditionalGeneration(config))
    batch = {"input_ids": torch.tensor([[VOCAB, 3]])}
    assert inputs.checked(batch, 0) is batch
    assert inputs.labels == VOCAB


@pytest.mark.parametrize("kind", ["llama", "bert masked", "bert tokens", "bert class", "vit", "t5"])
def test_labels_beyond_what_the_model_predicts(kind: str) -> None:
    """By whatever path its loss is computed."""
    c = case(kind)
    words = VOCAB if kind in ("llama", "bert masked", "t5") else CLASSES
    for wrong in (words, -1):
        batch = dict(collate(c.samples[:4]))
        batch["labels"] = batch["labels"].clone()
        batch["labels"][(1, 1)[: batch["labels"].dim()]] = wrong
        refused(
            kind, [batch], rf"^labels of batch 0 has {wrong}; expected -100, or .* 0 … {words - 1}"
        )


def test_what_no_label_is_may_be_anything() -> None:
    """The first of a causal sample, and those of padding."""
    c = case("llama")
    batch = dict(collate(c.samples[:4]))
    expected = energies_of(peft_of(c), [batch])
    # The first token of the padding is predicted by the last real one.
    padded = (batch["attention_mask"] == 0) & (batch["attention_mask"].roll(1, 1) == 0)
    assert padded.any()
    batch["labels"] = batch["labels"].masked_fill(padded, -1)
    batch["labels"][:, 0] = 10_000
    found = energies_of(peft_of(c), [batch])
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def positioned(kind: str) -> tuple[nn.Module, int]:
    """A model and how many tokens a sample of it may have."""
    small = {"vocab_size": VOCAB, "num_attention_heads": 2}
    if kind == "roberta":  # its first positions are those of padding
        config = RobertaConfig(
            **small, hidden_size=8, intermediate_size=8, num_hidden_layers=1, is_decoder=True,
            max_position_embeddings=16, pad_token_id=1,
        )  # fmt: skip
        return RobertaForCausalLM(config), 14
    if kind == "gptj":  # rotary, from a table
        config = GPTJConfig(
            vocab_size=VOCAB, n_embd=8, n_layer=1, n_head=2, n_positions=16, rotary_dim=2,
            bos_token_id=2, eos_token_id=2,
        )  # fmt: skip
        return GPTJForCausalLM(config), 16
    return case(kind).model, 16


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bert masked", "bart", "roberta", "gptj"])
def test_samples_beyond_the_positions(kind: str) -> None:
    """The last that fits runs, one more is refused: what OPT and RoBERTa leave out is known."""
    model, longest = positioned(kind)
    assert linears(model)
    c = Case(model, [], linears(model, "lm_head")[:2])
    ids = rows(2, longest + 1, below=VOCAB - 3) + 3
    fits = dict.fromkeys(("input_ids", "labels"), ids[:, :-1].contiguous())
    statistics_of(peft_of(c), [fits])
    message = rf" of batch 1 has {longest + 1} tokens a sample; expected at most {longest}, .*"
    for key in ("input_ids", "labels") if kind == "bart" else ("input_ids",):
        batch = {**fits, key: ids} if kind == "bart" else {"input_ids": ids, "labels": ids}
        with pytest.raises(ValueError, match=f"^{key}{message}--max-length {longest}"):
            statistics_of(peft_of(c), [fits, batch])


def test_positions_that_are_given() -> None:
    """Packed samples begin anew, however long the row."""
    c = case("gpt2")
    ids = rows(2, 24)
    batch = {"input_ids": ids, "labels": ids, "position_ids": rows(2, 24, below=12)}
    statistics_of(peft_of(c), [batch])
    batch["position_ids"] = rows(1, 24)
    refused(
        "gpt2", [batch], r"^position_ids of batch 0 has 23; expected 0 … 15, the positions that"
    )


def test_rotary_positions_have_no_end() -> None:
    c = case("llama")
    ids = rows(2, 3 * c.model.config.max_position_embeddings)
    assert statistics_of(peft_of(c), [{"input_ids": ids, "labels": ids}]).tokens == ids.numel()


class Samples(Dataset):
    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


class Streamed(IterableDataset):
    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def test_samples_in_place_of_batches() -> None:
    c = case("llama")
    kind = type("Dataset", (), {"__module__": "datasets.arrow_dataset", "__getitem__": None})
    for given in (Samples(c.samples), kind()):
        name = type(given).__name__
        message = rf"^dataloader is a {name}, a data set of samples; expected batches: .*DataLoader"
        for forward_fn in (None, models_own):
            with pytest.raises(TypeError, match=message):
                statistics_of(peft_of(c), given, forward_fn)
    lists = [{key: value.tolist() for key, value in sample.items()} for sample in c.samples]
    refused("llama", lists, r"^input_ids of batch 0 is a list; .*DataLoader", TypeError)
    message = r"^input_ids of batch 0 has shape \(5,\), as one sample has; .*DataLoader"
    refused("llama", c.samples, message)
    refused("vit", case("vit").samples, r"^labels of batch 0 has shape \(\), as one sample has; .*")
    short = collate(c.samples[:3])
    short["labels"] = short["labels"][:2]
    refused("llama", [short], r"^labels of batch 0 is of 2 samples and input_ids of 3")
    # A dict of batches' keys, the keys themselves, nothing at all.
    for wrong in (collate(c.samples), rows(3, 4), None, 3):
        with pytest.raises(TypeError, match=rf"^dataloader is a {type(wrong).__name__}; expected"):
            statistics_of(peft_of(c), wrong)


def test_batches_of_any_iterable() -> None:
    """A data set of batches by a loader that leaves them alone; a stream of them as it is."""
    c = case("llama")
    batches = [collate(c.samples[:5]), collate(c.samples[5:])]
    loaded = DataLoader(Samples(batches), batch_size=None)
    for given in (batches, iter(batches), loaded, Streamed(batches)):
        assert_energies(energies_of(peft_of(c), given), truth("llama"), FLOAT32)


def test_pairs_for_dpo() -> None:
    c = case("llama")
    batch = collate(c.samples[:2])
    pairs = {
        f"{side}_{key}": batch[key]
        for side in ("prompt", "chosen", "rejected")
        for key in ("input_ids", "attention_mask")
    }
    message = (
        r"^no input_ids in the keys of batch 0, prompt_input_ids, .*; expected the arguments of "
        r"LlamaForCausalLM, or a forward_fn"
    )
    refused("llama", [pairs], message)
    refused("llama", [{"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}], "^no input_ids in")

    def chosen(model: Any, batch: Any) -> Any:
        side = {key: batch[f"chosen_{key}"] for key in ("input_ids", "attention_mask")}
        return model(**side, labels=side["input_ids"]).loss, 3

    assert statistics_of(peft_of(c), [pairs], chosen).samples == 2


def test_a_linear_that_is_called_with_something_else() -> None:
    class Listing(Perceptron):
        def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
            return self.up([self.embedding(input_ids)])

    listing = Case(Listing(), case("perceptron").samples, ["up"])
    with pytest.raises(ValueError, match="up was called with list positional input"):
        statistics_of(peft_of(listing), loader(listing.samples), mean_and_terms)


def test_a_linear_that_returns_something_else() -> None:
    """Llama 4's router, which PEFT's "all-linear" targets."""
    config = Llama4TextConfig(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=40, intermediate_size_mlp=40,
        num_hidden_layers=1, num_attention_heads=3, num_key_value_heads=3, head_dim=8,
        num_local_experts=2, pad_token_id=0,
    )  # fmt: skip
    c = Case(randomised(Llama4ForCausalLM(config)), case("llama").samples, [])
    routed = peft_of(c, target_modules="all-linear")
    message = r"^model\.layers\.0\.feed_forward\.router returned a tuple; .* target_modules without"
    with pytest.raises(ValueError, match=message):
        statistics_of(routed, loader(c.samples))


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
