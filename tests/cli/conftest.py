"""A small model, data and calls for the tests of the command line."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import WORDS, arguments, sentence


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: Any) -> None:
        raise AssertionError(f"the command line opened a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(autouse=True, scope="module")
def settings() -> Iterator[None]:
    """One thread, as layers this small only wait for more; what the commands set, put back."""
    from transformers import logging

    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<pad>", "<eos>", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": sentence(n)}) + "\n" for n in range(24)))
    return path


@pytest.fixture
def init(model_folder: Path, data: Path, tmp_path: Path) -> list[str]:
    """Arguments of a small ``filet init``; later ones win."""
    return arguments(
        "init", "--model", model_folder, "--data", data, "--output", tmp_path / "out" / "adapter",
        "--rank", 4, "--batch-size", 4, "--max-length", 16, "--device", "cpu", "--no-progress",
    )  # fmt: skip


@pytest.fixture
def stats(model_folder: Path) -> list[str]:
    return arguments(
        "stats", "--model", model_folder, "--batch-size", 4, "--max-length", 16,
        "--samples", "all", "--device", "cpu", "--no-progress",
    )  # fmt: skip
