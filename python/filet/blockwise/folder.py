"""Which models in folders the blockwise engine takes, and when it is the one to take."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from safetensors import safe_open

from filet.blockwise.stream import size_of
from filet.model.checkpoint import entries, shard_files, understood
from filet.model.folder import outline, settings_of
from filet.model.targets import adapted, find_targets
from filet.system.memory import available_on_host

__all__ = ["ADAPTER", "Engine", "Unsupported", "check_alone", "choose_engine", "empty_model"]

Engine = Literal["auto", "memory", "blockwise"]


ADAPTER = "default"


def check_alone(lora_config: LoraConfig) -> None:
    """ValueError for what is saved with an adapter besides A and B."""
    nothing: dict[str, Any] = {
        "modules_to_save": None, "trainable_token_indices": None, "bias": "none",
        "layer_replication": None,
    }  # fmt: skip
    for key, none in nothing.items():
        value = getattr(lora_config, key)
        if value and value != none:
            raise ValueError(
                f"{key}={value!r}: the blockwise engine has no weights left to save beside the "
                f"adapter's; expected {none!r} (or engine='memory')"
            )


class Unsupported(ValueError):
    """A kind of model that the blockwise engine does not take."""


def empty_model(
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | Literal["auto"] = "auto",
    trust_remote_code: bool = False,
) -> Any:
    """The causal language model of a folder without its weights: parameters on the meta device.

    Buffers are real (rotary frequencies, say). Raises :class:`Unsupported` for what the blockwise
    engine does not take, as far as config.json and the names of the files say it, and ValueError
    for what no engine does (:func:`filet.folder.settings_of`).
    """
    folder = Path(folder)
    settings = settings_of(folder, trust_remote_code=trust_remote_code)
    if getattr(settings, "quantization_config", None) is not None:
        raise Unsupported(
            f"{folder} is quantised (quantization_config in config.json); expected weights in "
            "float32, bfloat16 or float16"
        )
    try:
        files = shard_files(folder)
    except FileNotFoundError as error:
        raise Unsupported(str(error)) from error
    if dtype == "auto":
        with understood(folder):
            dtype = getattr(settings, "dtype", None) or _dtype_of(files)
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype)
    with understood(folder):
        return outline(settings, dtype, trust_remote_code=trust_remote_code)


def _dtype_of(files: Sequence[Path]) -> torch.dtype:
    """That of the first floating weight, as transformers has it; where all are quantised, any."""
    for path in files:
        with safe_open(str(path), framework="pt") as file:
            for key in file.keys():
                dtype = file.get_slice(key)[:0].dtype
                if dtype.is_floating_point and dtype.itemsize > 1:
                    return dtype
    return torch.float32


def choose_engine(
    folder: str | os.PathLike[str],
    lora_config: LoraConfig,
    device: torch.device,
    *,
    dtype: torch.dtype | Literal["auto"] = "auto",
    trust_remote_code: bool = False,
) -> Literal["memory", "blockwise"]:
    """What "auto" is: "blockwise" where weights and second moments take more than 3/4 of a device.

    Of its free memory, that is; the rest is for activations. A kind of model that the blockwise
    engine does not take is "memory" in any case.
    """
    try:
        model = empty_model(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    except Unsupported:
        return "memory"
    weights = size_of(entries(model))
    peft_model = adapted(model, lora_config)
    targets, _ = find_targets(peft_model, ADAPTER, loaded=False)
    moments = sum(2 * 4 * min(target.weight.shape) ** 2 for target in targets.values())
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_on_host()
    return "memory" if weights + moments <= 0.75 * free else "blockwise"
