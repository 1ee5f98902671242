"""TRL's SFTTrainer in two processes, by DDP and by FSDP2, beside one process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers_made import CORPUS, bpe
from torch import Tensor
from transformers import TrainerCallback

import filet
from alike import assert_same
from filet import FiletConfig
from fsdp_models import sharded_on_a_cpu, whole
from models import linears, llama
from ranks import run, values

trl = pytest.importorskip("trl", minversion="1.16")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

STEPS, SAVED = 3, 2
WORDS = " ".join(CORPUS[:2]).split()
ROWS = [
    {
        "prompt": " ".join(WORDS[n : n + 3]),
        "completion": " " + " ".join(WORDS[n + 2 : n + 4 + n % 3]),
    }
    for n in range(12)
]


def base() -> Any:
    """Without dropout, which no two processes draw alike."""
    torch.manual_seed(5)
    return llama(vocab_size=400, max_position_embeddings=128, attention_dropout=0.0)


def adapted() -> Any:
    model = base()
    targets = linears(model, "lm_head")
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets))


def fsdp(states: str, **more: Any) -> dict[str, Any]:
    config = {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "state_dict_type": states,
        **more,
    }
    return {"fsdp": "full_shard auto_wrap", "fsdp_config": config}


def trainer_of(folder: Path, model: Any, size: int, callbacks: Any, **more: Any) -> Any:
    """Four samples a step, of all processes together."""
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(folder),
            max_steps=STEPS,
            save_steps=SAVED,
            per_device_train_batch_size=4 // size,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            **more,
        ),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=bpe(),
        callbacks=callbacks,
    )


class Noted(TrainerCallback):  # type: ignore[misc]
    """A and B as the training begins."""

    found: dict[str, Tensor]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found = factors(kwargs["model"])


def factors(model: Any) -> dict[str, Tensor]:
    return {name: whole(p) for name, p in model.named_parameters() if "lora_" in name}


def trained(
    folder: Path, route: str, start: str, size: int = 1, resume: bool = False, **more: Any
) -> dict[str, Any]:
    """What comes of a training; resumed, of the step after its checkpoint."""
    config, model = FiletConfig(start=start), adapted()
    if resume and start == "untouched":  # what is loaded has a frozen half
        model = filet.load(base(), folder / "adapter")
    callback, noted = filet.FiletInitCallback(config), Noted()
    by = [callback, noted] if route == "callback" else [noted]
    trainer = trainer_of(folder, model, size, by, **more)
    report = None
    if route == "before" and not resume:
        report = filet.initialize_from_trainer(trainer, config)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVED}") if resume else None)
    filet.save_as_lora(trainer.model, folder / "adapter")
    trainer.save_model(str(folder / "saved"))
    report = report or callback.report
    return {
        "kind": type(trainer.model_wrapped).__name__,
        "begun": noted.found,
        "trained": factors(trainer.model),
        "losses": [each["loss"] for each in trainer.state.log_history if "loss" in each],
        "samples": report and report.samples,
        "energies": report and {name: its.energies for name, its in report.modules.items()},
        "indices": report and {name: its.indices for name, its in report.modules.items()},
    }


# Route, start, and the type of checkpoints where FSDP2 shards the model; "": DDP.
CASES = [
    ("callback", "zero", ""),
    ("before", "untouched", ""),
    ("before", "zero", "FULL_STATE_DICT"),
    ("callback", "untouched", "SHARDED_STATE_DICT"),
]


def on_rank(rank: int, folder: Path) -> list[Any]:
    """All cases in one go: to import TRL takes longer than any of them."""
    from accelerate.state import AcceleratorState

    os.environ["CI"] = "1"  # TRL tells nobody of it
    sharded_on_a_cpu()
    found = []
    for number, (route, start, states) in enumerate(CASES):
        place = folder / str(number)
        more = fsdp(states) if states else {}
        found.append([trained(place, route, start, 2, resume, **more) for resume in (False, True)])
        AcceleratorState._reset_state()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sft")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[Any]:
    return values(run(2, on_rank, folder))


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CI", "1")
        return {start: trained(folder / start, "before", start) for start in ("zero", "untouched")}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(torch.arange(4, 40).view(2, 18)).logits
    return found


@pytest.mark.parametrize("number", range(len(CASES)), ids=map("-".join, CASES))
def test_two_processes_equal_one(
    number: int, two: list[Any], one: dict[str, Any], folder: Path
) -> None:
    _, start, states = CASES[number]
    (got, resumed), alone = two[0][number], one[start]
    for mine, theirs in zip(two[1][number], two[0][number], strict=True):
        assert_same(mine, theirs, "rank 1")
    assert got["kind"] == ("FSDPPeftModelForCausalLM" if states else "DistributedDataParallel")
    assert got["samples"] == alone["samples"] == len(ROWS)
    assert_same(got["indices"], alone["indices"], "indices")
    for name, its in alone["energies"].items():
        torch.testing.assert_close(got["energies"][name], its, rtol=1e-5, atol=0)
    for name, its in alone["begun"].items():
        torch.testing.assert_close(got["begun"][name], its, rtol=1e-4, atol=1e-5)
    assert len(got["losses"]) == STEPS
    torch.testing.assert_close(got["losses"], alone["losses"], rtol=1e-5, atol=0)
    for name, its in alone["trained"].items():
        torch.testing.assert_close(got["trained"][name], its, rtol=1e-3, atol=1e-4)
    assert resumed["indices"] is None  # it took the checkpoint's adapter
    assert resumed["losses"] == pytest.approx(got["losses"], rel=1e-6)
    for name, its in got["trained"].items():
        torch.testing.assert_close(resumed["trained"][name], its, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("number", range(len(CASES)), ids=map("-".join, CASES))
def test_plain_peft_loads_what_was_saved(number: int, two: list[Any], folder: Path) -> None:
    """By the Trainer, and by FILet; of a sharded checkpoint the Trainer saves no adapter."""
    _, start, states = CASES[number]
    expected = adapted()
    if start == "untouched":
        expected = filet.load(base(), folder / str(number) / "adapter")
    own = dict(expected.named_parameters())
    with torch.no_grad():
        for name, its in two[0][number][0]["trained"].items():
            own[name].copy_(its)
    ways = ["adapter"] if states == "SHARDED_STATE_DICT" else ["adapter", "saved", "checkpoint-3"]
    for way in ways:
        plain = PeftModel.from_pretrained(base(), folder / str(number) / way)
        torch.testing.assert_close(logits(plain), logits(expected), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(expected), logits(base()), atol=1e-3)
