"""Initialisation from what a transformers Trainer has: its model, data, collator and loss."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

import filet
from filet import FiletConfig
from models import case, collate, peft_of, truth, worst
from passes import FLOAT32
from ranks import run, values

pytestmark = pytest.mark.usefixtures("one_thread")


def trainer_of(folder: Path, kind: str = "llama", model: Any = None, **more: Any) -> Trainer:
    """Of all samples of a case, five in a batch, shuffled."""
    c = case(kind)
    own = ("compute_loss_func", "callbacks")
    return Trainer(
        model=peft_of(c) if model is None else model,
        args=TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=5,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            max_steps=2,
            logging_steps=1,
            **{key: value for key, value in more.items() if key not in own},
        ),
        train_dataset=c.samples,  # type: ignore[arg-type]
        data_collator=collate,
        **{key: value for key, value in more.items() if key in own},
    )


def energies(report: filet.FiletReport) -> dict[str, Tensor]:
    return {name: module.energies for name, module in report.modules.items()}


@pytest.mark.parametrize("kind", ["llama", "bert class", "t5"])
def test_energies_are_those_of_its_data(kind: str, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, kind)
    report = filet.initialize_from_trainer(trainer, FiletConfig(samples=None))
    error, name = worst(energies(report), truth(kind))
    assert error < FLOAT32, name
    assert report.samples == len(case(kind).samples)


def test_what_is_written_is_what_its_batches_give(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    batches = [dict(batch) for batch in trainer.get_train_dataloader()]
    config = FiletConfig(samples=7)
    report = filet.initialize_from_trainer(trainer, config)
    expected = peft_of(case("llama"))
    filet.initialize_lora_filet_weights(expected, batches, config, show_progress_bar=False)
    assert report.samples == 7
    mine = dict(trainer.model.named_parameters())
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(mine[name], parameter, rtol=1e-4, atol=1e-5)


def test_mixed_precision_is_that_of_the_training(tmp_path: Path) -> None:
    """Autocast, which accelerate puts into the model's forward when the training begins."""
    trainer = trainer_of(tmp_path, bf16=True)
    batches = [dict(batch) for batch in trainer.get_train_dataloader()]
    config = FiletConfig(samples=None)
    found = energies(filet.initialize_from_trainer(trainer, config))
    expected = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            report = filet.initialize_lora_filet_weights(
                peft_of(case("llama")), batches, config, show_progress_bar=False
            )
        expected.append(energies(report))
    assert worst(found, expected[0])[0] < 1e-4
    assert worst(found, expected[1])[0] > 1e-3


def summed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")


def halved(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return summed(outputs, labels) / 2


def test_a_loss_of_its_own(tmp_path: Path) -> None:
    """A sum is found to be one; what is neither it nor the mean is refused, or named."""
    trainer = trainer_of(tmp_path, compute_loss_func=summed)
    report = filet.initialize_from_trainer(trainer)
    assert worst(energies(report), truth("llama"))[0] < FLOAT32
    trainer = trainer_of(tmp_path, compute_loss_func=halved)
    with pytest.raises(ValueError, match="neither the mean nor the sum"):
        filet.initialize_from_trainer(trainer)
    report = filet.initialize_from_trainer(trainer, FiletConfig(loss_reduction="sum"))
    quarter = {name: value / 4 for name, value in truth("llama").items()}
    assert worst(energies(report), quarter)[0] < FLOAT32


class Other(Trainer):
    """Smoothes labels in a way of its own, by overriding the loss."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        assert not return_outputs  # it may cost another forward
        labels = inputs.pop("labels")
        return LabelSmoother(0.3)(model(**inputs), labels, shift_labels=True)


def test_smoothed_labels(tmp_path: Path) -> None:
    """Against the formula: a loss of (1 − ε) nll + ε mean over all words, in every label."""

    def loss(model: Any, batch: Any) -> tuple[Tensor, int]:
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["labels"][:, 1:]
        log_probs = logits[:, :-1].log_softmax(-1)[labels != -100]
        wanted = labels[labels != -100]
        picked = log_probs.gather(-1, wanted[:, None])[:, 0]
        terms = -(0.7 * picked + 0.3 * log_probs.mean(-1))
        return terms.mean(), len(terms)

    expected = filet.initialize_lora_filet_weights(
        peft_of(case("llama")), [collate(case("llama").samples)], forward_fn=loss,
        show_progress_bar=False,
    )  # fmt: skip
    assert worst(energies(expected), truth("llama"))[0] > 0.1  # it does change them
    own = trainer_of(tmp_path, label_smoothing_factor=0.3)
    other = trainer_of(tmp_path)
    other.__class__ = Other
    for trainer in (own, other):
        report = filet.initialize_from_trainer(trainer)
        assert worst(energies(report), energies(expected))[0] < FLOAT32


@pytest.mark.parametrize("keep", ["batches", "self"])
def test_data_to_keep_need_no_labels(keep: str, tmp_path: Path) -> None:
    batch = collate(case("llama").samples[::2])
    del batch["labels"]
    kept: Any = [batch] if keep == "batches" else "self"
    trainer = trainer_of(tmp_path)
    report = filet.initialize_from_trainer(trainer, FiletConfig(samples=12), keep=kept)
    expected = peft_of(case("llama"))
    filet.initialize_lora_filet_weights(
        expected, [collate(case("llama").samples)], FiletConfig(samples=12), keep=kept,
        show_progress_bar=False,
    )  # fmt: skip
    assert report.config["select"] == "contrast"
    mine = dict(trainer.model.named_parameters())
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(mine[name], parameter, rtol=1e-4, atol=1e-5)


def test_the_training_after_it_is_the_one_without_it(tmp_path: Path) -> None:
    """The same batches in the same order, as A is put back to what it was."""
    losses = []
    for before in (False, True):
        torch.manual_seed(3)
        trainer = trainer_of(tmp_path, model=peft_of(case("llama")))
        state = torch.get_rng_state()
        weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        if before:
            filet.initialize_from_trainer(trainer, FiletConfig(samples=3))
        assert torch.equal(torch.get_rng_state(), state)
        for name, parameter in trainer.model.named_parameters():
            assert parameter.requires_grad == ("lora_" in name) and parameter.grad is None
            parameter.data.copy_(weights[name])
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_it_trains_from_the_directions(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, learning_rate=1e-2)
    filet.initialize_from_trainer(trainer, FiletConfig(start="untouched"))
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert changed == trained and len(trained) == 2 * len(case("llama").targets)


def test_what_is_no_trainer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="trainer is a LlamaForCausalLM; expected a transformers"):
        filet.initialize_from_trainer(case("llama").model)
    plain = trainer_of(tmp_path, model=case("llama").model)
    with pytest.raises(TypeError, match="expected the PeftModel that"):
        filet.initialize_from_trainer(plain)
    generating = trainer_of(tmp_path)
    generating.reward_funcs = []  # as GRPO has them
    with pytest.raises(ValueError, match="Trainer generates what it trains on"):
        filet.initialize_from_trainer(generating)


def test_processes_that_accelerate_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CPUs it knows them by use_cpu alone; else each would train by itself, on all data."""
    callback = filet.FiletInitCallback()
    trainer = trainer_of(tmp_path, callbacks=[callback])
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda *_: 2)
    with pytest.raises(ValueError, match="has 2 processes, and the trainer knows of 1: each"):
        filet.initialize_from_trainer(trainer)
    with pytest.raises(ValueError, match="expected use_cpu=True in its arguments"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


def on_rank(rank: int, folder: Path, samples: int | None) -> Any:
    trainer = trainer_of(folder)
    report = filet.initialize_from_trainer(trainer, FiletConfig(samples=samples))
    weights = {n: p.detach() for n, p in trainer.model.named_parameters() if "lora_" in n}
    return energies(report), report.samples, weights


def test_two_processes(tmp_path: Path) -> None:
    first, second = values(run(2, on_rank, tmp_path, None))
    assert first[1] == second[1] == len(case("llama").samples)
    assert worst(first[0], truth("llama"))[0] < FLOAT32
    for name, weight in first[2].items():
        assert torch.equal(weight, second[2][name]), name


def factors(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


class AtFirst(TrainerCallback):
    """The adapter at the first step of each training."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.seen.append(factors(kwargs["model"]))


@pytest.mark.parametrize("start", ["zero", "untouched"])
def test_a_second_training_goes_on_from_the_first(start: Any, tmp_path: Path) -> None:
    first, seen = filet.FiletInitCallback(FiletConfig(start=start)), AtFirst()
    trainer = trainer_of(tmp_path, callbacks=[first, seen], learning_rate=0.01)
    trainer.train()
    trained, report = factors(trainer.model), first.report
    trainer.train()
    assert first.report is report and len(seen.seen) == 2
    assert all(torch.equal(seen.seen[1][name], trained[name]) for name in trained)
    assert any(not torch.equal(seen.seen[0][name], trained[name]) for name in trained)


@pytest.mark.parametrize("start", ["zero", "untouched"])
def test_a_trained_adapter_is_not_started_anew(start: Any, tmp_path: Path) -> None:
    """As it would be lost without a word. One that has only been initialised is."""
    trainer = trainer_of(tmp_path / "one", learning_rate=0.01)
    filet.initialize_from_trainer(trainer, FiletConfig(start=start))
    again = filet.FiletInitCallback(FiletConfig(start=start))
    trainer_of(tmp_path / "two", model=trainer.model, callbacks=[again]).train()
    assert again.report is not None
    filet.save_as_lora(trainer.model, tmp_path / "adapter")
    loaded = filet.load(copy.deepcopy(case("llama").model), tmp_path / "adapter")
    before, other = factors(loaded), filet.FiletInitCallback()
    with pytest.raises(ValueError, match=r"adapter 'default' was trained \(lora_B of .*anew"):
        trainer_of(tmp_path / "three", model=loaded, callbacks=[other]).train()
    after = factors(loaded)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_labels_of_data_to_keep_are_not_read(tmp_path: Path) -> None:
    batches = [dict(batch) for batch in trainer_of(tmp_path).get_train_dataloader()]
    found = []
    for label in (None, 10**6):
        keep = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]
        if label is not None:
            keep = [{**b, "labels": torch.full((1, 1), label)} for b in keep]
        trainer = trainer_of(tmp_path)
        filet.initialize_from_trainer(trainer, FiletConfig(samples=None), keep=keep)
        found.append(factors(trainer.model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
