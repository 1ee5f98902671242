"""Weights that bitsandbytes packs: the tensors they consist of, and the parameter made of these.

A weight in 4 bits is its bytes, the largest magnitude of every block of them, and a table of
values; with double quantisation the magnitudes are packed in turn. One in int8 is its bytes and the
largest magnitude of every row. Whoever streams a model gives these tensors places of their own, and
has the parameter made of them there, as transformers makes it on loading.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from filet.model.gptq import Buffers, is_gptqmodel

__all__ = ["Packed", "begin_quantised", "begin_stored", "check_tied", "is_packed", "packed_of"]

_OFFSET = "offset"  # of a double quantisation; a file has it in the text of its state
_STATE = "weight.quant_state."


def is_packed(module: nn.Module) -> bool:
    """Whether bitsandbytes keeps the weight of this module packed."""
    return type(module).__name__ in ("Linear4bit", "Linear8bitLt")


def check_tied(model: Any) -> None:
    """ValueError for a packed layer whose weight is an embedding's, which is never packed."""
    for key in getattr(model, "all_tied_weights_keys", None) or {}:
        name = key.rpartition(".")[0]
        if is_packed(model.get_submodule(name)):
            raise ValueError(
                f"{name} was to be quantised, and its weight is tied to another that is not, so "
                "that it cannot run; expected it among llm_int8_skip_modules of "
                "quantization_config, or no such list"
            )


def begin_quantised(module: nn.Module, dtype: torch.dtype) -> None:
    """The weight of a module on the meta device becomes what quantising it will give, there too.

    ``dtype``: of the weight that will be quantised.
    """
    whole = torch.empty(_stored_shape(module), dtype=dtype, device="meta")
    made = _quantised(module, whole)
    made.whole = whole
    state = getattr(made, "quant_state", None)
    if state is not None and state.nested:
        # A state dict asks for its value. In float32, whatever torch.set_default_dtype was given:
        # the offset of a double quantisation goes to where this one lies.
        state.offset = torch.zeros((), dtype=torch.float32, device="cpu")
    module._parameters["weight"] = made


def begin_stored(
    module: Any, stored: Mapping[str, Tensor]
) -> list[tuple[str, torch.Size, torch.Size]]:
    """The weight of a module on the meta device becomes what files hold of it, there too.

    ``stored``: what they have below the module, by name; on the meta device but for the text of a
    state. Returns names and shapes, as they are there and as they have to be. Raises KeyError for a
    part that is not among them.
    """
    import bitsandbytes as bnb

    weight, shape = stored["weight"], torch.Size((module.out_features, module.in_features))
    if not _is_4bit(module):
        its = {"has_fp16_weights": False, "SCB": stored["SCB"]}
        made = bnb.nn.Int8Params(weight, requires_grad=False, **its)
        module._parameters["weight"] = made
        return [("weight", weight.shape, shape), ("SCB", stored["SCB"].shape, shape[:1])]
    key = next((key for key in stored if key.startswith(_STATE)), f"{_STATE}bitsandbytes__nf4")
    said = json.loads(bytes(stored[key].tolist()))
    names = ["weight.absmax", "weight.quant_map", key]
    if "nested_offset" in said:
        names += ["weight.nested_absmax", "weight.nested_quant_map"]
    made = bnb.nn.Params4bit.from_prequantized(
        data=weight, quantized_stats={name: stored[name] for name in names}, device="meta"
    )
    state = made.quant_state
    if state.nested:
        # Rounded as bitsandbytes rounds it, which makes a weight in memory.
        default = torch.get_default_dtype()
        state.offset = torch.tensor(float(said["nested_offset"]), dtype=default, device="cpu")
    module._parameters["weight"] = made
    like = torch.empty(state.shape, dtype=state.dtype, device="meta")
    its = {"compress_statistics": state.nested, "quant_storage": weight.dtype}
    expected = _parts(_in_4bit(like, state.blocksize, state.quant_type, **its))
    parts = [(key, value.shape, expected[key].shape) for key, value in _parts(made).items()]
    return [("weight", torch.Size(state.shape), shape), *parts]


def packed_of(module: nn.Module, weight: Any, quantizer: Any) -> Packed | Buffers | None:
    """How a weight is packed; None for a plain one, which is what most are.

    ``quantizer``: transformers', None where nothing is quantised. Of a layer of gptqmodel's the
    first tensor stands for all.
    """
    if is_gptqmodel(module):
        return Buffers(module, quantizer)
    quantises = quantizer is not None and not quantizer.pre_quantized
    if not is_packed(module) or weight is not module._parameters["weight"]:
        return None
    return Packed(module, weight, quantises)


class Packed:
    """The weight of a module that bitsandbytes packs.

    Attributes:
        quantises: the files have it whole; it is quantised on its way into its places.
        parts: what lies in the places, by name below the module; shapes and dtypes.
        stored_weight: what the files have under the weight's name, likewise.
    """

    def __init__(self, module: nn.Module, weight: Any, quantises: bool) -> None:
        """``weight``: of :func:`begin_quantised` or :func:`begin_stored`."""
        self.quantises = quantises
        self.parts = _parts(weight)
        if not quantises:
            self.parts.pop(_OFFSET, None)
        self.stored_weight = weight.whole if quantises else self.parts["weight"]
        self._module = module
        self._weight = weight

    def quantise(self, whole: Tensor, views: Mapping[str, Tensor]) -> None:
        """``whole``, as the files have it, quantised into ``views``, the places of the parts.

        By what transformers does on loading, on the device of ``whole``.
        """
        for name, value in _parts(_quantised(self._module, whole)).items():
            views[name].copy_(value)

    @contextlib.contextmanager
    def placed(self, views: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the module's weight is made of ``views``, which have its parts."""
        module: Any = self._module
        weight = self._made(views)
        if _is_4bit(module):
            module.quant_state = weight.quant_state
        else:
            module.state.reset_grads()
        module._parameters["weight"] = weight
        try:
            yield
        finally:
            module._parameters["weight"] = self._weight
            if _is_4bit(module):
                module.quant_state = None
            else:
                module.state.reset_grads()  # the forward takes them from the weight

    def _made(self, views: Mapping[str, Tensor]) -> Any:
        import bitsandbytes as bnb

        weight = views["weight"]
        if not _is_4bit(self._module):
            return bnb.nn.Int8Params(
                weight, requires_grad=False, has_fp16_weights=False, CB=weight, SCB=views["SCB"]
            )
        its, state = self._weight, self._weight.quant_state
        offset = second = None
        if state.nested:
            offset = views.get(_OFFSET)
            if offset is None:
                offset = state.offset.to(weight.device, copy=True)
            second = bnb.functional.QuantState(
                absmax=views["weight.nested_absmax"],
                code=views["weight.nested_quant_map"],
                blocksize=state.state2.blocksize,
                dtype=state.state2.dtype,
            )
        made = bnb.functional.QuantState(
            absmax=views["weight.absmax"],
            shape=state.shape,
            code=views["weight.quant_map"],
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
            offset=offset,
            state2=second,
        )
        return bnb.nn.Params4bit(
            weight, requires_grad=False, quant_state=made, bnb_quantized=True, module=self._module,
            blocksize=its.blocksize, compress_statistics=its.compress_statistics,
            quant_type=its.quant_type, quant_storage=its.quant_storage,
        )  # fmt: skip


def _is_4bit(module: nn.Module) -> bool:
    return type(module).__name__ == "Linear4bit"


def _stored_shape(module: Any) -> torch.Size:
    """Of the whole weight in the files: of a Conv1D it is turned."""
    m, n = module.out_features, module.in_features
    return torch.Size((n, m) if _is_turned(module) else (m, n))


def _is_turned(module: Any) -> bool:
    return issubclass(getattr(module, "source_cls", nn.Linear), Conv1D)


def _quantised(module: Any, whole: Tensor) -> Any:
    """What transformers makes of a whole weight on loading; on the meta device, its shapes."""
    import bitsandbytes as bnb

    if _is_turned(module):
        whole = whole.T
    whole = whole.contiguous()
    if not _is_4bit(module):
        rows, largest, _ = bnb.functional.int8_vectorwise_quant(whole.to(torch.float16))
        return bnb.nn.Int8Params(rows, requires_grad=False, has_fp16_weights=False, SCB=largest)
    its = module._parameters["weight"]
    return _in_4bit(
        whole, its.blocksize, its.quant_type, compress_statistics=its.compress_statistics,
        quant_storage=its.quant_storage,
    )  # fmt: skip


def _in_4bit(whole: Tensor, blocksize: int, quant_type: str, **how: Any) -> Any:
    import bitsandbytes as bnb

    how |= {"blocksize": blocksize, "quant_type": quant_type}
    if whole.device.type == "meta":
        # bitsandbytes' table for scales stays on the device that first asks for it, for as long as
        # the process runs. On meta it would let nothing be quantised twice any more.
        with torch.device("cpu"):
            bnb.functional.quantize_blockwise(torch.zeros(1, dtype=torch.float32, device="cpu"))
    weight, state = bnb.functional.quantize_4bit(whole, **how)
    return bnb.nn.Params4bit(
        weight, requires_grad=False, quant_state=state, bnb_quantized=True, **how
    )


def _parts(weight: Any) -> dict[str, Tensor]:
    """The tensors of a packed weight, by the names below its module that transformers saves."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return {"weight": weight.data, "SCB": weight.SCB}
    parts = {"weight": weight.data, "weight.absmax": state.absmax, "weight.quant_map": state.code}
    if state.nested:
        second = state.state2
        parts |= {"weight.nested_absmax": second.absmax, "weight.nested_quant_map": second.code}
        parts[_OFFSET] = state.offset
    return parts
