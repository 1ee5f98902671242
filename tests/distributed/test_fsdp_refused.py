"""Models that are divided in another way than by FSDP2: refused, and what to do instead."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import filet
from fsdp_models import sharded
from models import case, collate, peft_of
from ranks import run, values


def initialise(model: Any) -> str:
    batches = [collate(case("llama").samples[:2])]
    try:
        filet.initialize_lora_filet_weights(model, batches, show_progress_bar=False)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def refused(rank: int, folder: Path) -> dict[str, str]:
    said = {}
    cpu = torch.device("cpu")
    flat = FullyShardedDataParallel(peft_of(case("llama")), use_orig_params=True, device_id=cpu)
    said["FSDP 1"] = initialise(flat)
    said["FSDP 1, inside"] = initialise(flat.module)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    parallel = peft_of(case("llama"))
    layer = parallel.base_model.model.model.layers[0].mlp.up_proj.base_layer
    layer.weight = torch.nn.Parameter(
        distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]), requires_grad=False
    )
    said["tensor parallel"] = initialise(parallel)
    marked = peft_of(case("llama"))
    marked.base_model.model._tp_size = 2
    said["tensor parallel, of transformers"] = initialise(marked)
    zero = peft_of(case("llama"))
    for parameter in zero.parameters():
        parameter.ds_id = 0
    said["ZeRO-3"] = initialise(zero)
    each = init_device_mesh("cpu", (2, 1), mesh_dim_names=("other", "own"))["own"]
    said["a mesh of one"] = initialise(fully_shard(peft_of(case("llama")), mesh=each))
    wrapped = sharded(peft_of(case("llama")), (2,))
    apply_activation_checkpointing(wrapped, check_fn=lambda m: isinstance(m, LlamaDecoderLayer))
    said["activation checkpointing"] = initialise(wrapped)
    try:
        filet.save_as_lora(wrapped, folder / "adapter")
    except ValueError as error:
        said["activation checkpointing, saved"] = f"ValueError: {error}"
    model = sharded(peft_of(case("llama")), (2,))
    try:
        filet.estimate(model, collate(case("llama").samples[:2]))
    except ValueError as error:
        said["estimate"] = f"ValueError: {error}"
    return said


def test_divided_in_another_way(tmp_path: Path) -> None:
    first, second = values(run(2, refused, tmp_path))
    assert first == second
    for way, parts in {
        "FSDP 1": ("FullyShardedDataParallel", "expected FSDP 2: fully_shard, or fsdp_version=2"),
        "FSDP 1, inside": ("FullyShardedDataParallel",),
        "tensor parallel": ("tensor parallel", "PEFT's own LoRA layers fail"),
        "tensor parallel, of transformers": ("tensor parallel",),
        "ZeRO-3": ("ZeRO-3", "'torchrun -m filet.cli init'"),
        "a mesh of one": ("between 1 of 2 processes; expected a mesh of all",),
        "activation checkpointing": ("CheckpointWrapper", "expected gradient_checkpointing=True"),
        "activation checkpointing, saved": ("PEFT saves no adapter",),
        "estimate": ("FSDP has sharded the model", "before it is sharded"),
    }.items():
        assert first[way].startswith("ValueError: "), (way, first[way])
        assert all(part in first[way] for part in parts), (way, first[way])


class Linear4bit(torch.nn.Linear):
    """Of bitsandbytes as far as FILet looks, its packed weight sharded."""

    __module__ = "bitsandbytes.nn.modules"
    compute_dtype, quant_state = torch.float32, SimpleNamespace()


def quantised(rank: int, folder: Path) -> str:
    model = peft_of(case("llama"))
    for name, module in model.named_modules():
        if name.endswith(".base_layer"):
            module.__class__ = Linear4bit
    return initialise(sharded(model, (2,)))


def test_quantised_and_sharded(tmp_path: Path) -> None:
    first, _ = values(run(2, quantised, tmp_path))
    assert "this Linear4bit is quantised and FSDP has sharded it" in first
    assert "bnb_4bit_quant_storage=torch.uint8" in first
