"""examples/vlm.py: a tiny Gemma 3 from a folder, trained on chats with images, and loaded again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel
from transformers import AutoModelForImageTextToText

import filet
from made_data import write_jsonl
from seeing import chats, folder_of, images_in

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_example_trains_what_it_initialised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl", minversion="1.16")
    import vlm

    monkeypatch.setenv("CI", "1")  # TRL tells nobody of a run in CI
    seen = []
    initialise = filet.initialize_from_trainer

    def watched(*args: object, **more: object) -> object:
        seen.append(initialise(*args, **more))  # type: ignore[arg-type]
        return seen[0]

    monkeypatch.setattr(filet, "initialize_from_trainer", watched)
    # TRL takes marks in templates of models that see from there on.
    marked = Version(transformers.__version__) >= Version("5.18")
    folder_of("gemma3", tmp_path / "model", marked=marked)
    # A query of the padding whose window has no key at all gets a gradient of NaN on a GPU (H200,
    # torch 2.11), with PEFT alone too.
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["text_config"]["sliding_window"] = 256
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    data = write_jsonl(tmp_path / "chats.jsonl", *chats(images_in(tmp_path)))
    output = tmp_path / "adapter"
    given = {"model": tmp_path / "model", "data": data, "output": output, "rank": 2, "steps": 2}
    vlm.main([part for key, value in given.items() for part in (f"--{key}", str(value))])
    [report] = seen
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    loaded = PeftModel.from_pretrained(base, str(output))
    factors = {n: p for n, p in loaded.named_parameters() if "lora_B" in n}
    assert len(factors) == len(report.modules)
    assert any("vision_tower" in name for name in factors)
    assert all(bool(torch.isfinite(value).all()) for value in factors.values())
    assert any(value.abs().max() > 0 for value in factors.values())
