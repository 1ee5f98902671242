"""What the tests of adapters share: files and models as they were, and calls that fail."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from adapted import TARGETS, assert_same, classifier, gpt2, llama, lora_layers

FILES = ["adapter_config.json", "adapter_model.safetensors", "filet.json"]


def contents(folder: Path) -> dict[str, bytes]:
    """Its files; of a config what it says, for PEFT writes sets in the order that they come."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for name in found.keys() & {"adapter_config.json"}:
        config = json.loads(found[name])
        lists = {key: sorted(map(str, x)) for key, x in config.items() if isinstance(x, list)}
        found[name] = json.dumps({**config, **lists}, sort_keys=True).encode()
    return found


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that an operation which failed must leave alone."""
    found: dict[str, Any] = {
        "tensors": {key: value.clone() for key, value in model.state_dict().items()},
        "parameters": {key: id(value) for key, value in model.named_parameters()},
        "flags": {key: value.requires_grad for key, value in model.named_parameters()},
        "modules": {key: (id(value), type(value)) for key, value in model.named_modules()},
        "sizes": {
            key: (value.in_features, value.out_features)
            for key, value in model.named_modules()
            if isinstance(value, nn.Linear)
        },
        "attributes": set(vars(model)),
    }
    if isinstance(model, PeftModel):
        found["configs"] = {
            key: (type(value), copy.deepcopy(vars(value)))
            for key, value in model.peft_config.items()
        }
        found["active"] = list(model.active_adapters)
        found["layers"] = {
            name: tuple(
                dict(known)
                for known in (layer.r, layer.lora_alpha, layer.scaling, layer.use_rslora)
            )
            for name, layer in lora_layers(model).items()
        }
    return found


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert_same(after.pop("tensors"), before["tensors"])
    for key, value in after.items():
        assert value == before[key], key


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no task": {"task_type": None},
    "rslora": {"use_rslora": True, "r": 6, "lora_alpha": 7},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6},
        "alpha_pattern": {"k_proj": 3, "layers.0.mlp.gate_proj": 5},
    },
    "patterns rslora": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 3, "layers.1.mlp.down_proj": 6},
        "alpha_pattern": {"k_proj": 3, "layers.0.mlp.gate_proj": 5},
    },
    "modules to save": {"modules_to_save": ["lm_head"]},
    "trained tokens": {"trainable_token_indices": [3, 5]},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "embedding": {"target_modules": [*TARGETS, "embed_tokens"]},
    "rslora embedding": {
        "use_rslora": True,
        "r": 6,
        "target_modules": [*TARGETS, "embed_tokens"],
    },
    "embedding and head": {"target_modules": [*TARGETS, "embed_tokens", "lm_head"]},
    "rslora lora_bias": {"use_rslora": True, "r": 6, "lora_bias": True},
    "dropout": {"lora_dropout": 0.3},
    "regex": {"target_modules": r".*layers\.1\..*(up|down)_proj"},
    "all linear": {"target_modules": "all-linear"},
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "classifier": {"task_type": "SEQ_CLS"},
    "conv1d": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    "conv1d rslora": {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_rslora": True},
}


def base_of(case: str) -> Any:
    if case.startswith("conv1d"):
        return gpt2()
    if case == "classifier":
        return classifier()
    return llama(attention_bias="bias" in case, mlp_bias="bias" in case)


class Failing:
    """A function that fails once, at its k-th call: before it has run, or after."""

    def __init__(self, function: Callable[..., Any], k: int, error: BaseException, after: bool):
        self.function, self.k, self.error, self.after = function, k, error, after
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.k and not self.after:
            raise self.error
        result = self.function(*args, **kwargs)
        if self.calls == self.k:
            raise self.error
        return result
