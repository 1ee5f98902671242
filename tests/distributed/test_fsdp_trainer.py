"""The callback in transformers' Trainer, whose accelerate shards the model by FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import Trainer, TrainingArguments

import filet
from alike import assert_same
from filet import FiletConfig
from fsdp_models import sharded_on_a_cpu, whole
from models import case, collate, peft_of
from ranks import run, values


def trained(folder: Path, start: str, steps: int, way: str = "", resume: bool = False) -> Any:
    """``way``: the type of its checkpoints where the model is sharded."""
    c = case("llama")
    torch.manual_seed(5)
    model = peft_of(c)
    if resume and start == "untouched":  # what is loaded has a frozen half
        model = filet.load(model.unload(), folder / "adapter")
    for module in model.modules():
        if hasattr(module, "attention_dropout"):  # which no two processes draw alike
            module.attention_dropout = 0.0
    callback = filet.FiletInitCallback(FiletConfig(start=start))
    more: dict[str, Any] = {}
    if way:
        config = {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "state_dict_type": way,
        }
        more = {"fsdp": "full_shard auto_wrap", "fsdp_config": config}
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=2 if way else 4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_strategy="steps",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **more,
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=c.samples[:12],
        data_collator=collate,
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=resume)
    filet.save_as_lora(model, folder / "adapter")
    report = callback.report
    return {
        "weights": {n: whole(p) for n, p in model.named_parameters() if "lora_" in n},
        "losses": [each["loss"] for each in trainer.state.log_history if "loss" in each],
        "kind": type(model).__name__,
        "samples": report and report.samples,
        "indices": report and {name: its.indices for name, its in report.modules.items()},
    }


def on_rank(rank: int, folder: Path, start: str, way: str) -> Any:
    sharded_on_a_cpu()
    found = trained(folder / "run", start, 3, way)
    if rank == 0:
        (folder / "run" / "checkpoint-3").rename(folder / "last")
    dist.barrier()
    if (start, way) == ("untouched", "FULL_STATE_DICT"):  # torch does not load both halves
        return [found]
    return [found, trained(folder / "run", start, 3, way, resume=True)]


@pytest.mark.parametrize(
    ("start", "way"),
    [
        ("zero", "FULL_STATE_DICT"),
        ("untouched", "FULL_STATE_DICT"),
        ("untouched", "SHARDED_STATE_DICT"),
    ],
)
def test_trainer_of_two_processes(start: str, way: str, tmp_path: Path) -> None:
    first, second = values(run(2, on_rank, tmp_path, start, way))
    alone = trained(tmp_path / "alone", start, 3)
    for one, two in zip(first, second, strict=True):
        assert_same(one["weights"], two["weights"], "rank 1")
        assert one["kind"] == "FSDPPeftModel"
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(one["weights"][name], weight, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(one["losses"], alone["losses"], rtol=1e-5, atol=1e-5)
    assert first[0]["samples"] == 12
    assert_same(first[0]["indices"], alone["indices"], "one process")
    assert all(each["indices"] is None for each in first[1:])  # they kept the checkpoint's adapter
    if way == "FULL_STATE_DICT":
        model = filet.load(peft_of(case("llama")).unload(), tmp_path / "last")
        loaded = {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}
        assert_same(loaded, first[0]["weights"], "what was saved")
