"""An initialised adapter: how it is written into the model, and its ways to disk and back.

Its layers hold [A; A0] and [B, −B0] (:mod:`filet.factors`), a plain LoRA of rank 2r over the base
as it was, and its config says so. What PEFT saves of it loads in any PEFT; ``filet.json`` beside it
says which half is frozen, so that :func:`load` goes on training at rank r.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils import WEIGHTS_NAME, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from filet.factors import OF_ADAPTER, StartedFactor, StartedLinear
from filet.files import replaced, replaced_together
from filet.targets import (
    Target,
    check_fingerprint,
    check_peft_model,
    check_unmerged,
    find_targets,
    fingerprints,
    layers_of,
    weight_of,
)
from filet_kernels import residual_weight_

__all__ = ["Layer", "commit", "load", "save_as_lora", "write_residual"]

_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_FILET = "filet.json"
_FORMAT = "filet-adapter-2"


@dataclass(eq=False)
class Layer:
    """What was chosen for a layer: its factors, in the dtype in which the adapter stores them."""

    A0: Tensor  # (r, n)
    B0: Tensor  # (m, r)
    fingerprint: str  # of the base weight


class FiletLoraConfig(LoraConfig):
    """The config of an adapter that FILet initialised, as it is: of rank 2r, half of it frozen."""

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        # Of which adapter, only PEFT's save_pretrained knows: others may share this config.
        caller = sys._getframe(1).f_locals
        if isinstance(caller.get("self"), PeftModel):
            _complete(Path(save_directory), caller["self"], caller["adapter_name"])


# Writing an initialisation into the model.


def commit(
    peft_model: PeftModel,
    adapter_name: str,
    targets: Mapping[str, Target],
    layers: Mapping[str, Layer],
) -> None:
    """Start the adapter at A0, B0 in these layers: in all of them, or on an exception in none."""
    configs = peft_model.peft_config
    undo: list[Any] = [partial(configs.__setitem__, adapter_name, configs[adapter_name])]
    try:
        for name, layer in layers.items():
            _start(targets[name], layer, undo)
        _describe(peft_model, adapter_name)
    except BaseException:
        for action in reversed(undo):
            action()
        raise


def _start(target: Target, layer: Layer, undo: list[Any]) -> None:
    """Put the factors of a layer into its A and B; on ``undo`` what reverts it."""
    place, adapter, scaling = target.layer, target.adapter, target.scaling
    for linear, value, dim in ((target.A, layer.A0, 0), (target.B, layer.B0, 1)):
        _write(linear, "weight", value, undo)
        if linear.bias is not None:
            _write(linear, "bias", torch.zeros_like(linear.bias, device=value.device), undo)
        if isinstance(linear, StartedFactor):
            undo.append(partial(StartedFactor.begin, linear, linear.start, dim, linear.base))
        else:
            undo.append(partial(StartedFactor.end, linear))
        StartedFactor.begin(linear, value if dim == 0 else -value, dim, layer.fingerprint)
    undo.append(partial(setattr, place, "__class__", type(place)))
    place.__class__ = StartedLinear
    rank = 2 * target.rank
    _set_rank(place, adapter, rank, _whole(scaling * rank), False, undo)


def _write(linear: nn.Linear, name: str, value: Tensor, undo: list[Any]) -> None:
    parameter = linear._parameters[name]
    assert parameter is not None
    if parameter.device.type == "meta":
        undo.append(partial(linear._parameters.__setitem__, name, parameter))
        written = nn.Parameter(value.clone(), requires_grad=parameter.requires_grad)
        linear._parameters[name] = written
    else:
        undo.append(partial(parameter.data.copy_, parameter.detach().clone()))
        parameter.data.copy_(value)


def _set_rank(
    layer: LoraLayer, adapter: str, rank: int, alpha: float, rslora: bool, undo: list[Any]
) -> None:
    """What PEFT knows of a layer's rank. Its scaling stays what it is."""
    for known, value in ((layer.r, rank), (layer.lora_alpha, alpha), (layer.use_rslora, rslora)):
        undo.append(partial(known.__setitem__, adapter, known[adapter]))
        known[adapter] = value


def _whole(alpha: float) -> float:
    """PEFT's alphas are integers: drop the rounding of s · r where it should be one."""
    alpha = float(alpha)  # PEFT makes scalings tensors, for a hot swap of a compiled model
    nearest = round(alpha)
    return nearest if math.isclose(alpha, nearest, rel_tol=1e-12) else alpha


def _describe(peft_model: PeftModel, adapter_name: str) -> None:
    """Give the adapter a config that says what its layers are.

    The config has no rslora, whose α/√r is another at rank 2r, and says every rank by the layer's
    full name: a shorter one would be taken for all modules whose name ends so. The user's own
    object stays as it is.
    """
    config = copy.deepcopy(peft_model.peft_config[adapter_name])
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, layer in layers_of(peft_model, adapter_name):
        if isinstance(layer, ParamWrapper):  # several may be nested at one place
            name = f"{name.removesuffix('.base_layer')}.{layer.parameter_name}"
        rank = ranks[f"^{name}"] = layer.r[adapter_name]
        alphas[f"^{name}"] = _whole(layer.scaling[adapter_name] * rank)
    config.r, config.rank_pattern = _pattern(ranks)
    config.lora_alpha, config.alpha_pattern = _pattern(alphas)
    config.use_rslora, config.init_lora_weights, config.eva_config = False, True, None
    config.__dict__.pop(OF_ADAPTER, None)
    config.__class__ = LoraConfig
    if _factors(peft_model, adapter_name):
        config.__class__ = FiletLoraConfig
        config.__dict__[OF_ADAPTER] = adapter_name
    peft_model.peft_config[adapter_name] = config


def _factors(
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


def _started(peft_model: PeftModel, adapter_name: str) -> dict[str, Target]:
    """The layers that hold a start, an error where there is none."""
    check_peft_model(peft_model, adapter_name)
    targets, _ = find_targets(peft_model, adapter_name, loaded=False)
    found = {name: targets[name] for name in _factors(peft_model, adapter_name)}
    if not found:
        raise ValueError(
            f"adapter {adapter_name!r} is not one that FILet initialised; expected one of "
            f"{[n for n, c in peft_model.peft_config.items() if isinstance(c, FiletLoraConfig)]}"
        )
    return found


def write_residual(peft_model: PeftModel, adapter_name: str = "default") -> None:
    """W ← W_res = W − s B0 A0, as the paper has it: a one-way conversion, in place.

    The adapter goes on as an ordinary LoRA of rank r, A and B as they are (the same parameters), on
    a base that is another model from now on: save that too (``base_model.save_pretrained``), for
    the adapter belongs to no other. FILet keeps nothing of it, and no original weights. It saves
    the frozen half's products in training, 0.6% to 4.3% of a step (docs/adapters.md).

    W_res is computed in float32 (float64 unless W has 16 bits) and rounded once to W's dtype, by
    which the model's function moves. The names by which model and adapter know where their weights
    came from are cleared.

    Raises ValueError, with the model as it was, for an adapter that FILet did not initialise or
    that is merged, for a weight that another module uses too, and for a layer on which another
    adapter sits: their functions would change with W. On another exception (no memory, say) the
    layers that are done are done, each with its function; the same call goes on.
    """
    targets = _started(peft_model, adapter_name)
    check_unmerged(targets)
    _check_sole_user(peft_model, targets, adapter_name)
    model = peft_model.base_model.model
    try:
        for target in targets.values():
            A, B = target.A, target.B
            assert isinstance(A, StartedFactor) and isinstance(B, StartedFactor)
            rank, scaling = target.rank, target.scaling
            dtype = target.dtype
            residual_weight_(target.weight, A.start.to(dtype), -B.start.to(dtype), scaling)
            StartedFactor.end(A)
            StartedFactor.end(B)
            if not any(isinstance(x, StartedFactor) for x in target.layer.lora_A.values()):
                target.layer.__class__ = lora.Linear
            _set_rank(target.layer, adapter_name, rank, _whole(scaling * rank), False, [])
    finally:
        _describe(peft_model, adapter_name)
        peft_model.peft_config[adapter_name].base_model_name_or_path = None
        if hasattr(model, "name_or_path"):
            model.name_or_path = ""


def _check_sole_user(peft_model: PeftModel, targets: dict[str, Target], adapter_name: str) -> None:
    names: dict[int, list[str]] = {}
    for name, parameter in peft_model.base_model.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name, target in targets.items():
        used_by = names[id(target.parameter)]
        if len(used_by) > 1:
            raise ValueError(
                f"the weight of {name} is shared ({', '.join(used_by)}), so writing its residual "
                "would change the other module too; expected target_modules without it"
            )
        others = set(target.layer.lora_A) - {adapter_name}
        if others:
            raise ValueError(
                f"{name} also has the adapter {sorted(others)[0]!r}, whose function would change "
                "with the base weight; expected it deleted first"
            )


# To disk and back.


def save_as_lora(
    peft_model: PeftModel, folder: str | os.PathLike[str], adapter_name: str = "default"
) -> None:
    """Save an adapter that FILet initialised: what PEFT saves, into ``folder`` itself.

    That is a plain LoRA of rank 2r for the base model as it is,
        A' = [A; A0],  B' = [B, −B0],  alpha' = 2r s,
    with A and B to the bit. It loads in any PEFT, without this package; ``filet.json`` beside it
    lets :func:`load` go on training at rank r. ``peft_model.save_pretrained``, a Trainer's
    checkpoints and uploads write the same files.

    All files are in place, or on an exception those that were there before. Killed while they are
    renamed, the folder has no ``adapter_config.json``, so nothing loads what belongs to two saves.

    Raises ValueError for an adapter that FILet did not initialise.
    """
    _started(peft_model, adapter_name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = peft_model.peft_config[adapter_name]
    with tempfile.TemporaryDirectory(prefix=".filet.", dir=folder) as beside:
        try:
            _describe(peft_model, adapter_name)  # with scalings that somebody changed, for now
            peft_model.save_pretrained(beside, selected_adapters=[adapter_name])
        finally:
            peft_model.peft_config[adapter_name] = config
        place = Path(beside) / ("" if adapter_name == "default" else adapter_name)
        replaced_together(place, folder, (_WEIGHTS, _FILET, _CONFIG))


def _complete(folder: Path, peft_model: PeftModel, adapter_name: str) -> None:
    """Write which half of an adapter is frozen beside what PEFT has just saved of it.

    The frozen halves themselves too, where its weights were gathered from ``named_parameters``, as
    many training scripts do. Weights of another rank are no longer this adapter: PEFT can save its
    difference to another one.
    """
    factors = _factors(peft_model, adapter_name)
    tensors = load_peft_weights(str(folder), device="cpu") if factors else {}
    halves = {
        _key(name, side): factor
        for name, pair in factors.items()
        for side, factor in zip("AB", pair, strict=True)
    }
    lacking = [k for k, f in halves.items() if k in tensors and tensors[k].shape == f.start.shape]
    for key in lacking:
        start = halves[key].start.to("cpu", tensors[key].dtype)
        tensors[key] = torch.cat([tensors[key], start], halves[key].dim)
    if lacking and (folder / _WEIGHTS).exists():
        save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    elif lacking:
        torch.save(tensors, folder / WEIGHTS_NAME)
    whole = {key: (factor.out_features, factor.in_features) for key, factor in halves.items()}
    there = {key: tuple(tensor.shape) for key, tensor in tensors.items() if key in whole}
    if not factors or there != whole:
        (folder / _FILET).unlink(missing_ok=True)
        return
    layers = {
        name: {"rank": A.rank, "weight": A.base, **_starts(tensors, name, A.rank)}
        for name, (A, _) in factors.items()
    }
    with replaced(folder / _FILET) as beside:
        beside.write_text(json.dumps({"format": _FORMAT, "layers": layers}, indent=1))


def _key(name: str, side: str) -> str:
    """Of a factor in a file of PEFT's."""
    return f"base_model.model.{name}.lora_{side}.weight"


def _starts(tensors: Mapping[str, Tensor], name: str, rank: int) -> dict[str, str]:
    """Fingerprints of the frozen halves of a layer's factors."""
    A, B = tensors[_key(name, "A")], tensors[_key(name, "B")]
    return fingerprints({"A0": A[rank:], "B0": B[:, rank:]})


def load(
    base_model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default"
) -> PeftModel:
    """Load what :func:`save_as_lora` wrote, ready to go on training at rank r.

    Args:
        base_model: with the very weights that the adapter was made for; they stay as they are.
        folder: what :func:`save_as_lora`, ``save_pretrained`` or a Trainer wrote.
        adapter_name: the adapter's name in the new model.

    Returns:
        A PeftModel like the saved one. For inference alone, plain PEFT loads the folder as well.

    Raises:
        ValueError: no such adapter in the folder, or a base model of other weights (the first
            module that differs is named); ``base_model`` is then as it was.
    """
    if isinstance(base_model, PeftModel):
        raise ValueError("base_model is a PeftModel; expected the model without adapters")
    folder = Path(folder)
    layers, tensors = _described(folder)
    config = LoraConfig.from_pretrained(str(folder))
    replicated = bool(config.layer_replication)
    if not replicated:  # else its layers are not there yet
        _check_base(base_model, layers, folder)
    config.inference_mode = False
    half = any(value.dtype in (torch.float16, torch.bfloat16) for value in tensors.values())
    with _kept_on_error(base_model, tensors):
        peft_model = get_peft_model(
            base_model, config, adapter_name=adapter_name, autocast_adapter_dtype=not half
        )
        found = set_peft_model_state_dict(peft_model, tensors, adapter_name=adapter_name)
        # With bias="all" PEFT writes those of modules to save twice, once under a name of its own.
        unknown = [key for key in found.unexpected_keys if ".modules_to_save." not in key]
        if unknown:
            raise ValueError(f"the base model has no place for {unknown[0]!r}, which {folder} has")
        if replicated:
            _check_base(base_model, layers, folder)
        targets, _ = find_targets(peft_model, adapter_name)
        for name, layer in layers.items():
            for linear, dim in ((targets[name].A, 0), (targets[name].B, 1)):
                trained, start = linear.weight.detach().tensor_split([layer["rank"]], dim)
                linear.weight = nn.Parameter(trained.clone())
                StartedFactor.begin(linear, start.clone(), dim, layer["weight"])
            targets[name].layer.__class__ = StartedLinear
        _describe(peft_model, adapter_name)
    return peft_model


@contextlib.contextmanager
def _kept_on_error(base_model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """On an exception the base model is as it was: its modules, what asks for gradients, values.

    ``tensors`` are an adapter's. Those of the base's own weights among them (biases that were
    trained, embeddings that were saved along) are loaded into it. PEFT's ``unload`` would leave
    them there, and trained heads in place of the base's.
    """
    children = [(m, *child) for m in base_model.modules() for child in m.named_children()]
    flags = {parameter: parameter.requires_grad for parameter in base_model.parameters()}
    names = {k.removeprefix("base_model.model.").replace(".base_layer", "") for k in tensors}
    own = dict(base_model.named_parameters(remove_duplicate=False))
    values = {own[name]: own[name].detach().clone() for name in names & own.keys()}
    try:
        yield
    except BaseException:
        for module, name, child in children:
            module._modules[name] = child
        base_model.__dict__.pop("peft_config", None)  # PEFT's
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for parameter, value in values.items():
            parameter.data.copy_(value)
        raise


def _described(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """The layers of the adapter in a folder that have a start, and all its tensors."""
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
    layers: dict[str, dict[str, Any]] = description["layers"]
    tensors = load_peft_weights(str(folder), device="cpu")
    for name, layer in layers.items():
        starts = {key: layer[key] for key in ("A0", "B0")}
        key = _key(name, "A")
        if key not in tensors or _starts(tensors, name, layer["rank"]) != starts:
            raise ValueError(
                f"{folder / _FILET} describes another adapter than lies beside it: the frozen half "
                f"of {name} is another; expected them of one save (peft.PeftModel.from_pretrained "
                "loads the adapter as an ordinary LoRA)"
            )
    return layers, tensors


def _check_base(
    base_model: nn.Module, layers: Mapping[str, Mapping[str, Any]], folder: Path
) -> None:
    weights = {}
    for name in layers:
        try:
            linear = base_model.get_submodule(name)
        except AttributeError:
            linear = base_model
        if isinstance(linear, LoraLayer):
            linear = linear.get_base_layer()
        if not isinstance(linear, (nn.Linear, Conv1D)):
            raise ValueError(f"the base model has no linear module {name!r}, which {folder} has")
        weights[name] = weight_of(linear)
    for name, found in fingerprints(weights).items():
        check_fingerprint(name, found, layers[name]["weight"], f"{folder} belongs")
