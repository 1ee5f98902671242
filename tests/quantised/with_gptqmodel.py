"""GPTQ and AWQ with gptqmodel itself, by both engines. test_gptqmodel.py runs it."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import gptqmodel.nn_modules.qlinear.torch as gptq
import gptqmodel.nn_modules.qlinear.torch_awq as awq
import pytest
import torch
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig, PeftModel, get_peft_model
from quantised_folders import assert_same, changed_config, rewrite, streamed
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import filet
import models
from filet import FiletConfig
from filet.blockwise.folder import empty_model
from filet.model.folder import load_model
from filet.model.values import dtype_of_model, values_of

GROUP = 32
KINDS = ("gptq", "gptq_v2", "awq")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_folders = tempfile.TemporaryDirectory(prefix="filet-tests-")


@functools.cache
def plain() -> Any:
    wide = {"hidden_size": 64, "intermediate_size": 96, "attention_bias": True}
    return models.randomised(models.llama(3, **wide)).to(torch.float16)


def rounded(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """Scales and zeros, (out, groups) each, that span the weights of each group."""
    groups = layer.weight.data.float().unflatten(1, (-1, GROUP))
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scales = ((high - low) / 15).half()
    return scales, (-low / scales.float()).round().clamp(0, 15)


def packed(layer: nn.Linear, kind: str) -> dict[str, Tensor]:
    """The tensors of a layer in a folder, by the library's own packing."""
    scales, zeros = rounded(layer)
    n, m = layer.in_features, layer.out_features
    of = {"bits": 4, "group_size": GROUP, "desc_act": False, "in_features": n, "out_features": m}
    bias = layer.bias is not None
    if kind == "awq":
        made = awq.AwqTorchLinear(**of, sym=False, bias=bias, register_buffers=True)
        made.pack(layer, scales.float(), zeros)
    else:
        made = gptq.TorchLinear(**of, sym=False, bias=bias)
        made.pack(layer, scales.float(), zeros, torch.arange(n, dtype=torch.int32) // GROUP)
    state = made.state_dict()
    if kind == "gptq":  # the first format has them one less
        state["qzeros"] -= 0x11111111
    return state


@functools.cache
def folder(kind: str) -> Path:
    """Of a model, in several shards."""
    path = Path(_folders.name) / kind
    model = plain()
    state = model.state_dict()
    for name, layer in model.model.layers.named_modules(prefix="model.layers"):
        if isinstance(layer, nn.Linear):
            del state[f"{name}.weight"]
            state |= {f"{name}.{key}": value for key, value in packed(layer, kind).items()}
    model.config.save_pretrained(path)
    save_torch_state_dict(state, path, max_shard_size="50KB")
    config: dict[str, Any] = {"bits": 4, "group_size": GROUP, "desc_act": False}
    if kind == "awq":
        config |= {"quant_method": "awq", "version": "gemm", "zero_point": True}
    else:
        config |= {"quant_method": "gptq", "sym": False, "checkpoint_format": kind}
    changed_config(path, config)
    return path


def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS)


def batches() -> list[dict[str, Tensor]]:
    ids = torch.arange(96).view(8, 12) % 29
    return [{"input_ids": part, "labels": part} for part in ids.split(2)]


def of_layers(model: Any) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if type(m).__module__.startswith("gptqmodel")}


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_streamed_is_what_transformers_loads(kind: str, dtype: Any) -> None:
    reference = load_model(folder(kind), device=DEVICE, dtype=dtype)
    ids = batches()[0]["input_ids"].to(DEVICE)
    model = empty_model(folder(kind), dtype=dtype)
    with streamed(model, folder(kind), device=DEVICE), torch.no_grad():
        assert_same(model, reference)
        assert len(of_layers(model)) == 21
        logits = []
        for each in (model, reference):
            each.eval()  # without dropout
            for layer in of_layers(each).values():
                layer.train()
            logits.append(each(ids, use_cache=False).logits)
        assert torch.equal(*logits)
    assert {value.device.type for value in model.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("kind", KINDS)
def test_w_is_what_the_layer_multiplies_by(kind: str) -> None:
    """And near what was packed: with the zeros of the other format it would be a step off."""
    model = load_model(folder(kind), device=DEVICE, dtype=torch.bfloat16).train()
    dtype = dtype_of_model(model)  # transformers makes it float16 for AWQ where there is a GPU
    originals = dict(plain().named_modules())
    for name, layer in of_layers(model).items():
        weight = values_of(layer, dtype).weight()
        layer.bias = None
        own = layer(torch.eye(layer.in_features, dtype=dtype, device=DEVICE)).T
        scales, _ = rounded(originals[name])
        assert torch.equal(weight, own), name
        steps = scales.float().repeat_interleave(GROUP, 1)
        off = (weight.float().cpu() - originals[name].weight.float()) / steps
        assert off.mean().abs() < 0.1 and off.abs().median() < 0.5, name


@pytest.mark.parametrize("kind", KINDS)
def test_both_engines_and_a_dense_model_agree(kind: str, tmp_path: Path) -> None:
    reports = {}
    for engine in ("memory", "blockwise"):
        reports[engine] = filet.initialize_folder(
            folder(kind), batches(), tmp_path / engine,
            LoraConfig(r=4, lora_alpha=4, target_modules="all-linear"), engine=engine,
            device=DEVICE, dtype=torch.float32, show_progress_bar=False,
        )  # fmt: skip
    names = reports["memory"].modules.keys()
    assert names == reports["blockwise"].modules.keys() and len(names) == 21
    written = [load_file(tmp_path / engine / "adapter_model.safetensors") for engine in reports]
    assert all(torch.equal(value, written[1][key]) for key, value in written[0].items())

    loaded = load_model(folder(kind), device=DEVICE, dtype=torch.float32)
    dense = LlamaForCausalLM(plain().config).float()
    state = {**loaded.state_dict()}
    for name, layer in of_layers(loaded).items():
        state[f"{name}.weight"] = values_of(layer, torch.float32).weight()
    dense.load_state_dict({key: state[key] for key in dense.state_dict()})
    model = get_peft_model(dense.to(DEVICE), lora())
    report = filet.initialize_lora_filet_weights(model, batches(), show_progress_bar=False)
    for name, its in report.modules.items():
        error = (reports["blockwise"].modules[name].energies - its.energies).abs().max()
        # AWQ's kernel rounds x to float16.
        assert error <= (2e-3 if kind == "awq" else 1e-5) * its.energies.abs().max(), name


@pytest.mark.parametrize("start", ["zero", "untouched"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_and_plain_peft_loads_it(kind: str, start: Any, tmp_path: Path) -> None:
    ids = batches()[0]["input_ids"].to(DEVICE)
    model = get_peft_model(load_model(folder(kind), device=DEVICE, dtype=torch.float32), lora())
    base = {k: v.clone() for k, v in model.state_dict().items() if "lora_" not in k}
    report = filet.initialize_lora_filet_weights(
        model, batches(), FiletConfig(start=start), show_progress_bar=False
    )
    assert all(torch.equal(model.state_dict()[key], value) for key, value in base.items())
    filet.save_as_lora(model, tmp_path, report=report)
    again = PeftModel.from_pretrained(
        load_model(folder(kind), device=DEVICE, dtype=torch.float32), tmp_path
    )
    with torch.no_grad():
        before, loaded = (each.eval()(input_ids=ids, labels=ids) for each in (model, again))
    torch.testing.assert_close(before.logits, loaded.logits, rtol=1e-4, atol=1e-5)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(5):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        assert model.eval()(input_ids=ids, labels=ids).loss < before.loss - 0.1


@pytest.mark.parametrize("engine", ["memory", "blockwise"])
def test_a_group_that_is_none(engine: Any, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(folder("gptq"), base)

    def change(weights: dict[str, Tensor]) -> None:
        weights["model.layers.1.mlp.up_proj.g_idx"][5] = -1

    rewrite(base, change)
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.g_idx has numbers from -1 to 1"):
        filet.initialize_folder(
            base, batches(), tmp_path / "out", lora(), engine=engine, device=DEVICE
        )
