"""examples/qlora.py on a tiny model: it trains what plain PEFT loads on the same 4-bit base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from quantised_bases import kinds, plain_folder
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
)

WORDS = "the a cat dog bird sees hears finds and one two red blue small old house tree".split()


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen += [logs["loss"]] if "loss" in logs else []


@pytest.mark.parametrize("kind", kinds("nf4"))
def test_the_example_trains(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import qlora

    words = Tokenizer(WordLevel({w: i for i, w in enumerate(["<unk>", *WORDS])}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    folder, data, output = tmp_path / "model", tmp_path / "data.jsonl", tmp_path / "adapter"
    AutoModelForCausalLM.from_pretrained(plain_folder()).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    texts = [" ".join(WORDS[(n + k) % 17] for k in range(9)) for n in range(16)]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    losses = Losses()
    init = Trainer.__init__

    def watched(self: Any, model: Any, args: Any, **more: Any) -> None:
        args.logging_steps, args.learning_rate = 5, 2e-2  # so small a model needs more
        init(self, model, args, callbacks=[losses], **more)

    monkeypatch.setattr(Trainer, "__init__", watched)
    qlora.main(
        [f"--{k}={v}" for k, v in (("model", folder), ("data", data), ("output", output))]
        + ["--rank=4", "--steps=30"]
    )
    assert len(losses.seen) == 6 and losses.seen[-1] < losses.seen[0] - 0.5
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=four_bits)
    loaded = PeftModel.from_pretrained(base, output)
    ids = torch.tensor([tokenizer(texts[0])["input_ids"]], device=base.device)
    with torch.no_grad():
        trained = loaded(input_ids=ids, labels=ids).loss
        with loaded.disable_adapter():
            plain = loaded(input_ids=ids, labels=ids).loss
    assert trained < plain - 0.5
