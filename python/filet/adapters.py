"""The state of an initialised model, and its ways to disk and back.

With A0, B0 the factors at the start and s the layer's scaling, the trained model computes
    (W − s B0 A0) x + s B A x = W x + s [B, −B0] [A; A0] x,
the right-hand side being a plain LoRA of rank 2r on the *original* base. That form is what is
saved: it loads in plain PEFT, and splits back into A, B and A0, B0.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from filet.config import Base, FiletConfig
from filet.files import replaced
from filet.targets import (
    Target,
    check_fingerprint,
    check_peft_model,
    check_targets,
    find_targets,
    fingerprints,
)
from filet.transfer import background_copies, values
from filet_kernels import residual_weight_

__all__ = [
    "AdapterState",
    "FiletCallback",
    "Layer",
    "adapter_states",
    "assign",
    "commit",
    "load",
    "restore_base",
    "save_as_lora",
    "twin_name",
    "write_residual",
]

_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_FILET = "filet.json"
_FORMAT = "filet-adapter-1"
_FACTORS = ("lora_A", "lora_B")
_SCALE = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
_TWIN = "_filet_twin"
# Attribute of an adapter's config: the output folder whose checkpoints FiletCallback converts.
_CONVERTED = "_filet_converted_checkpoints"


@dataclass(eq=False)
class Layer:
    """One initialised layer: its factors at the start, and in residual mode the weight before."""

    A0: Tensor  # (r, n), as the adapter stores it
    B0: Tensor  # (m, r)
    fingerprint: str  # of the original base weight
    original: Tensor | None = None  # the base weight as it was, on the host


@dataclass(eq=False)
class AdapterState:
    """What FILet keeps of an adapter that it initialised, as an attribute of the PeftModel."""

    base: str  # "residual" | "untouched"
    layers: dict[str, Layer] = field(default_factory=dict)
    handles: list[Any] = field(default_factory=list)  # of the hooks that accept the plain form


def adapter_states(peft_model: PeftModel) -> dict[str, AdapterState]:
    """Adapter name → state, of the adapters that FILet initialised."""
    states: dict[str, AdapterState] = peft_model.__dict__.setdefault("_filet_states", {})
    return states


def twin_name(adapter_name: str) -> str:
    """The frozen adapter (A0, −B0) that stands beside ``adapter_name`` in untouched mode."""
    return adapter_name + _TWIN


class _FiletLoraConfig(LoraConfig):
    """The adapter's config while the model is FILet's: a raw save of it says what to call."""

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        folder = Path(save_directory)
        converted = self.__dict__.get(_CONVERTED)
        if converted is None or not any(
            place.parent == Path(converted) and place.name.startswith("checkpoint-")
            for place in (folder, folder.parent)
        ):
            warnings.warn(
                f"save_pretrained({str(save_directory)!r}) saves the bare A and B of an adapter "
                "that FILet initialised: on the original base model they reload as another "
                "function. Call filet.save_as_lora(peft_model, folder) instead (or give the "
                "Trainer a filet.FiletCallback()); it writes a plain LoRA that reloads exactly",
                UserWarning,
                stacklevel=3,
            )
        super().save_pretrained(save_directory, **kwargs)


class _TwinLoraModel(LoraModel):
    """PEFT's model of LoRA layers, in which an adapter is active together with its twin."""

    def set_adapter(self, adapter_name: str | list[str], *args: Any, **kwargs: Any) -> None:
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        twins = [twin_name(name) for name in names]
        names += [twin for twin in twins if twin in self.peft_config and twin not in names]
        super().set_adapter(names, *args, **kwargs)


# Writing an initialisation into the model.


def originals(
    targets: dict[str, Target], base: str
) -> contextlib.AbstractContextManager[Callable[[str], Tensor]]:
    """Copies of the base weights, in the background: what :func:`commit` asks for.

    Into fresh memory that takes longer than anything else of writing, and hides behind the pass.
    """
    residual = base == "residual"
    return background_copies({n: t.parameter for n, t in targets.items()} if residual else {})


def commit(
    peft_model: PeftModel,
    adapter_name: str,
    targets: dict[str, Target],
    layers: dict[str, Layer],
    base: str,
    original: Callable[[str], Tensor],
) -> dict[str, float]:
    """Write A0, B0 and the base mode into the model: all of it, or on an exception none.

    ``original(name)`` is a copy of a layer's base weight on the CPU, asked for in residual mode.
    Returns each layer's largest |W_res + s B A − W| over (unit roundoff of W's dtype · max|W|);
    0 in untouched mode.
    """
    previous = adapter_states(peft_model).get(adapter_name)
    twin_before = previous.layers if previous is not None and previous.base == "untouched" else None
    twin = layers if base == "untouched" else None
    undo: list[Any] = []
    errors: dict[str, Tensor] = {}
    try:
        for name, layer in layers.items():
            target = targets[name]
            assign(target.A, layer.A0, undo)
            assign(target.B, layer.B0, undo)
            if base == "residual":
                layer.original = original(name)
                undo.append(partial(target.parameter.data.copy_, layer.original))
                errors[name] = write_residual(target.weight, layer, target.scaling)
        if twin_before is not None or twin is not None:
            undo.append(partial(_set_twin, peft_model, adapter_name, targets, twin_before))
            _set_twin(peft_model, adapter_name, targets, twin)
    except BaseException:
        for action in reversed(undo):
            action()
        raise
    state = AdapterState(base, layers)
    for handle in previous.handles if previous is not None else ():
        handle.remove()
    for name, layer in layers.items():
        hook = partial(_split_plain_form, adapter_name=adapter_name, layer=layer)
        state.handles.append(targets[name].layer.register_load_state_dict_pre_hook(hook))
    adapter_states(peft_model)[adapter_name] = state
    peft_model.peft_config[adapter_name].__class__ = _FiletLoraConfig
    return dict.fromkeys(layers, 0.0) | dict(
        zip(errors, values(list(errors.values())), strict=True)
    )


def write_residual(weight: Tensor, layer: Layer, scale: float) -> Tensor:
    """W ← W_res in place; returns the error in units of W's rounding, without waiting for it."""
    largest = torch.linalg.vector_norm(weight, torch.inf)  # before it is overwritten
    difference = residual_weight_(weight, layer.A0, layer.B0, scale)
    unit = torch.finfo(weight.dtype).eps / 2 * largest.to(difference.dtype)
    return torch.where(unit > 0, difference / unit, 0)


def assign(module: nn.Linear, factor: Tensor, undo: list[Any]) -> None:
    """Put a factor into A or B, a bias to 0, and on ``undo`` what reverts it."""
    values = {"weight": factor}
    if module.bias is not None:
        values["bias"] = torch.zeros_like(module.bias, device=factor.device)
    for key, value in values.items():
        old = getattr(module, key)
        if old.device.type == "meta":
            undo.append(partial(setattr, module, key, old))
            setattr(module, key, nn.Parameter(value.clone(), requires_grad=old.requires_grad))
        else:
            undo.append(partial(old.data.copy_, old.detach().clone()))
            old.data.copy_(value)


def _set_twin(
    peft_model: PeftModel,
    adapter_name: str,
    targets: dict[str, Target],
    layers: dict[str, Layer] | None,
) -> None:
    """Put the frozen adapter (A0, −B0) of these layers beside the trained one; None: remove it."""
    twin = twin_name(adapter_name)
    config = peft_model.peft_config[adapter_name]
    flags = {parameter: parameter.requires_grad for parameter in peft_model.parameters()}
    active = [name for name in peft_model.active_adapters if name != twin]
    try:
        # PEFT's delete_adapter would not know a twin that an exception left half added.
        peft_model.peft_config.pop(twin, None)
        peft_model.base_model.set_adapter(active)
        for module in peft_model.modules():
            if isinstance(module, LoraLayer):
                module.delete_adapter(twin)
        if layers is None:
            return
        peft_model.base_model.__class__ = _TwinLoraModel
        twin_config = LoraConfig(
            **{key: copy.copy(getattr(config, key)) for key in _SCALE},
            fan_in_fan_out=config.fan_in_fan_out,
            target_modules="|".join(re.escape(name) for name in layers),  # these and no others
        )
        with torch.random.fork_rng(devices=[]):  # what add_adapter draws is overwritten
            # A classification model's own add_adapter would give the twin a classifier.
            PeftModel.add_adapter(peft_model, twin, twin_config)
        for name, layer in layers.items():
            lora_layer = targets[name].layer
            lora_layer.scaling[twin] = targets[name].scaling
            for key, factor in zip(_FACTORS, (layer.A0, -layer.B0), strict=True):
                linear = getattr(lora_layer, key)[twin]
                weight = factor.detach().to(linear.weight.device, copy=True)
                # As a buffer it stays frozen whatever set_adapter or enable_adapters switch on,
                # and no optimiser sees it.
                del linear.weight
                linear.register_buffer("weight", weight)
        peft_model.base_model.set_adapter(active)
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def _state(peft_model: PeftModel, adapter_name: str) -> AdapterState:
    check_peft_model(peft_model, adapter_name)
    states = adapter_states(peft_model)
    if adapter_name not in states:
        raise ValueError(
            f"adapter {adapter_name!r} was not initialised by FILet in this process; expected one "
            f"of {list(states)}"
        )
    return states[adapter_name]


def restore_base(peft_model: PeftModel, adapter_name: str = "default") -> None:
    """Put the original base weights back, bitwise, and keep the model's function.

    The adapter goes over to the "untouched" mode: a frozen adapter (A0, −B0) beside the trained
    one takes the place of what the residual had subtracted. Training can go on, and
    ``disable_adapter()`` is the original model. Nothing happens to an adapter that is in that mode.
    Where the model's dtype was changed since, the weights are the original ones in the new dtype.

    Raises ValueError for an adapter that FILet did not initialise, or a merged one.
    """
    state = _state(peft_model, adapter_name)
    if state.base == "untouched":
        return
    targets, unsupported = find_targets(peft_model, adapter_name)
    check_targets(targets, unsupported, adapter_name)
    undo: list[Any] = []
    try:
        for name, layer in state.layers.items():
            weight = targets[name].parameter.data
            undo.append(partial(weight.copy_, weight.to("cpu", copy=True)))
            assert layer.original is not None  # residual mode keeps it
            weight.copy_(layer.original)
        undo.append(partial(_set_twin, peft_model, adapter_name, targets, None))
        _set_twin(peft_model, adapter_name, targets, state.layers)
    except BaseException:
        for action in reversed(undo):
            action()
        raise
    state.base = "untouched"
    for layer in state.layers.values():
        layer.original = None


# To disk and back.


def save_as_lora(
    peft_model: PeftModel, folder: str | os.PathLike[str], adapter_name: str = "default"
) -> None:
    """Save the adapter as a plain LoRA for the *original* base model.

    Writes ``adapter_model.safetensors`` and ``adapter_config.json`` of rank 2r,
        A' = [A; A0],  B' = [B, −B0],  alpha' = 2r s,
    so A and B are stored to the bit. The config has no rslora, whose scaling would not be the same
    at rank 2r: alpha is fractional where rslora's s = alpha / sqrt(r) is. Loads in plain PEFT
    without this package. ``filet.json`` beside them lets :func:`load` go on training at rank r.
    Layers that FILet did not initialise, ``modules_to_save`` and biases are saved as PEFT saves
    them.

    The files are replaced together, once all are written. Raises ValueError for an adapter that
    FILet did not initialise.
    """
    state = _state(peft_model, adapter_name)
    config: LoraConfig = peft_model.peft_config[adapter_name]
    prefix = "base_model.model."
    tensors: dict[str, Tensor] = {
        key: value.detach().cpu()
        for key, value in get_peft_model_state_dict(peft_model, adapter_name=adapter_name).items()
        if _TWIN not in key  # older PEFT takes whatever has the adapter's name in its own
    }
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    model = peft_model.base_model.model
    for name, lora_layer in model.named_modules():
        if not isinstance(lora_layer, LoraLayer) or adapter_name not in lora_layer.r:
            continue
        rank, scaling = lora_layer.r[adapter_name], lora_layer.scaling[adapter_name]
        layer = state.layers.get(name)
        if layer is not None:
            key_a, key_b = (f"{prefix}{name}.{factor}.weight" for factor in _FACTORS)
            A, B = tensors[key_a], tensors[key_b]
            tensors[key_a] = torch.cat([A, layer.A0.to(A)])
            tensors[key_b] = torch.cat([B, -layer.B0.to(B)], dim=1)
            rank *= 2
        ranks[f"^{name}"] = rank  # without ^ PEFT takes every module whose name ends so
        alphas[f"^{name}"] = _whole(scaling * rank)
    plain = copy.deepcopy(config)
    plain.__class__ = LoraConfig
    plain.r, plain.rank_pattern = _pattern(ranks)
    plain.lora_alpha, plain.alpha_pattern = _pattern(alphas)
    plain.use_rslora, plain.init_lora_weights, plain.inference_mode = False, True, True
    if not plain.base_model_name_or_path:  # "" for a model that was made from a config
        plain.base_model_name_or_path = getattr(model, "name_or_path", None) or None
    description = {
        "format": _FORMAT,
        "base": state.base,
        "adapter": {key: getattr(config, key) for key in _SCALE},
        "weights": {name: layer.fingerprint for name, layer in state.layers.items()},
    }
    distinct = {key: value.contiguous().clone() for key, value in tensors.items()}
    folder = Path(folder)
    with (
        replaced(folder / _WEIGHTS) as weights,
        replaced(folder / _FILET) as filet,
        replaced(folder / _CONFIG) as plain_config,
    ):
        save_file(distinct, weights, metadata={"format": "pt"})
        filet.write_text(json.dumps(description, indent=1))
        plain_config.write_text(
            json.dumps(_config_dict(peft_model, plain), indent=2, sort_keys=True)
        )


def _config_dict(peft_model: PeftModel, config: LoraConfig) -> dict[str, Any]:
    """The adapter config as PEFT writes it."""
    values = config.to_dict()
    if config.task_type is None:
        base_class = type(peft_model.base_model.model)
        values["auto_mapping"] = {
            "base_model_class": base_class.__name__,
            "parent_library": base_class.__module__,
        }
    return {
        key: sorted(value) if isinstance(value, set) else value for key, value in values.items()
    }


def _pattern(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most common value, and the modules that differ from it."""
    found = list(values.values())
    common = max(set(found), key=found.count)
    return common, {name: value for name, value in values.items() if value != common}


def _whole(alpha: float) -> float:
    """PEFT's alphas are integers: drop the rounding of s · r where it should be one."""
    nearest = round(alpha)
    return nearest if math.isclose(alpha, nearest, rel_tol=1e-12) else alpha


def _split_plain_form(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    *_: Any,
    adapter_name: str,
    layer: Layer,
) -> None:
    """Let an initialised layer load its plain form: keep A and B of it, check A0 and B0.

    This is how a checkpoint that :class:`FiletCallback` wrote goes back into the model whose
    training is resumed, and how :func:`load` fills A and B.
    """
    key_a, key_b = (f"{prefix}{factor}.{adapter_name}.weight" for factor in _FACTORS)
    A, B = state_dict.get(key_a), state_dict.get(key_b)
    rank = layer.A0.shape[0]
    if A is None or B is None or A.shape[0] != 2 * rank:
        return
    A0, B0 = layer.A0.to(A), layer.B0.to(B)
    if not (torch.equal(A[rank:], A0) and torch.equal(B[:, rank:], -B0)):
        raise RuntimeError(
            f"{prefix.removesuffix('.')}: the checkpoint was made from another initialisation than "
            "this model's (A0, B0 differ); expected the same one: load the checkpoint with "
            "filet.load(base_model, folder) instead of initialising again"
        )
    state_dict[key_a], state_dict[key_b] = A[:rank], B[:, :rank]


def load(
    base_model: nn.Module,
    folder: str | os.PathLike[str],
    base: Base | None = None,
    adapter_name: str = "default",
) -> PeftModel:
    """Load what :func:`save_as_lora` wrote, ready to go on training at rank r.

    Args:
        base_model: the original base model, with the very weights the adapter was made for. In
            residual mode W_res is written into it.
        folder: what :func:`save_as_lora` or a :class:`FiletCallback` checkpoint wrote.
        base: "residual" or "untouched", see :class:`FiletConfig`; as it was saved by default.
        adapter_name: the adapter's name in the new model.

    Returns:
        A PeftModel like the saved one. For inference alone, plain PEFT loads the folder as well.

    Raises:
        ValueError: no such adapter in the folder, or a base model of other weights (the first
            module that differs is named); ``base_model`` is then as it was.
    """
    folder = Path(folder)
    try:
        description = json.loads((folder / _FILET).read_text())
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder} has no {_FILET}; expected a folder that filet.save_as_lora wrote"
        ) from error
    if description.get("format") != _FORMAT:
        raise ValueError(
            f"{folder / _FILET}: format {description.get('format')!r}; expected {_FORMAT!r}"
        )
    base = FiletConfig(base=base or description["base"]).base
    config = LoraConfig.from_pretrained(str(folder))
    for key, value in description["adapter"].items():
        setattr(config, key, value)
    config.inference_mode = False
    tensors = load_file(folder / _WEIGHTS)
    half = any(value.dtype in (torch.float16, torch.bfloat16) for value in tensors.values())
    flags = {parameter: parameter.requires_grad for parameter in base_model.parameters()}
    peft_model = get_peft_model(
        base_model, config, adapter_name=adapter_name, autocast_adapter_dtype=not half
    )
    try:
        targets, _ = find_targets(peft_model, adapter_name)
        layers = {}
        for name in description["weights"]:
            if name not in targets:
                raise ValueError(
                    f"the base model has no linear module {name!r}, which {folder} has"
                )
        found = fingerprints({name: targets[name].weight for name in description["weights"]})
        for name, expected in description["weights"].items():
            target = targets[name]
            check_fingerprint(name, found[name], expected, f"{folder} belongs")
            A, B = (tensors[f"base_model.model.{name}.{key}.weight"] for key in _FACTORS)
            layers[name] = Layer(
                A[target.rank :].to(target.A.weight),
                -B[:, target.rank :].to(target.B.weight),
                expected,
            )
        with originals(targets, base) as original:
            commit(peft_model, adapter_name, targets, layers, base, original)
        loaded = set_peft_model_state_dict(peft_model, tensors, adapter_name=adapter_name)
        if loaded.unexpected_keys:
            raise ValueError(
                f"the base model has no place for {loaded.unexpected_keys[0]!r}, which {folder} has"
            )
    except BaseException:
        state = adapter_states(peft_model).get(adapter_name)
        if state is not None:
            restore_base(peft_model, adapter_name)
        peft_model.unload()
        base_model.__dict__.pop("peft_config", None)  # PEFT's, which unload leaves
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        raise
    return peft_model


class FiletCallback(TrainerCallback):
    """Makes the checkpoints of a transformers ``Trainer`` reload as the model that was trained.

    Each checkpoint's adapter is replaced by its plain LoRA form (:func:`save_as_lora`). So
    ``PeftModel.from_pretrained(base_model, checkpoint)`` is right on the original base,
    ``filet.load(base_model, checkpoint)`` goes on at rank r, and ``resume_from_checkpoint`` and
    ``load_best_model_at_end`` work: an initialised model takes its plain form and splits it.

    What transformers itself does not do stays undone: it loads the best model of an adapter named
    "default" only, and pushes a checkpoint to the Hub before any callback, so as PEFT saved it.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        peft_model = kwargs["model"]
        for name in adapter_states(peft_model):
            peft_model.peft_config[name].__dict__[_CONVERTED] = args.output_dir

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        peft_model = kwargs["model"]
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not state.is_world_process_zero or not checkpoint.is_dir():
            return
        for name in adapter_states(peft_model):
            # Where PEFT put it: "default" in the folder itself, others below it.
            save_as_lora(peft_model, checkpoint if name == "default" else checkpoint / name, name)
            shutil.rmtree(checkpoint / twin_name(name), ignore_errors=True)
