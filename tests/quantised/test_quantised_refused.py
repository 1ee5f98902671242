"""What two options make of a packed layer that it cannot be: one line, before anything is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from quantised_folders import loaded, whole
from transformers import BitsAndBytesConfig

import filet
import models

IDS = torch.arange(4, 20).view(2, 8)
BATCHES = [{"input_ids": IDS, "labels": IDS}]
TARGETS = ["q_proj", "down_proj"]


def replicated(model: Any) -> Any:
    """Every block twice, over the same weights."""
    blocks = model.config.num_hidden_layers
    twice = {"layer_replication": [[0, blocks], [0, blocks]]}
    return get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS, **twice))


@pytest.mark.parametrize("ran", [False, True], ids=["new", "after a forward"])
def test_blocks_that_share_int8_weights(ran: bool) -> None:
    """In the second one bitsandbytes multiplies by codes without scales."""
    peft_model = replicated(loaded(whole(), "int8"))
    if ran:
        peft_model(input_ids=IDS)
    with pytest.raises(ValueError, match=r"layers.0.*layers.5.*share one weight in int8"):
        filet.initialize_lora_filet_weights(peft_model, BATCHES, show_progress_bar=False)


def test_blocks_that_share_weights_in_4_bits() -> None:
    report = filet.initialize_lora_filet_weights(
        replicated(loaded(whole(), "nf4")), BATCHES, show_progress_bar=False
    )
    assert len(report.modules) == 2 * 2 * 5


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("engine", ["memory", "blockwise"])
def test_a_tied_head_that_was_to_be_quantised(engine: Any, bits: int, tmp_path: Path) -> None:
    models.llama(2, tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    config = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, llm_int8_skip_modules=["none of it"]
    )
    with pytest.raises(ValueError, match=r"lm_head was to be quantised, and its weight is tied"):
        filet.initialize_folder(
            tmp_path / "tied", BATCHES, tmp_path / "out", LoraConfig(r=2, target_modules=TARGETS),
            engine=engine, device="cpu", quantization_config=config,
        )  # fmt: skip


@pytest.mark.parametrize("engine", ["memory", "blockwise", "auto"])
def test_a_config_that_is_none(engine: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"quantization_config='nf4'; expected transformers'"):
        filet.initialize_folder(
            whole(), BATCHES, tmp_path / "out", LoraConfig(r=2, target_modules=TARGETS),
            engine=engine, device="cpu", quantization_config="nf4",
        )  # fmt: skip
