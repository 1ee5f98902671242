"""Quantised models in folders: which the blockwise engine takes, and their packed weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from filet.model.checkpoint import (
    Header,
    Names,
    check_shapes,
    headers_of,
    missing_weight,
    understood,
)
from filet.model.gptq import KERNELS, method_of
from filet.model.packed import begin_quantised, begin_stored, is_packed

__all__ = ["Unsupported", "begin_packed", "quantizer_of"]


class Unsupported(ValueError):
    """A kind of model that the blockwise engine does not take."""


_QUANTISES: tuple[str, ...] = ("bitsandbytes",)
_TAKEN = (*_QUANTISES, "fp8", *KERNELS)

# Where what is not taken may go.
_UNKNOWN = "weights in 32 or 16 bits"
_WHOLE = "the model loaded with dequantize=True, and what that saves"
_IN_MEMORY = "engine='memory'"
_ROUTES = {
    "hqq": f"{_IN_MEMORY} (by a transformers that loads it)",
    "torchao": _IN_MEMORY,
    "compressed-tensors": _WHOLE,
    "mxfp4": _WHOLE,
}


def quantizer_of(folder: Path, settings: Any, quantization_config: Any) -> Any:
    """transformers' quantizer for a folder's model; None where there is nothing quantised.

    ``quantization_config``: transformers', for weights that are not, or None. Raises ValueError
    where they are, :class:`Unsupported` for a kind that is not taken, and ImportError where its
    package is missing.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    there = getattr(settings, "quantization_config", None)
    if there is None and quantization_config is None:
        return None
    if there is None:
        name, taken = method_of(quantization_config), _QUANTISES
        what = f"quantization_config is of {name}, by which the blockwise engine does not quantise"
    else:
        name, taken = method_of(there), _TAKEN
        if quantization_config is not None:
            raise ValueError(
                f"{folder} is quantised already, by {name} (quantization_config in config.json); "
                "expected no quantization_config (--quantize), or the folder that it was made from"
            )
        what = (
            f"{folder} is quantised by {name} (quantization_config in config.json), which the "
            "blockwise engine does not read"
        )
    if name not in taken:
        raise Unsupported(
            f"{what}; expected {' or '.join(taken)}, or {_ROUTES.get(name, _UNKNOWN)}"
        )
    config = quantization_config if there is None else there
    _check_kernel(folder, name, config)
    with understood(folder):
        quantizer = AutoHfQuantizer.from_config(config, pre_quantized=there is not None)
        quantizer.validate_environment(device_map={"": "cpu"})
    if getattr(quantizer.quantization_config, "llm_int8_has_fp16_weight", False):
        raise Unsupported(
            f"{folder}: llm_int8_has_fp16_weight keeps weights whole and quantises them in every "
            "forward; expected false"
        )
    settings.quantization_config = quantizer.quantization_config
    return quantizer


def _check_kernel(folder: Path, method: str, config: Any) -> None:
    """GPTQ's and AWQ's others keep more than what files have, or repack it."""
    kernel = KERNELS.get(method)
    if kernel is not None and (given := config.get("backend")) != kernel:
        raise Unsupported(
            f"{folder} has backend {given!r} (quantization_config in config.json), which the "
            f"blockwise engine does not run; expected 'auto', {kernel!r}, or {_IN_MEMORY}"
        )


def begin_packed(folder: Path, model: Any, files: Sequence[Path], dtype: torch.dtype) -> None:
    """The packed weights of a model on the meta device become what they will be, there too.

    By what the files have of them, or by what they will be quantised to from ``dtype``. Raises
    ValueError for parts that the files do not have, or of a weight of another shape.
    """
    packed = {path: module for path, module in model.named_modules() if is_packed(module)}
    if not packed:
        return
    quantizer = model.hf_quantizer
    if not quantizer.pre_quantized:
        for module in packed.values():
            begin_quantised(module, dtype)
        return
    headers: dict[str, Header] = {}
    states: dict[str, Tensor] = {}
    for file in files:
        headers |= headers_of(file)
        with safe_open(str(file), framework="pt") as opened:
            texts = [key for key in opened.keys() if ".quant_state." in key]
            states |= {key: opened.get_tensor(key) for key in texts}
    keys = Names(model, headers).plain
    if hasattr(quantizer, "get_new_dtype"):
        _keep_dtypes(model, keys, headers)
    for path, module in packed.items():
        name = f"{path}.weight"
        if name not in keys:
            raise missing_weight(folder, [name])
        stem = keys[name].removesuffix("weight")
        stored = {
            key.removeprefix(stem): states.get(key, header.meta())
            for key, header in headers.items()
            if key.startswith(stem)
        }
        try:
            shapes = begin_stored(module, stored)
        except KeyError as error:
            raise missing_weight(folder, [f"{path}.{error.args[0]}"]) from error
        check_shapes(folder, ((f"{path}.{part}", there, here) for part, there, here in shapes))


def _keep_dtypes(model: Any, keys: Mapping[str, str], headers: Mapping[str, Header]) -> None:
    """Plain weights of a quantised model are of the files' dtype, whatever that of the model is.

    So transformers has it since it asks its quantizers, and before only where they are the same.
    """
    for name, weight in model.named_parameters():
        if name in keys and name.endswith("weight") and weight.is_floating_point():
            header = headers[keys[name]]
            if header.dtype.is_floating_point:
                weight.data = weight.data.to(header.dtype)
