"""Which models in folders the blockwise engine takes, and when it is the one to take."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal

import torch
from peft import LoraConfig
from safetensors import safe_open
from transformers.utils.quantization_config import QuantizationConfigMixin

from filet.blockwise.division import size_of
from filet.blockwise.quantised import Unsupported, begin_packed, quantizer_of
from filet.config import FiletConfig, checked_config
from filet.distributed.group import current
from filet.model.checkpoint import check_codes, entries, shard_files, understood
from filet.model.folder import outline, settings_of
from filet.model.gptq import KERNELS, method_of
from filet.model.inputs import check_dataloader
from filet.model.packed import check_tied
from filet.model.targets import adapted, check_init, find_targets
from filet.model.tasks import CAUSAL, SEEING
from filet.system.files import check_place, index_of, inside
from filet.system.memory import available, available_on_host

__all__ = [
    "ADAPTER",
    "Engine",
    "check_alone",
    "checked_folder_arguments",
    "choose_engine",
    "empty_model",
    "scratch_folder",
]

Engine = Literal["auto", "memory", "blockwise"]
ADAPTER = "default"


def checked_folder_arguments(
    model: Path,
    batches: Any,
    output: Path,
    lora_config: Any,
    config: FiletConfig | None,
    engine: str,
    device: torch.device | str | None,
    host_memory: int | None,
    overwrite: bool,
    save_statistics: Path | None,
    quantization_config: Any,
    task: str,
) -> tuple[FiletConfig, torch.device]:
    """The config and device that :func:`filet.initialize_folder` is to take.

    ValueError or TypeError for an argument of it that does not fit.
    """
    config = checked_config(config)
    check_dataloader(batches, "batches")
    if task not in (CAUSAL, SEEING):
        raise ValueError(f"task={task!r}; expected {CAUSAL!r} or {SEEING!r}")
    if engine not in ("auto", "memory", "blockwise"):
        raise ValueError(f"engine={engine!r}; expected 'auto', 'memory' or 'blockwise'")
    if not isinstance(lora_config, LoraConfig):
        raise TypeError(f"lora_config is a {type(lora_config).__name__}; expected a LoraConfig")
    check_init(lora_config)
    if not isinstance(quantization_config, (QuantizationConfigMixin, Mapping, NoneType)):
        raise TypeError(
            f"quantization_config={quantization_config!r}; expected transformers' "
            "BitsAndBytesConfig(...), or None"
        )
    if host_memory is not None and host_memory < 1:
        raise ValueError(f"host_memory={host_memory}; expected a positive number of bytes")
    _check_output(output, overwrite)
    if save_statistics is not None:
        _check_file(save_statistics, model, output, overwrite)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    return config, torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _check_output(output: Path, overwrite: bool) -> None:
    check_place(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        if not overwrite:
            raise ValueError(f"output={str(output)!r} exists; expected overwrite=True to replace")
        if not (output / "adapter_config.json").is_file():
            raise ValueError(
                f"output={str(output)!r} holds no adapter; overwrite=True replaces only adapters"
            )


def _check_file(path: Path, model: Path, output: Path, overwrite: bool) -> None:
    given = f"save_statistics={str(path)!r}"
    check_place(path)
    if path.is_dir() or inside(path, output):
        raise ValueError(f"{given} is a folder, or lies in output; expected a file beside it")
    exists = path.exists() or index_of(path).exists()
    if exists and not overwrite:
        raise ValueError(f"{given} exists; expected overwrite=True to replace it")
    if exists and inside(path, model):
        raise ValueError(f"{given} is a file of the model; expected one outside {model}")


def scratch_folder(scratch: str | os.PathLike[str], run_folder: Path) -> Path:
    """The folder inside ``scratch`` that belongs to a run folder.

    One name for one run folder, which is locked: what a killed run has left there is replaced, and
    nothing of another one.
    """
    name = hashlib.blake2b(str(run_folder.resolve()).encode(), digest_size=6).hexdigest()
    return Path(scratch) / f"filet-scratch-{name}"


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


def empty_model(
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | Literal["auto"] = "auto",
    trust_remote_code: bool = False,
    quantization_config: Any = None,
    task: str = CAUSAL,
) -> Any:
    """The language model of a folder without its weights: parameters on the meta device.

    ``task``: what it is for, text alone or images too. Buffers are real (rotary frequencies, say).
    Packed weights say what they consist of; with ``quantization_config``, transformers', weights
    that are to be quantised as well.
    Raises :class:`Unsupported` for what the blockwise engine does not take, as far as config.json
    and the names of the files say it, and ValueError for what no engine does
    (:func:`filet.model.folder.settings_of`).
    """
    folder = Path(folder)
    settings = settings_of(folder, trust_remote_code=trust_remote_code, task=task)
    quantizer = quantizer_of(folder, settings, quantization_config)
    try:
        files = shard_files(folder)
    except FileNotFoundError as error:
        raise Unsupported(str(error)) from error
    if quantizer is not None and method_of(quantizer.quantization_config) in KERNELS:
        check_codes(folder)
    if dtype == "auto":
        with understood(folder):
            dtype = getattr(settings, "dtype", None) or _dtype_of(files)
    given: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if quantizer is not None:
        given = quantizer.update_dtype(given)
    with understood(folder):
        how: Any = {"trust_remote_code": trust_remote_code, "task": task}
        model = outline(settings, given, quantizer=quantizer, **how)
        check_tied(model)
        begin_packed(folder, model, files, given)
    return model


def _dtype_of(files: Sequence[Path]) -> torch.dtype:
    """That of the first floating weight, as transformers has it; where all are quantised, any."""
    for path in files:
        with safe_open(str(path), framework="pt") as file:
            for key in file.keys():
                dtype: torch.dtype = file.get_slice(key)[:0].dtype
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
    quantization_config: Any = None,
    keep: bool = False,
    task: str = CAUSAL,
) -> Literal["memory", "blockwise"]:
    """What "auto" is: "blockwise" where weights and second moments take more than 3/4 of a device.

    Of its free memory, that is; the rest is for activations. ``keep``: the inputs of the targets
    have a moment of data to keep as well. A kind of model that the blockwise
    engine does not take is "memory" in any case. Of several processes all take "blockwise" where
    one has to: collective.
    """
    try:
        model = empty_model(
            folder,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            quantization_config=quantization_config,
            task=task,
        )
    except Unsupported:
        return "memory"
    group = current()
    fits = _fits(model, lora_config, device, keep)
    everywhere = fits if group is None else all(group.exchanged(fits))
    return "memory" if everywhere else "blockwise"


def _fits(model: Any, lora_config: LoraConfig, device: torch.device, keep: bool) -> bool:
    """Whether weights and second moments leave the device a quarter of its free memory."""
    weights = size_of(entries(model))
    peft_model = adapted(model, lora_config)
    targets, _ = find_targets(peft_model, ADAPTER, loaded=False)
    moments = sum((3 if keep else 2) * 4 * min(target.shape) ** 2 for target in targets.values())
    free = available(device) if device.type == "cuda" else available_on_host()
    return weights + moments <= 0.75 * free
