"""Models that see, block by block: the blocks are the text's, images run before them, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForImageTextToText

import filet
from filet import FiletConfig
from models import Case, worst
from passes import FLOAT32
from pictures import gemma3, llava, qwen2_5_vl, qwen2_vl, true_of, with_images

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = [qwen2_vl, qwen2_5_vl, gemma3, llava]


def run(
    folder: Path, output: Path, c: Case, targets: Any, engine: str, number: int = 2
) -> filet.FiletReport:
    """In batches of so many samples."""
    parts = [c.samples[start : start + number] for start in range(0, len(c.samples), number)]
    return filet.initialize_folder(
        folder,
        [with_images(part) for part in parts],
        output,
        LoraConfig(r=2, target_modules=targets),
        FiletConfig(samples=None),
        engine=engine,
        device="cpu",
        show_progress_bar=False,
        task="vlm",
    )


def energies(report: filet.FiletReport) -> dict[str, torch.Tensor]:
    return {name: module.energies for name, module in report.modules.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_both_engines_give_the_same(kind: Any, tmp_path: Path) -> None:
    c = kind()
    c.model.save_pretrained(tmp_path / "model")
    with pytest.warns(UserWarning, match="beside the text's blocks") as caught:
        found = energies(run(tmp_path / "model", tmp_path / "a", c, "all-linear", "blockwise"))
    assert sum("beside the text's blocks" in str(each.message) for each in caught) == 1
    whole = energies(run(tmp_path / "model", tmp_path / "b", c, "all-linear", "memory"))
    text = {name: value for name, value in whole.items() if "language_model" in name}
    assert 0 < len(text) < len(whole)
    assert worst(found, text)[0] < 5e-6  # the loss is rounded in another way
    assert worst(whole, true_of(c))[0] < FLOAT32
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "a"))
    adapted = {name.removesuffix(".lora_A.default.weight") for name, _ in loaded.named_parameters()
               if "lora_A" in name}  # fmt: skip
    assert adapted == {f"base_model.model.{name}" for name in text}
