"""GPTQ and AWQ folders whose settings or codes nobody reads rightly: refused before any is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from quantised_folders import changed_config
from safetensors.torch import save_file
from torch import Tensor

import filet
import models
from filet.model.checkpoint import check_codes
from filet.model.folder import settings_of

GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": True}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm"}
IDS = torch.arange(4, 20).view(2, 8)


def folder(path: Path, config: dict[str, Any]) -> Path:
    models.llama(1).config.save_pretrained(path)
    changed_config(path, config)
    return path


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({**GPTQ, "bits": 5}, "bits 5 .* by gptq; expected 2, 3, 4 or 8"),
        ({**GPTQ, "bits": "4"}, "bits '4' .*; expected 2, 3, 4 or 8"),
        ({**AWQ, "bits": True}, "bits True .* by awq; expected 2, 3, 4 or 8"),
        ({"quant_method": "gptq"}, "bits None .*; expected 2, 3, 4 or 8"),
        ({**GPTQ, "group_size": "32"}, "group_size '32' .*; expected -1, or above 0"),
        ({**AWQ, "group_size": 0}, "group_size 0 .*; expected -1, or above 0"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin' .*; expected 'gptq'"),
        ({**GPTQ, "format": "junk"}, "format 'junk' .*; expected 'gptq' or 'gptq_v2' or 'gptq_p'"),
        (
            {**GPTQ, "checkpoint_format": "gptq_p", "bits": 3},
            "checkpoint_format 'gptq_p' .*; expected 'gptq' or 'gptq_v2'$",
        ),
        ({**AWQ, "version": "GEMV"}, "version 'gemv' .*; expected 'gemm'"),
        ({**GPTQ, "dynamic": {"-:.*q_proj": {}}}, "dynamic .*q_proj.*; expected none"),
    ],
)
@pytest.mark.parametrize("engine", ["memory", "blockwise", "auto"])
def test_settings(config: dict[str, Any], said: str, engine: Any, tmp_path: Path) -> None:
    place = folder(tmp_path / "base", config)
    with pytest.raises(ValueError, match=f"{place} has {said}"):
        filet.initialize_folder(
            place, [{"input_ids": IDS, "labels": IDS}], tmp_path / "out",
            LoraConfig(r=2, target_modules=["q_proj"]), engine=engine, device="cpu",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("config", "backend"),
    [
        (GPTQ, "torch"),
        ({**GPTQ, "backend": "AUTO"}, "torch"),
        ({**GPTQ, "backend": "Marlin"}, "marlin"),
        ({**GPTQ, "checkpoint_format": "GPTQ_V2"}, "torch"),
        ({**GPTQ, "checkpoint_format": "gptq_p"}, "torch"),
        ({**GPTQ, "bits": 3, "group_size": -1}, "torch"),
        ({**GPTQ, "dynamic": {}}, "torch"),
        ({**AWQ, "version": "GEMM"}, "torch_awq"),
        ({**AWQ, "version": "gemv", "backend": "gemv"}, "gemv"),
    ],
)
def test_the_kernel_that_is_chosen(config: dict[str, Any], backend: str, tmp_path: Path) -> None:
    settings = settings_of(folder(tmp_path, config))
    assert settings.quantization_config["backend"] == backend


def codes() -> dict[str, Tensor]:
    return {
        "a.qweight": torch.ones(2, 8, dtype=torch.int32),
        "a.qzeros": torch.ones(2, 1, dtype=torch.int32),
        "a.scales": torch.ones(2, 8, dtype=torch.float16),
        "a.g_idx": torch.arange(16, dtype=torch.int32) // 8,
        "b.qweight": torch.ones(2, 8),  # of no layer with scales
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update({"a.qweight": c["a.qweight"].half()}), "a.qweight is float16"),
        (lambda c: c.update({"a.qzeros": c["a.qzeros"].float()}), "a.qzeros is float32"),
        (lambda c: c.update({"a.g_idx": c["a.g_idx"].float()}), "a.g_idx is float32"),
        (lambda c: c["a.g_idx"][3:4].fill_(-1), "a.g_idx has numbers from -1 to 1 .*0 to 1"),
        (lambda c: c["a.g_idx"][3:4].fill_(2), "a.g_idx has numbers from 0 to 2 .*0 to 1"),
    ],
)
def test_codes(change: Callable[[dict[str, Tensor]], Any], said: str, tmp_path: Path) -> None:
    """Also where a layer's tensors are in two files."""
    whole = codes()
    save_file(whole, tmp_path / "model.safetensors")
    check_codes(tmp_path)
    change(whole)
    save_file(whole, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=said):
        check_codes(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for part in ("qweight", "g_idx"):
        its = {key: value for key, value in whole.items() if key.endswith(part)}
        rest = {key: value for key, value in whole.items() if not key.endswith(part)}
        save_file(its, tmp_path / "one.safetensors")
        save_file(rest, tmp_path / "two.safetensors")
        places = {key: "one.safetensors" for key in its} | {key: "two.safetensors" for key in rest}
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": places}))
        with pytest.raises(ValueError, match=said):
            check_codes(tmp_path)
