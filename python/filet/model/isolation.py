"""A model and a process as a pass needs them, and as they were afterwards."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from filet.model.fused import fused
from filet.model.sharded import over_shards, running
from filet.model.targets import Target
from filet.model.values import as_trained
from filet.system.transfer import values

__all__ = [
    "adapters_put_back",
    "deterministic_attention",
    "gradients_put_back",
    "preserved",
]

# By which transformers asks the flash-attn package, which does not listen to torch, for a backward
# without atomics. Read at every call.
_FLASH_ATTENTION = "FLASH_ATTENTION_DETERMINISTIC"


@contextlib.contextmanager
def preserved(
    peft_model: PeftModel, adapter_name: str, targets: Mapping[str, Target]
) -> Iterator[None]:
    """Everything of the model and the process that a pass changes, put back also on an exception.

    Inside: the model as its training will begin (:func:`_as_it_starts`), all parameters frozen,
    dropout off, no key/value cache, gradients on, on CUDA deterministic algorithms, and norms and
    gates by fused kernels. Restored: training flags, requires_grad, which adapters are active, the
    caches' settings, the random states of Python, NumPy and torch. ``.grad`` is never touched:
    nothing that owns one asks for a gradient.
    """
    base_model = peft_model.base_model.model
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(running(peft_model))
        stack.enter_context(_random_states())
        # Before the adapter is switched: PEFT has what it switches on trained.
        stack.enter_context(gradients_put_back(peft_model))
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        # The switch of deterministic_attention is the process's, and autograd has a thread of its
        # own for each GPU: one would throw it while another computes.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*CuBLAS.*deterministic")
        stack.enter_context(_as_it_starts(peft_model, adapter_name, targets))
        stack.enter_context(_deterministic(bool(cuda)))
        for parameter in peft_model.parameters():
            parameter.requires_grad_(False)
        quantised = stack.enter_context(as_trained(peft_model))
        stack.enter_context(_without_dropout(peft_model, quantised))
        stack.enter_context(_without_cache(base_model))
        stack.enter_context(fused(base_model))
        stack.enter_context(_gradient_from_embeddings(base_model))
        yield


@contextlib.contextmanager
def _random_states() -> Iterator[None]:
    """Those of Python and NumPy are afterwards what they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextlib.contextmanager
def gradients_put_back(model: nn.Module) -> Iterator[None]:
    """Whatever asks for a gradient is afterwards what it was."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def _deterministic(cuda: bool) -> Iterator[None]:
    """Inside, operations are deterministic; on CUDA as far as torch has a way."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    sdp = torch.backends.cuda
    memory: Any = torch.utils.deterministic  # its attribute is a property that mypy does not see
    with contextlib.ExitStack() as stack:
        # cuDNN's attention differs from run to run, also where torch is told to be strict.
        stack.callback(sdp.enable_cudnn_sdp, sdp.cudnn_sdp_enabled())
        sdp.enable_cudnn_sdp(False)
        stack.enter_context(_environment(_FLASH_ATTENTION, "1"))
        if cuda:
            stack.callback(torch.use_deterministic_algorithms, before[0], warn_only=before[1])
            if before != (True, False):
                torch.use_deterministic_algorithms(True, warn_only=True)
                stack.enter_context(deterministic_attention())
        fill = memory.fill_uninitialized_memory
        stack.callback(setattr, memory, "fill_uninitialized_memory", fill)
        memory.fill_uninitialized_memory = False  # a pass over every new tensor
        yield


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


@contextlib.contextmanager
def _without_dropout(model: nn.Module, quantised: Set[nn.Module]) -> Iterator[None]:
    """Inside, no module trains, but those that checkpoint gradients, and none drops anything.

    The quantised ones train as well: they have no dropout.
    """
    training = {m: m.training for m in model.modules() if m not in quantised}
    dropouts: list[tuple[nn.Module, str, float]] = []
    try:
        for module, flag in training.items():
            # Gradient checkpointing runs only in training mode, so the modules that do it keep
            # that flag; their children lose it, and with it their dropout.
            # (Not getattr: PEFT 0.18's wrapper of a head that is not active fails at any.)
            module.training = flag and bool(vars(module).get("gradient_checkpointing", False))
            if module.training:
                for name, value in list(vars(module).items()):
                    if "drop" in name and isinstance(value, float):
                        dropouts.append((module, name, value))
                        setattr(module, name, 0.0)
        yield
    finally:
        for module, name, value in dropouts:
            setattr(module, name, value)
        for module, flag in training.items():
            module.training = flag


@contextlib.contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Inside, a model of texts keeps no keys and values."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    before = getattr(config, "use_cache", None)
    if before is None:
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = before


@contextlib.contextmanager
def _as_it_starts(
    peft_model: PeftModel, adapter_name: str, targets: Mapping[str, Target]
) -> Iterator[None]:
    """The model as the adapter's training begins: itself, without what its targets add.

    What else is active then is active here: trained heads and tokens (``modules_to_save``,
    ``trainable_token_indices``), layers of the adapter that FILet does not initialise, and other
    adapters that are active beside it. An adapter that is not active is taken to be alone.
    """
    tuner = peft_model.base_model
    with adapters_put_back(peft_model) as modules:
        if adapter_name not in tuner.active_adapters:
            tuner.set_adapter(adapter_name)
        off = {(id(target.layer), adapter_name) for target in targets.values()}
        off |= _adding_nothing(modules)
        for module in modules:
            module._disable_adapters = False
            if isinstance(module, LoraLayer):
                names = [name for name in module.active_adapters if (id(module), name) not in off]
                module._active_adapter = names
        yield


@contextlib.contextmanager
def adapters_put_back(peft_model: PeftModel) -> Iterator[list[Any]]:
    """Which adapters are active, and in which modules they are off, is afterwards what it was.

    Gives the modules that have any.
    """
    tuner = peft_model.base_model
    switches = {
        module: (module._active_adapter, module._disable_adapters)
        for module in peft_model.modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    }
    active = tuner.active_adapter
    try:
        yield list(switches)
    finally:
        for module, (names, disabled) in switches.items():
            module._active_adapter, module._disable_adapters = names, disabled
        tuner.active_adapter = active


def _adding_nothing(modules: Iterable[nn.Module]) -> set[tuple[int, str]]:
    """Layers (by id) and their adapters whose B A is still zero: running them would only cost.

    That of fused experts is a copy of all their weights, kept for the backward.
    """
    nothing: set[tuple[int, str]] = set()
    found: dict[tuple[int, str], tuple[list[Tensor], list[Tensor]]] = {}
    for layer in modules:
        if not isinstance(layer, LoraLayer):
            continue
        for name in layer.active_adapters:
            linears = [side[name] for side in (layer.lora_A, layer.lora_B) if name in side]
            embeddings = (layer.lora_embedding_A, layer.lora_embedding_B)
            factors = [x.weight for x in linears] + [x[name] for x in embeddings if name in x]
            if not factors or name in layer.lora_variant:  # a variant may scale W
                continue
            if any(factor.device.type == "meta" for factor in factors):
                nothing.add((id(layer), name))
                continue
            found[id(layer), name] = factors, [x.bias for x in linears if x.bias is not None]
    tensors = [tensor.detach() for sides in found.values() for side in sides for tensor in side]
    numbers = iter(values(over_shards(tensors, _not_zero)))
    for place, (factors, biases) in found.items():
        zero = 0 in [next(numbers) for _ in factors]
        if not any([next(numbers) for _ in biases]) and zero:
            nothing.add(place)
    return nothing


def _not_zero(part: Tensor, _: int) -> Tensor:
    return torch.count_nonzero(part)


@contextlib.contextmanager
def deterministic_attention() -> Iterator[None]:
    """Makes the backward of scaled_dot_product_attention deterministic, of calls by this thread.

    It adds with atomics, and differs from run to run, unless torch is told to be strict: a mere
    warning leaves it as it is. Being strict about everything would refuse the operations that have
    no other way, so this is for the attention's own node of the graph, which runs in this thread as
    all of the backward does (:func:`preserved`).
    """
    plain, mine = F.scaled_dot_product_attention, threading.get_ident()

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        output = plain(*args, **kwargs)
        node = output.grad_fn if threading.get_ident() == mine else None
        while node is not None and not node.name().startswith("ScaledDotProduct"):
            node = node.next_functions[0][0] if node.next_functions else None
        if node is not None:
            node.register_prehook(lambda *_: torch.use_deterministic_algorithms(True))
            node.register_hook(lambda *_: torch.use_deterministic_algorithms(True, warn_only=True))
        return output

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


@contextlib.contextmanager
def _gradient_from_embeddings(model: Any) -> Iterator[None]:
    """Inside, what the embeddings give asks for a gradient.

    Reentrant checkpointing needs an input with gradient at its first block.
    """
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embeddings = None
    if not isinstance(embeddings, nn.Module):
        yield
        return
    handle = embeddings.register_forward_hook(_ask_for_gradient)
    try:
        yield
    finally:
        handle.remove()


class _Start(torch.autograd.Function):
    """The same memory, as something that has a gradient, of which nothing is kept.

    A leaf that asks for one would keep it, and cannot be written to in place, as BLIP, GIT and CTRL
    do with their embeddings.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, leaf: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


@torch.compiler.disable
def _ask_for_gradient(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, Tensor) and output.is_floating_point() and output.is_leaf:
        return _Start.apply(output, output.new_empty(0, requires_grad=True))
    return None
