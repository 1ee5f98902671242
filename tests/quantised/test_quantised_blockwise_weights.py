"""Packed weights as the blockwise engine has them on the device: what transformers loads."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_folders import (
    PACKED,
    assert_same,
    changed_config,
    fp8,
    loaded,
    packed,
    packing,
    rewrite,
    streamed,
    whole,
)
from torch import Tensor, nn
from transformers import FineGrainedFP8Config

from filet.blockwise.division import size_of
from filet.blockwise.folder import choose_engine, empty_model
from filet.blockwise.quantised import Unsupported
from filet.model.checkpoint import entries
from filet.model.packed import begin_quantised

pytestmark = [pytest.mark.usefixtures("one_thread")]

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", ["auto", torch.float16])
@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("of", ["wide", "gpt2"])
def test_equal_to_what_transformers_loads(
    kind: str, dtype: Any, of: str, device: torch.device
) -> None:
    """Packed in the files, and quantised as they are read; GPT-2 has its weights turned."""
    ids = torch.arange(1, 25).view(2, 12)
    for folder, quantize in ((packed(kind, of), None), (whole(of), kind)):
        given = {} if quantize is None else {"quantization_config": packing(kind)}
        model = empty_model(folder, dtype=dtype, **given)
        reference = loaded(folder, quantize, dtype, device).eval()
        with streamed(model, folder, device), torch.no_grad():
            assert_same(model, reference)
            if of == "wide" and device == CPU:  # transformers' GPT-2 of two dtypes does not run
                logits = [each(ids, use_cache=False).logits for each in (model, reference)]
                assert torch.equal(*logits)


@pytest.mark.parametrize("kind", PACKED)
def test_the_places_are_a_quarter_or_half_and_free_afterwards(kind: str) -> None:
    folder = whole("wide", torch.bfloat16)
    plain, model = empty_model(folder), empty_model(folder, quantization_config=packing(kind))
    stored = empty_model(packed(kind, "wide", torch.bfloat16))

    def blocks(of: Any) -> int:
        return size_of([entry for entry in entries(of) if ".layers." in entry.names[0]])

    # Beside the bytes: a float32 for 64 numbers, or for a row; tables and norms.
    most = 0.55 if kind == "int8" else 0.32
    assert blocks(model) < most * blocks(plain)
    assert blocks(stored) <= blocks(model)
    with streamed(model, folder):
        assert all(not value.is_meta for value in model.parameters())
    assert all(value.is_meta for value in model.parameters())
    for module in model.modules():
        assert getattr(module, "quant_state", None) is None
        assert getattr(getattr(module, "state", None), "CB", None) is None


def test_what_is_outlined_leaves_no_table_of_bitsandbytes_on_meta(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import bitsandbytes as bnb

    monkeypatch.setattr(bnb.functional, "name2qmap", {})  # of a process that has quantised nothing
    layer = bnb.nn.Linear4bit(64, 32, compress_statistics=True, device="meta")
    with torch.device("meta"):
        begin_quantised(layer, torch.float32)
    assert layer.weight.quant_state.nested and layer.weight.is_meta
    state = bnb.functional.quantize_4bit(torch.ones(64, 64), compress_statistics=True)[1]
    assert not state.absmax.is_meta


def test_what_is_skipped_stays_whole() -> None:
    folder, config = whole("wide"), packing("nf4")
    config.llm_int8_skip_modules = ["lm_head", "o_proj"]
    model = empty_model(folder, quantization_config=config)
    reference = dict(empty_model(folder).named_parameters())
    with streamed(model, folder):
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                left = name.endswith(("lm_head", "o_proj"))
                assert (type(module) is nn.Linear) == left, name
                assert (module.weight.shape == reference[f"{name}.weight"].shape) == left


@pytest.mark.parametrize("dtype", ["auto", torch.float32])
def test_fp8_without_a_gpu_becomes_numbers(dtype: Any, tmp_path: Path) -> None:
    """As transformers has it: value × scale of the block, in the dtype of the model."""
    folder = fp8(tmp_path / "fp8")
    model = empty_model(folder, dtype=dtype)
    if model.config.to_dict().get("quantization_config") is not None:
        pytest.skip("there is a GPU: fp8 stays packed")
    with streamed(model, folder):
        assert_same(model, loaded(folder, dtype=dtype))
        weight = model.model.layers[3].mlp.up_proj.weight
        assert weight.dtype == (torch.bfloat16 if dtype == "auto" else dtype)
        original = loaded(whole(dtype=torch.bfloat16)).model.layers[3].mlp.up_proj.weight
        error = (weight.float() - original.float()).abs().max()
        assert 0 < error < 2**-4 * original.abs().max()  # three bits of mantissa


# Refused.


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"quant_method": "gptq", "bits": 4, "backend": "marlin"},
            "backend 'marlin' .*'auto', 'torch', or engine='memory'",
        ),
        (
            {"quant_method": "awq", "bits": 4, "backend": "gemv"},
            "backend 'gemv' .*'auto', 'torch_awq', or engine='memory'",
        ),
        ({"quant_method": "compressed-tensors"}, "by compressed-tensors .*dequantize=True"),
        ({"quant_method": "mxfp4"}, "by mxfp4 .*dequantize=True"),
        ({"quant_method": "hqq"}, "by hqq .*engine='memory'"),
        ({"quant_method": "aqlm"}, "by aqlm .*weights in 32 or 16 bits"),
        ({"quant_method": "never heard of"}, "by never heard of"),
    ],
    ids=lambda value: value["quant_method"] if isinstance(value, dict) else "",
)
def test_kinds_that_are_refused_by_name(config: Any, said: str, tmp_path: Path) -> None:
    shutil.copytree(whole(), tmp_path / "model")
    changed_config(tmp_path / "model", config)
    with pytest.raises(Unsupported, match=said) as caught:
        empty_model(tmp_path / "model")
    assert str(tmp_path / "model") in str(caught.value)


def test_quantising_twice_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"by bitsandbytes .* expected no quantization_config \(--quantize\)"
    ):
        empty_model(packed("nf4"), quantization_config=packing("nf4"))


def test_only_bitsandbytes_quantises_here() -> None:
    with pytest.raises(Unsupported, match="quantization_config is of fp8"):
        empty_model(whole(), quantization_config=FineGrainedFP8Config())


def test_weights_quantised_in_every_forward_are_refused() -> None:
    config = packing("int8")
    config.llm_int8_has_fp16_weight = True
    with pytest.raises(Unsupported, match="llm_int8_has_fp16_weight"):
        empty_model(whole(), quantization_config=config)


@pytest.mark.parametrize(
    ("kind", "part", "said"),
    [
        ("nf4", "weight", "no weight for NAME.weight"),
        ("nf4", "weight.absmax", "no weight for NAME.weight.absmax"),
        ("double", "weight.nested_absmax", "no weight for NAME.weight.nested_absmax"),
        ("fp4", "weight.quant_state.bitsandbytes__fp4", "no weight for NAME.weight.quant_state"),
        ("int8", "SCB", "no weight for NAME.SCB"),
        ("int8", "weight", "no weight for NAME.weight"),
    ],
)
def test_a_missing_part_is_named(kind: str, part: str, said: str, tmp_path: Path) -> None:
    shutil.copytree(packed(kind), tmp_path / "model")
    name = "model.layers.3.mlp.down_proj"

    def without(weights: dict[str, Tensor]) -> None:
        del weights[f"{name}.{part}"]

    rewrite(tmp_path / "model", without)
    with pytest.raises(ValueError, match=re.escape(said.replace("NAME", name))):
        empty_model(tmp_path / "model")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_packed_weight_of_another_shape(kind: str, tmp_path: Path) -> None:
    shutil.copytree(packed(kind), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 64}))
    with pytest.raises(ValueError, match=r"has shape \(48, 32\) .* expected \(64, 32\)"):
        empty_model(tmp_path / "model")


def test_cut_bytes_of_a_packed_weight(tmp_path: Path) -> None:
    shutil.copytree(packed("nf4"), tmp_path / "model")
    name = "model.layers.3.mlp.down_proj.weight"

    def cut(weights: dict[str, Tensor]) -> None:
        weights[name] = weights[name][:-1].clone()

    rewrite(tmp_path / "model", cut)
    with pytest.raises(ValueError, match=re.escape(name)):
        empty_model(tmp_path / "model")


def test_auto_counts_packed_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fits packed is loaded whole; and what the blockwise engine does not read is as well."""
    from blockwise_runs import CHEAP

    folder = whole("wide", torch.bfloat16)
    lora_config = CHEAP["lora_config"]
    limits = {}
    for name, config in (("plain", None), ("nf4", packing("nf4"))):
        model = empty_model(folder, quantization_config=copy.deepcopy(config))
        limits[name] = size_of(entries(model))
    between = (limits["plain"] + limits["nf4"]) // 2
    moments = 2 * 4 * 128**2 * 4  # q_proj and up_proj of two blocks, either side of 128
    monkeypatch.setattr(
        "filet.blockwise.folder.available_on_host", lambda: int((between + moments) / 0.75)
    )
    assert choose_engine(folder, copy.deepcopy(lora_config), CPU) == "blockwise"
    chosen = choose_engine(
        folder, copy.deepcopy(lora_config), CPU, quantization_config=packing("nf4")
    )
    assert chosen == "memory"
