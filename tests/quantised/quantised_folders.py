"""Folders of small models for the blockwise engine, whole and as transformers saves packed ones."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import models
from filet.blockwise.stream import WeightStream
from filet.blockwise.weights import ShardedWeights
from filet.model.checkpoint import entries

pytest.importorskip("bitsandbytes")  # whose version the configs ask for

# Wider than a block of absolute maxima that are packed in turn (64 × 256 numbers), with biases.
WIDE = {"hidden_size": 128, "intermediate_size": 192, "attention_bias": True}

PACKED: dict[str, Any] = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "fp4": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.bfloat16
    ),
    "double": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}

_folders = tempfile.TemporaryDirectory(prefix="filet-tests-")


def packing(kind: str) -> Any:
    """A quantisation config of one's own: transformers keeps and changes what it gets."""
    return copy.deepcopy(PACKED[kind])


@functools.cache
def whole(kind: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    """A folder of a model as it is, in several shards: "llama", "wide" or "gpt2"."""
    made = {
        "llama": lambda: models.llama(5),
        "wide": lambda: models.llama(2, **WIDE),
        "gpt2": lambda: models.case("gpt2").model,
    }[kind]()
    path = Path(_folders.name) / f"{kind}-{dtype}"
    model = models.randomised(copy.deepcopy(made)).to(dtype)
    model.save_pretrained(path, max_shard_size="100KB" if kind == "wide" else "20KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


def loaded(folder: Path, kind: str | None = None, dtype: Any = "auto", device: Any = "cpu") -> Any:
    """What transformers loads, quantised by ``kind`` while it does."""
    how = {} if kind is None else {"quantization_config": packing(kind)}
    how["device_map"] = {"": device}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **how)


@functools.cache
def packed(kind: str, of: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    """A folder of the model packed by bitsandbytes, in several shards."""
    path = Path(_folders.name) / f"{of}-{dtype}-{kind}"
    loaded(whole(of, dtype), kind).save_pretrained(path, max_shard_size="5KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


def fp8(goal: Path, block: int = 16) -> Path:
    """A folder of the model with its blocks' weights in fp8, with a scale for every block of it."""
    shutil.copytree(whole(dtype=torch.bfloat16), goal)
    changed_config(goal, {"quant_method": "fp8", "weight_block_size": [block, block]})

    def scaled(weights: dict[str, Tensor]) -> None:
        for name in [name for name in weights if name.endswith("proj.weight")]:
            m, n = weights[name].shape
            blocks = weights[name].float().view(m // block, block, n // block, block)
            scales = blocks.abs().amax((1, 3)) / 448
            values = (blocks / scales[:, None, :, None]).view(m, n)
            weights[name] = values.to(torch.float8_e4m3fn)
            weights[f"{name}_scale_inv"] = scales

    rewrite(goal, scaled)
    return goal


def changed_config(folder: Path, quantization_config: dict[str, Any]) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "quantization_config": quantization_config}))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the weights of a folder, which are in one file then."""
    weights: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@contextmanager
def streamed(model: Any, folder: Path, device: torch.device | str = "cpu") -> Iterator[Any]:
    """Inside, the model has its weights, from the folder."""
    stream = WeightStream(ShardedWeights(folder, model), torch.device(device))
    with closing(stream.loaded([entries(model)])) as all_of_it:
        next(all_of_it)
        yield model


def assert_same(mine: Any, theirs: Any) -> None:
    """Everything that two models would save, to the bit."""
    ours, others = mine.state_dict(), theirs.state_dict()
    assert ours.keys() == others.keys()
    for name, value in others.items():
        assert ours[name].dtype == value.dtype, name
        assert torch.equal(ours[name], value), name
