"""A transformers Trainer with an initialised adapter: its own checkpoints, and their reloading.

Every process-like setting builds the base model anew from the same weights and initialises it on
the same data, as a script that is started again does.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

import filet
from adapted import VOCAB, llama, logits, trainable
from filet import FiletConfig
from initialised import LOUD

pytestmark = pytest.mark.usefixtures("one_thread")


def samples() -> list[dict[str, Tensor]]:
    ids = torch.randint(1, VOCAB, (16, 7), generator=torch.Generator().manual_seed(1))
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids
    ]


def initialised(device: torch.device, name: str = "default", **more: Any) -> PeftModel:
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "lora_dropout": 0.1}
    lora |= {"modules_to_save": ["lm_head"], "task_type": "CAUSAL_LM", **more.pop("lora", {})}
    model = get_peft_model(llama().to(device), LoraConfig(**lora), name)  # type: ignore[arg-type]
    batch = {key: torch.stack([s[key] for s in samples()]) for key in samples()[0]}
    filet.initialize_lora_filet_weights(
        model,
        [batch],
        FiletConfig(**LOUD, samples=None, **more),
        adapter_name=name,
        show_progress_bar=False,
    )
    return model


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


def place(folder: Path, name: str) -> Path:
    """Where PEFT puts an adapter of that name."""
    return folder if name == "default" else folder / name


def assert_reloads(folder: Path, name: str, expected: Tensor, device: torch.device) -> None:
    """In plain PEFT and by filet.load, over the base as it was."""
    for again in (
        PeftModel.from_pretrained(llama().to(device), str(place(folder, name))),
        filet.load(llama().to(device), place(folder, name), adapter_name=name),
    ):
        assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
@pytest.mark.parametrize("name", ["default", "mine"])
def test_every_checkpoint_is_the_model_of_its_step(
    name: str, rslora: bool, tmp_path: Path, device: torch.device
) -> None:
    model = initialised(device, name, lora={"use_rslora": rslora, "r": 6})
    live = Live()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*[Ff]i[Ll]et")
        trainer_of(model, tmp_path, live).train()
    assert sorted(live.logits) == [2, 4, 6]
    assert (live.logits[6] - live.logits[2]).abs().max() > 0.1
    for step, expected in live.logits.items():
        assert_reloads(tmp_path / f"checkpoint-{step}", name, expected, device)


@pytest.mark.parametrize("how", ["initialised again", "another initialisation", "filet.load"])
@pytest.mark.parametrize("name", ["default", "mine"])
def test_resuming_ends_where_the_uninterrupted_run_does(
    name: str, how: str, tmp_path: Path, device: torch.device
) -> None:
    """A checkpoint brings its start with it, whatever the one of the model is."""
    model = initialised(device, name)
    trainer_of(model, tmp_path, save_steps=4).train()
    checkpoint = tmp_path / "checkpoint-4"
    if how == "filet.load":
        again = filet.load(llama().to(device), place(checkpoint, name), adapter_name=name)
    else:
        again = initialised(device, name, select="max" if "another" in how else "min")
    live = Live()
    trainer = trainer_of(again, tmp_path, live)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert sorted(live.logits) == [6]  # it did resume
    assert_same(trainable(again), trainable(model), device)
    assert_same(again.state_dict(), model.state_dict(), device)
    assert_reloads(tmp_path / "checkpoint-6", name, live.logits[6], device)


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path, device: torch.device) -> None:
    model = initialised(device)
    live = Live()
    trainer = trainer_of(
        model,
        tmp_path,
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
    assert torch.equal(logits(model), live.logits[best])
    assert [path.name for path in tmp_path.iterdir()] == [f"checkpoint-{best}"]
    assert_reloads(tmp_path / f"checkpoint-{best}", "default", live.logits[best], device)


class _Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt


@pytest.mark.parametrize("interrupted", [False, True])
def test_save_model(interrupted: bool, tmp_path: Path, device: torch.device) -> None:
    model = initialised(device)
    before = logits(model)
    trainer = trainer_of(model, tmp_path, *([_Stop()] if interrupted else []))
    try:
        trainer.train()
    except KeyboardInterrupt:
        assert interrupted
    trainer.save_model(str(tmp_path / "final"))
    assert (logits(model) - before).abs().max() > 0.1
    assert_reloads(tmp_path / "final", "default", logits(model), device)


def test_a_checkpoint_moves(tmp_path: Path, device: torch.device) -> None:
    """It holds no path of the run, and what the Trainer needs beside it is still there."""
    model = initialised(device)
    trainer_of(model, tmp_path / "run", save_total_limit=2).train()
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"checkpoint-4", "checkpoint-6"}
    shutil.move(tmp_path / "run" / "checkpoint-4", tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "run")
    files = {path.name for path in (tmp_path / "elsewhere").iterdir()}
    assert files >= {"adapter_model.safetensors", "adapter_config.json", "filet.json"}
    assert files >= {"optimizer.pt", "scheduler.pt", "trainer_state.json"}
    for name in ("filet.json", "adapter_config.json"):
        assert str(tmp_path) not in (tmp_path / "elsewhere" / name).read_text()
    config = json.loads((tmp_path / "elsewhere" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    again = initialised(device)
    trainer_of(again, tmp_path / "new").train(resume_from_checkpoint=str(tmp_path / "elsewhere"))
    assert_same(trainable(again), trainable(model), device)
