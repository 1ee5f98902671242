"""What an initialised adapter is: its config, its files, and which half of its factors is frozen.

One that started at B = 0 is PEFT's plain LoRA, and nothing here is about it but its config. The
layers of another hold [A; A0] and [B, −B0] (:mod:`filet.model.factors`), a plain LoRA of rank 2r
over the base as it was, and its config says so. What PEFT saves of it loads in any PEFT;
``filet.json`` beside it says which half is frozen.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils import WEIGHTS_NAME, load_peft_weights
from peft.utils.other import get_pattern_key
from torch import Tensor

from filet.model.factors import OF_ADAPTER, StartedFactor
from filet.model.fingerprint import fingerprints
from filet.model.targets import Target, check_peft_model, find_targets, layers_of
from filet.report.names import FILET_FILE, MARK, WEIGHTS_FILE
from filet.system.files import replaced
from filet.system.tensorfile import write_tensors

__all__ = [
    "FORMAT",
    "FiletLoraConfig",
    "describe",
    "factors_of",
    "key_of",
    "made_by",
    "set_rank",
    "started",
    "starts_of",
]

FORMAT = "filet-adapter-2"  # of FILET_FILE

# Attribute of a FiletLoraConfig: the config that the adapter had before, where that is known.
_GIVEN = "_filet_given"


class FiletLoraConfig(LoraConfig):
    """The config of an adapter with a frozen half, as it is: of rank 2r."""

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        # Of which adapter, only PEFT's save_pretrained knows: others may share this config.
        caller = sys._getframe(1).f_locals
        if isinstance(caller.get("self"), PeftModel):
            _complete(Path(save_directory), caller["self"], caller["adapter_name"])


def set_rank(layer: LoraLayer, adapter: str, rank: int, rslora: bool, undo: list[Any]) -> None:
    """What PEFT knows of a layer's rank, and the alpha by which its scaling stays what it is."""
    alpha = _alpha(layer.scaling[adapter], rank, rslora)
    for known, value in ((layer.r, rank), (layer.lora_alpha, alpha), (layer.use_rslora, rslora)):
        undo.append(partial(known.__setitem__, adapter, known[adapter]))
        known[adapter] = value


def _alpha(scaling: float, rank: int, rslora: bool = False) -> float:
    """That of a scaling. PEFT's are integers: the rounding is dropped where it should be one."""
    # PEFT makes scalings tensors, for a hot swap of a compiled model.
    alpha = float(scaling) * (math.sqrt(rank) if rslora else rank)
    nearest = round(alpha)
    return nearest if math.isclose(alpha, nearest, rel_tol=1e-12) else alpha


def made_by(peft_model: PeftModel, adapter_name: str) -> LoraConfig | None:
    """The config by which PEFT made the adapter, or None where nobody has it any more."""
    config = peft_model.peft_config[adapter_name]
    if not isinstance(config, FiletLoraConfig):
        return config
    given: LoraConfig | None = vars(config).get(_GIVEN)
    return given


def describe(peft_model: PeftModel, adapter_name: str) -> None:
    """Give the adapter a config that says what its layers are.

    Without a frozen half that is the config by which PEFT made it, wherever its ranks and scalings
    still are the layers'; :class:`FiletLoraConfig` remembers it. Any other config has no rslora,
    whose α/√r is another at rank 2r, and says every rank by the layer's full name: a shorter one
    would be taken for all modules whose name ends so. The user's own object stays as it is.
    """
    begun = bool(factors_of(peft_model, adapter_name))
    given = made_by(peft_model, adapter_name)
    if not begun and given is not None and _fits(given, peft_model, adapter_name):
        config = given if given.init_lora_weights is True else copy.deepcopy(given)
    else:
        config = _spelled_out(peft_model, adapter_name)
    if config is not given:
        config.init_lora_weights, config.eva_config = True, None
    if begun:
        config.__class__ = FiletLoraConfig
        config.__dict__ |= {OF_ADAPTER: adapter_name, _GIVEN: given}
    peft_model.peft_config[adapter_name] = config


def _fits(config: LoraConfig, peft_model: PeftModel, adapter_name: str) -> bool:
    """Whether the layers have the ranks and scalings that a config says, read as PEFT reads it."""
    for name, layer in _named_layers(peft_model, adapter_name):
        rank, alpha = (
            pattern.get(get_pattern_key(pattern.keys(), name), common)
            for pattern, common in (
                (config.rank_pattern, config.r),
                (config.alpha_pattern, config.lora_alpha),
            )
        )
        scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        if layer.r[adapter_name] != rank:
            return False
        if not math.isclose(layer.scaling[adapter_name], scaling, rel_tol=1e-12):
            return False
    return True


def _spelled_out(peft_model: PeftModel, adapter_name: str) -> LoraConfig:
    """A copy of the adapter's config with the ranks and scalings that its layers have."""
    config: LoraConfig = copy.deepcopy(peft_model.peft_config[adapter_name])
    for attribute in (OF_ADAPTER, _GIVEN):
        config.__dict__.pop(attribute, None)
    config.__class__ = LoraConfig
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, layer in _named_layers(peft_model, adapter_name):
        rank = ranks[f"^{name}"] = layer.r[adapter_name]
        alphas[f"^{name}"] = _alpha(layer.scaling[adapter_name], rank)
    config.r, config.rank_pattern = _pattern(ranks)
    config.lora_alpha, config.alpha_pattern = _pattern(alphas)
    config.use_rslora = False
    return config


def _named_layers(peft_model: PeftModel, adapter_name: str) -> Iterator[tuple[str, LoraLayer]]:
    """The adapter's layers by the names that patterns of a config are compared with."""
    for name, layer in layers_of(peft_model, adapter_name):
        if isinstance(layer, ParamWrapper):  # several may be nested at one place
            name = f"{name.removesuffix('.base_layer')}.{layer.parameter_name}"
        yield name, layer


def factors_of(
    peft_model: PeftModel, adapter_name: str
) -> dict[str, tuple[StartedFactor, StartedFactor]]:
    """A and B of the adapter's layers that have a start, by the layers' paths."""
    return {
        name: (layer.lora_A[adapter_name], layer.lora_B[adapter_name])
        for name, layer in layers_of(peft_model, adapter_name)
        if adapter_name in layer.lora_A and isinstance(layer.lora_A[adapter_name], StartedFactor)
    }


def _pattern(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most common value, and the modules that differ from it."""
    found = list(values.values())
    common = max(set(found), key=found.count)
    return common, {name: value for name, value in values.items() if value != common}


def started(peft_model: PeftModel, adapter_name: str) -> dict[str, Target]:
    """The layers that have a frozen half, an error where there is none."""
    check_peft_model(peft_model, adapter_name)
    targets, _ = find_targets(peft_model, adapter_name, loaded=False)
    found = {name: targets[name] for name in factors_of(peft_model, adapter_name)}
    if not found:
        others = [n for n, c in peft_model.peft_config.items() if isinstance(c, FiletLoraConfig)]
        raise ValueError(
            f"adapter {adapter_name!r} has no frozen half, so there is no residual to write; "
            f"expected one that FILet initialised with start='untouched', of {others}"
        )
    return found


def _complete(folder: Path, peft_model: PeftModel, adapter_name: str) -> None:
    """Write which half of an adapter is frozen beside what PEFT has just saved of it.

    The frozen halves themselves too, where its weights were gathered from ``named_parameters``, as
    many training scripts do. Weights of another rank are no longer this adapter: PEFT can save its
    difference to another one.
    """
    factors = factors_of(peft_model, adapter_name)
    tensors = load_peft_weights(str(folder), device="cpu") if factors else {}
    halves = {
        key_of(name, side): factor
        for name, pair in factors.items()
        for side, factor in zip("AB", pair, strict=True)
    }
    lacking = [k for k, f in halves.items() if k in tensors and tensors[k].shape == f.start.shape]
    for key in lacking:
        start = halves[key].start.to("cpu", tensors[key].dtype)
        tensors[key] = torch.cat([tensors[key], start], halves[key].dim)
    whole = {key: (factor.out_features, factor.in_features) for key, factor in halves.items()}
    there = {key: tuple(tensor.shape) for key, tensor in tensors.items() if key in whole}
    if not factors or there != whole:
        (folder / FILET_FILE).unlink(missing_ok=True)
        return
    if (folder / WEIGHTS_FILE).exists():
        write_tensors(folder / WEIGHTS_FILE, tensors, {"format": "pt", MARK: FORMAT})
    elif lacking:
        torch.save(tensors, folder / WEIGHTS_NAME)
    layers = {
        name: {"rank": A.rank, "weight": A.base, **starts_of(tensors, name, A.rank)}
        for name, (A, _) in factors.items()
    }
    with replaced(folder / FILET_FILE) as beside:
        beside.write_text(json.dumps({"format": FORMAT, "layers": layers}, indent=1))


def key_of(name: str, side: str) -> str:
    """Of a factor in a file of PEFT's."""
    return f"base_model.model.{name}.lora_{side}.weight"


def starts_of(tensors: Mapping[str, Tensor], name: str, rank: int) -> dict[str, str]:
    """Fingerprints of the frozen halves of a layer's factors."""
    A, B = tensors[key_of(name, "A")], tensors[key_of(name, "B")]
    return fingerprints({"A0": A[rank:], "B0": B[:, rank:]})
