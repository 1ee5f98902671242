"""Heads that are quantised as well: in pieces block by block, whole in memory."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from blockwise_runs import MARKS, adapter, assert_equal, batches, initialize
from quantised_bases import kinds, peft_of
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import models
from filet import FiletConfig, initialize_lora_filet_weights, load, save_as_lora
from filet.blockwise import head

pytestmark = MARKS

WORDS = 1024
_folders = tempfile.TemporaryDirectory(prefix="filet-tests-")


@functools.cache
def folder(dtype: torch.dtype) -> Path:
    path = Path(_folders.name) / str(dtype)
    models.llama(2, vocab_size=WORDS).to(dtype).save_pretrained(path)
    return path


def packing(kind: str, dtype: torch.dtype) -> Any:
    """Of every linear layer, which by default leaves the head out."""
    how: dict[str, Any] = {"llm_int8_skip_modules": ["none"]}
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, **how)
    how |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    return BitsAndBytesConfig(load_in_4bit=True, **how)


@pytest.mark.parametrize("kind", [None, *kinds("nf4", "int8")])
def test_a_piece_has_so_many_logits(
    kind: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the weight of the head is stored: 4 bits are flat, two numbers in a byte."""
    monkeypatch.setattr(head, "_LOGITS", 5 * WORDS)
    pieces: list[tuple[int, ...]] = []
    cross_entropy_ = head.cross_entropy_

    def watched(logits: Tensor, *args: Any, **more: Any) -> Tensor:
        pieces.append(tuple(logits.shape))
        return cross_entropy_(logits, *args, **more)

    monkeypatch.setattr(head, "cross_entropy_", watched)
    packed = None if kind is None else packing(kind, torch.float32)
    initialize(folder(torch.float32), tmp_path / "out", quantization_config=packed)
    assert {words for _, words in pieces} == {WORDS}
    full = [rows == 5 for rows, _ in pieces]
    # Of a batch all pieces are full but the last.
    assert max(rows for rows, _ in pieces) == 5 and sum(full) > len(full) / 2


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-3)])
@pytest.mark.parametrize("kind", kinds("nf4", "int8"))
def test_both_engines(kind: str, dtype: torch.dtype, bound: float, tmp_path: Path) -> None:
    """In memory the model computes its own loss, and bfloat16 rounds a few of its gradients."""
    reports = [
        initialize(
            folder(dtype), tmp_path / engine, engine, quantization_config=packing(kind, dtype)
        )
        for engine in ("memory", "blockwise")
    ]
    assert_equal(reports[1], reports[0], bound)
    mine, theirs = (adapter(tmp_path / engine) for engine in ("blockwise", "memory"))
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert (value - theirs[name]).abs().max() <= bound * theirs[name].abs().max(), name


@pytest.mark.parametrize("kind", kinds("nf4", "int8"))
def test_a_label_beyond_the_vocabulary_is_named(kind: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        folder(torch.float32),
        quantization_config=packing(kind, torch.float32),
        device_map={"": "cpu"},
    )
    wrong = [{**batch, "labels": batch["labels"].clone()} for batch in batches()]
    wrong[0]["labels"][0, 1] = WORDS
    with pytest.raises(ValueError, match=f"labels of batch 0 has {WORDS}; expected"):
        initialize_lora_filet_weights(
            peft_of(model), wrong, FiletConfig(samples=None), show_progress_bar=False
        )


@pytest.mark.parametrize("how", ["ours", "peft"])
@pytest.mark.parametrize("kind", kinds("nf4", "int8"))
def test_an_adapter_on_the_head_is_saved_without_its_codes(
    kind: str, how: str, tmp_path: Path
) -> None:
    """Which PEFT saves, and another base would take for the weight of its head."""
    quantised = {"quantization_config": packing(kind, torch.float32), "device_map": {"": "cpu"}}
    bases = [
        functools.partial(AutoModelForCausalLM.from_pretrained, folder(torch.float32), **more)
        for more in (quantised, {"dtype": torch.float32})
    ]
    peft_model = peft_of(bases[0](), target_modules=["q_proj", "lm_head"])
    given = batches()
    initialize_lora_filet_weights(
        peft_model, given, FiletConfig(samples=None), show_progress_bar=False
    )
    if how == "ours":
        save_as_lora(peft_model, tmp_path)
        assert all(".lora_" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    else:
        peft_model.save_pretrained(tmp_path)
    ids = given[0]["input_ids"]
    for base in bases:  # B is 0: each has the logits that it has
        loaded = load(base(), tmp_path).eval()
        assert sum("lora_A" in name for name, _ in loaded.named_parameters()) == 3
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids).logits, base().eval()(ids).logits)
