"""accelerate's ``cpu_ram_efficient_loading``: the model goes through the meta device, and what
counts is the first process's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import filet
from alike import assert_same
from filet import FiletConfig
from fsdp_models import sharded_on_a_cpu, whole
from models import case, collate, linears, llama
from ranks import run, values


def base(empty: bool = False) -> Any:
    """The same in all processes; an empty one has its weights on the meta device."""
    torch.manual_seed(5)
    model = llama(attention_dropout=0.0)
    if empty:
        with init_empty_weights(include_buffers=False):
            model = LlamaForCausalLM(model.config)
    return model


def adapted(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=4, target_modules=linears(model, "lm_head")))


class Noted(TrainerCallback):  # type: ignore[misc]
    """A as the training begins."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found = {n: whole(p) for n, p in kwargs["model"].named_parameters() if "lora_A" in n}


def trained(folder: Path, model: Any, route: str, start: str, plugin: bool = True) -> Any:
    more: dict[str, Any] = {}
    if plugin:
        config = {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "cpu_ram_efficient_loading": True,
            "state_dict_type": "FULL_STATE_DICT",
        }
        more = {"fsdp": "full_shard auto_wrap", "fsdp_config": config}
    noted = Noted()
    callback = filet.FiletInitCallback(FiletConfig(start=start))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=2,
            save_strategy="no",
            per_device_train_batch_size=2 if plugin else 4,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            **more,
        ),
        train_dataset=case("llama").samples[:12],
        data_collator=collate,
        callbacks=[callback, noted] if route == "callback" else [noted],
    )
    if route == "before":
        filet.initialize_from_trainer(trainer, FiletConfig(start=start))
    trainer.train()
    filet.save_as_lora(trainer.model, folder / "adapter")
    return {
        "weights": {n: whole(p) for n, p in trainer.model.named_parameters() if "lora_" in n},
        "starts": {n: b.clone() for n, b in trainer.model.named_buffers() if n.endswith("start")},
        "losses": [each["loss"] for each in trainer.state.log_history if "loss" in each],
        "begun": noted.found,
    }


# Route, start, and whether the second process has no weights.
CASES = [
    ("before", "zero", False),
    ("before", "untouched", False),
    ("callback", "zero", True),
    ("callback", "untouched", True),
]


def on_rank(rank: int, folder: Path) -> list[Any]:
    from accelerate.state import AcceleratorState

    sharded_on_a_cpu()
    found: list[Any] = []
    for number, (route, start, empty) in enumerate(CASES):
        AcceleratorState._reset_state()
        model = adapted(base(empty and rank == 1))
        found.append(trained(folder / str(number), model, route, start))
    AcceleratorState._reset_state()
    with pytest.raises(ValueError) as refused:
        trained(folder / "empty", adapted(base(rank == 1)), "before", "zero")
    return [found, str(refused.value)]


def test_two_processes_equal_one(tmp_path: Path) -> None:
    first, second = values(run(2, on_rank, tmp_path))
    alone = {
        start: trained(tmp_path / start, adapted(base()), "before", start, plugin=False)
        for start in ("zero", "untouched")
    }
    for (route, start, empty), one, two in zip(CASES, first[0], second[0], strict=True):
        where = f"{route} {start} {empty}"
        assert_same(one, two, where)
        for name, its in alone[start]["begun"].items():
            torch.testing.assert_close(one["begun"][name], its, rtol=1e-4, atol=1e-5)
        if empty:  # accelerate finds no parameter of the optimizer's by its place in memory then
            continue
        assert one["losses"] == pytest.approx(alone[start]["losses"], rel=1e-5), where
        for part in ("weights", "starts"):
            for name, its in alone[start][part].items():
                torch.testing.assert_close(one[part][name], its, rtol=1e-3, atol=1e-4)
    assert first[0][1]["starts"] and not first[0][0]["starts"]
    # What has no weights yet cannot be initialised before it is prepared.
    said = second[1]
    assert "is on the meta device (" in said and "left to rank 0 by cpu_ram_efficient_load" in said
    assert "FiletInitCallback" in said and first[1] == f"rank 1: {said}"


def test_an_adapter_of_weights_that_are_not_there(tmp_path: Path) -> None:
    """Its frozen half belongs to weights, which are compared as it is loaded."""
    model = adapted(base())
    filet.initialize_lora_filet_weights(
        model, [collate(case("llama").samples)], FiletConfig(start="untouched"),
        show_progress_bar=False,
    )  # fmt: skip
    filet.save_as_lora(model, tmp_path)
    with pytest.raises(ValueError, match=r"q_proj is on the meta device .* in every process"):
        filet.load(base(empty=True), tmp_path)
