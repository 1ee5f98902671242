"""Writing into a model: a start, PEFT's default where nothing was chosen, and W_res."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from filet.adapter.state import describe, made_by, set_rank, started
from filet.model.factors import StartedFactor, StartedLayer, plain_class, started_class
from filet.model.sharded import by_rows, check_division, is_sharded, local, local_rows, write
from filet.model.targets import Target, check_unmerged
from filet.select import Layer
from filet_kernels import residual_weight_

__all__ = ["commit", "materialise_rest", "write_residual"]


def commit(
    peft_model: PeftModel,
    adapter_name: str,
    targets: Mapping[str, Target],
    layers: Mapping[str, Layer],
    settled: Callable[[], object] | None = None,
) -> None:
    """Start the adapter in these layers: in all of them, or on an exception in none.

    ``settled`` is called when all are started: what it raises undoes them as well.

    At A0 and B0 with a frozen half beside them, to PEFT of rank 2r then. Or, where there is no B0,
    at A0 and 0: PEFT's plain LoRA of rank r.
    """
    configs = peft_model.peft_config
    undo: list[Any] = [partial(configs.__setitem__, adapter_name, configs[adapter_name])]
    rslora = _rslora(peft_model, adapter_name)
    try:
        for name, layer in layers.items():
            _start(targets[name], layer, rslora, undo)
        describe(peft_model, adapter_name)
        if settled is not None:
            settled()
    except BaseException:
        for action in reversed(undo):
            action()
        raise


def _rslora(peft_model: PeftModel, adapter_name: str) -> bool:
    """Whether layers without a frozen half scale by α/√r."""
    given = made_by(peft_model, adapter_name)
    return given is not None and given.use_rslora


def _start(target: Target, layer: Layer, rslora: bool, undo: list[Any]) -> None:
    """Put the start of a layer into its A and B; on ``undo`` what reverts it."""
    place, rank, A0, B0 = target.layer, target.rank, layer.A0, layer.B0
    was = isinstance(target.A, StartedFactor)
    undo.append(partial(setattr, place, "__class__", type(place)))
    if B0 is None:
        zero = A0.new_zeros(target.shape[0], rank)
        _put(target.A, A0, None, 0, layer.fingerprint, undo)
        _put(target.B, zero, None, 1, layer.fingerprint, undo)
    else:
        _put(target.A, A0, A0, 0, layer.fingerprint, undo)
        _put(target.B, B0, -B0, 1, layer.fingerprint, undo)
    _settle(place)
    if B0 is not None:
        set_rank(place, target.adapter, 2 * rank, False, undo)
    elif was:  # else PEFT has it right
        set_rank(place, target.adapter, rank, rslora, undo)


def _put(
    linear: nn.Linear, value: Tensor, start: Tensor | None, dim: int, base: str, undo: list[Any]
) -> None:
    """Write a factor's value, and give it this frozen half, or none."""
    _write(linear, "weight", value, undo)
    if linear.bias is not None:
        _write(linear, "bias", value.new_zeros(linear.bias.shape), undo)
    if isinstance(linear, StartedFactor):
        undo.append(partial(StartedFactor.begin, linear, linear.start, dim, linear.base))
    else:
        undo.append(partial(StartedFactor.end, linear))
    if start is not None:
        StartedFactor.begin(linear, start, dim, base)
    elif isinstance(linear, StartedFactor):
        StartedFactor.end(linear)


def _settle(layer: LoraLayer) -> None:
    """The layer's class by whether any of its adapters has a frozen half."""
    begun = any(isinstance(factor, StartedFactor) for factor in layer.lora_A.values())
    kind = type(layer)
    if begun:
        layer.__class__ = started_class(kind)
    elif issubclass(kind, StartedLayer):
        layer.__class__ = plain_class(kind)


def _write(linear: nn.Linear, name: str, value: Tensor, undo: list[Any]) -> None:
    parameter = linear._parameters[name]
    assert parameter is not None
    if parameter.device.type == "meta":
        undo.append(partial(linear._parameters.__setitem__, name, parameter))
        written = nn.Parameter(value.clone(), requires_grad=parameter.requires_grad)
        linear._parameters[name] = written
    else:
        undo.append(write(parameter, value))


def write_residual(peft_model: PeftModel, adapter_name: str = "default") -> None:
    """W ← W_res = W − s B0 A0, as the paper has it: a one-way conversion, in place.

    The adapter goes on as an ordinary LoRA of rank r, A and B as they are (the same parameters), on
    a base that is another model from now on: save that too (``base_model.save_pretrained``), for
    the adapter belongs to no other. FILet keeps nothing of it, and no original weights. It saves
    the frozen half's products in training, 0.6% to 4.3% of a step (docs/adapters.md).

    W_res is computed in float32 (float64 unless W has 16 bits) and rounded once to W's dtype, by
    which the model's function moves. The names by which model and adapter know where their weights
    came from are cleared.

    Raises ValueError, with the model as it was, for an adapter that has no frozen half or that is
    merged, for a quantised weight, for one that another module uses too, and for a layer on which
    another adapter sits: their functions would change with W. On another exception (no memory,
    say) the layers that are done are done, each with its function; the same call goes on.
    """
    targets = started(peft_model, adapter_name)
    check_division(peft_model)
    check_unmerged(targets)
    _check_plain(targets)
    _check_sole_user(peft_model, targets, adapter_name)
    model, rslora = peft_model.base_model.model, _rslora(peft_model, adapter_name)
    try:
        for target in targets.values():
            A, B = target.A, target.B
            assert isinstance(A, StartedFactor) and isinstance(B, StartedFactor)
            dtype = target.dtype
            A0, B0, W = A.start.to(dtype), -B.start.to(dtype), target.weight
            if is_sharded(W):
                B0, W = local_rows(B0, W), local(W)
            if len(W):
                residual_weight_(W, A0, B0, target.scaling)
            StartedFactor.end(A)
            StartedFactor.end(B)
            _settle(target.layer)
            set_rank(target.layer, adapter_name, target.rank, rslora, [])
    finally:
        describe(peft_model, adapter_name)
        config = copy.deepcopy(peft_model.peft_config[adapter_name])  # it may be the user's own
        config.base_model_name_or_path = None
        peft_model.peft_config[adapter_name] = config
        if hasattr(model, "name_or_path"):
            model.name_or_path = ""


def _check_plain(targets: Mapping[str, Target]) -> None:
    for name, target in targets.items():
        if target.values.quantised:
            raise ValueError(
                f"the weight of {name} is quantised ({target.values.kind}): its residual would be "
                "quantised anew, whose error (9% of W in NF4) is larger than what is taken out; "
                "expected the frozen half left beside it, as it is"
            )
        if is_sharded(target.weight) and not by_rows(target.weight):
            raise ValueError(
                f"{name}: of its weight each process has columns, not rows; expected the residual "
                "written before FSDP shards the model"
            )


def _check_sole_user(peft_model: PeftModel, targets: dict[str, Target], adapter_name: str) -> None:
    names: dict[int, list[str]] = {}
    for name, parameter in peft_model.base_model.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name, target in targets.items():
        used_by = names[id(target.base.weight)]
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


def materialise_rest(peft_model: PeftModel, adapter_name: str, seed: int) -> None:
    """Give PEFT's default initialisation to adapter weights that are still on the meta device.

    Drawn on the CPU, so that the same seed gives the same on every device and no GPU's random state
    changes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for layer in peft_model.base_model.model.modules():
            if not isinstance(layer, LoraLayer):
                continue
            device = _device_of(layer.get_base_layer())
            if device.type == "meta":  # of a model that is never whole
                device = torch.device("cpu")
            drawn: list[nn.Parameter] = []
            for factors in (layer.lora_A, layer.lora_B):
                if adapter_name in factors and _is_on_meta(factors[adapter_name]):
                    drawn += factors[adapter_name].to_empty(device="cpu").parameters()
            for parameters in (layer.lora_embedding_A, layer.lora_embedding_B):
                if adapter_name in parameters and parameters[adapter_name].device.type == "meta":
                    old = parameters[adapter_name]
                    parameters[adapter_name] = nn.Parameter(
                        torch.empty_like(old, device="cpu"), requires_grad=old.requires_grad
                    )
                    drawn.append(parameters[adapter_name])
            if drawn:
                layer.reset_lora_parameters(adapter_name, True)
            for parameter in drawn:
                parameter.data = parameter.data.to(device)


def _device_of(base: nn.Module) -> torch.device:
    """Of a base whose weight may be one of several, as of experts, or no parameter (HQQ, GPTQ)."""
    tensors = (*base.parameters(), *base.buffers())
    if tensors:
        return tensors[0].device
    found: Any = getattr(base, "device", "cpu")  # HQQ's
    return torch.device(found)


def _is_on_meta(factor: nn.Module) -> bool:
    # Its parameter, not its weight: that of an initialised layer is made of two halves when read.
    return next(factor.parameters()).device.type == "meta"
