"""The model's own norms, gates and position embeddings by fused kernels while a pass runs.

Done one operation after the other, a third of the time of a transformer's forward and backward goes
into elementwise operations (docs/performance.md). Three things are replaced for the time of a pass,
in any model that has them: RMSNorm, the MLP down(silu(gate(x)) ⊙ up(x)), and the function
``apply_rotary_pos_emb`` of a module's source. What they compute is not known by their names, only
seen: without the model's weights, on the CPU, each has to give bit by bit what the formula gives,
and its gradient. Every instance is tried: what it does may depend on any of its attributes.

The arithmetic is the model's own, rounded at the same places; sums within a row may be added in
another order. What cannot be replaced runs as it is.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from filet.model.overrides import own_forward, replaced
from filet_kernels.dispatch import runs_triton
from filet_kernels.elementwise.rms_norm import WIDEST, rms_norm, rms_norm_reference
from filet_kernels.elementwise.rotary import rotary, rotary_reference, unfit
from filet_kernels.elementwise.swiglu import swiglu, swiglu_reference

__all__ = ["FUSES_ON", "fused", "has_hooks", "why_kept"]

# Where the kernels run.
FUSES_ON = {"cuda"}
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_EPSILON = ("variance_epsilon", "eps")
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_HOOKS = re.compile("_(forward|backward).*_hooks")
_ROTARY = "apply_rotary_pos_emb"

# What is tried is shown heads, which have the most dimensions: what names one of them by its place
# is seen. Rows are of these magnitudes, powers of two: the least such that ε counts, the largest
# such that it shows what is cut off.
_SHAPE = (2, 3, 5, 24)
_MAGNITUDES = (-20, -10, 0, 5, 12)

# How far its gradients in float32 may be from the formula's, of the largest in a row. Another order
# of the same operations is off by some 2⁻²⁴ of that; what is detached or multiplied, by far more.
_GRADIENT = 2**-10


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches its calls: this module's, or those of all modules."""
    return bool(nn.modules.module._has_any_global_hook()) or any(
        hooks for name, hooks in vars(module).items() if _HOOKS.fullmatch(name)
    )


def why_kept(module: nn.Module) -> str | None:
    """Why a module has to be called itself, as it is, or None."""
    if has_hooks(module):
        return "has hooks"
    # A device map's moves its input to the weight, as whoever replaces it will do.
    return "has a forward of its own" if own_forward(module) is None else None


@contextlib.contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """Inside: norms, MLPs and position embeddings of ``model`` run by fused kernels, on a GPU.

    Parameters must be frozen. Modules into which somebody has put another forward are left alone,
    and under torch.compile, which fuses by itself, all run as they are. The function of the
    position embeddings is replaced in its module, for all models of the process; it computes the
    same there.
    """
    if not (FUSES_ON | {"meta"}) & {p.device.type for p in model.parameters()}:
        yield
        return
    with _trying():
        functions = {
            source: vars(source)[_ROTARY]
            for source in {sys.modules.get(type(module).__module__) for module in model.modules()}
            if source is not None and _is_rotary(vars(source).get(_ROTARY))
        }
        found = {
            module: forward
            for module in model.modules()
            if (plain := own_forward(module)) is not None
            and (forward := _norm(module, plain) or _mlp(module, plain)) is not None
        }
    try:
        for source, function in functions.items():
            setattr(source, _ROTARY, _rotary(function))
        with replaced(found):
            yield
    finally:
        for source, function in functions.items():
            setattr(source, _ROTARY, function)


def _norm(module: Any, plain: Callable[..., Any]) -> Callable[..., Tensor] | None:
    names = [name for name in _EPSILON if isinstance(getattr(module, name, None), float)]
    if not names or list(module._parameters) != ["weight"] or module._modules or module._buffers:
        return None
    weight, eps = module.weight, getattr(module, names[0])
    if weight is None or weight.dim() != 1 or weight.dtype not in _DTYPES:
        return None
    dtype = weight.dtype
    if not _is_norm(module, dtype, eps):
        return None

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        x: Any = args[0] if len(args) == 1 and not kwargs else None
        if _fuses(x):
            weight = module.weight  # by now on its device, where blocks come and go
            fits = x.shape[-1:] == weight.shape and weight.numel() <= WIDEST
            if fits and x.device == weight.device and x.dtype == weight.dtype == dtype:
                return rms_norm(x, weight, eps=eps)
        result: Tensor = plain(*args, **kwargs)
        return result

    return forward


def _mlp(module: Any, plain: Callable[..., Any]) -> Callable[..., Tensor] | None:
    if set(module._modules) != _MLP or module._parameters or module._buffers:
        return None
    if any(map(has_hooks, module.act_fn.modules())):  # it is no longer called by itself
        return None
    weight = next(iter(module.parameters()), None)
    if weight is None or weight.dtype not in _DTYPES:
        return None
    dtype = weight.dtype
    if not _is_swiglu(module, dtype):
        return None

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        x: Any = args[0] if len(args) == 1 and not kwargs else None
        if not _fuses(x):
            result: Tensor = plain(*args, **kwargs)
            return result
        gate, up = module.gate_proj(x), module.up_proj(x)
        if _fuses(gate) and gate.dtype == up.dtype == dtype and gate.device == up.device:
            product = swiglu(gate, up)
        else:  # a module in between went to another device, or to another dtype
            product = module.act_fn(gate) * up
        result = module.down_proj(product)
        return result

    return forward


def _rotary(plain: Callable[..., Any]) -> Callable[..., Any]:
    def apply_rotary_pos_emb(*args: Any, **kwargs: Any) -> Any:
        if len(args) != 4 or kwargs or not _fuses(args[0]) or unfit(*args) is not None:
            return plain(*args, **kwargs)
        if args[2].requires_grad or args[3].requires_grad:  # learned: they would get no gradient
            return plain(*args)
        return rotary(*args)

    return apply_rotary_pos_emb


def _fuses(x: Any) -> bool:
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.device.type in FUSES_ON
        and x.dtype in _DTYPES
        and (runs_triton(x.device) or not x.is_cuda)
        and not torch.is_autocast_enabled(x.device.type)
    )


@contextlib.contextmanager
def _trying() -> Iterator[None]:
    """Nothing around counts for what is tried, and it takes no random number from others."""
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.autocast("cpu", enabled=False),
    ):
        yield


class _Example(NamedTuple):
    inputs: tuple[Tensor, ...]
    watched: int  # of so many inputs, the first ones, the gradients count as well
    output: Any
    gradients: tuple[Tensor, ...]


def _is_norm(module: Any, dtype: torch.dtype, eps: float) -> bool:
    twin = copy.copy(module)
    twin._parameters = {}

    def function(x: Tensor, weight: Tensor) -> Any:
        twin._parameters["weight"] = weight
        return type(twin).forward(twin, x)  # of the class: it runs no hooks

    return _is(twin, function, _norm_examples(dtype, eps))


@functools.cache
def _norm_examples(dtype: torch.dtype, eps: float) -> list[_Example]:
    def reference(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm_reference(x, weight, eps)[0]

    weight = _numbers(_SHAPE[-1:], torch.float32)[0]
    return [
        _example(reference, (_rows().to(dtype), weight.to(dtype)), 0),
        _example(reference, (_rows(), weight), 1),
    ]


def _is_swiglu(module: Any, dtype: torch.dtype) -> bool:
    twin = copy.copy(module)
    twin._modules = {**_PROJECTIONS, "act_fn": module.act_fn}
    return _is(twin, lambda x: type(twin).forward(twin, x), _swiglu_examples(dtype))


@functools.cache
def _swiglu_examples(dtype: torch.dtype) -> list[_Example]:
    gate, up, down = _PROJECTIONS.values()

    def reference(x: Tensor) -> Tensor:
        return down(swiglu_reference(gate(x), up(x)))

    return [_example(reference, (_rows().to(dtype),), 0), _example(reference, (_rows(),), 1)]


class _Projection(nn.Module):
    """In place of a linear layer: x ⊙ numbers, which shows what it is given, and how often.

    It has no forward: who does not call it, as hooks need it, gets nothing.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def __call__(self, x: Tensor) -> Tensor:
        return x * _factors(x.dtype)[self.number]


@functools.cache
def _factors(dtype: torch.dtype) -> list[Tensor]:
    # Gates are around 1 in the second largest rows, and in float16 finite in the largest.
    return [numbers * 2**-6 for numbers in _numbers(_SHAPE[-1:], dtype)]


_PROJECTIONS = {
    name: _Projection(number) for number, name in enumerate(("gate_proj", "up_proj", "down_proj"))
}


def _rows() -> Tensor:
    scale = 2.0 ** torch.tensor(_MAGNITUDES, dtype=torch.float32, device="cpu").unsqueeze(1)
    return _numbers(_SHAPE, torch.float32)[0] * scale


def _is(twin: Any, function: Callable[..., Any], examples: list[_Example]) -> bool:
    """Whether a copy of a module does the same, and nothing besides."""
    before = dict(vars(twin))
    if not all(_gives(function, example) for example in examples):
        return False
    after = vars(twin)  # what it notes down for others would be missing
    return after.keys() == before.keys() and all(after[name] is before[name] for name in after)


def _is_rotary(function: Any) -> bool:
    return callable(function) and all(
        _gives(function, example) for dtype in _DTYPES for example in _rotary_examples(dtype)
    )


@functools.cache
def _rotary_examples(dtype: torch.dtype) -> list[_Example]:
    def reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rotary_reference(q, cos, sin), rotary_reference(k, cos, sin)

    q, k, _ = _numbers(_SHAPE, dtype)
    cos, sin, _ = _numbers((_SHAPE[0], *_SHAPE[2:]), dtype)
    watched = 2 if dtype == torch.float32 else 0
    # With positions of every sample, and with the same for all.
    return [
        _example(reference, (q, k[:, :1], cos[:count], sin[:count]), watched) for count in (2, 1)
    ]


def _example(reference: Callable[..., Any], inputs: tuple[Tensor, ...], watched: int) -> _Example:
    output, gradients = _run(reference, inputs, watched)
    return _Example(inputs, watched, output, gradients)


@functools.cache
def _numbers(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    how: Any = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    return [(2 * torch.randn(shape, **how)).to(dtype) for _ in range(3)]


def _gives(function: Callable[..., Any], example: _Example) -> bool:
    """Whether it returns that: outputs bit by bit, gradients to the roundings of float32."""
    try:
        output, gradients = _run(function, example.inputs, example.watched)
    except Exception:  # it wants other arguments, other parts, another width: another thing
        return False
    return _same(output, example.output) and all(map(_close, gradients, example.gradients))


def _run(
    function: Callable[..., Any], inputs: tuple[Tensor, ...], watched: int
) -> tuple[Any, tuple[Tensor, ...]]:
    """What it returns for copies, and their gradients for given ones of what it returns."""
    given = [x.clone().requires_grad_(index < watched) for index, x in enumerate(inputs)]
    with torch.set_grad_enabled(watched > 0):
        output = function(*given)
        if any(x._version for x in given):
            raise ValueError("it writes its inputs")
        if not watched:
            return output, ()
        outputs = output if isinstance(output, tuple) else (output,)
        along = [_numbers(y.shape, y.dtype)[2] for y in outputs]
        return output, torch.autograd.grad(outputs, given[:watched], along)


def _same(found: Any, expected: Any) -> bool:
    if isinstance(expected, tuple):
        return (
            isinstance(found, tuple)
            and len(found) == len(expected)
            and all(map(_same, found, expected))
        )
    return (
        isinstance(found, Tensor)
        and (found.dtype, found.device) == (expected.dtype, expected.device)
        and torch.equal(found, expected)
    )


def _close(found: Tensor, expected: Tensor) -> bool:
    if torch.equal(found, expected):  # mostly, and quicker
        return True
    bound = _GRADIENT * expected.abs().amax(-1, keepdim=True)
    return bool(((found - expected).abs() <= bound).all())
