"""A transformers Trainer with :class:`filet.FiletCallback`: its checkpoints, and their reloading.

Every process-like setting builds the base model anew from the same weights and initialises it on
the same data, as a script that is started again does.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import filet
from filet import FiletCallback, FiletConfig
from filet.adapters import twin_name

VOCAB = 31
BASES = ["residual", "untouched"]
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small only wait for one another on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def base_model() -> Any:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * (parameter.shape[0] / parameter.numel()) ** 0.5)
    return model


def samples() -> list[dict[str, Tensor]]:
    ids = torch.randint(1, VOCAB, (16, 7), generator=torch.Generator().manual_seed(1))
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids
    ]


def initialised(
    device: torch.device, base: str = "residual", name: str = "default", **more: Any
) -> PeftModel:
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "lora_dropout": 0.1}
    lora |= {"modules_to_save": ["lm_head"], "task_type": "CAUSAL_LM", **more.pop("lora", {})}
    model = get_peft_model(base_model().to(device), LoraConfig(**lora), name)  # type: ignore[arg-type]
    batch = {key: torch.stack([s[key] for s in samples()]) for key in samples()[0]}
    filet.initialize_lora_filet_weights(
        model,
        [batch],
        FiletConfig(base=base, scaling="singular", samples=None, **more),  # type: ignore[arg-type]
        adapter_name=name,
        show_progress_bar=False,
    )
    return model


def logits(model: Any) -> Tensor:
    training = model.training
    model.eval()
    with torch.no_grad():
        ids = torch.stack([sample["input_ids"] for sample in samples()])
        found: Tensor = model(ids.to(next(model.parameters()).device)).logits.float().cpu()
    model.train(training)
    return found


def trained(model: PeftModel) -> dict[str, Tensor]:
    return {k: p.detach().cpu().clone() for k, p in model.named_parameters() if p.requires_grad}


class Live(TrainerCallback):
    """The logits of the live model at each save, by step."""

    def __init__(self) -> None:
        self.logits: dict[int, Tensor] = {}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.logits[state.global_step] = logits(kwargs["model"])


def trainer_of(
    model: PeftModel, folder: Path, *callbacks: TrainerCallback, **arguments: Any
) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": 6,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-2,
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": next(model.parameters()).device.type == "cpu",
        **arguments,
    }
    if "eval_strategy" in settings:
        settings["per_device_eval_batch_size"] = 16
    args = TrainingArguments(output_dir=str(folder), **settings)
    # On several GPUs it would wrap DataParallel, and its checkpoints hold the state of the dropout
    # of one GPU only: a resumed run would draw other numbers.
    args._n_gpu = min(args.n_gpu, 1)
    return Trainer(
        model=model,
        args=args,
        train_dataset=samples(),  # type: ignore[arg-type]
        eval_dataset=samples(),  # type: ignore[arg-type]
        callbacks=list(callbacks),
    )


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], device: Any) -> None:
    """To the bit on the CPU; a GPU's sums of gradients may come in another order."""
    assert actual.keys() == expected.keys()
    tolerance = {"rtol": 0, "atol": 0} if device.type == "cpu" else {"rtol": 1e-3, "atol": 1e-4}
    for key, value in expected.items():
        torch.testing.assert_close(
            actual[key], value, **tolerance, msg=lambda m, k=key: f"{k}: {m}"
        )


def raw_save_warnings(found: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in found if "filet.save_as_lora" in str(w.message)]


@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
@pytest.mark.parametrize("name", ["default", "mine"])
@pytest.mark.parametrize("base", BASES)
def test_every_checkpoint_is_the_model_of_its_step(
    base: str, name: str, rslora: bool, tmp_path: Path, device: torch.device
) -> None:
    model = initialised(device, base, name, lora={"use_rslora": rslora, "r": 6})
    live = Live()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer_of(model, tmp_path, FiletCallback(), live).train()
    assert raw_save_warnings(found) == []
    assert sorted(live.logits) == [2, 4, 6]
    assert (live.logits[6] - live.logits[2]).abs().max() > 0.1
    for step, expected in live.logits.items():
        checkpoint = tmp_path / f"checkpoint-{step}"
        assert not list(checkpoint.rglob(f"*{twin_name(name)}*"))
        folder = checkpoint if name == "default" else checkpoint / name
        plain = PeftModel.from_pretrained(base_model().to(device), str(folder))
        torch.testing.assert_close(logits(plain), expected, **CLOSE)
        loaded = filet.load(base_model().to(device), folder, adapter_name=name)
        torch.testing.assert_close(logits(loaded), expected, **CLOSE)


@pytest.mark.parametrize("loaded", [False, True], ids=["initialised again", "filet.load"])
@pytest.mark.parametrize("name", ["default", "mine"])
@pytest.mark.parametrize("base", BASES)
def test_resuming_ends_where_the_uninterrupted_run_does(
    base: str, name: str, loaded: bool, tmp_path: Path, device: torch.device
) -> None:
    model = initialised(device, base, name)
    trainer_of(model, tmp_path, FiletCallback()).train()
    expected = trained(model)
    checkpoint = tmp_path / "checkpoint-4"
    if loaded:
        folder = checkpoint if name == "default" else checkpoint / name
        again = filet.load(base_model().to(device), folder, adapter_name=name)
    else:
        again = initialised(device, base, name)
    live = Live()
    trainer = trainer_of(again, tmp_path, FiletCallback(), live)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert sorted(live.logits) == [6]  # it did resume
    assert_same(trained(again), expected, device)
    torch.testing.assert_close(logits(again), logits(model), **CLOSE)
    torch.testing.assert_close(live.logits[6], logits(model), **CLOSE)


@pytest.mark.parametrize("base", BASES)
def test_resuming_in_the_other_base_mode(base: Any, tmp_path: Path, device: torch.device) -> None:
    model = initialised(device, base)
    trainer_of(model, tmp_path, FiletCallback()).train()
    other = BASES[1 - BASES.index(base)]
    again = filet.load(base_model().to(device), tmp_path / "checkpoint-4", base=other)
    trainer = trainer_of(again, tmp_path, FiletCallback())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("base", BASES)
def test_a_checkpoint_of_another_initialisation_is_refused(
    base: str, tmp_path: Path, device: torch.device
) -> None:
    trainer_of(initialised(device, base), tmp_path, FiletCallback()).train()
    other = initialised(device, base, select="max")
    with pytest.raises(RuntimeError, match=r"q_proj: .* another initialisation .* filet\.load"):
        trainer_of(other, tmp_path, FiletCallback()).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-4")
        )


@pytest.mark.parametrize("base", BASES)
def test_the_best_model_is_loaded_at_the_end(
    base: str, tmp_path: Path, device: torch.device
) -> None:
    model = initialised(device, base)
    live = Live()
    trainer = trainer_of(
        model,
        tmp_path,
        FiletCallback(),
        live,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=2,
        save_total_limit=1,
        metric_for_best_model="loss",
        greater_is_better=True,  # the first checkpoint, as a rule, so that the last is not it
    )
    trainer.train()
    best = int(str(trainer.state.best_model_checkpoint).rpartition("-")[2])
    assert best < 6, "the last checkpoint says nothing here"
    torch.testing.assert_close(logits(model), live.logits[best], **CLOSE)
    assert [path.name for path in tmp_path.iterdir()] == [f"checkpoint-{best}"]
    plain = PeftModel.from_pretrained(base_model().to(device), str(tmp_path / f"checkpoint-{best}"))
    torch.testing.assert_close(logits(plain), live.logits[best], **CLOSE)


def test_save_total_limit_keeps_the_latest(tmp_path: Path, device: torch.device) -> None:
    model = initialised(device)
    live = Live()
    trainer_of(model, tmp_path, FiletCallback(), live, save_total_limit=2).train()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", "checkpoint-6"}
    for step in (4, 6):
        plain = PeftModel.from_pretrained(
            base_model().to(device), str(tmp_path / f"checkpoint-{step}")
        )
        torch.testing.assert_close(logits(plain), live.logits[step], **CLOSE)


class _Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_save_model_without_conversion_warns(
    base: str, interrupted: bool, tmp_path: Path, device: torch.device
) -> None:
    model = initialised(device, base)
    trainer = trainer_of(model, tmp_path, FiletCallback(), *([_Stop()] if interrupted else []))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        try:
            trainer.train()
        except KeyboardInterrupt:
            assert interrupted
        assert raw_save_warnings(found) == []
        for folder in (tmp_path, tmp_path / "final"):
            trainer.save_model(str(folder))
            (message,) = raw_save_warnings(found)
            assert f"save_pretrained({str(folder)!r})" in message
            found.clear()
        filet.save_as_lora(model, tmp_path / "final")
        assert raw_save_warnings(found) == []
    plain = PeftModel.from_pretrained(base_model().to(device), str(tmp_path / "final"))
    torch.testing.assert_close(logits(plain), logits(model), **CLOSE)


@pytest.mark.parametrize("base", BASES)
def test_a_trainer_without_the_callback_warns(
    base: str, tmp_path: Path, device: torch.device
) -> None:
    with pytest.warns(UserWarning, match=r"filet\.FiletCallback"):
        trainer_of(initialised(device, base), tmp_path, max_steps=2).train()


def test_the_callback_leaves_models_that_are_not_filets_alone(
    tmp_path: Path, device: torch.device
) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(base_model().to(device), config)
    trainer_of(model, tmp_path, FiletCallback(), max_steps=2).train()
    stored = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert {value.shape[0] for key, value in stored.items() if "lora_A" in key} == {4}
    assert not (tmp_path / "checkpoint-2" / "filet.json").exists()
    trainer_of(base_model().to(device), tmp_path / "full", FiletCallback(), max_steps=2).train()
    assert (tmp_path / "full" / "checkpoint-2" / "model.safetensors").exists()


def test_a_checkpoint_moves(tmp_path: Path, device: torch.device) -> None:
    """It holds no path of the run, and what the Trainer needs beside it is still there."""
    model = initialised(device)
    trainer_of(model, tmp_path / "run", FiletCallback()).train()
    expected = trained(model)
    shutil.move(tmp_path / "run" / "checkpoint-4", tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "run")
    files = {path.name for path in (tmp_path / "elsewhere").iterdir()}
    assert files >= {"adapter_model.safetensors", "adapter_config.json", "filet.json"}
    assert files >= {"optimizer.pt", "scheduler.pt", "trainer_state.json"}
    assert str(tmp_path) not in (tmp_path / "elsewhere" / "filet.json").read_text()
    config = json.loads((tmp_path / "elsewhere" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    again = initialised(device)
    trainer_of(again, tmp_path / "new", FiletCallback()).train(
        resume_from_checkpoint=str(tmp_path / "elsewhere")
    )
    assert_same(trained(again), expected, device)
