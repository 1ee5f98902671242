"""A tiny language model with its tokenizer, and data for it, in folders."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from models import VOCAB, llama

WORDS = [f"w{i}" for i in range(VOCAB - 3)]


def sentence(generator: torch.Generator) -> str:
    count = int(torch.randint(3, 9, (), generator=generator))
    chosen = torch.randint(0, len(WORDS), (count,), generator=generator)
    return " ".join(WORDS[i] for i in chosen)


def write_folders(folder: Path, data: Path) -> None:
    """A model, and files of 20 rows of a task named "task"."""
    vocabulary = {word: i for i, word in enumerate(("<pad>", "<unk>", "<eos>", *WORDS))}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    llama(attention_dropout=0.0, max_position_embeddings=64).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    for name in ("task_train", "task_test", "general", "keep"):
        text = name in ("general", "keep")
        rows = [
            {"text": sentence(generator)}
            if text
            else {"prompt": sentence(generator), "completion": f" {sentence(generator)}"}
            for _ in range(20)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (data / f"{name}.jsonl").write_text(lines, encoding="utf-8")
