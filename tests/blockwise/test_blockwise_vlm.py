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
from filet.blockwise.batches import Batch
from filet.blockwise.samples import samples_of
from models import Case, worst
from passes import FLOAT32
from pictures import gemma3, llava, qwen2_5_vl, qwen2_vl, qwen3_vl, true_of, with_images

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
        targets if isinstance(targets, LoraConfig) else LoraConfig(r=2, target_modules=targets),
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
    end = ".lora_A.default.weight"
    found_in = [name for name, _ in loaded.named_parameters() if name.endswith(end)]
    assert found_in == [f"base_model.model.{name}{end}" for name in text]


def test_names_that_both_have_are_those_of_the_text(tmp_path: Path) -> None:
    """CLIP's layers have the names of Llama's; those that only it has are refused."""
    c = llava()
    folder = tmp_path / "model"
    c.model.save_pretrained(folder)
    with pytest.warns(UserWarning, match=r"vision_tower.*q_proj.*beside the text's blocks"):
        report = run(folder, tmp_path / "a", c, ["q_proj", "gate_proj"], "blockwise")
    assert sorted(report.modules) == [
        f"model.language_model.layers.0.{name}" for name in ("mlp.gate_proj", "self_attn.q_proj")
    ]
    for names in (["q_proj", "fc1"], ["linear_1"], r".*vision_tower.*\.fc2", ["lm_head"]):
        with pytest.raises(
            ValueError, match=r"of no layer in model.language_model; .* of the text"
        ):
            run(folder, tmp_path / "b", c, names, "blockwise")
    excluded = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"])
    with pytest.warns(UserWarning, match="beside the text's blocks"):
        report = run(folder, tmp_path / "c", c, excluded, "blockwise")
    assert [*report.modules] == ["model.language_model.layers.0.self_attn.q_proj"]


def test_images_go_through_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c = gemma3()
    c.model.save_pretrained(tmp_path / "model")
    kind, seen = type(c.model.model.vision_tower), []
    forward = kind.forward

    def watched(self: Any, *args: Any, **more: Any) -> Any:
        seen.append(None)
        return forward(self, *args, **more)

    monkeypatch.setattr(kind, "forward", watched)
    run(tmp_path / "model", tmp_path / "a", c, ["gate_proj"], "blockwise", number=1)
    assert len(seen) == sum("pixel_values" in sample for sample in c.samples) == 2


def test_images_between_the_blocks_are_refused(tmp_path: Path) -> None:
    """Qwen3-VL adds them to what its first blocks made; without images it is a chain."""
    c = qwen3_vl()
    c.model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="does not hand the output of one block of") as caught:
        run(tmp_path / "model", tmp_path / "a", c, ["q_proj"], "blockwise")
    assert "Qwen3VLForConditionalGeneration" in str(caught.value)
    whole = energies(run(tmp_path / "model", tmp_path / "b", c, "all-linear", "memory"))
    assert worst(whole, true_of(c))[0] < FLOAT32
    words = Case(c.model, c.samples[-1:], c.targets, True)
    found = energies(run(tmp_path / "model", tmp_path / "c", words, ["q_proj"], "blockwise"))
    expected = true_of(words)
    assert worst(found, {name: expected[name] for name in found})[0] < FLOAT32


def test_other_images_are_other_samples(tmp_path: Path) -> None:
    """A run that was not finished is that of its images."""
    c = llava()
    first = samples_of(batch_of(c.samples))
    again = samples_of(batch_of(c.samples))
    assert [each.digest for each in first] == [each.digest for each in again]
    others = [{**c.samples[0], "pixel_values": -c.samples[0]["pixel_values"]}, c.samples[1]]
    changed = samples_of(batch_of(others))
    assert all(a.digest != b.digest for a, b in zip(first, changed, strict=True))


def batch_of(samples: list[Any]) -> Batch:
    batch = with_images(samples)
    labels = batch.pop("labels").flatten()
    rows = (labels != -100).nonzero().squeeze(1)
    return Batch(batch, rows, labels[rows], None, None, len(samples), labels.numel(), 0)


def test_a_task_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="task='seq-cls'; expected 'causal-lm' or 'vlm'"):
        filet.initialize_folder(tmp_path, [], tmp_path / "a", LoraConfig(), task="seq-cls")
