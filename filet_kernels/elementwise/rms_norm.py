"""RMSNorm with a frozen weight, forward and backward in one pass over the rows each.

    r = (Σ_j x_j² / n + ε)^(−½),   y = w ⊙ x r,
    ∂L/∂x = r (d − x r ⟨d, x r⟩ / n)   with d = w ⊙ ∂L/∂y

(Zhang and Sennrich, arXiv 1910.07467). A block has two, which transformers computes in eight
operations forward and more than a dozen backward, most of them over float32 copies of the rows.
The weight gets no gradient: in a pass for second moments it is frozen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from filet_kernels.dispatch import Backend, Operation, by_triton

__all__ = ["WIDEST", "rms_norm", "rms_norm_reference"]

WIDEST = 16384  # columns; a program of the Triton kernel keeps whole rows in registers

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """y = weight ⊙ round(x / √(mean(x²) + eps)), row by row; differentiable in x.

    Args:
        x: (..., n), bfloat16, float16 or float32, any strides (rows that are not contiguous are
            copied). n ≤ :data:`WIDEST`.
        weight: (n,) of x's dtype, on its device. Frozen: one that asks for a gradient is refused.
        eps: ε, added to the mean square.

    Returns:
        y of x's shape and dtype, contiguous. Computed in float32, and rounded where transformers'
        Llama rounds: before the weight and after it, and in the backward after the weight and at
        the end. So it differs from that only where another order of the sum of squares moves a
        rounding. Kept for the backward: x and a float32 number a row. Nothing is mutated;
        deterministic. On a GPU from compute capability 8.0 on two Triton kernels, where
        Triton is installed, and otherwise plain torch.

    Raises:
        TypeError: a dtype that is not listed above, or a weight of another one than x.
        ValueError: shapes or devices that do not fit, or a weight that asks for a gradient.
    """
    if x.dtype not in _DTYPES:
        raise TypeError(f"x is {x.dtype}; expected one of {', '.join(map(str, _DTYPES))}")
    if weight.dtype != x.dtype:
        raise TypeError(f"weight is {weight.dtype}; expected {x.dtype}, as x")
    if x.dim() == 0 or weight.shape != x.shape[-1:] or not 1 <= x.shape[-1] <= WIDEST:
        raise ValueError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)}; expected (..., n) and (n,) with "
            f"1 ≤ n ≤ {WIDEST}"
        )
    if weight.device != x.device:
        raise ValueError(f"weight is on {weight.device}; expected {x.device}, as x")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight asks for a gradient; expected weight.requires_grad_(False)")
    y: Tensor = _RMSNorm.apply(x, weight, eps)
    return y


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y and r (..., 1) in plain torch."""
    v = x.float()
    r = torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (v * r).to(x.dtype), r


def _backward_reference(gradient: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> Tensor:
    d = (gradient * weight).float()
    v = x.float() * r
    return (r * (d - v * (d * v).mean(-1, keepdim=True))).to(x.dtype)


_TRITON = "filet_kernels.elementwise.rms_norm_triton"
_FORWARD = Operation(by_triton(_TRITON, "forward"), Backend("reference", rms_norm_reference))
_BACKWARD = Operation(by_triton(_TRITON, "backward"), Backend("reference", _backward_reference))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        y: Tensor
        y, r = _FORWARD.choose(None, x).run(x, weight, eps)
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, r = ctx.saved_tensors
        gradient = gradient.contiguous()
        return _BACKWARD.choose(None, x).run(gradient, x, weight, r), None, None
