"""GPTQ's and AWQ's layers, by gptqmodel: their kernels, and their tensors where they are streamed.

transformers puts the layers in, loads what the files have, and has the library finish each layer:
GPTQ's zeros of the first format become those of the second, and what a kernel needs beside them is
made. Whoever streams a model does the same each time that a layer's tensors are there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from filet.model.parts import comes_from

__all__ = ["KERNELS", "Buffers", "choose_kernel", "is_gptqmodel", "method_of"]

KERNELS = {"gptq": "torch", "awq": "torch_awq"}
"""By method, the kernel of plain torch: it trains, gives its values, and runs on any device."""

_OPEN = (None, "auto", "auto_trainable")  # the library is to choose
_BITS = (2, 3, 4, 8)


def is_gptqmodel(module: Any) -> bool:
    """Whether it is a layer of gptqmodel's."""
    return comes_from(type(module), "gptqmodel") and hasattr(module, "SUPPORTS_TRAINING")


def method_of(config: Any) -> str:
    """A quantisation's method as config.json writes it: "gptq"."""
    values = config if isinstance(config, Mapping) else config.to_dict()
    if values.get("load_in_4bit") or values.get("load_in_8bit"):
        return "bitsandbytes"
    method = values.get("quant_method")
    return str(getattr(method, "value", method))


def choose_kernel(folder: Path, settings: Any) -> None:
    """Where a model's config leaves GPTQ's or AWQ's kernel open it will be :data:`KERNELS`'.

    What the library would choose may be without a gradient, or not give its values. Raises
    ValueError for settings by which transformers would read the codes wrongly, or not at all.
    """
    config = getattr(settings, "quantization_config", None)
    if not isinstance(config, MutableMapping):
        return
    method = method_of(config)
    kernel = KERNELS.get(method)
    if kernel is None:
        return
    backend = config.get("backend")
    backend = backend.lower() if isinstance(backend, str) else backend
    backend = kernel if backend in _OPEN else backend
    _check(folder, method, config, backend)
    settings.quantization_config = {**config, "backend": backend}


def _check(folder: Path, method: str, config: Mapping[str, Any], backend: str) -> None:
    """ValueError for the first setting that does not fit; defaults are transformers'."""
    awq = method == "awq"
    bits, group = config.get("bits", 4 if awq else None), config.get("group_size", 128)
    keys = ("version", "format") if awq else ("checkpoint_format", "format")
    key = next((key for key in keys if config.get(key) is not None), keys[0])
    form = str(config.get(key, "gemm" if awq else "gptq")).lower()
    forms: tuple[str, ...] = ("gemm",) if awq else ("gptq", "gptq_v2", "gptq_p")
    if awq and backend != KERNELS["awq"]:  # of another kernel the layer itself will be asked
        forms = (form,)
    elif bits == 3:  # transformers does not pass on that gptq_p has these in planes
        forms = forms[:2]
    for name, value, right, expected in (
        ("bits", bits, type(bits) is int and bits in _BITS, "2, 3, 4 or 8"),
        ("group_size", group, type(group) is int and (group == -1 or group > 0), "-1, or above 0"),
        (key, form, form in forms, " or ".join(map(repr, forms))),
        # Layers with settings of their own, or left whole: transformers drops it.
        ("dynamic", config.get("dynamic"), not config.get("dynamic"), "none"),
    ):
        if not right:
            raise ValueError(
                f"{folder} has {name} {value!r} (quantization_config in config.json), and is "
                f"quantised by {method}; expected {expected}"
            )


class Buffers:
    """The tensors of a layer of gptqmodel's that files have; they are read as they are.

    Attributes:
        quantises: False; as of :class:`filet.model.packed.Packed`.
        parts: by name below the module; shapes and dtypes.
        stored_weight: the first of them.
    """

    quantises = False

    def __init__(self, module: nn.Module, quantizer: Any) -> None:
        """``module``: on the meta device, as transformers put it in. ``quantizer``: its own."""
        self.parts: dict[str, Tensor] = dict(module.state_dict())
        self.stored_weight = self.parts["qweight"]
        self._module: Any = module
        optimum = getattr(quantizer, "optimum_quantizer", None)  # of GPTQ alone
        self._converts = optimum is not None and _format_of(optimum) == "gptq"

    @contextlib.contextmanager
    def placed(self, views: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the layer has ``views`` and is finished; GPTQ's zeros in them are converted.

        Once for each time that they are read, therefore.
        """
        module = self._module
        before = dict(vars(module))
        vars(module).update(
            _buffers={**module._buffers, **views},
            _non_persistent_buffers_set=set(module._non_persistent_buffers_set),
            # torch.compile of each layer's values would be done anew for each block and sweep.
            optimized=True,
        )
        try:
            with torch.no_grad():
                self._finish()
            yield
        finally:
            # Caches too: they go by addresses, at which another layer's tensors will lie.
            before["training"] = module.training
            vars(module).clear()
            vars(module).update(before)

    def _finish(self) -> None:
        module = self._module
        if self._converts and module.REQUIRES_FORMAT_V2:
            from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module as convert

            convert(module, bits=module.bits, pack_dtype=module.pack_dtype)
        module.post_init()


def _format_of(optimum: Any) -> str:
    """The format of the zeros in the files; older versions of optimum name it otherwise."""
    found: str = optimum.format if hasattr(optimum, "format") else optimum.checkpoint_format
    return found
