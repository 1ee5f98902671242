"""What a LoRA layer's base multiplies by: W (m, n) = (out, in), plain or dequantised.

The one place that knows kinds of bases. Each says whether it can be trained on, and gives W as its
own forward multiplies by it. PEFT's registry of backends would do for merging, but dequantises to
the dtype of the weight that was quantised, not to the one that the layer computes in.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from filet.model.gptq import is_gptqmodel
from filet.model.parts import DOUBLE, comes_from, flat, is_a, numbers, tensors_in
from filet.model.product import is_product
from filet.model.sharded import local

__all__ = [
    "Unreadable",
    "Values",
    "as_trained",
    "dtype_of_model",
    "is_quantised",
    "unpack",
    "values_of",
]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_READABLE = (
    "expected a plain linear module, or one of bitsandbytes, torchao (weight only), HQQ, GPTQ, AWQ "
    "or FP8 blocks"
)

# AWQ's kernels whose packed weight is laid out as AutoAWQ's GEMM has it.
_AWQ_GEMM = ("AwqTorchLinear", "AwqGEMMLinear", "AwqGEMMTritonLinear")


class Unreadable(ValueError):
    """A base whose values cannot be had, or that nothing can be trained on: why, in one line."""


class Values:
    """Of a plain linear module; the subclasses are of quantised ones.

    Nothing is kept: the module's tensors are looked up whenever they are asked for, for blockwise
    weights come and go.

    Attributes:
        module: the base module.
        quantised: W is made anew whenever it is asked for.
        multiplies: the module's forward is x Wᵀ + b with this very W, and nothing else. False also
            where it quantises x or adds up otherwise; then it is left to itself.
        rounds: x and g of a wider dtype are rounded to W's before they are multiplied, and y and
            h are given back in theirs.
        casts: False where it fails on an x of another dtype than W's.
        shareable: two modules with one weight multiply by the same W.
    """

    quantised = False
    multiplies = False
    rounds = False
    casts = True
    shareable = True

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        """``dtype``: of the model's hidden states, for a base that multiplies in that of its x."""
        self.module: Any = module
        self._of_model = dtype
        if type(self) is Values:
            self.multiplies = type(module) is nn.Linear

    def dtype_for(self, x: torch.dtype) -> torch.dtype:
        """In which the layer multiplies an x of this dtype by W."""
        dtype: torch.dtype = self.module.weight.dtype
        return dtype

    @property
    def dtype(self) -> torch.dtype:
        """That of W, for an x as the model's hidden states are."""
        return self.dtype_for(self._of_model)

    @property
    def kind(self) -> str:
        """How W is stored, for fingerprints and messages: "bfloat16", "nf4 (bitsandbytes)"."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def shape(self) -> tuple[int, int]:
        m, n = self.weight().shape
        return m, n

    @property
    def device(self) -> torch.device:
        device: torch.device = self.module.weight.device
        return device

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W (m, n), detached: a view of the module's, or dequantised, in memory of its own.

        ``dtype``: what :meth:`dtype_for` gave; :attr:`dtype` by default.
        """
        weight: Tensor = self.module.weight.detach()
        return weight.T if isinstance(self.module, Conv1D) else weight

    def stored(self) -> list[Tensor]:
        """What W is made of, in an order of its own: all that a fingerprint is to tell apart."""
        return [self.weight()]

    def why_untrainable(self, x: Tensor) -> str | None:
        """Why nothing can be trained on the layer when it gets this x, or None."""
        return None

    def check(self) -> None:
        """Raises :class:`Unreadable` where W cannot be had, or no gradient comes through."""
        if self.dtype not in _DTYPES:
            raise Unreadable(
                f"the weight of this {type(self.module).__name__} is {self.dtype}: quantised as "
                f"nothing that FILet reads; {_READABLE}"
            )


class _Quantised(Values):
    """A module with ``out_features`` and ``in_features``."""

    quantised = True

    @classmethod
    def claims(cls, module: Any) -> bool:
        raise NotImplementedError

    @property
    def kind(self) -> str:
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, int]:
        return self.module.out_features, self.module.in_features

    def dtype_for(self, x: torch.dtype) -> torch.dtype:
        return x

    def check(self) -> None:
        pass


class _Bnb4bit(_Quantised):
    """``bitsandbytes.nn.Linear4bit``: NF4 or FP4, its scales quantised once more or not.

    Made by hand it may have no compute dtype. Its first x gives it one then.
    """

    multiplies = True
    rounds = True

    def dtype_for(self, x: torch.dtype) -> torch.dtype:
        return self.module.compute_dtype or x

    @classmethod
    def claims(cls, module: Any) -> bool:
        return is_a(module, "bitsandbytes", "Linear4bit")

    @property
    def kind(self) -> str:
        weight = self.module.weight
        double = DOUBLE if weight.compress_statistics else ""
        return f"{weight.quant_type}{double} (bitsandbytes)"

    def check(self) -> None:
        if self.device.type != "meta" and self._state is None:
            raise Unreadable("this Linear4bit is not quantised yet: move it to its device first")

    @property
    def _state(self) -> Any:
        state = getattr(self.module.weight, "quant_state", None)
        return self.module.quant_state if state is None else state  # FSDP drops the weight's

    def packed(self) -> tuple[Tensor, Any]:
        """The packed bytes and their state, as bitsandbytes made them; copied if they are not so.

        On a CPU with AVX512-BF16 a forward in eval mode repacks the weight in place, and rounds its
        scales to bfloat16. bitsandbytes' way back rounds them once more, or leaves them turned.
        """
        data, state = self.module.weight.data, self._state
        if not getattr(state, "packing_format_for_cpu", False):
            return data, state
        from bitsandbytes import functional

        state = copy.copy(state)
        scales = state.absmax.T.reshape(-1).float()
        state.original_nested = False  # what it would quantise the scales for
        data, state = functional._convert_weight_packed_for_cpu_inverse(data, state)
        state.absmax, state.nested = scales, False
        return data, state

    def unpack(self) -> None:
        """Undo that repacking, by which no gradient comes through. Mutates the module."""
        if getattr(self._state, "packing_format_for_cpu", False):
            data, state = self.packed()
            self.module.weight.data = data
            self.module.weight.quant_state = self.module.quant_state = state

    @torch.no_grad()
    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        from bitsandbytes import functional

        data, state = self.packed()
        if state.dtype != (dtype or self.dtype):  # the forward rounds once, to its own
            state = copy.copy(state)
            state.dtype = dtype or self.dtype
        W: Tensor = functional.dequantize_4bit(data, state)
        return W if tuple(W.shape) == self.shape else W.T

    def stored(self) -> list[Tensor]:
        data, state = self.packed()
        scales = state.absmax
        if state.nested:
            inner = state.state2
            each = inner.absmax.repeat_interleave(inner.blocksize)[: scales.numel()]
            scales = inner.code[scales.long()] * each + state.offset
        # Rounded to bfloat16 by that repacking or not, it is one base.
        return [data, scales.flatten().bfloat16(), state.code, numbers(state.blocksize)]


class _Bnb8bit(_Quantised):
    """``bitsandbytes.nn.Linear8bitLt``: LLM.int8(), whose forward rounds x to int8 on a GPU.

    W = CB diag(SCB) / 127, by rows, rounded to the dtype of x as in its backward. The rounding of x
    and its outliers is the layer's own affair: y = W x and h = Wᵀ g are not.
    """

    shareable = False  # SCB moves to the state of the first, and the second multiplies by bare CB

    @classmethod
    def claims(cls, module: Any) -> bool:
        return is_a(module, "bitsandbytes", "Linear8bitLt")

    @property
    def kind(self) -> str:
        return "int8 (bitsandbytes)"

    def check(self) -> None:
        if self.module.state.has_fp16_weights:
            raise Unreadable(
                "this Linear8bitLt quantises its weight anew in every forward "
                "(has_fp16_weights=True); expected load_in_8bit=True"
            )
        if self.device.type != "meta" and self.module.weight.dtype != torch.int8:
            raise Unreadable("this Linear8bitLt is not quantised yet: move it to its device first")

    @property
    def _scales(self) -> Tensor:
        # They move from the weight to the state in the first forward.
        scales = self.module.state.SCB
        found: Tensor = self.module.weight.SCB if scales is None else scales
        return found.to(self.device)

    @torch.no_grad()
    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        codes: Tensor = self.module.weight.data
        return codes.to(dtype or self.dtype).mul_(self._scales.unsqueeze(1).mul(1.0 / 127.0))

    def stored(self) -> list[Tensor]:
        return [self.module.weight.data, self._scales]


class _Hqq(_Quantised):
    """``hqq.core.quantize.HQQLinear``, of any number of bits."""

    multiplies = True
    casts = False

    @classmethod
    def claims(cls, module: Any) -> bool:
        return is_a(module, "hqq", "HQQLinear")

    @property
    def kind(self) -> str:
        return f"{self.module.meta['nbits']} bits (HQQ)"

    @property
    def shape(self) -> tuple[int, int]:
        m, n = self.module.meta["shape"]
        return m, n

    @property
    def device(self) -> torch.device:
        device: torch.device = self.module.W_q.device
        return device

    def dtype_for(self, x: torch.dtype) -> torch.dtype:
        dtype: torch.dtype = self.module.compute_dtype
        return dtype

    def why_untrainable(self, x: Tensor) -> str | None:
        """Its backward multiplies g by W as they come, which torch does in one dtype only."""
        place = x.device.type
        cast = torch.is_autocast_enabled(place)
        got = torch.get_autocast_dtype(place) if cast else x.dtype
        if got == self.dtype:
            return None
        if cast:
            where, instead = "under autocast to", f"autocast to {self.dtype}, or none"
        else:
            where, instead = "with an input in", "no prepare_model_for_kbit_training"
        return (
            f"an HQQLinear of compute_dtype={self.dtype} cannot be trained {where} {got}, which "
            f"its backward does not cast; expected {instead}, or compute_dtype={got}"
        )

    def check(self) -> None:
        if not self.module.ready:
            raise Unreadable("this HQQLinear is not quantised yet")

    @torch.no_grad()
    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        W: Tensor = self.module.dequantize().detach()
        return W

    def stored(self) -> list[Tensor]:
        meta = self.module.meta
        of_codes = numbers(*(meta[key] or 0 for key in ("nbits", "group_size", "axis")))
        return [self.module.W_q.detach(), *tensors_in(meta), of_codes]


class _Torchao(_Quantised):
    """``nn.Linear`` whose weight is one of torchao's tensors, x staying as it is."""

    _gradients: ClassVar[dict[tuple[type, str], str]] = {}  # why there is none, or ""

    @classmethod
    def claims(cls, module: Any) -> bool:
        return isinstance(module, nn.Linear) and comes_from(type(module.weight), "torchao")

    @property
    def kind(self) -> str:
        return f"{type(self.module.weight).__name__} (torchao)"

    def dtype_for(self, x: torch.dtype) -> torch.dtype:
        dtype: torch.dtype = self.module.weight.dtype
        return dtype

    def check(self) -> None:
        weight = self.module.weight
        for name in ("act_quant_kwargs", "activation_quantization"):
            if getattr(weight, name, None) is not None:
                raise Unreadable(
                    f"torchao's {type(weight).__name__} quantises its input as well ({name}), so "
                    "that it has no gradient; expected a weight-only configuration"
                )
        key = type(weight), self.device.type
        if self.device.type != "meta" and key not in self._gradients:
            self._gradients[key] = self._tried()
        if self._gradients.get(key):
            raise Unreadable(
                f"torchao's {type(weight).__name__} gives no gradient to its input, or no values "
                f"({self._gradients[key]}); expected Int8WeightOnlyConfig, say"
            )

    def _tried(self) -> str:
        """Why no gradient comes through a weight of this kind, or "" where one does."""
        try:
            W = self.weight()
            with torch.enable_grad():
                x = W.new_zeros(1, self.shape[1], requires_grad=True)
                nn.functional.linear(x, self.module.weight.detach()).sum().backward()
            return "" if x.grad is not None else "none arrived"
        except (NotImplementedError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]

    @torch.no_grad()
    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        W: Tensor = self.module.weight.detach().dequantize()
        return W

    def stored(self) -> list[Tensor]:
        return flat(self.module.weight.detach())


class _GptqModel(_Quantised):
    """GPTQ's and AWQ's modules, by gptqmodel."""

    @classmethod
    def claims(cls, module: Any) -> bool:
        return is_gptqmodel(module)

    @property
    def _method(self) -> str:
        methods = [
            getattr(each, "value", each) for each in getattr(self.module, "SUPPORTS_METHODS", ())
        ]
        return "AWQ" if "awq" in [getattr(each, "value", each) for each in methods] else "GPTQ"

    @property
    def kind(self) -> str:
        return f"{self.module.bits} bits ({self._method})"

    @property
    def device(self) -> torch.device:
        device: torch.device = self.module.qweight.device
        return device

    def check(self) -> None:
        kernel, method = type(self.module).__name__, self._method
        config = "AwqConfig" if method == "AWQ" else "GPTQConfig"
        if not self.module.SUPPORTS_TRAINING:
            raise Unreadable(
                f"{method}'s kernel {kernel} has no gradient to its input: load with "
                f"{config}(backend='auto_trainable')"
            )
        if not hasattr(self.module, "dequantize_weight") and kernel not in _AWQ_GEMM:
            raise Unreadable(
                f"{method}'s kernel {kernel} does not give its values: load with "
                f"{config}(backend='{'torch_awq' if method == 'AWQ' else 'auto_trainable'}')"
            )
        for name in ("online_full_had", "online_partial_had"):
            if getattr(self.module, name, False):
                raise Unreadable(f"this {kernel} rotates its input ({name}), which FILet does not")

    @torch.no_grad()
    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        module = self.module
        if hasattr(module, "dequantize_weight"):
            W = module.dequantize_weight()
        else:
            from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

            scales = self._scales(dtype or self.dtype)
            W = dequantize_gemm(
                module.qweight, module.qzeros, scales, module.bits, module.group_size
            )
        turned: Tensor = W.detach().T  # theirs is (in, out)
        return turned.to(dtype or self.dtype)

    def stored(self) -> list[Tensor]:
        module = self.module
        zeros, g_idx = (getattr(module, name, None) for name in ("qzeros", "g_idx"))
        parts = [module.qweight, zeros, self._scales(self.dtype), g_idx]
        return [part for part in parts if part is not None]

    def _scales(self, dtype: torch.dtype) -> Tensor:
        """As they are multiplied by for an x of ``dtype``.

        AWQ's kernels give them the dtype that they compute in, for good, when the first x comes.
        """
        scales: Tensor = self.module.scales
        if self._method == "GPTQ":
            return scales
        return scales.to(dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16)


class _Fp8(_Quantised):
    """transformers' ``FP8Linear``: float8 values with a scale for each block, x rounded as well."""

    @classmethod
    def claims(cls, module: Any) -> bool:
        return is_a(module, "transformers", "FP8Linear") and module.weight.element_size() == 1

    @property
    def kind(self) -> str:
        return "float8 blocks"

    def check(self) -> None:
        from transformers.integrations import finegrained_fp8

        if not hasattr(finegrained_fp8, "FP8LinearFunction"):
            raise Unreadable(
                "FP8Linear has no gradient to its input in this transformers: load with "
                "FineGrainedFP8Config(dequantize=True), or update transformers"
            )
        if not self.module.weight.dtype.is_floating_point:
            raise Unreadable("FP8Linear has no gradient through FP4 weights")

    @torch.no_grad()
    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

        module = self.module
        scales = module.weight_scale_inv.detach()
        W: Tensor = _dequantize_fp8_weight(
            module.weight.detach(), scales, module.block_size, dtype or self.dtype
        )
        return W

    def stored(self) -> list[Tensor]:
        return [self.module.weight.detach(), self.module.weight_scale_inv.detach()]


_KINDS: tuple[type[_Quantised], ...] = (_Bnb4bit, _Bnb8bit, _Hqq, _Torchao, _GptqModel, _Fp8)


def values_of(module: nn.Module, dtype: torch.dtype) -> Values:
    """The values of a base module; :class:`Unreadable` with the reason where they cannot be had.

    ``dtype``: of the model's hidden states (:func:`dtype_of_model`).
    """
    kind = type(module).__name__
    claimed = next((each for each in _KINDS if each.claims(module)), None)
    if claimed is None:
        _refuse(module, kind)
    values = Values(module, dtype) if claimed is None else claimed(module, dtype)
    values.check()
    return values


def _refuse(module: Any, kind: str) -> None:
    """:class:`Unreadable` for what no class here is for."""
    compressed = hasattr(module, "quantization_scheme") or kind.startswith("CompressedTensors")
    compressed |= comes_from(type(module), "compressed_tensors")
    if compressed and ("forward" in vars(module) or not _is_plain(module)):
        raise Unreadable(
            "compressed-tensors' layers are not trained on as they are: load with "
            "CompressedTensorsConfig(dequantize=True)"
        )
    if "mxfp4" in kind.lower():
        raise Unreadable(f"{kind} has MXFP4 weights: load with Mxfp4Config(dequantize=True)")
    if not isinstance(module, (nn.Linear, Conv1D)):
        raise Unreadable(f"{kind} is not a linear module (or is quantised); {_READABLE}")
    if not isinstance(getattr(module, "weight", None), Tensor):
        raise Unreadable(f"{kind} has no weight; {_READABLE}")
    weight = type(local(module.weight))
    if weight.__module__.partition(".")[0] != "torch":
        raise Unreadable(
            f"the weight of this {kind} is a {weight.__module__}.{weight.__name__}, which FILet "
            f"does not read; {_READABLE}"
        )
    if not is_product(module):
        raise Unreadable(
            f"the forward of this {kind} is its own and no product with its weight; {_READABLE}"
        )


def _is_plain(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dtype in _DTYPES


def dtype_of_model(model: Any) -> torch.dtype:
    """That of a model's hidden states: as its embeddings give them, or else as its config says.

    prepare_model_for_kbit_training casts the embeddings; the config stays what it was.
    """
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embeddings = None
    parameters = embeddings.parameters() if isinstance(embeddings, nn.Module) else iter(())
    dtype = getattr(getattr(model, "config", None), "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    found = (getattr(next(parameters, None), "dtype", None), dtype)
    return next((each for each in found if each in _DTYPES), torch.float32)


def is_quantised(module: nn.Module) -> bool:
    """Whether it keeps codes for a weight, in whatever dtype; one that cannot be read as well."""
    codes = any(not value.is_floating_point() for value in module.parameters(recurse=False))
    return codes or any(kind.claims(module) for kind in _KINDS)


def unpack(model: nn.Module) -> None:
    """Undo bitsandbytes' repacking of 4-bit weights for a CPU, before its ``state_dict`` does.

    That does it in place, and leaves other values than there were (docs/quantised.md).
    """
    for module in model.modules():
        if _Bnb4bit.claims(module):
            _Bnb4bit(module, torch.float32).unpack()


@contextlib.contextmanager
def as_trained(model: nn.Module) -> Iterator[set[nn.Module]]:
    """Inside, quantised layers run as they do in training, which some do otherwise; gives those.

    bitsandbytes repacks 4-bit weights on some CPUs in eval mode, and rounds the inputs of 8-bit
    ones there; GPTQ's kernels have another forward. A weight that was repacked before is unpacked
    for good: trained on as it is, its input would get no gradient. bitsandbytes also casts a 4-bit
    layer's bias to the dtype of what comes in: it is the old one again afterwards.
    """
    found = {m for m in model.modules() for kind in _KINDS if kind.claims(m)}
    flags = {module: module.training for module in found}
    own = [module.bias for module in found if isinstance(getattr(module, "bias", None), Tensor)]
    biases = [(bias, bias.data) for bias in own]
    try:
        unpack(model)
        for module in found:
            module.train()
        yield found
    finally:
        for module, flag in flags.items():
            module.train(flag)
        for bias, data in biases:
            bias.data = data
