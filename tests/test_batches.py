"""What a model's code would trip over, and arguments in one another's place: said beforehand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import (
    BertForSequenceClassification,
    DebertaConfig,
    DebertaForSequenceClassification,
    LlamaForCausalLM,
)

import filet
from batch_cases import padded, qwen2_vl, with_images
from filet import FiletConfig
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
    peft_of,
    randomised,
)

pytestmark = pytest.mark.usefixtures("one_thread")


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
