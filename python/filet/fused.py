"""The model's own norms, gates and position embeddings by fused kernels while a pass runs.

Done one operation after the other, a third of the time of a transformer's forward and backward goes
into elementwise operations (docs/performance.md). Three things are replaced for the time of a pass,
in any model that has them: RMSNorm, the MLP down(silu(gate(x)) ⊙ up(x)), and the function
``apply_rotary_pos_emb`` of a module's source. What they compute is not known by their names, only
seen: without the model's weights, on the CPU, each has to give bit by bit what the formula gives.

The arithmetic is the model's own, rounded at the same places; sums within a row may be added in
another order. What cannot be replaced runs as it is.
"""

from __future__ import annotations

import contextlib
import copy
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from filet.forwards import Forwards
from filet_kernels.rms_norm import WIDEST, rms_norm, rms_norm_reference
from filet_kernels.rotary import rotary, rotary_reference, unfit
from filet_kernels.swiglu import swiglu, swiglu_reference
from filet_kernels.syrk import _runs_triton

__all__ = ["FUSES_ON", "fused", "has_hooks"]

# Where the kernels run.
FUSES_ON = {"cuda"}

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_EPSILON = ("variance_epsilon", "eps")
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_HOOKS = re.compile("_(forward|backward).*_hooks")
_ROTARY = "apply_rotary_pos_emb"
_SEEN = (5, 24)  # shape of the numbers that a copy is shown


def has_hooks(module: nn.Module) -> bool:
    return any(hooks for name, hooks in vars(module).items() if _HOOKS.fullmatch(name))


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
    known: dict[Any, bool] = {}  # kinds of modules, so that each is tried once
    forwards = Forwards()
    functions = {
        source: vars(source)[_ROTARY]
        for source in {sys.modules.get(type(module).__module__) for module in model.modules()}
        if source is not None and _is_rotary(vars(source).get(_ROTARY))
    }
    try:
        for source, function in functions.items():
            setattr(source, _ROTARY, _rotary(function))
        for module in model.modules():
            plain = forwards.own(module)
            if plain is None:
                continue
            forward = _norm(module, plain, known) or _mlp(module, plain, known)
            if forward is not None:
                forwards.replace(module, forward)
        yield
    finally:
        forwards.restore()
        for source, function in functions.items():
            setattr(source, _ROTARY, function)


def _norm(
    module: Any, plain: Callable[..., Any], known: dict[Any, bool]
) -> Callable[..., Tensor] | None:
    names = [name for name in _EPSILON if isinstance(getattr(module, name, None), float)]
    if not names or list(module._parameters) != ["weight"] or module._modules or module._buffers:
        return None
    weight, eps = module.weight, getattr(module, names[0])
    if weight is None or weight.dim() != 1 or weight.dtype not in _DTYPES:
        return None
    kind = (type(module), weight.dtype, eps)
    if kind not in known:
        known[kind] = _is_norm(module, weight.dtype, eps)
    if not known[kind]:
        return None

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        x: Any = args[0] if len(args) == 1 and not kwargs else None
        if _fuses(x):
            weight = module.weight  # by now on its device, where blocks come and go
            fits = x.shape[-1:] == weight.shape and weight.numel() <= WIDEST
            if fits and x.device == weight.device and x.dtype == weight.dtype:
                return rms_norm(x, weight, eps=eps)
        result: Tensor = plain(*args, **kwargs)
        return result

    return forward


def _mlp(
    module: Any, plain: Callable[..., Any], known: dict[Any, bool]
) -> Callable[..., Tensor] | None:
    if set(module._modules) != _MLP or module._parameters or module._buffers:
        return None
    if has_hooks(module.act_fn):  # it is no longer called by itself
        return None
    weight = next(iter(module.parameters()), None)
    if weight is None or weight.dtype not in _DTYPES:
        return None
    kind = (type(module), type(module.act_fn), weight.dtype)
    if kind not in known:
        known[kind] = _is_swiglu(module, weight.dtype)
    if not known[kind]:
        return None

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        x: Any = args[0] if len(args) == 1 and not kwargs else None
        if not _fuses(x):
            result: Tensor = plain(*args, **kwargs)
            return result
        gate, up = module.gate_proj(x), module.up_proj(x)
        if _fuses(gate) and gate.dtype == up.dtype and gate.device == up.device:
            product = swiglu(gate, up)
        else:  # a module in between went to another device, or to float64
            product = module.act_fn(gate) * up
        result = module.down_proj(product)
        return result

    return forward


def _rotary(plain: Callable[..., Any]) -> Callable[..., Any]:
    def apply_rotary_pos_emb(*args: Any, **kwargs: Any) -> Any:
        if len(args) != 4 or kwargs or not _fuses(args[0]) or unfit(*args) is not None:
            return plain(*args, **kwargs)
        return rotary(*args)

    return apply_rotary_pos_emb


def _fuses(x: Any) -> bool:
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.device.type in FUSES_ON
        and x.dtype in _DTYPES
        and (_runs_triton(x.device) or not x.is_cuda)
        and not torch.is_autocast_enabled(x.device.type)
    )


def _is_norm(module: Any, dtype: torch.dtype, eps: float) -> bool:
    x, weight = _numbers(2, dtype)
    twin = copy.copy(module)
    twin._parameters = {"weight": nn.Parameter(weight[0], requires_grad=False)}
    return _gives(type(twin).forward, (twin, x), rms_norm_reference(x, weight[0], eps)[:1])


def _is_rotary(function: Any) -> bool:
    if not callable(function):
        return False
    for dtype in _DTYPES:
        q, k, cos, sin = (t.view(1, *_SEEN).expand(2, 3, -1, -1) for t in _numbers(4, dtype))
        cos, sin = cos[:, 0], sin[:, 0]
        expected = tuple(rotary_reference(x, cos, sin) for x in (q, k))
        if not _gives(function, (q, k, cos, sin), expected):
            return False
    return True


def _is_swiglu(module: Any, dtype: torch.dtype) -> bool:
    x, gate, up = _numbers(3, dtype)
    twin = copy.copy(module)
    twin._modules = {
        "gate_proj": _Gives(gate), "up_proj": _Gives(up), "down_proj": nn.Identity(),
        "act_fn": module.act_fn,
    }  # fmt: skip
    return _gives(type(twin).forward, (twin, x), (swiglu_reference(gate, up),))


class _Gives(nn.Module):
    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        return self.output


def _numbers(count: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        (2 * torch.randn(_SEEN, generator=generator, device="cpu")).to(dtype) for _ in range(count)
    )


def _gives(
    function: Callable[..., Any], arguments: tuple[Any, ...], expected: tuple[Tensor, ...]
) -> bool:
    """Whether it returns that: of a module the forward of its class, which runs no hooks."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            found = function(*arguments)
        except Exception:  # it wants other arguments, other parts, another width: another thing
            return False
    outputs = found if isinstance(found, tuple) else (found,)
    return len(outputs) == len(expected) and all(
        isinstance(a, Tensor) and torch.equal(a, b) for a, b in zip(outputs, expected, strict=True)
    )
