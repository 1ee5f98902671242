"""The callback in transformers' Trainer: one process, and two that train by DDP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import filet
from filet import FiletConfig
from models import case, collate, peft_of
from ranks import run, values


def trained(folder: Path, start: str, steps: int, resume: bool = False) -> dict[str, Any]:
    c = case("llama")
    torch.manual_seed(5)
    model = peft_of(c)
    callback = filet.FiletInitCallback(FiletConfig(start=start))
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=c.samples[:11],
        data_collator=collate,
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=resume)
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    if callback.report is None:
        return {"weights": weights, "indices": None}
    report = callback.report
    return {
        "weights": weights,
        "indices": {name: its.indices for name, its in report.modules.items()},
        "samples": report.samples,
        "wrapped": type(trainer.model_wrapped).__name__,
    }


def on_rank(rank: int, folder: Path, start: str) -> Any:
    return [
        trained(folder / "run", start, 2),
        trained(folder / "run", start, 3, resume=True),
        trained(folder / "one go", start, 3),
    ]


@pytest.mark.parametrize("start", ["zero", "untouched"])
def test_trainer_of_two_processes(start: str, tmp_path: Path) -> None:
    first, second = values(run(2, on_rank, tmp_path, start))
    for one, two in zip(first, second, strict=True):
        for name, weight in one["weights"].items():
            assert torch.equal(weight, two["weights"][name]), name
    assert first[0]["wrapped"] == "DistributedDataParallel"
    assert first[0]["samples"] == 11  # none of those that accelerate repeats
    resumed, in_one_go = first[1:]
    assert resumed["indices"] is None  # it kept the checkpoint's adapter
    for name, weight in in_one_go["weights"].items():
        torch.testing.assert_close(resumed["weights"][name], weight, rtol=1e-6, atol=1e-7)
    alone = trained(tmp_path / "alone", start, 1)
    for name, indices in alone["indices"].items():
        assert torch.equal(indices, first[0]["indices"][name]), name
    assert alone["samples"] == 11
